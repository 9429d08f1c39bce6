"""Stages of a ranking: each ranks some blocks of one head, and knows how to find its best ones without listing all.

A block of one head is the key ``row * columns + column``; sets of blocks are ascending unique int64 keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from . import _csr
from ._csr import Bool, Int64
from ._grid import Grid
from .segments import LongNetSegments

#: Blocks to list at a time, at least, where all are wanted: bounds the memory of the work arrays.
_WAVE = 2**21


@dataclass(frozen=True)
class Space:
    """The blocks of one head that a ranking may pick: the allowed ones, restricted to the candidates if there are."""

    grid: Grid
    candidates: LongNetSegments | None

    def admits(self, keys: Int64) -> Bool:
        """Whether each key is a candidate (all keys given are allowed)."""
        if self.candidates is None:
            return np.ones(len(keys), np.bool_)
        rows = keys // self.grid.shape[1]
        return self.candidates.admits(self.grid, rows, keys - rows * self.grid.shape[1])

    def nearest(self) -> Int64:
        """Each row's block nearest the diagonal."""
        rows = np.nonzero(self.grid.allowed > 0)[0].astype(np.int64)
        keys = rows * self.grid.shape[1] + self.grid.diagonal[rows]
        return keys[self.admits(keys)]


class Stage(ABC):
    """Blocks with a rank. `extend` picks them in rank order; equal ranks are picked by (row, column)."""

    @abstractmethod
    def extend(self, space: Space, picked: Int64, count: int | None, trace: list[Int64] | None) -> Int64:
        """Add this stage's best blocks to ``picked`` until there are ``count`` (None: all of them).

        Args:
            space: What may be picked.
            picked: Keys that earlier stages picked.
            count: How many keys to return at most; at least ``len(picked)``.
            trace: If a list, the added keys are appended to it in rank order.
        """


def add_best(picked: Int64, keys: Int64, rank: Int64, count: int | None, trace: list[Int64] | None) -> Int64:
    """Add the best-ranked of the ascending unique ``keys`` (none of them picked) until there are ``count``."""
    room = len(keys) if count is None else min(len(keys), count - len(picked))
    if room < len(keys):
        worst = np.partition(rank, room - 1)[room - 1] if room else -1
        keep = rank < worst
        ties = np.nonzero(rank == worst)[0]
        keep[ties[: room - int(keep.sum())]] = True
        keys, rank = keys[keep], rank[keep]
    if trace is not None and len(keys):
        trace.append(keys[np.argsort(rank, kind="stable")])
    return _csr.union(picked, keys) if len(keys) else picked


class Levels(Stage):
    """A stage whose blocks come in levels 0, 1, 2, … that can be listed level by level."""

    @abstractmethod
    def sizes(self, space: Space) -> Int64:
        """Per level, the number of blocks in it, or more."""

    @abstractmethod
    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        """Allowed blocks of levels ``begin … end − 1``: keys (any order, repeats allowed) and their levels."""

    def extend(self, space: Space, picked: Int64, count: int | None, trace: list[Int64] | None) -> Int64:
        """List levels in waves just large enough, and cut the last one."""
        sizes = np.concatenate(([0], np.cumsum(self.sizes(space))))
        begin, last, waste = 0, len(sizes) - 1, 1
        while begin < last and (count is None or len(picked) < count):
            if count is None:
                wave = max(_WAVE, len(picked))
            else:
                wave = min(waste * (count - len(picked)), count)
                waste *= 2  # what a wave fell short of, candidates or repeats took
            end = int(np.clip(np.searchsorted(sizes, sizes[begin] + wave), begin + 1, last))
            keys, level = self.blocks(space, begin, end)
            if space.candidates is not None:
                admitted = space.admits(keys)
                keys, level = keys[admitted], level[admitted]
            keys, level = best_of_each(keys, level)
            new = ~is_member(keys, picked)
            picked = add_best(picked, keys[new], level[new], count, trace)
            begin = end
        return picked


def best_of_each(keys: Int64, level: Int64) -> tuple[Int64, Int64]:
    """Ascending unique keys, each with its lowest level."""
    if len(keys) < 2 or (keys[1:] > keys[:-1]).all():
        return keys, level
    bits = int(level.max()).bit_length()
    if int(keys.max()).bit_length() + bits < 63:
        both = np.sort((keys << bits) | level)
        keys, level = both >> bits, both & ((1 << bits) - 1)
    else:
        order = np.lexsort((level, keys))
        keys, level = keys[order], level[order]
    first = np.empty(len(keys), np.bool_)
    first[0] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first], level[first]


