"""Measures tile sizes, warps and stages on this GPU and keeps the fastest in the file that `bs_kernels` reads.

    python tools/gpu_tune.py --head-dims 64 128 --blocks 64 128

Once the file is there, calls use it: which configuration runs is decided by files and tables alone, never by a timing
inside a call, so results stay the same from run to run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bs_kernels._arguments import make_call
from bs_kernels.backends.base import Needs
from bs_kernels.backends.triton import config, launch
from bs_kernels.backends.triton.config import Config
from bs_patterns import BlockLayout


def choices(extent: tuple[int, int]) -> Iterator[Config]:
    """Configurations worth a try for blocks of this size."""
    limits = [min(block, 128) for block in extent]
    sizes = [[size for size in (16, 32, 64, 128) if size in (limit, limit // 2)] or [16] for limit in limits]
    for tile_m, tile_n, warps, stages in itertools.product(*sizes, (4, 8), (2, 3)):
        yield Config(tile_m, tile_n, warps, stages)


def fastest(options: Iterator[Config], run: Callable[[Config], object]) -> tuple[Config, float] | None:
    """The fastest configuration that the device can run, and its milliseconds."""
    best = None
    for option in options:
        try:
            run(option)
            torch.cuda.synchronize()
        except RuntimeError:  # too much of some resource
            continue
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(option)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        time = statistics.median(times)
        if best is None or time < best[1]:
            best = option, time
    return best


def tune(head_dims: list[int], dtype: torch.dtype, blocks: tuple[int, ...] = (128,)) -> dict[str, list[float]]:
    """Measure and keep; returns ``[tile_m, tile_n, warps, stages, ms]`` by shape."""
    path = config.tuned_path()
    if path is None:
        raise SystemExit("gpu_tune: BS_KERNELS_TUNING=off leaves nowhere to keep the result")
    found: dict[str, list[float]] = {}
    for dim, block in itertools.product(head_dims, blocks):
        n, heads = 8192 // block, 16
        mask = (np.random.default_rng(0).random((heads, n, n)) < 0.25) | np.eye(n, dtype=bool)
        layout = BlockLayout.from_dense(np.tril(mask), block_size=block, seq_len=8192, causal=True)
        q, k, v, dout = (torch.randn(2, 8192, heads, dim, device="cuda", dtype=dtype) for _ in range(4))
        call = make_call(q, k, v, layout)
        out, lse = launch.run_forward(call, torch.float32)
        delta = (out * dout).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

        def forward(c: Config, call=call, out=torch.empty_like(q), lse=torch.empty_like(lse)) -> None:  # noqa: B008
            launch.forward_launch(call, out, lse, c).run()

        def rows(c: Config, call=call, dout=dout, lse: Tensor = lse, delta: Tensor = delta, dq=dq) -> None:
            launch.rows_launch(call, dout, lse, delta, dq, None, c).run()

        def columns(c: Config, call=call, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv) -> None:
            launch.columns_launch(call, dout, lse, delta, None, dk, dv, c).run()

        wide = out.new_zeros(q.shape)

        def atomic(c: Config, call=call, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, wide=wide) -> None:
            launch.columns_launch(call, dout, lse, delta, wide, dk, dv, c).run()

        for name, run in (("forward", forward), ("rows", rows), ("columns", columns), ("atomic", atomic)):
            shape = launch._shape(call, name)
            best = fastest(choices(shape.extent), run)
            if best is None:
                continue
            chosen, ms = best
            found[shape.key] = [chosen.tile_m, chosen.tile_n, chosen.warps, chosen.stages, ms]
            print(f"{shape.key}: {chosen}, {ms:.3f} ms", flush=True)
            config.write_tuned(path, config.Target.of(q.device).name, {shape.key: chosen})
        launch.run_backward(call, dout, lse, delta, Needs(), dtype)  # with what was kept
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_tune: torch sees no GPU")
    tune(given.head_dims, getattr(torch, given.dtype), tuple(given.blocks))
