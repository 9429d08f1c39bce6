"""Measures bs-kernels on a GPU; writes docs/benchmarks/gpu-<device>.json and the page that shows every such file.

    python tools/bench_gpu.py                          # everything that fits into --minutes, the most telling first
    python tools/bench_gpu.py --only layouts decode    # some sections; the others keep what their file has
    python tools/bench_gpu.py --only speed --densities 0.1 --head-dims 128
    python tools/bench_gpu.py --tune                   # first measure tile sizes; see docs/guide/gpu.md
    python tools/bench_gpu.py --page                   # only write the page again, needs no GPU
    python tools/bench_gpu.py --dry --out FOLDER       # go through all of it in Triton's interpreter, tiny; no GPU

Correctness comes first: what is measured is held against the float64 oracle on this device, and nothing is measured
if it fails. Contestants take turns; what is reported is the median of the rounds with the quartiles beside it. A
setting that is measured again replaces itself in the file, the others stay: runs add up. Where one setting fails the
rest goes on, and the exit status is 1.

η = share × t_dense / t_sparse, where share is the fraction of the dense kernel's (query, key) pairs that the layout
keeps and t_dense is that of the fastest dense kernel here, inside torch (cuDNN, flash, efficient) or in an installed
flash-attn: η = 1 means that every skipped block is time saved. TFLOP/s count kept pairs only, 4 · D per pair forward
and 10 · D backward.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import numpy as np
import results
import torch
from gpu_contestants import Device, Setting, contestants_of, decoders_of, dense_pairs, kept_pairs, layout_of

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels.testing import check_against_oracle, make_case, make_layout

#: In the order of what should be there if time runs out.
SECTIONS = ("speed", "length", "plan", "memory", "groups", "layouts", "decode")


def settings(section: str, args: argparse.Namespace) -> Iterator[Setting]:
    """The settings of a section, the most telling ones first."""
    plain = Setting(dtype=args.dtype, heads=args.heads, kv_heads=args.heads, block=args.block)
    plain = replace(plain, head_dim=args.head_dims[0], tokens=args.speed_tokens)
    if section == "speed":
        for density in args.densities:
            for dim in args.head_dims:
                for causal in (False, True):
                    yield replace(plain, head_dim=dim, causal=causal, density=density)
    elif section == "layouts":
        for layout in ("window", "skewed"):
            for causal in (False, True):
                yield replace(plain, layout=layout, causal=causal)
    elif section == "length":
        for tokens in args.tokens:
            for causal in (True, False):
                yield replace(plain, tokens=tokens, causal=causal)
    elif section == "groups":
        for share in (2, 8, 16):
            yield replace(plain, kv_heads=max(1, args.heads // share), causal=True)
    elif section == "decode":
        for tokens in args.tokens:
            for density in (1.0, 0.1):
                for batch in args.batches:
                    few = replace(plain, tokens=tokens, density=density, queries=1, batch=batch)
                    yield replace(few, kv_heads=max(1, args.heads // 8))
    elif section in ("plan", "memory"):
        yield replace(plain, causal=True)
        yield replace(plain, tokens=max(args.tokens), causal=True)


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
        record[f"tflops_{phase}"] = pairs * setting.batch * per_pair * setting.head_dim / own / 1e9
        if dense:
            best = min(dense, key=dense.__getitem__)
            record[f"eta_{phase}"] = share * dense[best] / own
            record[f"best_dense_{phase}"] = best.removeprefix("dense ")
        if phase in times.get("flex", {}):
            record[f"over_flex_{phase}"] = times["flex"][phase] / own
    if "triton" in times and "triton any order" in times:
        record["any_order_backward"] = times["triton any order"]["backward"] / times["triton"]["backward"]
    if "triton" in times and "triton in one piece" in times:
        record["over_one_piece"] = times["triton in one piece"]["forward"] / times["triton"]["forward"]
    return record


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(setting: Setting, device: Device, *, flex: bool) -> dict[str, Any]:
    """One record of a speed section."""
    layout = layout_of(setting)
    found, notes = contestants_of(setting, layout, device, flex=flex)
    times: dict[str, dict[str, float]] = {name: {} for name in found}
    for at, phase in enumerate(("forward", "backward")):
        for name, got in device.take_turns({name: runs[at] for name, runs in found.items()}).items():
            times[name] |= {phase: got["ms"], f"{phase}_q1": got["q1"], f"{phase}_q3": got["q3"]}
    return record_of(setting, kept_pairs(layout, setting.heads), times, "; ".join(notes))


def measure_decode(setting: Setting, device: Device) -> dict[str, Any]:
    """One record of a few queries at the end of a cache, forward only."""
    layout = layout_of(setting)
    found, notes = decoders_of(setting, layout, device)
    got = device.take_turns(found, budget_ms=200.0)
    times = {name: {"forward": t["ms"], "forward_q1": t["q1"], "forward_q3": t["q3"]} for name, t in got.items()}
    return record_of(setting, kept_pairs(layout, setting.heads), times, "; ".join(notes))


def measure_plan(setting: Setting, device: Device) -> dict[str, Any]:
    """How long a plan takes: from a layout on the host, and of one that lives on the device."""
    from bs_kernels.backends.triton.lists import column_lists, row_lists

    layout = layout_of(setting)
    n = -(-setting.tokens // setting.block)
    begin = time.perf_counter()
    LayoutPlan.build(layout, TokenMask(setting.causal), device.name)
    device.synchronize()
    host = (time.perf_counter() - begin) * 1e3
    slots = max(1, round(setting.density * n))
    indices = torch.rand(1, setting.heads, n, n, device=device.name).argsort(-1)[..., :slots].to(torch.int32)
    counts = torch.full((1, setting.heads, n), slots, device=device.name, dtype=torch.int32)
    sizes = (setting.block, setting.block), (setting.tokens, setting.tokens)
    batched = BatchedLayout(indices, counts, *sizes, causal=setting.causal)

    def on_device() -> LayoutPlan:
        plan = LayoutPlan.build(batched, TokenMask(setting.causal), device.name)
        row_lists(plan, masked_ends=False)
        column_lists(plan, setting.heads // setting.kv_heads, masked_ends=False)
        return plan

    found, notes = contestants_of(setting, layout, device, flex=False)
    times = device.take_turns({"plan": on_device, "kernel": found["triton"][0]})
    record = {**asdict(setting), "blocks": layout.nnz, "host_ms": host, "note": "; ".join(notes)}
    return record | {"device_ms": times["plan"]["ms"], "kernel_ms": times["kernel"]["ms"]}


def measure_memory(setting: Setting, device: Device) -> dict[str, Any]:
    """Peak memory of forward and backward above the inputs, in MiB."""
    found, notes = contestants_of(setting, layout_of(setting), device, flex=False)
    peaks = {}
    for name, (forward, backward) in found.items():

        def step(forward: Any = forward, backward: Any = backward) -> None:
            held = forward()  # beside the gradients, as in training; what backward differentiates was made before
            backward()
            del held

        peaks[name] = device.peak(step)
    return {**asdict(setting), "mib": peaks, "note": "; ".join(notes)}


def measured(section: str, setting: Setting, device: Device, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one setting."""
    if section == "plan":
        return measure_plan(setting, device)
    if section == "memory":
        return measure_memory(setting, device)
    if section == "decode":
        return measure_decode(setting, device)
    return measure(setting, device, flex=not args.no_flex)