def is_member(keys: Int64, ascending: Int64) -> Bool:
    """Whether each of the ascending keys is in ``ascending``."""
    if not len(ascending):
        return np.zeros(len(keys), np.bool_)
    if len(ascending) * 8 < len(keys):
        found = np.zeros(len(keys), np.bool_)
        at = np.searchsorted(keys, ascending)
        hit = at < len(keys)
        at, wanted = at[hit], ascending[hit]
        found[at[keys[at] == wanted]] = True
        return found
    at = np.searchsorted(ascending, keys)
    return ascending[np.minimum(at, len(ascending) - 1)] == keys


@dataclass(frozen=True)
class Near(Stage):
    """Blocks at most ``reach`` tokens away (None: any distance), nearest first.

    The blocks within a distance are one range of columns per row, so the distance at which a count is reached is found
    by bisection over sums of range lengths: only the result is ever listed.
    """

    reach: int | None = None

    def extend(self, space: Space, picked: Int64, count: int | None, trace: list[Int64] | None) -> Int64:
        """Find the distance that suffices, then list the ranges."""
        farthest = sum(space.grid.seq_len)
        reach = farthest if self.reach is None else min(self.reach, farthest)
        if space.candidates is not None:
            return self._extend_candidates(space, space.candidates, picked, count, reach, trace)
        if count is not None and len(picked) >= count:
            return picked
        grid = space.grid
        apart = _distances(grid, picked)
        counts = np.sort(apart)

        def size(distance: int) -> int:
            """How many blocks are picked or within the distance."""
            low, high = grid.within(distance)
            return len(picked) + int((high - low).sum()) - int(np.searchsorted(counts, distance, side="right"))

        if count is None or size(reach) <= count:
            merged = _with_ranges(grid, picked[apart > reach], *grid.within(reach))
        else:
            low, high = -1, reach  # too few within low, enough within high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if size(middle) < count else (low, middle)
            inner_low, inner_high, ring = _ring(grid, high)
            ring = ring[~is_member(ring, picked)]
            outside = picked[apart >= high]
            missing = count - len(outside) - int((inner_high - inner_low).sum())
            merged = _with_ranges(grid, outside, inner_low, inner_high, ring[:missing])
        if trace is not None:
            added = _csr.difference(merged, picked)
            trace.append(added[np.argsort(_distances(grid, added), kind="stable")])
        return merged

    def _extend_candidates(
        self,
        space: Space,
        candidates: LongNetSegments,
        picked: Int64,
        count: int | None,
        reach: int,
        trace: list[Int64] | None,
    ) -> Int64:
        """List the candidates within a distance that doubles (in blocks found) until there are enough."""
        distance = -1
        wanted = count
        while distance < reach and (count is None or len(picked) < count):
            distance = reach if wanted is None else _reaching(space.grid, candidates, wanted, distance + 1, reach)
            keys = candidates.within(space.grid, distance)
            keys = keys[~is_member(keys, picked)]
            picked = add_best(picked, keys, _distances(space.grid, keys), count, trace)
            wanted = None if wanted is None else 2 * wanted
        return picked


def _reaching(grid: Grid, candidates: LongNetSegments, wanted: int, low: int, high: int) -> int:
    """The least distance in [low, high] that holds ``wanted`` candidates by count_within; else ``high``."""
    while low < high:
        middle = (low + high) // 2
        if candidates.count_within(grid, middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def _distances(grid: Grid, keys: Int64) -> Int64:
    rows = keys // grid.shape[1]
    return grid.distance(rows, keys - rows * grid.shape[1])


def _ring(grid: Grid, distance: int) -> tuple[Int64, Int64, Int64]:
    """Per row the range ``[low, high)`` of columns nearer than ``distance``, and ascending keys of those just there."""
    outer_low, outer_high = grid.within(distance)
    if distance == 0:
        low = high = outer_high
    else:
        low, high = grid.within(distance - 1)
        empty = low >= high
        low, high = np.where(empty, outer_high, low), np.where(empty, outer_high, high)
    starts = np.stack((outer_low, high), axis=1) + (np.arange(len(low), dtype=np.int64) * grid.shape[1])[:, None]
    counts = np.stack((low - outer_low, outer_high - high), axis=1)
    return low, high, _csr.concatenated_ranges(starts.ravel(), counts.ravel())


def _with_ranges(grid: Grid, outside: Int64, low: Int64, high: Int64, more: Int64 | None = None) -> Int64:
    """The columns ``[low, high)`` of each row, and the ascending ``outside`` and ``more``, which are not among them."""
    ranges = _csr.concatenated_ranges(np.arange(len(low), dtype=np.int64) * grid.shape[1] + low, high - low)
    extra = [item for item in (outside, more) if item is not None and len(item)]
    return np.sort(np.concatenate((ranges, *extra)), kind="stable") if extra else ranges
