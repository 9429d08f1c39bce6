"""Measures exact LongNet attention on the CPU against dense attention, by length; writes docs/benchmarks/longnet.json
and a page of tables beside it.

    python tools/bench_longnet.py                        # some minutes on one thread
    python tools/bench_longnet.py --tokens 4096 8192     # some of it
    python tools/bench_longnet.py --dense-tokens 16384   # how far to follow dense attention
    python tools/bench_longnet.py --page                 # measure nothing: the page again from the JSON

Results are first checked against dense masks built from the definition. Contestants take turns on the same tensors;
every figure is the best of the rounds, in processor time (of all threads), which neighbours on a busy machine change
less than the clock. It is that of the native backend: a run fails if that cannot compute the call. Dense attention is
torch's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import results
import torch

from bs_kernels import DilatedPlan, dilated_attention
from bs_kernels.testing import check_dilated_against_oracle, make_dilated_case

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


def measured(contestants: dict[str, Callable[..., torch.Tensor]], tokens: int, rounds: int) -> dict[str, Any]:
    """Of each contestant the seconds of its fastest forward, and of forward and backward; they take turns."""
    torch.manual_seed(0)
    q, k, v, cotangent = torch.randn(4, 1, tokens, HEADS, HEAD_DIM).unbind(0)
    forward = {name: partial(attend, q, k, v) for name, attend in contestants.items()}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def both(attend: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(attend(*leaves), leaves, cotangent)

    found: dict[str, Any] = {name: {} for name in contestants}
    backward = {name: partial(both, attend) for name, attend in contestants.items()}
    for what, runs in (("forward", forward), ("both", backward)):
        for name, seconds in results.take_turns(runs, rounds, clock=time.process_time, cold=runs).items():
            found[name][what] = min(seconds)
    return found


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times and pairs, by length."""
    for tokens in options.tokens:
        contestants: dict[str, Callable[..., torch.Tensor]] = {}
        pairs = {}
        for name, (lengths, rates, combine) in CONTESTANTS.items():
            plan = DilatedPlan.build(lengths, rates, tokens, HEADS, combine=combine)
            pairs[name] = sum(plan.pairs()) / (HEADS * tokens)
            how = {"segment_lengths": lengths, "dilation_rates": rates, "combine": combine, "backend": "native"}
            contestants[name] = partial(dilated_attention, **how)  # pyright: ignore[reportArgumentType]
        if tokens <= options.dense_tokens:
            contestants["dense"] = dense
        row = {"tokens": tokens, "seconds": measured(contestants, tokens, options.rounds), "pairs": pairs}
        print(json.dumps(row), flush=True)
        yield row


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    section = found["lengths"]
    lines = [
        "# LongNet, measured",
        "",
        "Made by `python tools/bench_longnet.py`; the raw figures are in `longnet.json`. "
        f"{HEADS} heads of {HEAD_DIM}, float32, not causal, segments of 2,048 to 32,768 tokens, `native` backend; "
        "dense attention is torch's `scaled_dot_product_attention`. Processor seconds, best of "
        f"{section['rounds']}; µs per token in brackets, which stay level where time is linear in tokens.",
        "",
        f"{results.described(section['machine'])}.",
        "",
    ]
    names = [*CONTESTANTS, "dense"]
    for what, title in (("forward", "Forward"), ("both", "Forward and backward")):
        rows = []
        for row in section["records"]:
            times = [row["seconds"].get(name, {}).get(what) for name in names]
            cells = ["not run" if t is None else f"{t:.3g} ({t / row['tokens'] * 1e6:.1f})" for t in times]
            rows.append([f"{row['tokens']:,}", *cells])
        lines += [f"## {title}", "", *results.table(["tokens", *names], rows), ""]
    lines += [
        "## Pairs per token and head",
        "",
        "What is computed, exactly counted; dense attention has as many as tokens. Up to the longest segment, 32,768 "
        "tokens, longer segments keep coming in; from there on the number stays.",
        "",
    ]
    rows = [
        [f"{row['tokens']:,}", *(f"{row['pairs'][name]:,.0f}" for name in CONTESTANTS)] for row in section["records"]
    ]
    return "\n".join([*lines, *results.table(["tokens", *CONTESTANTS], rows)]) + "\n"


def main() -> int:
    parser = results.parser(__doc__, "longnet.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N", help="lengths")
    parser.add_argument("--dense-tokens", type=int, default=2**15, metavar="N", help="longest for dense attention")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    options = parser.parse_args()
    if not options.page:
        torch.set_num_threads(options.threads)
        check()
        results.keep(options.out, "lengths", records(options), page, rounds=options.rounds)
    results.save(options.out, results.load(options.out), page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
