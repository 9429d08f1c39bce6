"""Measures tiny dense inputs on a CPU, where what surrounds a kernel decides; writes docs/benchmarks/small.json
and the page beside it.

    python tools/bench_small.py                    # a minute
    python tools/bench_small.py --tokens 64 --rounds 500 --out other.json

Torch's `scaled_dot_product_attention`, bare, against `block_sparse_attention` over a layout with every block active, on
the `native` backend and, where it can, on `flash` (torch's dense kernel behind the same checks). They take turns in one
process on the same tensors; what is reported is the fastest of the rounds, since everything else is the machine's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import results
import torch
from cpu_cases import DTYPES, contestants_of, operands, runners
from cpu_turns import only, take_turns

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


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    section = found["dense"]
    names = ["dense", "native", "flash"]
    lines = [
        "# Tiny dense inputs, measured",
        "",
        "Made by `python tools/bench_small.py`; the raw figures are in `small.json`. Every block is active. “Dense” is "
        "a bare `scaled_dot_product_attention`; `native` and `flash` (torch's dense kernel) stand behind "
        "`block_sparse_attention` with all its checks. They take turns in one process; microseconds of the fastest "
        "round. “Both” is forward and backward.",
        "",
        f"{results.described(section['machine'])}. Head dim {section['head_dim']}.",
        "",
    ]
    header = ["dtype", "heads", "tokens", *(f"{name} {what}" for what in ("forward", "both") for name in names)]
    rows = []
    for r in section["records"]:
        times = [r["best_us"].get(f"{name} {what}") for what in ("forward", "both") for name in names]
        rows.append([r["dtype"], r["heads"], r["tokens"], *("" if t is None else f"{t:,.0f}" for t in times)])
    return "\n".join([*lines, *results.table(header, rows)]) + "\n"


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All of them, one by one."""
    for dtype, heads, tokens in itertools.product(args.dtypes, args.heads, args.tokens):
        record = measure(dtype, tokens, heads, args.rounds)
        shown = ", ".join(f"{name} {best:.0f}" for name, best in record["best_us"].items())
        print(f"{dtype} S={tokens} H={heads}: {shown} µs", flush=True)
        yield record


def main() -> None:
    """The command."""
    parser = results.parser(__doc__, "small.json")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 32, 64, 128, 256], metavar="N", help="lengths")
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 8], metavar="N", help="query and key heads")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE", help="of inputs")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    parser.add_argument("--rounds", type=int, default=150, metavar="N", help="of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.page:
        results.keep(args.out, "dense", records(args), head_dim=HEAD_DIM)
    results.save(args.out, results.load(args.out), page)


if __name__ == "__main__":
    main()
