"""LongNet's branches cut into pieces that one attention call computes, and what `union` leaves out of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._dilated_rows import KeptRows

__all__ = ["Branch", "Piece", "branches_for_union", "overlap_mask", "pieces_of", "positions_of", "runs_left_out"]

#: Below this many rows, blocks are too small to leave out keys by the layout.
_LEAST_BLOCK = 16


class Branch(NamedTuple):
    """One segment length with its dilation rate."""

    length: int
    rate: int


@dataclass(frozen=True)
class Piece:
    """Queries and keys of the same segments of a branch: several whole segments, or a part of one.

    Attributes:
        branch: the branch.
        segment: index of the first segment.
        segments: how many segments; more than one only where queries and keys cover them whole.
        q, kv: the kept rows of the queries and of the keys.
        q_offset, kv_offset: the first token of each, in the tensors.
    """

    branch: Branch
    segment: int
    segments: int
    q: KeptRows
    kv: KeptRows
    q_offset: int
    kv_offset: int

    @property
    def q_tokens(self) -> int:
        """Query tokens that the piece covers."""
        return self.segments * (self.q.stop - self.q.start)

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, Sq, F, X] → the piece's [B, N, T, F, X]."""
        return x[:, self.q_offset :][:, : self.q_tokens].unflatten(1, (self.segments, self.q.stop - self.q.start))

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, Sk, F, X] → the piece's [B, N, T, F, X]."""
        tokens = self.kv.stop - self.kv.start
        return x[:, self.kv_offset :][:, : self.segments * tokens].unflatten(1, (self.segments, tokens))


def pieces_of(branch: Branch, q_range: tuple[int, int], kv_range: tuple[int, int], heads: int) -> list[Piece]:
    """Cut a branch along its segments.

    Args:
        branch: length and rate.
        q_range, kv_range: absolute positions ``[start, stop)`` of queries and keys.
        heads: query heads.

    Returns:
        At most five pieces in ascending order: the whole segments together, and the cut ones. Segments without a query
        or without a key have none.
    """
    (q0, q1), (k0, k1), length = q_range, kv_range, branch.length
    low, high = -(-max(q0, k0) // length), min(q1, k1) // length
    cut = {p // length for p in (q0, q1 - 1, k0, k1 - 1)}
    starts = [(m, 1) for m in cut if not low <= m < high]
    if low < high:
        starts.append((low, high - low))
    pieces = []
    for segment, segments in sorted(starts):
        begin, end = segment * length, (segment + segments) * length
        qa, qb, ka, kb = max(q0, begin), min(q1, end), max(k0, begin), min(k1, end)
        if qa < qb and ka < kb:
            spans = [(qa, qb), (ka, kb)] if segments == 1 else [(begin, begin + length)] * 2
            q, kv = (KeptRows(a - begin, b - begin, branch.rate, heads) for a, b in spans)
            pieces.append(Piece(branch, segment, segments, q, kv, qa - q0, ka - k0))
    return pieces


def branches_for_union(branches: list[Branch], longest: int) -> list[Branch]:
    """The branches in an order in which as much as possible is left out whole, without those that add nothing.

    Args:
        branches: as given.
        longest: the last position + 1; longer segments are this long where no position is negative.
    """
    ordered = sorted(branches, key=lambda b: (b.rate, -b.length))
    kept: list[Branch] = []
    for branch in ordered:
        clamped = Branch(min(branch.length, longest), branch.rate)
        earlier = [(b, Branch(min(b.length, longest), b.rate)) for b in kept]
        if not any(_overlap(a, branch) == 0 or _overlap(b, clamped) == 0 for a, b in earlier):
            kept.append(branch)
    return kept


def _overlap(earlier: Branch, branch: Branch) -> int | None:
    """Rows per run of the branch's rows within which an earlier branch has reached every pair already.

    0: everything is reached; None: what is reached is not such runs.
    """
    (first, coarse), (length, rate) = earlier, branch
    if rate % coarse:
        return None
    if first == length or (first % length == 0 and length % coarse == 0):
        return 0
    if length % first == 0 and first % rate == 0:
        return first // rate
    return None


def runs_left_out(piece: Piece, earlier: Sequence[Branch]) -> tuple[int, ...] | None:
    """The run lengths of `_overlap` if blocks can leave them out, else None."""
    runs = [_overlap(branch, piece.branch) for branch in earlier]
    found = [run for run in runs if run]
    if len(found) < len(runs):
        return None
    if found and math.gcd(*found, piece.q.first, piece.kv.first) < min(_LEAST_BLOCK, piece.kv.rows):
        return None
    return tuple(found)


def positions_of(piece: Piece, rows: KeptRows, device: torch.device) -> Tensor:
    """int64[N, H, n]; absolute positions of query or key rows, outside the range where there is no token."""
    begins = (piece.segment + torch.arange(piece.segments, device=device)) * piece.branch.length
    return begins[:, None, None] + rows.indices(device)


def overlap_mask(piece: Piece, earlier: Sequence[Branch], device: torch.device) -> Tensor | None:
    """Which pairs no earlier branch has: bool[N, H, n, n], True = keep; None where the plan leaves them out by blocks.

    Args:
        piece: the piece.
        earlier: the branches before the piece's.
        device: of the result.
    """
    if not earlier or runs_left_out(piece, earlier) is not None:
        return None
    q, k = (positions_of(piece, rows, device) for rows in (piece.q, piece.kv))
    reached = torch.zeros((), dtype=torch.bool, device=device)
    for branch in earlier:
        # A pair is the earlier branch's if both keep their token there, in one segment.
        of_query, of_key = _segment_where_kept(q, branch, -1), _segment_where_kept(k, branch, -2)
        reached = reached | (of_query[..., :, None] == of_key[..., None, :])
    return ~reached


def _segment_where_kept(positions: Tensor, branch: Branch, nowhere: int) -> Tensor:
    """Segment of the positions [N, H, n] that a branch keeps, ``nowhere`` of the others."""
    offsets = torch.arange(positions.shape[1], device=positions.device)[:, None] % branch.rate
    segment = positions.div(branch.length, rounding_mode="floor")
    kept = (positions - segment * branch.length) % branch.rate == offsets
    # Positions may be negative: twice the segment (even, or odd below zero) keeps clear of the two markers.
    return torch.where(kept, segment.abs() * 2 + (segment < 0).to(segment.dtype), nowhere)
