"""Measures tiny dense inputs on a CPU, where what surrounds a kernel decides; writes docs/benchmarks/small.json.

    python tools/bench_small.py                    # a minute
    python tools/bench_small.py --tokens 64 --rounds 500 --out /tmp/small.json

Torch's `scaled_dot_product_attention`, bare, against `block_sparse_attention` over a layout with every block active, on
the `native` backend and, where it can, on `flash` (torch's dense kernel behind the same checks). They take turns in one
process on the same tensors; what is reported is the fastest of the rounds, since everything else is the machine's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_cases import DTYPES, contestants_of, operands, runners
from cpu_turns import machine, only, take_turns

from bs_kernels import LayoutPlan, explain_backends
from bs_patterns import BlockLayout

HEAD_DIM, BLOCK = 64, 64


def measure(dtype: str, tokens: int, heads: int, rounds: int) -> dict[str, Any]:
    """Best times in microseconds of every contestant, forward and both passes."""
    blocks = -(-tokens // BLOCK)
    layout = BlockLayout.from_dense(
        np.ones((1, blocks, blocks), bool), block_size=(BLOCK, BLOCK), seq_len=(tokens, tokens)
    )
    tensors, cotangent = operands(tokens, heads, heads, HEAD_DIM, DTYPES[dtype])
    table = explain_backends(*tensors, layout)  # pyright: ignore[reportCallIssue]
    backends = [report.name for report in table if report.name in ("native", "flash") and report.supported]
    plan = LayoutPlan.build(layout)
    turns = contestants_of(tensors, cotangent, plan, [], causal=False)
    for name in backends:
        forward, both = runners(name, tensors, cotangent, plan)
        with only(name):
            both()
        turns |= {f"{name} forward": forward, f"{name} both": both}
    times = take_turns(turns, rounds)
    return {
        "dtype": dtype,
        "tokens": tokens,
        "heads": heads,
        "selected": table.selected,
        "best_us": {name: round(found["best"] * 1e3, 1) for name, found in times.items()},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 32, 64, 128, 256])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=150)
    default = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "small.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"head_dim": HEAD_DIM, "machine": machine(), "records": []}
    for dtype in args.dtypes:
        for heads in args.heads:
            for tokens in args.tokens:
                record = measure(dtype, tokens, heads, args.rounds)
                result["records"].append(record)
                shown = ", ".join(f"{name} {best:.0f}" for name, best in record["best_us"].items())
                print(f"{dtype} S={tokens} H={heads}: {shown} µs", flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
