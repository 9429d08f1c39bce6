"""Measures bs-kernels on a GPU; writes docs/benchmarks/gpu-<device>.json and the page that shows every such file.

    python tools/bench_gpu.py                          # everything, within nine minutes
    python tools/bench_gpu.py --only speed --densities 0.1 --head-dims 128
    python tools/bench_gpu.py --tune                   # first measure tile sizes; see docs/guide/gpu.md
    python tools/bench_gpu.py --page                   # only write the page again, needs no GPU

Correctness comes first: the `triton` backend is held against the float64 oracle on this device, and nothing is measured
if it fails. Contestants take turns; what is reported is the median of the rounds with the quartiles beside it.

η = share × t_dense / t_sparse, where share is the fraction of the dense kernel's (query, key) pairs that the layout
keeps and t_dense is that of the fastest dense kernel that torch has here: η = 1 means that every skipped block is time
saved. TFLOP/s count kept pairs only, 4 · D per pair forward and 10 · D backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_patterns import BlockLayout

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
#: In the order of what should be there if time runs out.
SECTIONS = ("speed", "length", "plan", "memory", "groups", "layouts")
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Setting:
    """What is measured: sizes, and the kind of layout."""

    layout: str = "random"
    density: float = 0.1
    tokens: int = 32768
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    block: int = 128
    causal: bool = False
    dtype: str = "bfloat16"


def settings(section: str, args: argparse.Namespace) -> Iterator[Setting]:
    """The settings of a section, the most telling ones first."""
    plain = Setting(dtype=args.dtype)
    if section == "speed":
        for dim in args.head_dims:
            for causal in (False, True):
                for density in args.densities:
                    yield replace(plain, head_dim=dim, causal=causal, density=density, tokens=args.speed_tokens)
    elif section == "layouts":
        for layout in ("window", "skewed"):
            for causal in (False, True):
                yield replace(plain, layout=layout, causal=causal, tokens=args.speed_tokens)
    elif section == "length":
        for tokens in args.tokens:
            yield replace(plain, tokens=tokens, causal=True)
    elif section == "groups":
        for kv_heads in (8, 2, 1):
            yield replace(plain, kv_heads=kv_heads, causal=True, tokens=args.speed_tokens)
    elif section in ("plan", "memory"):
        yield replace(plain, tokens=args.speed_tokens, causal=True)
        yield replace(plain, tokens=max(args.tokens), causal=True)


# -- layouts -----------------------------------------------------------------------------------------------------------


def layout_of(setting: Setting, seed: int = 0) -> BlockLayout:
    """A layout at about ``setting.density`` of the allowed blocks, the diagonal always among them.

    "random" differs per head; "window" is a band; "skewed" gives half of its blocks to a few global columns and rows,
    so that lists differ in length by orders of magnitude.
    """
    n = -(-setting.tokens // setting.block)
    i = np.arange(n)
    allowed = np.tril(np.ones((n, n), bool)) if setting.causal else np.ones((n, n), bool)
    budget = setting.density * allowed.sum()
    if setting.density >= 1:
        mask = allowed[None]
    elif setting.layout == "random":
        chance = max(0.0, (budget - n) / max(allowed.sum() - n, 1))
        mask = np.random.default_rng(seed).random((setting.heads, n, n)) < chance
    else:
        few = 0
        if setting.layout == "skewed":
            few = max(1, round(budget / 2 / (n if setting.causal else 2 * n)))
        spread = max(0.0, budget - few * (n if setting.causal else 2 * n))
        reach = max(0, round(spread / n) - 1) if setting.causal else max(0, round((spread / n - 1) / 2))
        mask = (np.abs(i[:, None] - i) <= reach)[None]
        mask = mask | ((i < few) | ((i[:, None] < few) & (not setting.causal)))[None]
    mask = (mask | np.eye(n, dtype=bool)) & allowed
    return BlockLayout.from_dense(mask, block_size=setting.block, seq_len=setting.tokens, causal=setting.causal)


def kept_pairs(layout: BlockLayout, heads: int) -> float:
    """(query, key) pairs that ``heads`` query heads keep; lengths are multiples of the block here."""
    block = layout.block_size[0]
    pairs = layout.nnz * block**2
    if layout.causal:
        _, row, column = layout.to_coo()
        pairs -= int((row == column).sum()) * block * (block - 1) / 2
    return pairs * heads / layout.heads


def dense_pairs(setting: Setting) -> float:
    """Pairs that a dense kernel computes."""
    n = setting.tokens
    return setting.heads * (n * (n + 1) / 2 if setting.causal else n**2)


def record_of(setting: Setting, pairs: float, times: dict[str, dict[str, float]], note: str = "") -> dict[str, Any]:
    """What is written down: times in milliseconds, and what follows from them.

    Args:
        setting: what was measured.
        pairs: `kept_pairs`.
        times: per contestant "forward", "backward" and their quartiles; dense ones are named "dense …".
        note: what went wrong, if anything.
    """
    share = pairs / dense_pairs(setting)
    record = {**asdict(setting), "share": share, "times": times, "note": note}
    for phase, per_pair in (("forward", 4), ("backward", 10)):
        dense = {n: t[phase] for n, t in times.items() if n.startswith("dense ") and phase in t}
        own = times.get("triton", {}).get(phase)
        if own is None:
            continue
        record[f"tflops_{phase}"] = pairs * per_pair * setting.head_dim / own / 1e9
        if dense:
            best = min(dense, key=dense.__getitem__)
            record[f"eta_{phase}"] = share * dense[best] / own
            record[f"best_dense_{phase}"] = best.removeprefix("dense ")
        if phase in times.get("flex", {}):
            record[f"over_flex_{phase}"] = times["flex"][phase] / own
    if "triton" in times and "triton any order" in times:
        record["any_order_backward"] = times["triton any order"]["backward"] / times["triton"]["backward"]
    return record


# -- measuring ---------------------------------------------------------------------------------------------------------


def take_turns(contestants: dict[str, Callable[[], Any]], budget_ms: float = 600.0) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of GPU time, contestants interleaved, after a warm-up."""
    cost = {}
    for name, run in contestants.items():
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        cost[name] = (time.perf_counter() - begin) * 1e3
    rounds = int(min(30, max(5, budget_ms / max(sum(cost.values()), 1e-3))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin_event.record()
            run()
            end_event.record()
            events[name].append((begin_event, end_event))
    torch.cuda.synchronize()
    found = {}
    for name, pairs in events.items():
        low, mid, high = statistics.quantiles([a.elapsed_time(b) for a, b in pairs], n=4)
        found[name] = {"ms": mid, "q1": low, "q3": high}
    return found


def operands(setting: Setting) -> tuple[torch.Tensor, ...]:
    """q, k, v and dout, [1, tokens, heads, head_dim]."""
    torch.manual_seed(0)
    dtype, size = getattr(torch, setting.dtype), (1, setting.tokens)
    q, dout = (torch.randn(*size, setting.heads, setting.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(*size, setting.kv_heads, setting.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def block_mask_of(layout: BlockLayout, mask_mod: Callable[..., Any]) -> Any:
    """FlexAttention's form of a layout on the GPU: blocks on the diagonal of a causal one are partial, others full."""
    from torch.nn.attention.flex_attention import BlockMask

    dense = torch.from_numpy(layout.to_dense()).cuda()[None]
    n = dense.shape[-1]
    partial = dense & torch.eye(n, dtype=torch.bool, device="cuda") if layout.causal else torch.zeros_like(dense)

    def lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(dense & ~partial), BLOCK_SIZE=layout.block_size[0], mask_mod=mask_mod
    )


def causal_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def any_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= 0


_flex: list[Any] = []


def flex_runner(setting: Setting, layout: BlockLayout) -> Callable[..., torch.Tensor]:
    """Compiled FlexAttention over the same blocks; compiled once per shape."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex:
        # One compilation per shape; past the limit it would silently run uncompiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        _flex.append(torch.compile(flex_attention, dynamic=False))
    mask = block_mask_of(layout, causal_mod if setting.causal else any_mod)
    grouped = setting.heads != setting.kv_heads
    return lambda q, k, v: _flex[0](q, k, v, block_mask=mask, enable_gqa=grouped)


def contestants_of(
    setting: Setting, layout: BlockLayout, flex: bool
) -> tuple[dict[str, tuple[Callable[[], Any], Callable[[], Any]]], list[str]]:
    """Forward and backward of everything that is compared, and why something is missing."""
    q, k, v, dout = operands(setting)
    plan = LayoutPlan.build(layout, TokenMask(setting.causal), "cuda")
    qh, kh, vh = heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    dout_first = dout.transpose(1, 2).contiguous()
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    notes: list[str] = []

    def add(name: str, forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
        try:
            out = forward()
            backward = lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)  # noqa: E731
            backward()
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device or shape does not have
            notes.append(f"{name}: {str(error).splitlines()[0][:100]}")
            return
        found[name] = (forward, backward)

    def sparse() -> torch.Tensor:
        return block_sparse_attention(q, k, v, plan, backend="triton")

    add("triton", sparse, [q, k, v], dout)
    any_order = partial(block_sparse_attention, q, k, v, plan, backend="triton", deterministic=False)
    add("triton any order", any_order, [q, k, v], dout)
    if "triton" not in found:
        raise SystemExit(f"bench_gpu: {notes[0]}")
    grouped = setting.heads != setting.kv_heads
    for name, kernel in DENSE.items():

        def dense(kernel: SDPBackend = kernel) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(qh, kh, vh, is_causal=setting.causal, enable_gqa=grouped)

        add(f"dense {name}", dense, heads_first, dout_first)
    if flex:
        run = flex_runner(setting, layout)
        add("flex", lambda: run(*heads_first), heads_first, dout_first)
    return found, notes


def measure(setting: Setting, flex: bool) -> dict[str, Any]:
    """One record of a speed section."""
    layout = layout_of(setting)
    found, notes = contestants_of(setting, layout, flex)
    times: dict[str, dict[str, float]] = {name: {} for name in found}
    for at, phase in enumerate(("forward", "backward")):
        for name, got in take_turns({name: runs[at] for name, runs in found.items()}).items():
            times[name] |= {phase: got["ms"], f"{phase}_q1": got["q1"], f"{phase}_q3": got["q3"]}
    return record_of(setting, kept_pairs(layout, setting.heads), times, "; ".join(notes))


def measure_plan(setting: Setting) -> dict[str, Any]:
    """How long a plan takes: from a layout on the host, and of one that lives on the device."""
    from bs_kernels.backends.triton.lists import column_lists, row_lists

    layout = layout_of(setting)
    n = -(-setting.tokens // setting.block)
    begin = time.perf_counter()
    LayoutPlan.build(layout, TokenMask(setting.causal), "cuda")
    torch.cuda.synchronize()
    host = (time.perf_counter() - begin) * 1e3
    slots = max(1, round(setting.density * n))
    indices = torch.rand(1, setting.heads, n, n, device="cuda").argsort(-1)[..., :slots].to(torch.int32)
    counts = torch.full((1, setting.heads, n), slots, device="cuda", dtype=torch.int32)
    batched = BatchedLayout(indices, counts, setting.block, setting.tokens, setting.causal)  # type: ignore[arg-type]

    def on_device() -> LayoutPlan:
        plan = LayoutPlan.build(batched, TokenMask(setting.causal), "cuda")
        row_lists(plan, masked_ends=False)
        column_lists(plan, setting.heads // setting.kv_heads, masked_ends=False)
        return plan

    times = take_turns({"device": on_device})
    return {**asdict(setting), "blocks": layout.nnz, "host_ms": host, "device_ms": times["device"]["ms"]}


def measure_memory(setting: Setting) -> dict[str, Any]:
    """Peak memory of forward and backward above the inputs, in MiB."""
    layout = layout_of(setting)
    found, notes = contestants_of(setting, layout, flex=False)
    peaks = {}
    for name, (forward, backward) in found.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = forward()  # beside the gradients, as in training; what backward differentiates was made before
        backward()
        del held
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {**asdict(setting), "mib": peaks, "note": "; ".join(notes)}


# -- correctness -------------------------------------------------------------------------------------------------------


def check() -> int:
    """Hold the backend against the float64 oracle on this device; returns the number of cases."""

    def moved(x: Any) -> Any:
        return x.cuda() if isinstance(x, torch.Tensor) else x

    def attention(q: Any, k: Any, v: Any, layout: Any, *, return_lse: bool, **arguments: Any) -> Any:
        arguments = {name: moved(x) for name, x in arguments.items()}
        results = block_sparse_attention(
            moved(q), moved(k), moved(v), layout, return_lse=return_lse, backend="triton", **arguments
        )
        return tuple(x.cpu() for x in results)

    cases = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 128):
            for block in (64, 128):
                for arguments in ({}, {"causal": True, "sinks": True}, {"causal": True, "block_bias": True}):
                    layout = make_layout(
                        np.random.default_rng(cases), seq_len=(700, 700), block_size=(block, block), density=0.5
                    )
                    case = make_case(layout, q_heads=4, kv_heads=2, head_dim=dim, dtype=dtype, **arguments)
                    check_against_oracle(case, attention)
                    cases += 1
    return cases


# -- the run -----------------------------------------------------------------------------------------------------------


def device_facts() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.01, 0.05, 0.25, 0.5, 1.0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 32768, 131072], help="of section length")
    parser.add_argument("--speed-tokens", type=int, default=32768, help="of every other section")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no new measurement after this long")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--no-check", action="store_true", help="skip the correctness check; recorded as such")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes first and keep them for this device")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON files and the page")
    args = parser.parse_args(argv)
    if any(n % 128 or n < 128 for n in [*args.tokens, args.speed_tokens]):
        parser.error("--tokens, --speed-tokens: expected multiples of 128")
    if any(not 0 < d <= 1 for d in args.densities):
        parser.error("--densities: expected numbers in (0, 1]")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.page:
        gpu_report.write(args.out)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch sees no GPU; --page writes the page from the files that are there")
    began = time.perf_counter()
    found: dict[str, Any] = {"stopped": [], "device": device_facts(), "checked_cases": 0 if args.no_check else check()}
    print(f"{found['device']['name']}: {found['checked_cases']} cases agree with the oracle", flush=True)
    if args.tune:
        import gpu_tune

        found["tuned"] = gpu_tune.tune(args.head_dims, getattr(torch, args.dtype))
    path = args.out / f"gpu-{slug(found['device']['name'])}.json"
    with contextlib.suppress(OSError, ValueError):
        found = {**json.loads(path.read_text()), **found}  # sections that are not measured now stay
    for section in args.only:
        records = []
        for setting in settings(section, args):
            if time.perf_counter() - began > args.minutes * 60:
                found["stopped"].append(section)
                break
            if section == "plan":
                records.append(measure_plan(setting))
            elif section == "memory":
                records.append(measure_memory(setting))
            else:
                records.append(measure(setting, flex=not args.no_flex and section in ("speed", "layouts")))
            print(section, gpu_report.line(records[-1]), flush=True)
            torch.cuda.empty_cache()
        found[section] = records
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        gpu_report.write(args.out)
    print(f"wrote {path} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