# -- correctness -------------------------------------------------------------------------------------------------------


def check(device: Device, args: argparse.Namespace) -> int:
    """Hold what is going to be measured against the float64 oracle on this device; returns the number of cases.

    Not every argument and dtype: every case waits for the compiler. The tests have them all.
    """
    dtype = getattr(torch, args.dtype)

    def moved(x: Any) -> Any:
        return x.to(device.name) if isinstance(x, torch.Tensor) else x

    def attention(
        q: Any, k: Any, v: Any, layout: Any, *, return_lse: bool, deterministic: bool = True, **arguments: Any
    ) -> Any:
        given = {name: moved(x) for name, x in arguments.items()}
        given |= {"return_lse": return_lse, "deterministic": deterministic, "backend": "triton"}
        return tuple(x.cpu() for x in block_sparse_attention(moved(q), moved(k), moved(v), layout, **given))

    length = 5 * args.block + args.block // 2
    training, decoding = (length, length), (1, 12 * length)
    variants: tuple[tuple[tuple[int, int], bool, dict[str, Any]], ...] = (
        (training, True, {}),
        (training, True, {"causal": True}),
        (training, False, {"causal": True}),
        (training, True, {"causal": True, "sinks": True, "block_bias": True}),
        (decoding, True, {}),
    )
    cases = 0
    for dim in args.head_dims:
        for lengths, deterministic, arguments in variants:
            layout = make_layout(
                np.random.default_rng(cases), seq_len=lengths, block_size=(args.block, args.block), density=0.5
            )
            case = make_case(layout, q_heads=4, kv_heads=2, head_dim=dim, dtype=dtype, **arguments)
            check_against_oracle(case, partial(attention, deterministic=deterministic))
            cases += 1
    return cases


# -- the run -----------------------------------------------------------------------------------------------------------


