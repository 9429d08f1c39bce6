"""How the torch backend walks a plan: rows of similar length side by side in chunks of bounded size.

A *unit* is one query-block row of one batch element and one head unit. A head unit is a query head, or, when the
layout is shared by all heads, a key/value head with its whole group of query heads stacked. Units of the same layout
row differ only by offsets, so the schedule lists layout rows and a call expands them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._plan_arrays import stable_argsort
from ..plan import LayoutPlan

__all__ = ["Chunk", "Schedule", "build_schedule"]

#: Rows share a chunk if the shortest fills at least this part of the longest.
_FILL = 7 / 8


@dataclass(frozen=True, eq=False)
class Chunk:
    """Layout rows that are computed together, padded to one number of key blocks.

    Attributes:
        rows: int64[R]; flat layout rows ``(l · H + h) · QB + i``.
        blocks: int64[R, n]; their key blocks, as positions in `Schedule.used`. Blocks that need a positional mask (or
            are short) come last; a row that is shorter than n repeats its first block in front.
        entries: int64[R, n]; the plan's ``entries`` of these blocks.
        padding: int64[R]; how many leading blocks of each row are such repeats, to be masked.
        max_padding: the largest of them.
        cut: how many trailing blocks need the positional mask.
        first, last: whether these are the first and the last blocks of their rows. The pieces of a longer row follow
            each other, one unit at a time, and their results merge.
        expand: the range of expansions (see `Schedule`) that this chunk covers.
    """

    rows: Tensor
    blocks: Tensor
    entries: Tensor
    padding: Tensor
    max_padding: int
    cut: int
    first: bool
    last: bool
    expand: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All chunks of a plan.

    Attributes:
        used: int64[U]; the key blocks that any row reads, ascending; all blocks if that is most of them.
        chunks: the chunks.
        workspace: elements of the largest chunk's score tile.
        units: of the chunk with the most.
        gathered: key tokens of the largest chunk, over all its units.
        bytes_placed: bytes of the index and mask tensors that say where all units lie.
    """

    used: Tensor
    chunks: tuple[Chunk, ...]
    workspace: int
    units: int
    gathered: int
    bytes_placed: int


def build_schedule(plan: LayoutPlan, group: int, expansions: int, budget: int) -> Schedule:
    """Group the rows of a plan.

    Args:
        plan: the plan.
        group: query heads per unit.
        expansions: units per layout row.
        budget: elements of a chunk's score tile; exceeded only where one block of one unit is larger.

    Returns:
        The schedule, on the plan's device.
    """
    begin, end = plan.row_begin.flatten().cpu().numpy(), plan.row_end.flatten().cpu().numpy()
    indices, partial, entries = (t.cpu().numpy() for t in (plan.indices, plan.partial, plan.entries))
    block_q, block_kv = plan.block_size
    short = np.diff(plan.kv_bounds.cpu().numpy()) < block_kv

    counts = (end - begin).astype(np.int64)
    row_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    slots = np.arange(len(row_of)) + np.repeat(begin - starts, counts)
    cut = (partial[slots] > 0) | short[indices[slots]]
    slots = slots[stable_argsort(row_of * 2 + cut, 2 * max(len(counts), 1))]
    used, position = np.unique(indices[slots], return_inverse=True)
    if 2 * used.size >= len(short):  # all of them are packed in one copy, which is faster than most of them
        used, position = np.arange(len(short)), indices[slots]
    cuts = np.bincount(row_of, weights=cut, minlength=len(counts)).astype(np.int64)

    unit = group * block_q * block_kv
    piece_blocks = max(1, budget // unit)
    pieces = _split_rows(counts, cuts, starts, piece_blocks)
    chunks: list[Chunk] = []
    largest = most = gathered = bytes_placed = 0
    for members, expand in _group_pieces(pieces, unit, expansions, budget):
        n = int(pieces.blocks[members].max())
        padding = n - pieces.blocks[members]
        take = pieces.start[members, None] + np.maximum(np.arange(n) - padding[:, None], 0)
        units = len(members) * (expand[1] - expand[0])
        largest, most = max(largest, units * n * unit), max(most, units)
        gathered = max(gathered, units * n * block_kv)
        cut = int(pieces.cut[members[0]])
        bytes_placed += units * (n + 4) * 8 + len(members) * cut * block_q * block_kv
        on_device = [
            torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(plan.device)
            for a in (pieces.row[members], position[take], entries[slots[take]], padding)
        ]
        chunks.append(
            Chunk(
                *on_device,
                max_padding=int(padding.max()),
                cut=cut,
                first=bool(pieces.order[members[0]] == 0),
                last=bool(pieces.last[members[0]]),
                expand=expand,
            )
        )
    on_device = torch.from_numpy(used.astype(np.int64)).to(plan.device)
    return Schedule(on_device, tuple(chunks), largest, most, gathered, bytes_placed)


@dataclass(frozen=True)
class _Pieces:
    """Runs of about as many blocks of one row, at most ``piece_blocks``; ``order`` counts the pieces of a row."""

    row: np.ndarray
    order: np.ndarray
    last: np.ndarray
    start: np.ndarray
    blocks: np.ndarray
    cut: np.ndarray


def _split_rows(counts: np.ndarray, cuts: np.ndarray, starts: np.ndarray, piece_blocks: int) -> _Pieces:
    per_row = -(-counts // piece_blocks)
    row = np.repeat(np.arange(len(counts)), per_row)
    order = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    size = -(-counts // np.maximum(per_row, 1))[row]
    first = order * size
    blocks = np.minimum(counts[row] - first, size)
    full = counts[row] - cuts[row]
    cut = np.clip(first + blocks - full, 0, blocks)
    return _Pieces(row, order, order == per_row[row] - 1, starts[row] + first, blocks, cut)


def _group_pieces(
    pieces: _Pieces, unit: int, expansions: int, budget: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield (piece indices, expansion range) of every chunk: rows of one piece, longest first, then the others."""
    whole = (pieces.order == 0) & pieces.last
    order = np.flatnonzero(whole)
    order = order[np.lexsort((-pieces.blocks[order], pieces.cut[order]))]
    for group in np.split(order, np.flatnonzero(np.diff(pieces.cut[order])) + 1):
        at = 0
        while expansions and at < len(group):  # else: an empty batch
            longest = int(pieces.blocks[group[at]])
            fits = int(np.searchsorted(-pieces.blocks[group[at:]], -_FILL * longest, side="right"))
            room = max(1, budget // (longest * unit))
            take = max(1, min(fits, room // expansions))
            members = group[at : at + take]
            step = expansions if take > 1 or room >= expansions else room
            for low in range(0, expansions, step):
                yield members, (low, min(low + step, expansions))
            at += take
    parts = np.flatnonzero(~whole)
    for row in np.split(parts, np.flatnonzero(pieces.order[parts] == 0)[1:]):
        for low in range(expansions):
            for piece in row:
                yield np.array([piece]), (low, low + 1)
