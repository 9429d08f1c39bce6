"""Host-side array algebra that turns CSR rows and positions into a plan's lists. O(entries), vectorised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .token_mask import TokenMask

__all__ = ["PlanArrays", "build_arrays", "order_entries"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class PlanArrays:
    """The list fields of a plan as numpy arrays; shapes as in `LayoutPlan` with L = 1."""

    row_begin: Int32
    row_end: Int32
    indices: Int32
    partial: NDArray[np.uint8]
    entries: Int32
    col_begin: Int32
    col_end: Int32
    t_rows: Int32
    t_slots: Int32
    row_order: Int32
    col_order: Int32


def stable_argsort(keys: NDArray[np.integer], bound: int) -> Int64:
    """Stable argsort of integers in ``[0, bound)``, 16 bits at a time: numpy sorts 16-bit integers by radix."""
    if bound <= 1 << 16:
        return np.argsort(keys.astype(np.uint16), kind="stable")
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while bound > 1 << shift:
        digit = ((keys >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
        shift += 16
    return order


def _longest_first(counts: NDArray[np.integer]) -> Int32:
    longest = int(counts.max(initial=0))
    return stable_argsort(longest - counts, longest + 1).astype(np.int32)


def _first_visit(groups: NDArray[np.integer], count: int) -> Int32:
    """All groups ``0 … count − 1`` in the order in which ``groups`` first names them, unnamed ones last."""
    named, first = np.unique(groups, return_index=True)
    rank = np.full(count, len(groups), np.int64)
    rank[named] = first
    return np.argsort(rank, kind="stable").astype(np.int32)


def order_entries(indptr: Int64, order: Int64) -> Int64:
    """Sort a visiting order by row and keep it within each row.

    Args:
        indptr: int64[heads, QB + 1]; row pointer with global offsets.
        order: int64[nnz]; a permutation of the CSR entries.

    Returns:
        int64[nnz]; CSR entries grouped by row, in visiting order within each.

    Raises:
        ValueError: ``order`` is not a permutation of the entries.
    """
    nnz = int(indptr[-1, -1])
    order = np.asarray(order)
    if order.shape != (nnz,) or not np.issubdtype(order.dtype, np.integer):
        raise ValueError(f"order: expected int64[{nnz}], one per active block, got {order.dtype}{list(order.shape)}")
    if nnz and (order.min() < 0 or order.max() >= nnz or np.bincount(order, minlength=nnz).max() != 1):
        raise ValueError(f"order: expected each of the {nnz} active blocks once, got repeats or out-of-range entries")
    row_of = np.repeat(np.arange(indptr.shape[0] * (indptr.shape[1] - 1)), np.diff(indptr, axis=1).ravel())
    return order[stable_argsort(row_of[order], row_of.size and int(row_of[-1]) + 1)]


def build_arrays(
    indptr: Int64,
    indices: Int32,
    kv_blocks: int,
    token_mask: TokenMask,
    q_first: Int64,
    q_last: Int64,
    kv_first: Int64,
    kv_last: Int64,
    visit: Int64 | None,
    *,
    longest_first: bool,
) -> PlanArrays:
    """Classify, prune, transpose and schedule the entries of a layout.

    Args:
        indptr: int64[heads, QB + 1]; row pointer with global offsets.
        indices: int32[nnz]; key block of each entry.
        kv_blocks: KB.
        token_mask: the positional mask.
        q_first, q_last: int64[QB]; absolute positions of each query block's first and last token.
        kv_first, kv_last: int64[KB]; likewise for key blocks.
        visit: int64[nnz] visiting order of the entries, or None for CSR order.
        longest_first: schedule rows and columns by falling length (else: as visited, or in index order).

    Returns:
        The lists of the plan.
    """
    heads, q_blocks = indptr.shape[0], indptr.shape[1] - 1
    counts = np.diff(indptr, axis=1).ravel()
    row_of = np.repeat(np.arange(heads * q_blocks, dtype=np.int32), counts)
    entries = np.arange(len(indices), dtype=np.int32)
    if visit is not None:
        entries = order_entries(indptr, visit).astype(np.int32)
        indices = indices[entries]

    partial = np.zeros(len(indices), np.uint8)
    if not token_mask.is_trivial:
        lo, hi = token_mask.band
        q_block = row_of % q_blocks if heads > 1 else row_of
        nearest = (kv_first[indices] - q_last[q_block], kv_last[indices] - q_first[q_block])
        keep = (nearest[0] <= hi) & (nearest[1] >= lo)
        partial = ((nearest[0] < lo) | (nearest[1] > hi)).astype(np.uint8)
        if not keep.all():
            indices, partial, entries, row_of = indices[keep], partial[keep], entries[keep], row_of[keep]
            counts = np.bincount(row_of, minlength=heads * q_blocks)

    row_end = np.cumsum(counts)
    head_of = row_of // q_blocks if heads > 1 else np.zeros_like(row_of)
    column = head_of * kv_blocks + indices
    slots = stable_argsort(column, heads * kv_blocks)
    col_counts = np.bincount(column, minlength=heads * kv_blocks)
    col_end = np.cumsum(col_counts)

    if longest_first:
        row_order, col_order = _longest_first(counts), _longest_first(col_counts)
    elif visit is None:
        row_order = np.arange(heads * q_blocks, dtype=np.int32)
        col_order = np.arange(heads * kv_blocks, dtype=np.int32)
    else:
        rank = np.empty(int(indptr[-1, -1]), np.int64)
        rank[visit] = np.arange(len(visit))
        seen = np.argsort(rank[entries], kind="stable")
        row_order = _first_visit(row_of[seen], heads * q_blocks)
        col_order = _first_visit(column[seen], heads * kv_blocks)

    return PlanArrays(
        row_begin=(row_end - counts).astype(np.int32).reshape(1, heads, q_blocks),
        row_end=row_end.astype(np.int32).reshape(1, heads, q_blocks),
        indices=np.array(indices, np.int32),
        partial=partial,
        entries=entries,
        col_begin=(col_end - col_counts).astype(np.int32).reshape(1, heads, kv_blocks),
        col_end=col_end.astype(np.int32).reshape(1, heads, kv_blocks),
        t_rows=(row_of[slots] % q_blocks if heads > 1 else row_of[slots]).astype(np.int32),
        t_slots=slots.astype(np.int32),
        row_order=row_order,
        col_order=col_order,
    )
