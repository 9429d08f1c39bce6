"""Measures exact LongNet attention on the CPU against dense attention, by length; writes docs/benchmarks/longnet.json
and a page of tables beside it.

    python tools/bench_longnet.py                        # some minutes on one thread
    python tools/bench_longnet.py --tokens 4096 8192     # some of it
    python tools/bench_longnet.py --dense-tokens 16384   # how far to follow dense attention
    python tools/bench_longnet.py --page                 # measure nothing: the page again from the JSON

Results are first checked against dense masks built from the definition. Every figure is the best of the rounds, in
processor time (of all threads), which neighbours on a busy machine change less than the clock. It is that of the native
backend: a run fails if that cannot compute the call. Dense attention is torch's, on the same tensors.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bs_kernels import DilatedPlan, dilated_attention
from bs_kernels.testing import check_dilated_against_oracle, make_dilated_case

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
HEADS, HEAD_DIM = 2, 64
TOKENS = [2**n for n in range(12, 19)]

#: The paper's branches, and the same lengths at rates that nest.
CONTESTANTS: dict[str, tuple[list[int], list[int], str]] = {
    "softmax, the paper's rates": ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12], "softmax"),
    "union, rates that nest": ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16], "union"),
}


def check() -> None:
    """Small cases of every contestant against the definition."""
    for lengths, rates, combine in CONTESTANTS.values():
        short = [length // 64 for length in lengths]
        for causal in (False, True):
            case = make_dilated_case(short, rates, seq_len=(600, 600), combine=combine, causal=causal)
            check_dilated_against_oracle(case, dilated_attention)


def best(rounds: int, run: Callable[[], Any]) -> float:
    """Processor seconds of the fastest round."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found)


def measured(attend: Callable[..., torch.Tensor], tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of the forward, and of forward and backward."""
    torch.manual_seed(0)
    q, k, v, cotangent = torch.randn(4, 1, tokens, HEADS, HEAD_DIM).unbind(0)
    forward = best(rounds, lambda: attend(q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return {
        "forward": forward,
        "both": best(rounds, lambda: torch.autograd.grad(attend(*leaves), leaves, cotangent)),
    }


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def page(record: dict[str, Any]) -> str:
    lines = [
        "# LongNet, measured\n",
        "Made by `python tools/bench_longnet.py`; the raw figures are in `longnet.json`. "
        f"{record['machine']}. {HEADS} heads of {HEAD_DIM}, float32, not causal, segments of 2,048 to 32,768 tokens, "
        "`native` backend; dense attention is torch's `scaled_dot_product_attention`. Processor seconds, best of "
        f"{record['rounds']}; µs per token in brackets, which stay level where time is linear in tokens.\n",
    ]
    names = [*CONTESTANTS, "dense"]
    for what, title in (("forward", "Forward"), ("both", "Forward and backward")):
        lines += [f"## {title}\n", "| tokens | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
        for row in record["rows"]:
            cells = []
            for name in names:
                found = row["seconds"].get(name)
                if found is None:
                    cells.append("not run")
                else:
                    cells.append(f"{found[what]:.3g} ({found[what] / row['tokens'] * 1e6:.1f})")
            lines.append(f"| {row['tokens']:,} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Pairs per token and head\n",
        "What is computed, exactly counted; dense attention has as many as tokens. Up to the longest segment, 32,768 "
        "tokens, longer segments keep coming in; from there on the number stays.\n",
        "| tokens | " + " | ".join(CONTESTANTS) + " |",
        "| --- " * (len(CONTESTANTS) + 1) + "|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['tokens']:,} | " + " | ".join(f"{row['pairs'][name]:,.0f}" for name in CONTESTANTS) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure LongNet attention on the CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dense-tokens", type=int, default=2**15, help="longest sequence for dense attention")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER / "longnet.json")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    if options.page:
        options.out.with_suffix(".md").write_text(page(json.loads(options.out.read_text())))
        return 0
    torch.set_num_threads(options.threads)
    check()
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {options.threads} thread(s), "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    record: dict[str, Any] = {"machine": machine, "rounds": options.rounds, "rows": []}
    for tokens in options.tokens:
        row: dict[str, Any] = {"tokens": tokens, "seconds": {}, "pairs": {}}
        for name, (lengths, rates, combine) in CONTESTANTS.items():
            plan = DilatedPlan.build(lengths, rates, tokens, HEADS, combine=combine)
            row["pairs"][name] = sum(plan.pairs()) / (HEADS * tokens)

            def attend(q: Any, k: Any, v: Any, lengths: Any = lengths, rates: Any = rates, how: Any = combine) -> Any:
                return dilated_attention(q, k, v, lengths, rates, combine=how, backend="native")

            row["seconds"][name] = measured(attend, tokens, options.rounds)
        if tokens <= options.dense_tokens:
            row["seconds"]["dense"] = measured(dense, tokens, options.rounds)
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
