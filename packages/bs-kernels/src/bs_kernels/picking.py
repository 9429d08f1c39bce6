"""From scores of blocks to the blocks that a layout lists."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ._plain import is_plain
from .backends._native_picks import native_best_blocks

__all__ = ["best_blocks"]


def best_blocks(scores: Tensor, counts: Tensor, slots: int) -> Tensor:
    """The key blocks with the largest scores of every row: ``indices`` of a `BatchedLayout` with these ``counts``.

    Shapes are static. On a CPU the native core finds them, and ties go to the earlier block; on other devices ties are
    broken as `torch.topk` breaks them. No gradient passes.

    Args:
        scores: [B, H, QB, KB], floating point, KB at least 1; a NaN counts as larger than everything.
        counts: int32 or int64 [B, H, QB]; blocks that each row takes, 0 to the smaller of ``slots`` and KB (others
            are clamped).
        slots: K, at least 0.

    Returns:
        int64 [B, H, QB, K]; ascending among the first ``counts``, KB − 1 in the rest.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, or a negative number of slots.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"scores: expected a floating-point tensor, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if not isinstance(counts, Tensor) or counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts: expected int32 or int64, got {getattr(counts, 'dtype', type(counts).__name__)}")
    if isinstance(slots, bool) or not isinstance(slots, numbers.Integral):
        raise TypeError(f"slots: expected an integer, got {slots!r}")
    if slots < 0:
        raise ValueError(f"slots: expected at least 0, got {slots}")
    if scores.ndim != 4 or not scores.shape[-1]:
        raise ValueError(f"scores: expected [B, H, QB, KB] with at least one key block, got {list(scores.shape)}")
    if counts.shape != scores.shape[:-1]:
        raise ValueError(f"counts: expected {list(scores.shape[:-1])}, got {list(counts.shape)}")
    if counts.device != scores.device:
        raise ValueError(f"counts: expected device {scores.device}, got {counts.device}")
    scores, slots = scores.detach(), int(slots)
    if is_plain([scores, counts]) and (made := native_best_blocks(scores, counts, slots)) is not None:
        return made
    columns = scores.shape[-1]
    if scores.device.type == "cpu":
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    else:
        best = scores.topk(min(slots, columns), dim=-1).indices
    best = torch.nn.functional.pad(best, (0, slots - best.shape[-1]), value=columns - 1)
    used = torch.arange(slots, device=scores.device) < counts[..., None].clamp(max=columns)
    return torch.where(used, best, columns).sort(dim=-1).values.clamp(max=columns - 1)
