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
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cpu_report
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import bs_kernels.plan
from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels.dispatch import BACKENDS, get_backend
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_patterns import BlockLayout

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "cpu.json"
SECTIONS = ("speed", "length", "masks", "small", "plan", "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- measuring ---------------------------------------------------------------------------------------------------------


def take_turns(
    contestants: dict[str, Callable[[], Any]], rounds: int, keep_rounds: bool = False
) -> dict[str, dict[str, Any]]:
    """Median and quartiles in milliseconds, contestants interleaved; one round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for at in range(rounds + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if at:
                times[name].append((time.perf_counter() - begin) * 1e3)
    found = {}
    for name, values in times.items():
        low, mid, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[name] = {"ms": round(mid, 4), "q1": round(low, 4), "q3": round(high, 4), "best": round(min(values), 4)}
        if keep_rounds:
            found[name]["rounds"] = [round(value, 4) for value in values]
    return found


@contextmanager
def only(name: str) -> Iterator[None]:
    """Fail if any backend but this one runs, or if this one does not."""
    calls = {backend.name: 0 for backend in BACKENDS}
    originals = []
    for backend in BACKENDS:
        for method in ("forward", "backward"):
            inner = getattr(backend, method)

            def counted(*args: Any, _inner: Callable[..., Any] = inner, _name: str = backend.name) -> Any:
                calls[_name] += 1
                return _inner(*args)

            originals.append((backend, method))
            setattr(backend, method, counted)
    try:
        yield
    finally:
        for backend, method in originals:
            delattr(backend, method)
    others = {other: count for other, count in calls.items() if other != name and count}
    if others or not calls[name]:
        raise SystemExit(f"bench_cpu: meant to measure {name!r}, but these calls ran: {calls}")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")}
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "instructions": [flag for flag in wanted if flag in flags],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


# -- inputs ------------------------------------------------------------------------------------------------------------


def layout_of(kind: str, tokens: int, block: int, heads: int, density: float, causal: bool) -> BlockLayout:
    """A layout at about this density: "random" (per head, diagonal always active) or "window" (shared)."""
    n = -(-tokens // block)
    if kind == "window":
        reach = max(0, round(density * n) - 1) if causal else max(0, round((density * n - 1) / 2))
        i = np.arange(n)
        mask = (np.abs(i[:, None] - i) <= reach)[None]
    else:
        generator = np.random.default_rng(0)
        mask = (
            generator.random((heads, n, n)) < (density * n - 1) / max(n - 1, 1)
            if n > 1
            else np.ones((heads, 1, 1), bool)
        )
        mask |= np.eye(n, dtype=bool)
    return BlockLayout.from_dense(np.tril(mask) if causal else mask, block_size=block, seq_len=tokens, causal=causal)


def share_of_dense(layout: BlockLayout) -> float:
    """Active pairs / pairs of the dense kernel, both after the causal mask (blocks on the diagonal count half)."""
    block, tokens = layout.block_size[0], layout.seq_len[0]
    if not layout.causal:
        return layout.density
    _, row, column = layout.to_coo()
    diagonal = int((row == column).sum())
    pairs = (layout.nnz - diagonal) * block**2 + diagonal * block * (block + 1) / 2
    return pairs / layout.heads / (tokens * (tokens + 1) / 2)


def operands(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, h, dim).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    return [q, k, v], torch.randn(1, tokens, heads, dim).to(dtype)


def contestants_of(
    tensors: list[torch.Tensor], cotangent: torch.Tensor, plan: LayoutPlan, backends: list[str], causal: bool
) -> dict[str, Callable[[], Any]]:
    """Forward and forward+backward of dense attention and of every backend."""
    grouped = tensors[0].shape[2] != tensors[1].shape[2]
    # Dense attention gets its own layout, head-major and contiguous: what is fastest for it.
    dense_tensors = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    dense_cotangent = cotangent.transpose(1, 2).contiguous()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(*dense_tensors, is_causal=causal, enable_gqa=grouped)  # pyright: ignore[reportArgumentType]

    def no_grad(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    found = {
        "dense forward": no_grad(dense),
        "dense both": lambda: torch.autograd.grad(dense(), dense_tensors, dense_cotangent),
    }
    for name in backends:
        forward, both = runners(name, tensors, cotangent, plan)
        found[f"{name} forward"], found[f"{name} both"] = watched(name, forward), watched(name, both)
    return found


def runners(
    name: str, tensors: list[torch.Tensor], cotangent: torch.Tensor, plan: LayoutPlan, **arguments: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward without gradients, and forward+backward, of one backend."""

    def sparse() -> torch.Tensor:
        return block_sparse_attention(*tensors, plan, backend=name, **arguments)  # pyright: ignore[reportCallIssue]

    return torch.no_grad()(sparse), lambda: torch.autograd.grad(sparse(), tensors, cotangent)


def watched(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, failing if another backend than ``name`` computes it."""

    def inner() -> None:
        with only(name):
            run()

    return inner


def flex_forward(tensors: list[torch.Tensor], layout: BlockLayout) -> Callable[[], Any] | None:
    """Compiled FlexAttention on the same blocks (forward only: it has no backward on CPU), or None if it cannot."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block, dense = layout.block_size[0], torch.from_numpy(layout.to_dense().copy())
    heads = tensors[0].shape[2]

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        active = dense[h if layout.heads > 1 else 0, q // block, k // block]
        return active & (q >= k) if layout.causal else active

    try:
        mask = create_block_mask(rule, 1, heads, *layout.seq_len, device="cpu", BLOCK_SIZE=block)
        torch._dynamo.reset()  # a second mask would compile with dynamic shapes, which its C++ template cannot
        run = torch.compile(flex_attention, dynamic=False)
        q, k, v = (x.detach().transpose(1, 2) for x in tensors)
        grouped = q.shape[1] != k.shape[1]

        @torch.no_grad()
        def forward() -> Any:
            return run(q, k, v, block_mask=mask, enable_gqa=grouped)

        forward()
    except Exception as error:
        print(f"  FlexAttention: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None
    return forward


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


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and η over density, head dim, block size and layout."""
    records = []
    for dtype, dim, kv_heads in itertools.product(args.dtypes, args.head_dims, args.kv_heads):
        tensors, cotangent = operands(args.tokens, args.heads, kv_heads, dim, DTYPES[dtype])
        kinds = list(itertools.product(args.layouts, args.blocks))
        first = kinds[0]
        if kv_heads != args.kv_heads[0]:  # sharing key heads changes one operand: one kind of layout shows it
            kinds = [first]
        for name, block, density in [(*kind, density) for kind in kinds for density in args.densities]:
            # What is slow is measured once per dtype and size.
            backends = args.backends if (name, block) == first else args.backends[:1]
            layout = layout_of(name, args.tokens, block, args.heads, density, args.causal)
            plan = LayoutPlan.build(layout)
            turns = contestants_of(tensors, cotangent, plan, backends, args.causal)
            flex = flex_forward(tensors, layout) if args.flex and (name, block) == first else None
            if flex is not None:
                turns["flex forward"] = flex
            share = share_of_dense(layout)
            record = {
                "dtype": dtype,
                "head_dim": dim,
                "heads": args.heads,
                "kv_heads": kv_heads,
                "tokens": args.tokens,
                "layout": name,
                "block": block,
                "causal": args.causal,
                "density": round(share, 4),
                "times": take_turns(turns, args.rounds, keep_rounds=True),
            }
            record["eta"] = etas(record)
            records.append(record)
            print(one_line(record), flush=True)
    return records


def etas(record: dict[str, Any]) -> dict[str, list[float]]:
    """η of every contestant but dense: median, least and most over the rounds, each round against its own dense run."""
    times, found = record["times"], {}
    for name in times:
        if not name.startswith("dense"):
            pairs = zip(times[f"dense {name.split()[1]}"]["rounds"], times[name]["rounds"], strict=True)
            ratios = [record["density"] * dense / sparse for dense, sparse in pairs]
            found[name] = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return found


def one_line(record: dict[str, Any]) -> str:
    what = "{dtype} D={head_dim} {layout} block={block} S={tokens} kv={kv_heads} density={density}".format(**record)
    return f"  {what}: " + ", ".join(f"{name} η={eta[0]}" for name, eta in record["eta"].items())


def length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time over length at a fixed number of blocks per row, and where dense attention is overtaken."""
    records = []
    for dtype in args.dtypes:
        for tokens in args.lengths:
            tensors, cotangent = operands(tokens, args.heads, args.heads, 64, DTYPES[dtype])
            per_row = min(1.0, 16 * 64 / tokens * (2 if args.causal else 1))
            layout = layout_of("random", tokens, 64, args.heads, per_row, args.causal)
            turns = contestants_of(tensors, cotangent, LayoutPlan.build(layout), args.backends, args.causal)
            rounds = args.rounds if tokens <= 16384 else 1
            record = {
                "dtype": dtype,
                "tokens": tokens,
                "heads": args.heads,
                "head_dim": 64,
                "causal": args.causal,
                "density": round(share_of_dense(layout), 4),
                "times": take_turns(turns, rounds),
            }
            records.append(record)
            shown = ", ".join(f"{name} {found['ms']:.1f} ms" for name, found in record["times"].items())
            print(f"  {dtype} S={tokens} density={record['density']}: {shown}", flush=True)
    return records


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


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of one forward and backward above the inputs', each in a process of its own."""
    records = []
    cases: list[tuple[str, int, int]] = [
        (name, tokens, 8)
        for tokens in (8192, 16384, 32768, 65536, 131072)
        for name in ("explicit", "dense", *args.backends)
        if not (name == "explicit" and tokens > 16384) and not (name == "dense" and tokens > 32768)
    ]
    cases += [(name, 1 << 20, 4) for name in args.backends]
    for name, tokens, heads in cases:
        command = [sys.executable, __file__, "--child-memory", name, str(tokens), str(heads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  {name} at {tokens} tokens: failed\n{done.stderr[-2000:]}")
            continue
        record = json.loads(done.stdout.splitlines()[-1]) | {"name": name, "tokens": tokens, "heads": heads}
        records.append(record)
        print(
            f"  {name} {tokens} × {heads} × 64: {record['peak_mib']} MiB above, {record['total_mib']} in all",
            flush=True,
        )
    return records


def child_memory(name: str, tokens: int, heads: int) -> None:
    """One forward and backward in bfloat16, causal, 16 blocks of 64 per row; prints the peak as JSON."""

    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    tensors, cotangent = operands(tokens, heads, heads, 64, torch.bfloat16)
    n, per_row = tokens // 64, 16
    generator = np.random.default_rng(0)
    row = np.repeat(np.arange(n), per_row)
    column = np.minimum(generator.integers(0, 1 << 30, len(row)) % (row + 1), row)
    layout = BlockLayout.from_coo(0, row, column, block_size=64, seq_len=tokens, causal=True)
    before, begin = resident(), time.perf_counter()
    if name == "explicit":
        q, k, v = (x.transpose(1, 2) for x in tensors)
        scores = (q @ k.transpose(-1, -2)) / 8
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
        out = (torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v).transpose(1, 2)
    elif name == "dense":
        q, k, v = (x.transpose(1, 2) for x in tensors)
        out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    else:
        with only(name):
            out = block_sparse_attention(*tensors, layout, backend=name)  # pyright: ignore[reportCallIssue]
            torch.autograd.grad(out, tensors, cotangent)
            out = None
    if out is not None:
        torch.autograd.grad(out, tensors, cotangent)
    peak = resident()
    seconds = round(time.perf_counter() - begin, 2)
    print(json.dumps({"peak_mib": round(peak - before), "total_mib": round(peak), "seconds": seconds}))


def main() -> None:
    if sys.argv[1:2] == ["--child-memory"]:
        child_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    available = [b.name for b in BACKENDS if b.name in ("native", "torch")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--backends", nargs="+", default=available)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768])
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
    sections = {"speed": speed, "length": length, "masks": masks, "small": small, "plan": plan, "memory": memory}
    for name in args.only:
        print(name, flush=True)
        where = machine()
        found[name] = {"machine": where, "records": sections[name](args)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(cpu_report.page(found))
    cpu_report.plots(found, args.out.parent)


if __name__ == "__main__":
    main()
