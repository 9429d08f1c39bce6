"""The lists of a plan as the kernels walk them: what needs no positional mask first, then what does.

Tensor operations of static shape only: on a GPU nothing waits for the host, so plans that change every step (adaptive
layouts) and CUDA graphs are served alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._derived import derived
from ...plan import LayoutPlan

__all__ = ["ColumnLists", "RowLists", "column_lists", "row_lists"]


@dataclass(frozen=True, eq=False)
class RowLists:
    """Rows of a plan; row r reads slots ``row_begin[r] : middle[r]`` whole and ``middle[r] : row_end[r]`` masked.

    Attributes:
        middle: int32[L, H, QB].
        blocks: int32[N]; key block of each slot.
        starts: int32[N + 1]; first local token of that block, and one element that kernels load and do not use.
        entries: int32[N]; as in the plan.
    """

    middle: Tensor
    blocks: Tensor
    starts: Tensor
    entries: Tensor


@dataclass(frozen=True, eq=False)
class ColumnLists:
    """Columns of a plan, likewise.

    Attributes:
        middle: int32[L, H, KB].
        rows: int32[N]; query block of each transposed slot.
        starts: int32[N + 1]; first local token of that block, and an element more.
        entries: int32[N]; as in the plan, of each transposed slot.
        order: int32; columns in the order to schedule them: those of the plan, or, where every query head has its
            own, of key heads: ``(l · Hkv + h) · KB + j``, ranked by the earliest of the group's columns.
    """

    middle: Tensor
    rows: Tensor
    starts: Tensor
    entries: Tensor
    order: Tensor


def row_lists(plan: LayoutPlan, *, masked_ends: bool) -> RowLists:
    """The rows of a plan, kept with it.

    Args:
        plan: the plan.
        masked_ends: every key block needs its end masked (a tile does not divide the block size); otherwise only short
            blocks do.
    """

    def build() -> RowLists:
        blocks = plan.indices.to(torch.int64)
        short = _short(plan.kv_bounds, plan.block_size[1], everywhere=masked_ends)
        masked = plan.partial.to(torch.bool) | _take(short, blocks)
        order, middle = _whole_first(plan.row_begin, plan.row_end, masked)
        blocks = blocks[order]
        starts = pad(_take(plan.kv_bounds, blocks), (0, 1))
        return RowLists(middle, blocks.to(torch.int32), starts, plan.entries[order])

    return _kept(plan, ("triton rows", masked_ends), build)


def column_lists(plan: LayoutPlan, group: int, *, masked_ends: bool) -> ColumnLists:
    """The columns of a plan, kept with it.

    Args:
        plan: the plan.
        group: query heads per key head.
        masked_ends: every query block needs its end masked, as in `row_lists`.
    """

    def build() -> ColumnLists:
        rows, slots = plan.t_rows.to(torch.int64), plan.t_slots.to(torch.int64)
        short = _short(plan.q_bounds, plan.block_size[0], everywhere=masked_ends)
        masked = plan.partial.to(torch.bool)[slots] | _take(short, rows)
        order, middle = _whole_first(plan.col_begin, plan.col_end, masked)
        rows = rows[order]
        starts, entries = pad(_take(plan.q_bounds, rows), (0, 1)), plan.entries[slots[order]]
        return ColumnLists(middle, rows.to(torch.int32), starts, entries, _column_order(plan, group))

    return _kept(plan, ("triton columns", group, masked_ends), build)


def _kept(plan: LayoutPlan, key: tuple, build):
    """``build()``, remembered with the plan.

    Not while a CUDA graph is captured: its memory belongs to the graph, and what is remembered would be stale where a
    replay finds another layout in the tensors of the plan.
    """
    if plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return build()
    return derived(plan, key, build)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` where there are values to take, else an empty tensor."""
    return values[index] if index.numel() else values.new_empty(0)


def _short(bounds: Tensor, block: int, *, everywhere: bool) -> Tensor:
    """bool per block: whether its end needs a mask."""
    lengths = bounds.diff()
    return torch.ones_like(lengths, dtype=torch.bool) if everywhere else lengths != block


def _whole_first(begin: Tensor, end: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Stable partition of every list by ``masked``.

    Args:
        begin, end: int32[…]; the lists, ascending and disjoint; slots between them belong to none and stay in place.
        masked: bool[N].

    Returns:
        int64[N] slots in their new order and, shaped like ``begin``, where each list's masked slots begin.
    """
    count, device = masked.numel(), masked.device
    first, last = begin.flatten().to(torch.int64), end.flatten().to(torch.int64)
    if count == 0 or first.numel() == 0:
        return torch.zeros(count, dtype=torch.int64, device=device), begin
    slot = torch.arange(count, device=device)
    before = pad((~masked).to(torch.int64).cumsum(0), (1, 0))  # whole slots before each slot
    middle = first + before[last] - before[first]
    owner = (torch.searchsorted(first, slot, right=True) - 1).clamp(min=0)
    inside = (slot >= first[owner]) & (slot < last[owner])
    whole = before[slot] - before[first[owner]]
    target = torch.where(masked, middle[owner] + (slot - first[owner] - whole), first[owner] + whole)
    order = torch.empty_like(slot).scatter_(0, torch.where(inside, target, slot), slot)
    return order, middle.view(begin.shape).to(torch.int32)


def _column_order(plan: LayoutPlan, group: int) -> Tensor:
    if plan.heads == 1 or group == 1:
        return plan.col_order
    order = plan.col_order.to(torch.int64)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rank = rank.view(plan.batch, plan.heads // group, group, plan.kv_blocks).amin(2)
    return rank.flatten().argsort(stable=True).to(torch.int32)
