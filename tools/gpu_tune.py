"""Measures tile sizes, warps, stages and ways to load on this GPU and keeps the fastest in the file that calls read.

    python tools/gpu_tune.py --head-dims 64 128 --blocks 64 128

The file is written after every kernel, with the best so far if the time is up; training at the first head dim comes
first. A configuration takes little longer than its compilation, a second or two: with a head dim and a block size there
are about a hundred.

Once the file is there, calls use it: which configuration runs is decided by files and tables alone, never by a timing
inside a call, so results stay the same from run to run. Tensor descriptors are used only where they measured faster.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace

import numpy as np
import torch

from bs_kernels._arguments import make_call
from bs_kernels.backends.base import Call, Needs
from bs_kernels.backends.triton import config
from bs_kernels.backends.triton.config import Config, Shape
from bs_patterns import BlockLayout


def choices(extent: tuple[int, int]) -> Iterator[Config]:
    """Configurations worth a try for blocks of this size."""
    limits = [min(block, 128) for block in extent]
    sizes = [[size for size in (16, 32, 64, 128) if size in (limit, limit // 2)] or [16] for limit in limits]
    for tile_m, tile_n, warps, stages in itertools.product(*sizes, (4, 8), (2, 3)):
        yield Config(tile_m, tile_n, warps, stages)


def variants(best: Config, *, hopper: bool, decoding: bool) -> Iterator[Config]:
    """What else may make a configuration faster: descriptors, and how many pieces a decode step is cut into."""
    for descriptors, waves in itertools.product((False, True) if hopper else (False,), (0, 1, 2, 4)):
        if waves == best.waves or decoding:
            yield replace(best, descriptors=descriptors, waves=waves)


def ranked(
    options: Iterable[Config], run: Callable[[Config], object], limit: float = math.inf
) -> list[tuple[Config, float]]:
    """The configurations that the device can run with their milliseconds, fastest first; none begun past ``limit``."""
    from triton.errors import TritonError

    found = []
    for option in options:
        if time.perf_counter() > limit:
            break
        try:
            run(option)
            torch.cuda.synchronize()
        except (RuntimeError, TritonError):  # too much of some resource, or nothing that the compiler can do
            continue
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(option)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found.append((option, statistics.median(times)))
    return sorted(found, key=_milliseconds)


def call_of(
    dim: int, block: int, dtype: torch.dtype, *, decoding: bool, device: str = "cuda", shrink: int = 1
) -> tuple[Call, torch.Tensor]:
    """A call to tune with, and a gradient of its output: training at 8,192 tokens, or one query of a long cache."""
    tokens, queries, heads, batch = (65536 // shrink, 1, 32, 4) if decoding else (8192 // shrink, 8192 // shrink, 16, 2)
    n, rows = tokens // block, -(-queries // block)
    mask = np.random.default_rng(0).random((1 if decoding else heads, rows, n)) < 0.25
    mask[:, np.arange(rows), np.arange(n)[-rows:]] = True
    mask = mask if decoding else np.tril(mask)
    layout = BlockLayout.from_dense(mask, block_size=block, seq_len=(queries, tokens), causal=not decoding)
    kv_heads = 4 if decoding else heads
    sizes = ((queries, heads), (tokens, kv_heads), (tokens, kv_heads), (queries, heads))
    q, k, v, dout = (torch.randn(batch, s, h, dim, device=device, dtype=dtype) for s, h in sizes)
    return make_call(q, k, v, layout), dout


def runs_of(call: Call, dout: torch.Tensor, *, decoding: bool) -> dict[str, Callable[[Config], object]]:
    """What each kernel is timed on."""
    from bs_kernels.backends.triton import launch

    out, lse = launch.run_forward(call, torch.float32)
    delta = (out * dout).sum(-1).transpose(1, 2).contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    narrow, found, wide = torch.empty_like(dout), torch.empty_like(lse), dout.new_zeros(dout.shape, dtype=torch.float32)
    given = call, dout, lse, delta
    runs: dict[str, Callable[[Config], object]] = {"forward": lambda c: launch.forward(call, narrow, found, c)}
    if decoding:
        return runs
    return runs | {
        "rows": lambda c: launch.rows_launch(*given, dq, None, c).run(),
        "columns": lambda c: launch.columns_launch(*given, None, dk, dv, c).run(),
        "atomic": lambda c: launch.columns_launch(*given, wide, dk, dv, c).run(),
    }


def tune(
    head_dims: list[int], dtype: torch.dtype, blocks: tuple[int, ...] = (128,), *, limit: float = math.inf
) -> dict[str, list[float]]:
    """Measure and keep; returns the fields of `Config` and the milliseconds by shape.

    Args:
        head_dims, dtype, blocks: what calls to measure with.
        limit: of `time.perf_counter`; no measurement begins past it.
    """
    from bs_kernels.backends.triton.arguments import shape_of

    path = config.tuned_path()
    if path is None:
        raise SystemExit("gpu_tune: BS_KERNELS_TUNING=off leaves nowhere to keep the result")
    target = config.Target.of(torch.device("cuda"))
    found: dict[str, list[float]] = {}
    for decoding, dim, block in itertools.product((False, True), head_dims, blocks):
        if time.perf_counter() > limit:
            break
        call, dout = call_of(dim, block, dtype, decoding=decoding)
        for name, run in runs_of(call, dout, decoding=decoding).items():
            shape: Shape = shape_of(call, name)
            tried = dict.fromkeys((next(config.candidates(target, shape)), *choices(shape.extent)))
            best = ranked(tried, run, limit)
            more = (variants(option, hopper=target.kind == "sm90", decoding=decoding) for option, _ in best[:3])
            best += ranked((option for each in more for option in each if option not in tried), run, limit)
            if best:
                chosen, ms = min(best, key=_milliseconds)
                found[shape.key] = [*(float(value) for value in astuple(chosen)), ms]
                print(f"{shape.key}: {chosen}, {ms:.3f} ms", flush=True)
                config.write_tuned(path, target.name, {shape.key: chosen})
        if not decoding:
            _check(call, dout)
    return found


def _milliseconds(measured: tuple[Config, float]) -> float:
    return measured[1]


def _check(call: Call, dout: torch.Tensor) -> None:
    """Run with what was kept."""
    from bs_kernels.backends.triton import launch

    out, lse = launch.run_forward(call, torch.float32)
    delta = (out * dout).sum(-1).transpose(1, 2).contiguous()
    launch.run_backward(call, dout, lse, delta, Needs(), dout.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no new measurement after this long")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_tune: torch sees no GPU")
    end = time.perf_counter() + given.minutes * 60
    tune(given.head_dims, getattr(torch, given.dtype), tuple(given.blocks), limit=end)
