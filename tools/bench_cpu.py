"""Measures bs-kernels on a CPU; writes docs/benchmarks/cpu.json, a page of tables and plots beside it.

    python tools/bench_cpu.py                                     # everything; the better part of an hour
    python tools/bench_cpu.py --only speed --tokens 4096 --rounds 3
    python tools/bench_cpu.py --only speed --layouts random --densities 0.1 --head-dims 96 --blocks 32 --tokens 5000
    python tools/bench_cpu.py --backends torch --out other.json   # leaves the committed figures alone

Everything that is compared takes turns in one process, on the same tensors: a round runs each contestant once, and what
is reported is the median of the rounds with the spread beside it. Every backend is first checked against the float64
oracle, and its calls are counted while it is timed: if another backend ran, the benchmark fails.

η = density × t_dense / t_sparse, where density is the share of the dense kernel's pairs that lie in active blocks: η
= 1 means that every skipped block is time saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cpu_report
import numpy as np
import results
import torch
from cpu_cases import DTYPES, contestants_of, flex_forward, layout_of, operands, runners, share_of_dense
from cpu_memory import memory
from cpu_turns import etas, only, take_turns, watched

import bs_kernels.plan
from bs_kernels import LayoutPlan, TokenMask
from bs_kernels.dispatch import BACKENDS, get_backend
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_patterns import BlockLayout

DENSE = ("dense forward", "dense both")

# -- sections ----------------------------------------------------------------------------------------------------------


def check(backends: list[str]) -> None:
    """Every backend against the float64 oracle before anything is timed."""
    for name in backends:
        for dtype in DTYPES.values():
            layout = make_layout(
                np.random.default_rng(0), seq_len=(200, 200), block_size=(64, 64), heads=4, density=0.5
            )
            case = make_case(layout, q_heads=4, kv_heads=2, head_dim=64, dtype=dtype, causal=True)
            with only(name):
                check_against_oracle(case, backend=name)
    print(f"checked against the oracle: {', '.join(backends)}")


def compare(
    layouts: dict[str, tuple[BlockLayout, list[str]]],
    inputs: tuple[list[torch.Tensor], torch.Tensor],
    rounds: int,
    *,
    flex: bool = False,
    once: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times and η of several layouts on the same tensors, every round against one run of dense attention.

    Args:
        layouts: by name, with the backends to measure; all causal or none.
        inputs: tensors and cotangent.
        rounds: how many.
        flex: measure FlexAttention too.
        once: one round, in which dense attention has not been warmed up.

    Returns:
        Of each layout what belongs into its record.
    """
    turns: dict[str, Callable[[], Any]] = {}
    for key, (layout, backends) in layouts.items():
        found = contestants_of(*inputs, LayoutPlan.build(layout), backends, layout.causal)
        if flex and (run := flex_forward(inputs[0], layout)) is not None:
            found["flex forward"] = run
        turns |= {name if name in DENSE else f"{name}, {key}": run for name, run in found.items()}
    times = take_turns(turns, 1 if once else rounds, keep_rounds=True, cold=DENSE if once else ())
    records = {}
    for key, (layout, _) in layouts.items():
        names = {name: name for name in DENSE} | {name.removesuffix(f", {key}"): name for name in times}
        own = {short: times[name] for short, name in names.items() if "," not in short}
        record = {"causal": layout.causal, "density": round(share_of_dense(layout), 4), "times": own}
        records[key] = record | {"eta": etas(record)}
    return records


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time and η over density, head dim, block size and layout."""
    for dtype, dim, kv_heads in itertools.product(args.dtypes, args.head_dims, args.kv_heads):
        inputs = operands(args.tokens, args.heads, kv_heads, dim, DTYPES[dtype])
        kinds = list(itertools.product(args.layouts, args.blocks))
        first = kinds[0]
        if kv_heads != args.kv_heads[0]:  # sharing key heads changes one operand: one kind of layout shows it
            kinds = [first]
        for name, block in kinds:
            backends = args.backends if name == first[0] else args.backends[:1]  # what is slow is measured once
            flex = args.flex and (name, block) == first and kv_heads == args.kv_heads[0]
            # A second mask makes FlexAttention compile anew: its densities are measured one by one.
            for densities in [[x] for x in args.densities] if flex else [args.densities]:
                layouts = {
                    f"{x:g}": (layout_of(name, args.tokens, block, args.heads, x, args.causal), backends)
                    for x in densities
                }
                for measured in compare(layouts, inputs, args.rounds, flex=flex).values():
                    what = {"dtype": dtype, "head_dim": dim, "heads": args.heads, "kv_heads": kv_heads}
                    what |= {"tokens": args.tokens, "layout": name, "block": block}
                    print(one_line(what | measured), flush=True)
                    yield what | measured


def one_line(record: dict[str, Any]) -> str:
    what = "{dtype} D={head_dim} {layout} block={block} S={tokens} kv={kv_heads} density={density}".format(**record)
    return f"  {what}: " + ", ".join(f"{name} η={eta[0]}" for name, eta in record["eta"].items())


def length(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time and η over length: 16 blocks of 64 per row, and fixed densities (those on the first backend only)."""
    for dtype, tokens in itertools.product(args.dtypes, args.lengths):
        inputs = operands(tokens, args.heads, args.heads, 64, DTYPES[dtype])
        per_row = min(1.0, 16 * 64 / tokens * (2 if args.causal else 1))
        densities = {"16 per row": per_row} | {f"{density:g}": density for density in args.length_densities}
        layouts = {
            key: (layout_of("random", tokens, 64, args.heads, density, args.causal), args.backends[:1])
            for key, density in densities.items()
        }
        layouts["16 per row"] = (layouts["16 per row"][0], args.backends)
        # A round of dense attention over 65,536 tokens takes minutes.
        for key, measured in compare(layouts, inputs, args.rounds, once=tokens > args.long).items():
            record = {"dtype": dtype, "tokens": tokens, "heads": args.heads, "head_dim": 64, "layout": key} | measured
            shown = ", ".join(f"{name} {found['ms']:.1f} ms" for name, found in record["times"].items())
            print(f"  {dtype} S={tokens} {key} density={record['density']}: {shown}", flush=True)
            yield record


