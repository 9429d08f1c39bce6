"""Layouts that differ per batch element, padded to static shapes, and their plans built on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._plain import is_plain
from ._pytrees import register_fields
from .backends._native_picks import native_lists
from .token_mask import TokenMask

__all__ = ["BatchedLayout", "batched_lists"]


@dataclass(frozen=True, eq=False)
class BatchedLayout:
    """A different layout per batch element, padded: what a learned gate produces on the device.

    Shapes are static, so a plan is built without a host round trip and under ``torch.compile``. ``block_bias`` for
    such a layout has the shape of ``indices``.

    Attributes:
        indices: int32 or int64 [B, H, QB, K]; key blocks of each row, unique among the first ``counts``; the rest of a
            row is ignored. H is 1 (shared by all query heads) or Hq.
        counts: int32 or int64 [B, H, QB]; how many of a row's K slots are used.
        block_size: ``(query, key)`` tokens per block.
        seq_len: ``(Sq, Sk)`` tokens.
        causal: whether keys after the query are masked.
    """

    indices: Tensor
    counts: Tensor
    block_size: tuple[int, int]
    seq_len: tuple[int, int]
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "seq_len"):
            value = getattr(self, name)
            pair = (value, value) if isinstance(value, int) else tuple(value)
            if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
                raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
            if min(pair) < 1:
                raise ValueError(f"{name}: expected positive numbers of tokens, got {value!r}")
            object.__setattr__(self, name, pair)
        for name, ndim in (("indices", 4), ("counts", 3)):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
            if value.ndim != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {list(value.shape)}")
        q_blocks = -(-self.seq_len[0] // self.block_size[0])
        if self.indices.shape[2] != q_blocks:
            raise ValueError(
                f"indices: expected [B, H, {q_blocks}, K] for these lengths, got {list(self.indices.shape)}"
            )
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(f"counts: expected {list(self.indices.shape[:3])}, got {list(self.counts.shape)}")
        if self.counts.device != self.indices.device:
            raise ValueError(f"counts: expected device {self.indices.device}, got {self.counts.device}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, query blocks, key blocks)."""
        batch, heads, q_blocks, _ = self.indices.shape
        return batch, heads, q_blocks, -(-self.seq_len[1] // self.block_size[1])

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.indices.device

    def validate(self) -> BatchedLayout:
        """Check every used slot; copies to the host.

        Raises:
            ValueError: a count outside [0, K], or a used index that is out of range or repeated in its row.
        """
        slots, kv_blocks = self.indices.shape[3], self.shape[3]
        if self.counts.numel() and not bool(((self.counts >= 0) & (self.counts <= slots)).all()):
            raise ValueError(f"counts: expected values in [0, {slots}], got {self.counts.min()} … {self.counts.max()}")
        used = torch.arange(slots, device=self.device) < self.counts[..., None]
        inside = (self.indices >= 0) & (self.indices < kv_blocks)
        if bool((used & ~inside).any()):
            bad = self.indices[used & ~inside][0]
            raise ValueError(f"indices: expected key blocks in [0, {kv_blocks}), got {int(bad)}")
        filler = torch.arange(slots, device=self.device) + kv_blocks
        row = torch.where(used, self.indices, filler).sort(dim=-1).values
        if bool((row[..., 1:] == row[..., :-1]).any()):
            raise ValueError("indices: expected each key block once per row, got a repeat")
        return self


register_fields(BatchedLayout, ("indices", "counts"), ("block_size", "seq_len", "causal"))


def batched_lists(layout: BatchedLayout, token_mask: TokenMask, geometry: dict[str, Tensor]) -> dict[str, Tensor]:
    """Build the lists of a plan (see `LayoutPlan`): on a CPU in the native core, else with tensor operations.

    Used slots of a row come first, ascending; blocks that the positional mask drops whole are left out, and off the
    host, where nothing is checked, those that are out of range. ``N = B · H · QB · K``. Shapes are static.

    Args:
        layout: the batched layout.
        token_mask: the positional mask.
        geometry: int32 ``q_bounds[QB + 1]``, ``kv_bounds[KB + 1]``, ``q_start[QB]`` and ``kv_start[KB]`` of the plan.

    Raises:
        ValueError: the layout is on a CPU, nothing traces, and it is not valid; see `BatchedLayout.validate`.
    """
    if layout.device.type == "cpu" and is_plain([layout.indices, layout.counts, *geometry.values()]):
        made = native_lists(layout.indices, layout.counts, geometry, token_mask.band)
        if made is None or not made[1]:  # the core tells only whether all is well at first sight
            layout.validate()
        if made is not None:
            return made[0]
    q_first, kv_first = geometry["q_start"], geometry["kv_start"]
    q_last = q_first + geometry["q_bounds"].diff() - 1
    kv_last = kv_first + geometry["kv_bounds"].diff() - 1
    batch, heads, q_blocks, kv_blocks = layout.shape
    slots, rows, cols = layout.indices.shape[3], batch * heads * q_blocks, batch * heads * kv_blocks
    device = layout.device
    keep = torch.arange(slots, device=device) < layout.counts[..., None]
    keep = keep & (layout.indices >= 0) & (layout.indices < kv_blocks)
    index = layout.indices.clamp(0, kv_blocks - 1).to(torch.int32)
    lo, hi = token_mask.band
    keep = keep & (_at(kv_first, index) - q_last[:, None] <= hi) & (_at(kv_last, index) - q_first[:, None] >= lo)

    index, within = torch.where(keep, index, kv_blocks).sort(dim=-1, stable=True)
    keep, index = index < kv_blocks, index.clamp(max=kv_blocks - 1)
    partial = (_at(kv_first, index) - q_last[:, None] < lo) | (_at(kv_last, index) - q_first[:, None] > hi)
    counts = keep.sum(-1)
    begin = torch.arange(rows, device=device) * slots

    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    column, t_slots = torch.where(keep, head * kv_blocks + index, cols).flatten().sort(stable=True)
    row = torch.arange(q_blocks, device=device)[:, None].expand(batch, heads, q_blocks, slots).reshape(-1)
    edges = torch.arange(cols, device=device)
    col_begin, col_end = torch.searchsorted(column, edges), torch.searchsorted(column, edges, right=True)
    lists = {
        "row_begin": begin.view(batch, heads, q_blocks),
        "row_end": (begin + counts.flatten()).view(batch, heads, q_blocks),
        "indices": index.flatten(),
        "entries": (begin[:, None] + within.view(rows, slots)).flatten(),
        "col_begin": col_begin.view(batch, heads, kv_blocks),
        "col_end": col_end.view(batch, heads, kv_blocks),
        "t_rows": _at(row, t_slots),
        "t_slots": t_slots,
        "row_order": counts.flatten().sort(descending=True, stable=True).indices,
        "col_order": (col_end - col_begin).sort(descending=True, stable=True).indices,
    }
    return {name: t.to(torch.int32).contiguous() for name, t in lists.items()} | {
        "partial": (partial & keep).to(torch.uint8).flatten()
    }


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` for one-dimensional values, several times faster on a CPU than indexing."""
    return values.index_select(0, index.flatten()).view(index.shape)