def device_facts(device: Device) -> dict[str, Any]:
    """What the page says about a device."""
    import triton

    facts = {"torch": torch.__version__, "triton": triton.__version__}
    if device.dry:
        return {"name": "Dry run", "memory_gib": 0, "processors": 0, "capability": [0, 0], "cuda": "none", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda or torch.version.hip,
        **facts,
    }


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


#: What a dry run asks for where the command line does not.
DRY = {
    "head_dims": [16],
    "densities": [0.5],
    "tokens": [64],
    "speed_tokens": 32,
    "heads": 2,
    "block": 16,
    "batches": [1],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--head-dims", nargs="+", type=int, help="of section speed; the others take the first")
    parser.add_argument("--densities", nargs="+", type=float, help="of section speed")
    parser.add_argument("--tokens", nargs="+", type=int, help="of sections length and decode, the longest of memory")
    parser.add_argument("--speed-tokens", type=int, help="of every other section")
    parser.add_argument("--heads", type=int, help="query heads")
    parser.add_argument("--block", type=int, help="tokens per block")
    parser.add_argument("--batches", nargs="+", type=int, help="of section decode")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="begin no new measurement after this long; --tune takes half at most"
    )
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--no-check", action="store_true", help="skip the correctness check; recorded as such")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes first and keep them for this device")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--dry", action="store_true", help="go through all of it in the interpreter; needs --out")
    parser.add_argument("--out", type=Path, help="folder of the JSON files and the page; docs/benchmarks by default")
    args = parser.parse_args(argv)
    real = {
        "head_dims": [128, 64],
        "densities": [0.1, 0.01, 0.05, 0.25, 0.5, 1.0],
        "tokens": [2048, 8192, 32768, 131072],
        "speed_tokens": 32768,
        "heads": 16,
        "block": 128,
        "batches": [1, 8],
    }
    for name, value in (DRY if args.dry else real).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dry and (args.out is None or args.tune):
        parser.error("--dry: expected --out FOLDER and no --tune; its numbers mean nothing")
    args.out, args.no_flex = args.out or results.FOLDER, args.no_flex or args.dry
    if args.block < 1 or any(n % args.block or n < args.block for n in [*args.tokens, args.speed_tokens]):
        parser.error(f"--tokens, --speed-tokens: expected multiples of the block, {args.block}")
    if any(not 0 < d <= 1 for d in args.densities):
        parser.error("--densities: expected numbers in (0, 1]")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    args = parse(argv)
    if args.page:
        gpu_report.write(args.out)
        return
    device = Device(args.dry)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
    elif not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch sees no GPU; --page writes the page from the files that are there")
    began = time.perf_counter()
    cases = 0 if args.no_check else check(device, args)
    found: dict[str, Any] = {"stopped": [], "failed": [], "device": device_facts(device), "checked_cases": cases}
    print(f"{found['device']['name']}: {cases} cases agree with the oracle, {_since(began)}", flush=True)
    if args.tune:
        import gpu_tune

        limit = began + args.minutes * 60 / 2
        found["tuned"] = gpu_tune.tune(args.head_dims, getattr(torch, args.dtype), (args.block,), limit=limit)
        print(f"tuned, {_since(began)}", flush=True)
    path = args.out / f"gpu-{slug(found['device']['name'])}.json"
    found = results.load(path) | found  # what is not measured now stays
    unfinished = found.pop("unfinished", {})
    for section in args.only:
        records = []
        for setting in settings(section, args):
            if time.perf_counter() - began > args.minutes * 60:
                found["stopped"].append(section)
                break
            try:
                records.append(measured(section, setting, device, args))
            except Exception as error:
                traceback.print_exc()
                found["failed"].append({"section": section, **asdict(setting), "error": repr(error)[:500]})
            else:
                print(section, f"{gpu_report.line(records[-1])}, {_since(began)}", flush=True)
            results.save(path, found | {"unfinished": unfinished | {section: records}})
            if not args.dry:
                torch.cuda.empty_cache()
        if not records:
            continue
        unfinished.pop(section, None)
        found[section] = joined(found.get(section, []), records)
        results.save(path, found | ({"unfinished": unfinished} if unfinished else {}))
        gpu_report.write(args.out)
    print(f"wrote {path}, {_since(began)}")
    if found["stopped"]:
        print(f"out of time for {', '.join(found['stopped'])}: run again with --only {' '.join(found['stopped'])}")
    if found["failed"]:
        raise SystemExit(f"bench_gpu: {len(found['failed'])} measurements failed; what went wrong is above")


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"


def joined(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a section: those of now, and of earlier runs those of other settings."""
    names = [field.name for field in fields(Setting)]
    again = [[record[name] for name in names] for record in now]
    return now + [record for record in before if [record.get(name) for name in names] not in again]


if __name__ == "__main__":
    main()
