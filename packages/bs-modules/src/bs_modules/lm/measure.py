"""What a run reports about itself: bits per byte by position, attention's share of a step, peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .model import ByteModel
from .team import Team

#: Position in the context, in tokens: 0–1K, 1–4K, 4–8K.
POSITION_EDGES = (0, 1024, 4096, 8192)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Bits per byte on the validation text.

    Attributes:
        bits_per_byte: Over all scored bytes.
        by_position: `{"0-1K": …}`: over the bytes at these positions of a window.
        scored: Number of bytes.
    """

    bits_per_byte: float
    by_position: dict[str, float]
    scored: int


def validation_windows(text: np.ndarray, context: int, limit: int) -> list[np.ndarray]:
    """Cuts the text into windows of `context + 1` bytes that overlap by one: every byte but the first is scored once.

    With more than `limit` bytes, evenly spread windows are taken. A last window that is not whole is left out, because
    a sparse layout of another length has other rows than the one that was trained on; a text without any whole window
    is one short window.
    """
    starts = np.arange(0, max(len(text) - context, 1), context)
    wanted = max(limit // context, 1)
    if len(starts) > wanted:
        starts = starts[np.linspace(0, len(starts) - 1, wanted).round().astype(int)]
    return [text[start : start + context + 1] for start in starts]


def validated_text(windows: Sequence[np.ndarray]) -> np.ndarray:
    """The scored bytes, one window after another: what compressors are given."""
    return np.concatenate([window[1:] for window in windows])


@torch.no_grad()
def validate(
    model: ByteModel,
    windows: Sequence[np.ndarray],
    device: torch.device,
    context: int | None = None,
    team: Team | None = None,
) -> Validation:
    """Scores the next byte at every position of every window.

    Args:
        model: In any mode; nothing of it changes.
        windows: `uint8[n + 1]` each.
        device: Where the model is.
        context: Let the model see at most so many bytes: each window is cut into pieces of `context` that advance by
            half of it, and a byte is scored with the longer past. `None`: the whole window.
        team: Processes that share the windows; each scores whole ones.
    """
    longest = max(len(window) for window in windows) - 1
    nats, count = np.zeros(longest), np.zeros(longest, np.int64)
    for window in windows if team is None else windows[team.rank :: team.world_size]:
        n = len(window) - 1
        for start, skip, stop in _pieces(n, context or n):
            piece = torch.from_numpy(window[start : stop + 1].copy()).to(device)[None]
            loss = model.loss(piece[:, :-1], piece[:, 1:], reduction="none")[0].double().cpu().numpy()
            nats[start + skip : stop] += loss[skip:]
        count[:n] += 1
    if team is not None:
        nats, count = team.sum(nats), team.sum(count)
    bits = nats / math.log(2)
    edges = [*POSITION_EDGES, *range(2 * POSITION_EDGES[-1], longest + POSITION_EDGES[-1], POSITION_EDGES[-1])]
    by_position = {
        f"{_kilo(low)}–{_kilo(high)}": float(bits[low:high].sum() / count[low:high].sum())
        for low, high in itertools.pairwise(edges)
        if count[low:high].any()
    }
    return Validation(float(bits.sum() / count.sum()), by_position, int(count.sum()))


def attention_share(model: ByteModel, step: Callable[[], None], repeats: int = 3) -> float:
    """Attention's share of a training step's time: its forward and backward over the whole step.

    Args:
        model: Its attention is timed.
        step: Takes one whole step, forward, backward and optimizer.
        repeats: Steps to take; the median counts.
    """
    shares = []
    with _timed_attention(model) as clock:
        for _ in range(repeats):
            clock.total = 0.0
            start = clock.now()
            step()
            shares.append(clock.total / (clock.now() - start))
    return sorted(shares)[len(shares) // 2]


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak, where the system lets one (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.total, self.started = device, 0.0, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.total += self.now() - self.started


class _Mark(torch.autograd.Function):
    """Identity that starts or stops the clock when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, act: Any, *tensors: Tensor) -> Any:
        ctx.act = act
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.act()
        return None, *grads


class _Timed(nn.Module):
    def __init__(self, inner: nn.Module, clock: _Clock) -> None:
        super().__init__()
        self.inner, self.clock = inner, clock

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        q, k, v = _Mark.apply(self.clock.stop, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
        self.clock.start()
        out = self.inner(q, k, v, is_causal=is_causal)
        self.clock.stop()
        return _Mark.apply(self.clock.start, out)[0]  # pyright: ignore[reportOptionalSubscript]


@contextlib.contextmanager
def _timed_attention(model: ByteModel) -> Iterator[_Clock]:
    clock = _Clock(model.embedding.device)
    inner = [block.attention for block in model.blocks]
    try:
        for block in model.blocks:
            block.attention = _Timed(block.attention, clock)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        yield clock
    finally:
        for block, attention in zip(model.blocks, inner, strict=True):
            block.attention = attention


def _pieces(n: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored offset, stop) of pieces that score each of n positions once."""
    start = scored = 0
    while scored < n:
        stop = min(start + context, n)
        yield start, scored - start, stop
        scored = stop
        start = stop - context // 2 if context > 1 else stop


def _kilo(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens else "0"
