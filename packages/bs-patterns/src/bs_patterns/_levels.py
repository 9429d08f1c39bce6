"""Concrete stages that come in levels: diagonals, columns, rows, and lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import _csr
from ._csr import Int64
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