#: What makes torch leave newer instructions alone.
_LIKE = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def engines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """η of every instruction set that the native core runs here, each in a process of its own."""
    from bs_kernels.backends._native_lib import EMULATED, load, missing_reason

    if missing_reason():
        print(f"  no native core: {missing_reason()}")
        return
    for isa in load().supported:
        if isa == EMULATED:
            continue
        # Dense attention gets the same instructions, as far as torch and its libraries can be told.
        limits = {"BS_KERNELS_ISA": isa} | _LIKE.get(isa, {})
        command = [sys.executable, __file__, "--child-engine", json.dumps(vars(args), default=str)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | limits)
        if done.returncode:
            raise SystemExit(f"bench_cpu: {isa}: {done.stderr[-2000:]}")
        for line in done.stdout.splitlines():
            record = {"isa": isa} | json.loads(line)
            print(f"  {isa}:{one_line(record)}", flush=True)
            yield record


def child_engine(options: dict[str, Any]) -> None:
    """One instruction set, in a process that was told to use it; prints a record per line."""
    tokens, heads = options["engine_tokens"], options["heads"]
    for dtype, dim in itertools.product(options["dtypes"], options["head_dims"]):
        inputs = operands(tokens, heads, heads, dim, DTYPES[dtype])
        layouts = {f"{x:g}": (layout_of("random", tokens, 64, heads, x, True), ["native"]) for x in (0.125, 1.0)}
        for measured in compare(layouts, inputs, options["rounds"]).values():
            what = {"dtype": dtype, "head_dim": dim, "heads": heads, "kv_heads": heads, "tokens": tokens}
            print(json.dumps(what | {"layout": "random", "block": 64} | measured))


def masks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a mask inside blocks costs, against the same blocks without one."""
    tokens, block = args.tokens, 64
    wide = layout_of("window", tokens, block, args.heads, 0.2, causal=False)
    padding = torch.ones(1, tokens, dtype=torch.bool)
    padding[:, -tokens // 10 :] = False
    segments = (torch.arange(tokens) // max(1, tokens // 7))[None]
    variants: dict[str, dict[str, Any]] = {
        "none": {},
        "window": {"window": (int(0.09 * tokens), int(0.09 * tokens))},
        "key_padding_mask": {"key_padding_mask": padding},
        "segment_ids": {"segment_ids": segments},
    }
    for dtype in args.dtypes:
        tensors, cotangent = operands(tokens, args.heads, args.heads, 64, DTYPES[dtype])
        for name in args.backends:
            turns: dict[str, Callable[[], Any]] = {}
            for mask, arguments in variants.items():
                window = arguments.get("window")
                plan = LayoutPlan.build(wide, TokenMask(window=window))
                rest = {key: value for key, value in arguments.items() if key != "window"}

                turns[mask] = watched(name, runners(name, tensors, cotangent, plan, **rest)[1])
            times = take_turns(turns, args.rounds, keep_rounds=True)
            slots = {
                mask: LayoutPlan.build(wide, TokenMask(window=a.get("window"))).indices.numel()
                for mask, a in variants.items()
            }
            per_block = {mask: [ms / slots[mask] for ms in times[mask]["rounds"]] for mask in variants}
            for mask in variants:
                cost = results.ratio(per_block[mask], per_block["none"])
                what = {"dtype": dtype, "backend": name, "mask": mask, "cost_per_block": cost[0], "cost_range": cost}
                print(f"  {dtype} {name} {mask}: {cost[0]:.3f} × the cost of a block without a mask", flush=True)
                yield what | {"time": times[mask]}


def small(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a call costs above its backend at 256 tokens, and the backends against each other on tiny inputs."""
    from bs_kernels._arguments import make_call

    for tokens in (32, 64, 128, 256, 512):
        for heads in (1, 8):
            block = min(64, tokens)
            plan = LayoutPlan.build(layout_of("window", tokens, block, 1, 0.5, causal=True))
            tensors, cotangent = operands(tokens, heads, heads, 64, torch.float32)
            turns: dict[str, Callable[[], Any]] = {}
            for name in dict.fromkeys([*args.backends, "reference"]):
                forward, both = runners(name, tensors, cotangent, plan)
                bare = partial(torch.no_grad()(get_backend(name).forward), make_call(*tensors, plan), torch.float32)  # pyright: ignore[reportCallIssue]
                turns |= {f"{name} bare": bare, f"{name} forward": forward, f"{name} both": both}
            times = take_turns(turns, 200)
            record = {"tokens": tokens, "heads": heads, "times": times}
            record["overhead_us"] = {
                name: round((times[f"{name} forward"]["best"] - times[f"{name} bare"]["best"]) * 1e3, 1)
                for name in args.backends
            }
            print(f"  S={tokens} H={heads}: µs above the backend {record['overhead_us']}", flush=True)
            yield record


