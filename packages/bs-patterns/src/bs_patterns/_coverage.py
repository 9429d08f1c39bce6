"""A layout shrunk to a picture: how many blocks of each picture cell are active and how many are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._csr import Int64
from ._grid import Blocks


@dataclass(frozen=True)
class Coverage:
    """Counts of blocks per picture cell, summed over the heads drawn.

    Attributes:
        active: int64 ``[lines, columns]``.
        allowed: int64 ``[lines, columns]``.
        row_edges: First query block of each line, then the number of query blocks.
        column_edges: First key block of each column, then the number of key blocks.
    """

    active: Int64
    allowed: Int64
    row_edges: Int64
    column_edges: Int64

    @property
    def share(self) -> NDArray[np.float64]:
        """Active / allowed blocks of each cell; 0 where none is allowed."""
        return self.active / np.maximum(self.allowed, 1)

    @property
    def is_exact(self) -> bool:
        """Whether every cell is one block of one head."""
        return bool(self.allowed.max() == 1 and (np.diff(self.row_edges) == 1).all())


def coverage(blocks: Blocks, heads: Sequence[int], lines: int, columns: int) -> Coverage:
    """Count the blocks of some heads in a picture of at most `lines` × `columns` cells. O(nnz + q_blocks + cells).

    Args:
        blocks: Those of any layout.
        heads: Indices of its heads to draw over one another.
        lines: Most lines; fewer query blocks get a line each.
        columns: Most columns; fewer key blocks get a column each.
    """
    rows, cols = blocks.grid.shape
    row_edges, column_edges = _edges(rows, lines), _edges(cols, columns)
    line_of = np.repeat(np.arange(len(row_edges) - 1), np.diff(row_edges))
    column_of = np.repeat(np.arange(len(column_edges) - 1), np.diff(column_edges))
    shape = len(row_edges) - 1, len(column_edges) - 1
    active = np.zeros(shape, np.int64)
    for head in heads:
        row = blocks.indptr[head]
        cell = np.repeat(line_of * shape[1], np.diff(row)) + column_of[blocks.indices[row[0] : row[-1]]]
        active += np.bincount(cell, minlength=active.size).reshape(shape)
    allowed = _prefix_counts(blocks.grid.allowed_per_row(), line_of, shape, column_edges, column_of)
    return Coverage(active, allowed * len(heads), row_edges, column_edges)


def _edges(blocks: int, cells: int) -> Int64:
    cells = min(blocks, cells)
    return np.arange(cells + 1, dtype=np.int64) * blocks // cells


def _prefix_counts(
    lengths: Int64, line_of: Int64, shape: tuple[int, int], column_edges: Int64, column_of: Int64
) -> Int64:
    """Per cell, how many blocks lie in the first ``lengths[row]`` of their row."""
    filled = np.flatnonzero(lengths)
    last = column_of[lengths[filled] - 1]
    cell = line_of[filled] * shape[1] + last
    ending = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    within = lengths[filled] - column_edges[last]
    partial = np.bincount(cell, weights=within, minlength=ending.size).reshape(shape).astype(np.int64)
    passing = ending[:, ::-1].cumsum(axis=1)[:, ::-1] - ending
    return partial + passing * np.diff(column_edges)
