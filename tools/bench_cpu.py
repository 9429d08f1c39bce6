"""Measures bs-kernels on a CPU; writes docs/benchmarks/cpu.json, a page of tables and plots beside it.

    python tools/bench_cpu.py                                     # everything; the better part of an hour
    python tools/bench_cpu.py --only speed --tokens 4096 --rounds 3
    python tools/bench_cpu.py --only speed --layouts random --densities 0.1 --head-dims 96 --blocks 32 --tokens 5000
    python tools/bench_cpu.py --backends torch --out /tmp/cpu.json

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu_report
import numpy as np
import torch
from cpu_cases import DTYPES, contestants_of, flex_forward, layout_of, operands, runners, share_of_dense
from cpu_memory import memory
from cpu_turns import etas, machine, only, take_turns, watched

import bs_kernels.plan
from bs_kernels import LayoutPlan, TokenMask
from bs_kernels.dispatch import BACKENDS, get_backend
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_patterns import BlockLayout

DENSE = ("dense forward", "dense both")
OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "cpu.json"

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


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and η over density, head dim, block size and layout."""
    records = []
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
                    records.append(what | measured)
                    print(one_line(records[-1]), flush=True)
    return records


def one_line(record: dict[str, Any]) -> str:
    what = "{dtype} D={head_dim} {layout} block={block} S={tokens} kv={kv_heads} density={density}".format(**record)
    return f"  {what}: " + ", ".join(f"{name} η={eta[0]}" for name, eta in record["eta"].items())


def length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and η over length: 16 blocks of 64 per row, and fixed densities (those on the first backend only)."""
    records = []
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
            records.append(record)
            shown = ", ".join(f"{name} {found['ms']:.1f} ms" for name, found in record["times"].items())
            print(f"  {dtype} S={tokens} {key} density={record['density']}: {shown}", flush=True)
    return records


#: What makes torch leave newer instructions alone.
_LIKE = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def engines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """η of every instruction set that the native core runs here, each in a process of its own."""
    from bs_kernels.backends._native_lib import EMULATED, load, missing_reason

    if missing_reason():
        print(f"  no native core: {missing_reason()}")
        return []
    records = []
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
            records.append({"isa": isa} | json.loads(line))
            print(f"  {isa}:{one_line(records[-1])}", flush=True)
    return records


def child_engine(options: dict[str, Any]) -> None:
    """One instruction set, in a process that was told to use it; prints a record per line."""
    tokens, heads = options["engine_tokens"], options["heads"]
    for dtype, dim in itertools.product(options["dtypes"], options["head_dims"]):
        inputs = operands(tokens, heads, heads, dim, DTYPES[dtype])
        layouts = {f"{x:g}": (layout_of("random", tokens, 64, heads, x, True), ["native"]) for x in (0.125, 1.0)}
        for measured in compare(layouts, inputs, options["rounds"]).values():
            what = {"dtype": dtype, "head_dim": dim, "heads": heads, "kv_heads": heads, "tokens": tokens}
            print(json.dumps(what | {"layout": "random", "block": 64} | measured))


def masks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a mask inside blocks costs, against the same blocks without one."""
    records = []
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
            times = take_turns(turns, args.rounds)
            slots = {
                mask: LayoutPlan.build(wide, TokenMask(window=a.get("window"))).indices.numel()
                for mask, a in variants.items()
            }
            for mask in variants:
                per_block = times[mask]["ms"] / slots[mask] / (times["none"]["ms"] / slots["none"])
                records.append(
                    {
                        "dtype": dtype,
                        "backend": name,
                        "mask": mask,
                        "cost_per_block": round(per_block, 3),
                        "time": times[mask],
                    }
                )
                print(f"  {dtype} {name} {mask}: {per_block:.3f} × the cost of a block without a mask", flush=True)
    return records


def small(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a call costs above its backend at 256 tokens, and the backends against each other on tiny inputs."""
    from bs_kernels._arguments import make_call

    records = []
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
            records.append(record)
            print(f"  S={tokens} H={heads}: µs above the backend {record['overhead_us']}", flush=True)
    return records


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Building a plan, cold, and looking it up."""
    records = []
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
        records.append({"tokens": tokens, "heads": heads, "blocks": layout.nnz, "times": times})
        print(f"  {tokens} tokens × {heads} heads, {layout.nnz} blocks: {times['build']['ms']:.2f} ms", flush=True)
    return records


def forgotten(build: Callable[[], Any]) -> None:
    """Build a plan as if for the first time."""
    bs_kernels.plan._plans.clear()
    build()


SECTIONS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "speed": speed,
    "length": length,
    "engines": engines,
    "masks": masks,
    "small": small,
    "plan": plan,
    "memory": memory,
}


def main() -> None:
    if sys.argv[1:2] == ["--child-engine"]:
        child_engine(json.loads(sys.argv[2]))
        return
    available = [b.name for b in BACKENDS if b.name in ("native", "torch")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--backends", nargs="+", default=available)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--long", type=int, default=16384, help="tokens beyond which lengths are measured once")
    parser.add_argument("--length-densities", nargs="*", type=float, default=[0.05, 0.125])
    parser.add_argument("--engine-tokens", type=int, default=4096)
    parser.add_argument("--memory-lengths", nargs="+", type=int, default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--longest", type=int, default=1 << 20, help="tokens of the last memory case; 0: none")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--kv-heads", nargs="+", type=int, default=None, help="default: as many as heads, and a quarter"
    )
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.125, 0.5, 1.0])
    parser.add_argument("--layouts", nargs="+", choices=("random", "window"), default=["random", "window"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-causal", dest="causal", action="store_false")
    parser.add_argument("--no-flex", dest="flex", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or sorted({args.heads, max(1, args.heads // 4)}, reverse=True)

    check(args.backends)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        print(name, flush=True)
        where = machine()
        found[name] = {"machine": where, "records": SECTIONS[name](args)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(cpu_report.page(found))
    cpu_report.plots(found, args.out.parent)


if __name__ == "__main__":
    main()