def plan(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Building a plan, cold, and looking it up."""
    for tokens, heads, density in ((8192, 1, 0.1), (65536, 8, 0.05), (1 << 20, 1, 16 * 64 / (1 << 20))):
        generator = np.random.default_rng(0)
        n = tokens // 64
        per_row = max(1, round(density * n))
        head = np.repeat(np.arange(heads), n * per_row)
        row = np.tile(np.repeat(np.arange(n), per_row), heads)
        layout = BlockLayout.from_coo(
            head, row, generator.integers(0, n, len(row)), block_size=64, seq_len=tokens, heads=heads
        )
        layout.validate()
        _ = layout.digest

        look_up = partial(LayoutPlan.build, layout, TokenMask(causal=True))
        times = take_turns({"build": partial(forgotten, look_up), "look up": look_up}, 15)
        print(f"  {tokens} tokens × {heads} heads, {layout.nnz} blocks: {times['build']['ms']:.2f} ms", flush=True)
        yield {"tokens": tokens, "heads": heads, "blocks": layout.nnz, "times": times}


def forgotten(build: Callable[[], Any]) -> None:
    """Build a plan as if for the first time."""
    bs_kernels.plan._plans.clear()
    build()


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "speed": speed,
    "length": length,
    "engines": engines,
    "masks": masks,
    "small": small,
    "plan": plan,
    "memory": memory,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = results.parser(__doc__, "cpu.json", SECTIONS)
    available = [b.name for b in BACKENDS if b.name in ("native", "torch")]
    parser.add_argument("--backends", nargs="+", default=available, metavar="NAME", help="beside dense attention")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of every comparison")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="query heads, but for section memory")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE", help=_CHOICES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128], metavar="N", help="of speed, engines")
    parser.add_argument("--no-causal", dest="causal", action="store_false", help="speed and length without causality")
    speed = parser.add_argument_group("section speed")
    speed.add_argument("--tokens", type=int, default=8192, metavar="N", help="of section masks too")
    speed.add_argument("--layouts", nargs="+", choices=("random", "window"), default=["random", "window"], help="kinds")
    speed.add_argument("--blocks", nargs="+", type=int, default=[64, 128], metavar="N", help="tokens per block")
    speed.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.125, 0.5, 1.0], metavar="X", help="asked")
    speed.add_argument("--kv-heads", nargs="+", type=int, metavar="N", help="None: as many as heads, and a quarter")
    speed.add_argument("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out")
    length = parser.add_argument_group("section length")
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    length.add_argument("--lengths", nargs="+", type=int, default=lengths, metavar="N", help="tokens")
    length.add_argument("--long", type=int, default=16384, metavar="N", help="tokens beyond which there is one round")
    length.add_argument("--length-densities", nargs="*", type=float, default=[0.05, 0.125], metavar="X", help="asked")
    rest = parser.add_argument_group("sections engines and memory")
    rest.add_argument("--engine-tokens", type=int, default=4096, metavar="N", help="of section engines")
    lengths = [8192, 16384, 32768, 65536, 131072]
    rest.add_argument("--memory-lengths", nargs="+", type=int, default=lengths, metavar="N", help="tokens, at 8 heads")
    rest.add_argument("--longest", type=int, default=1 << 20, metavar="N", help="last memory case, at 4 heads; 0: none")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or sorted({args.heads, max(1, args.heads // 4)}, reverse=True)
    return args


_CHOICES = f"of: {', '.join(DTYPES)}"


def main() -> None:
    if sys.argv[1:2] == ["--child-engine"]:
        child_engine(json.loads(sys.argv[2]))
        return
    args = parse()
    if not args.page:
        check(args.backends)
        for name in args.only:
            print(name, flush=True)
            results.keep(args.out, name, SECTIONS[name](args), cpu_report.page)
    found = results.load(args.out)
    results.save(args.out, found, cpu_report.page)
    cpu_report.plots(found, args.out.parent)


if __name__ == "__main__":
    main()
