"""One pass over a layout's active blocks: who reads which key block, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._check import integer

if TYPE_CHECKING:
    from bs_patterns import BlockLayout

Int64 = NDArray[np.int64]


def resolve_kv_heads(layout: BlockLayout, kv_heads: int | None) -> tuple[int, int]:
    """Return (kv heads, head groups): where all heads share a layout, all kv heads form one group."""
    heads = layout.shape[0]
    if kv_heads is None:
        return heads, heads
    kv_heads = integer("kv_heads", kv_heads)
    if heads == 1:
        return kv_heads, 1
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of the layout's {heads} heads, got {kv_heads}")
    return kv_heads, kv_heads


def readers(layout: BlockLayout, group: int, groups: int, part_of_row: NDArray[np.integer], parts: int) -> Int64:
    """Count the active blocks of one head group by who reads them.

    Args:
        layout: ``heads / groups`` consecutive query heads form a group.
        group: Which one.
        groups: How many there are.
        part_of_row: ``[q_blocks]``: the part (rank or chunk) of each query block.
        parts: Number of parts.

    Returns:
        ``int64[parts, kv_blocks]``: active blocks in that key column in the part's rows.
    """
    heads, _, columns = layout.shape
    share = heads // groups
    indptr, indices = _rows_of(layout, group * share, share)
    base = np.tile(part_of_row.astype(np.int64) * columns, share)
    flat = np.repeat(base, np.diff(indptr, axis=1).ravel())
    flat += indices
    return np.bincount(flat, minlength=parts * columns).reshape(parts, columns)


def first_alike(layout: BlockLayout, groups: int) -> list[int]:
    """For each head group the first one with the same rows: patterns often give every head the same layout."""
    share = layout.shape[0] // groups
    first = [0] * groups
    for group in range(1, groups):
        mine, kept = (_rows_of(layout, g * share, share) for g in (group, first[group - 1]))
        alike = np.array_equal(mine[0], kept[0]) and np.array_equal(mine[1], kept[1])
        first[group] = first[group - 1] if alike else group
    return first


def _rows_of(layout: BlockLayout, head: int, heads: int) -> tuple[Int64, NDArray[np.int32]]:
    indptr = layout.indptr[head : head + heads]
    return indptr - indptr[0, 0], layout.indices[indptr[0, 0] : indptr[-1, -1]]


def block_tokens(seq_len: int, block_size: int) -> Int64:
    """Tokens of each block: all full but the last."""
    starts = np.arange(0, seq_len, block_size, dtype=np.int64)
    return np.minimum(block_size, seq_len - starts)
