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
        first: whether these are the first blocks of their rows (else: results merge with what is there).
        expand: the range of expansions (see `Schedule`) that this chunk covers.
    """

    rows: Tensor
    blocks: Tensor
    entries: Tensor
    padding: Tensor
    max_padding: int
    cut: int
    first: bool
    expand: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All chunks of a plan.

    Attributes:
        used: int64[U]; the key blocks that any row reads, ascending; all blocks if that is most of them.
        chunks: the chunks, later pieces of long rows after earlier ones.
        workspace: elements of the largest chunk's score tile.
        gathered: key tokens of the largest chunk, over all its units.
        bytes_placed: bytes of the index and mask tensors that say where all units lie.
    """

    used: Tensor
    chunks: tuple[Chunk, ...]
    workspace: int
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
    largest = gathered = bytes_placed = 0
    for members, expand in _group_pieces(pieces, unit, expansions, budget):
        n = int(pieces.blocks[members].max())
        padding = n - pieces.blocks[members]
        take = pieces.start[members, None] + np.maximum(np.arange(n) - padding[:, None], 0)
        units = len(members) * (expand[1] - expand[0])
        largest, gathered = max(largest, units * n * unit), max(gathered, units * n * block_kv)
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
                expand=expand,
            )
        )
    on_device = torch.from_numpy(used.astype(np.int64)).to(plan.device)
    return Schedule(on_device, tuple(chunks), largest, gathered, bytes_placed)


@dataclass(frozen=True)
class _Pieces:
    """Runs of at most ``piece_blocks`` blocks of one row; ``order`` counts the pieces of a row."""

    row: np.ndarray
    order: np.ndarray
    start: np.ndarray
    blocks: np.ndarray
    cut: np.ndarray


def _split_rows(counts: np.ndarray, cuts: np.ndarray, starts: np.ndarray, piece_blocks: int) -> _Pieces:
    per_row = -(-counts // piece_blocks)
    row = np.repeat(np.arange(len(counts)), per_row)
    order = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    first = order * piece_blocks
    blocks = np.minimum(counts[row] - first, piece_blocks)
    full = counts[row] - cuts[row]
    cut = np.clip(first + blocks - full, 0, blocks)
    return _Pieces(row, order, starts[row] + first, blocks, cut)


def _group_pieces(
    pieces: _Pieces, unit: int, expansions: int, budget: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield (piece indices, expansion range) of every chunk: first pieces before later ones, longest first."""
    if not expansions:  # an empty batch
        return
    order = np.lexsort((-pieces.blocks, pieces.cut, pieces.order))
    key = np.stack((pieces.order[order], pieces.cut[order]))
    edges = np.flatnonzero((key[:, 1:] != key[:, :-1]).any(0)) + 1
    for group in np.split(order, edges):
        at = 0
        while at < len(group):
            longest = int(pieces.blocks[group[at]])
            fits = int(np.searchsorted(-pieces.blocks[group[at:]], -_FILL * longest, side="right"))
            room = max(1, budget // (longest * unit))
            take = max(1, min(fits, room // expansions))
            members = group[at : at + take]
            step = expansions if take > 1 or room >= expansions else room
            for low in range(0, expansions, step):
                yield members, (low, min(low + step, expansions))
            at += take
