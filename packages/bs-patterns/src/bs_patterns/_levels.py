"""Concrete stages that come in levels: diagonals, columns, rows, spans, random blocks and lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import _csr
from ._csr import Int64
from ._permutation import permuted
from ._stages import Levels, Space


@dataclass(frozen=True, eq=False)
class Offsets(Levels):
    """Whole diagonals, ``offsets[n]`` key blocks from the main one (negative: earlier keys); ``level[n]`` ascends."""

    offsets: Int64
    level: Int64

    def sizes(self, space: Space) -> Int64:
        return np.bincount(self.level, self._lengths(space, self.offsets), minlength=1).astype(np.int64)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        grid = space.grid
        chosen = slice(*np.searchsorted(self.level, (begin, end)))
        offsets, level = self.offsets[chosen], self.level[chosen]
        kept = self._lengths(space, offsets) > 0
        offsets, level = offsets[kept], level[kept]
        ascending = np.argsort(offsets, kind="stable")
        offsets, level = offsets[ascending], level[ascending]
        cols = grid.diagonal[:, None] + offsets
        valid = (cols >= 0) & (cols < grid.allowed[:, None])
        cols += (np.arange(grid.shape[0], dtype=np.int64) * grid.shape[1])[:, None]
        return cols[valid], np.broadcast_to(level, cols.shape)[valid]

    @staticmethod
    def _lengths(space: Space, offsets: Int64) -> Int64:
        """Allowed blocks on each diagonal."""
        grid = space.grid
        before = np.sort(grid.diagonal[grid.allowed > 0])
        after = np.sort(grid.allowed - grid.diagonal)
        lengths = np.where(
            offsets < 0,
            len(before) - np.searchsorted(before, -offsets),
            len(after) - np.searchsorted(after, offsets, side="right"),
        )
        if space.candidates is not None:
            lengths[~space.candidates.admits_offsets(grid, np.abs(offsets))] = 0
        return lengths


def rings(distances: Int64) -> Offsets:
    """Diagonals at the given distances on both sides of the main one, one level per distance; repeats are dropped."""
    first = np.sort(np.unique(distances, return_index=True)[1])
    distances = distances[first]
    level = np.arange(len(distances), dtype=np.int64)
    sides = np.stack((-distances, distances), axis=1).ravel()
    keep = np.ones(len(sides), np.bool_)
    keep[1::2] = distances != 0
    return Offsets(sides[keep], np.repeat(level, 2)[keep])


@dataclass(frozen=True, eq=False)
class Columns(Levels):
    """Whole columns, one level each, in the order given; column n starts at row ``first_rows[n]`` (None: row 0)."""

    columns: Int64
    first_rows: Int64 | None = None

    def sizes(self, space: Space) -> Int64:
        return np.full(len(self.columns), space.grid.shape[0], np.int64)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        grid = space.grid
        columns = self.columns[begin:end]
        rows = np.arange(grid.shape[0], dtype=np.int64)[:, None]
        valid = columns < grid.allowed[:, None]
        if self.first_rows is not None:
            valid &= rows >= self.first_rows[begin:end]
        level = np.broadcast_to(np.arange(begin, end, dtype=np.int64), valid.shape)
        return (rows * grid.shape[1] + columns)[valid], level[valid]


@dataclass(frozen=True, eq=False)
class Rows(Levels):
    """Whole rows, one level each, in the order given."""

    rows: Int64

    def sizes(self, space: Space) -> Int64:
        return space.grid.allowed[self.rows]

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        rows = self.rows[begin:end]
        counts = space.grid.allowed[rows]
        keys = _csr.concatenated_ranges(rows * space.grid.shape[1], counts)
        return keys, np.repeat(np.arange(begin, end, dtype=np.int64), counts)


@dataclass(frozen=True, eq=False)
class Listed(Levels):
    """An explicit list of allowed blocks; ``level`` ascends."""

    keys: Int64
    level: Int64

    def sizes(self, space: Space) -> Int64:
        return np.bincount(self.level, minlength=1).astype(np.int64)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        chosen = slice(*np.searchsorted(self.level, (begin, end)))
        return self.keys[chosen], self.level[chosen]


@dataclass(frozen=True, eq=False)
class Spans(Levels):
    """Columns ``[low, high)`` of each row, by their distance in key blocks from the row's own, ``first … last``."""

    first: Int64
    last: Int64
    low: Int64
    high: Int64

    def sizes(self, space: Space) -> Int64:
        before = np.sort(self.first - np.maximum(self.low, 0))
        after = np.sort(np.minimum(self.high, space.grid.shape[1]) - 1 - self.last)
        distance = np.arange(1, max(int(before[-1]), int(after[-1]), 0) + 1)
        own = int((self.last - self.first + 1).sum())
        both = len(before) - np.searchsorted(before, distance) + len(after) - np.searchsorted(after, distance)
        return np.concatenate(([own], both)).astype(np.int64)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        low = np.clip(self.low, 0, space.grid.allowed)
        high = np.clip(self.high, 0, space.grid.allowed)
        left, right = self.first - end + 1, self.last + end
        if begin == 0:
            starts, stops = np.clip(left, low, high)[:, None], np.clip(right, low, high)[:, None]
        else:
            starts = np.clip(np.stack((left, self.last + begin), axis=1), low[:, None], high[:, None])
            stops = np.clip(np.stack((self.first - begin + 1, right), axis=1), low[:, None], high[:, None])
        counts = np.maximum(stops - starts, 0)
        offset = (np.arange(len(low), dtype=np.int64) * space.grid.shape[1])[:, None]
        keys = _csr.concatenated_ranges((starts + offset).ravel(), counts.ravel())
        rows = np.repeat(np.arange(len(low)), counts.sum(axis=1))
        cols = keys - rows * space.grid.shape[1]
        return keys, np.maximum(np.maximum(self.first[rows] - cols, cols - self.last[rows]), 0)


@dataclass(frozen=True)
class Random(Levels):
    """``count`` pseudorandom allowed blocks per row, level n holding every row's n-th."""

    count: int
    seed: int
    head: int

    def sizes(self, space: Space) -> Int64:
        return np.full(min(self.count, space.grid.shape[1]), space.grid.shape[0], np.int64)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        grid = space.grid
        level = np.tile(np.arange(begin, end, dtype=np.int64), grid.shape[0])
        rows = np.repeat(np.arange(grid.shape[0], dtype=np.int64), end - begin)
        kept = level < grid.allowed[rows]
        rows, level = rows[kept], level[kept]
        cols = permuted(self.seed, self.head, rows, level, grid.allowed[rows])
        return rows * grid.shape[1] + cols, level
