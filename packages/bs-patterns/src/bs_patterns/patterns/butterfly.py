"""Butterfly connections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import _check, _csr
from .._levels import Listed
from .._stages import Space
from ..density import Ranking
from ..pattern import Pattern


@dataclass(frozen=True)
class Butterfly(Pattern):
    """The blocks (i, j) with i = j, or with i and j differing in exactly one binary digit; smallest digit first.

    log₂(blocks) + 1 blocks per row, through which any two blocks are connected in log₂(blocks) layers. A query block
    that spans several key blocks takes the partners of each.

    Args:
        max_stride: Use only digits up to this distance in key blocks, ≥ 1 (None: all).

    Source: Chen et al., "Pixelated Butterfly: Simple and Efficient Sparse Training", 2021, flat block butterfly.
    """

    max_stride: int | None = None

    def __post_init__(self) -> None:
        if self.max_stride is not None:
            object.__setattr__(self, "max_stride", _check.integer("max_stride", self.max_stride))

    def _ranking(self, space: Space, head: int) -> Ranking:
        grid = space.grid
        first, last = (np.maximum(item, 0) for item in grid.row_spans())
        rows = np.repeat(np.arange(grid.shape[0], dtype=np.int64), last - first + 1)
        own = _csr.concatenated_ranges(first, last - first + 1)
        strides = [0]
        while strides[-1] < grid.shape[1] and (self.max_stride is None or strides[-1] <= self.max_stride):
            strides.append(max(2 * strides[-1], 1))
        partners = np.array(strides[:-1], np.int64)[:, None] ^ own
        kept = partners < grid.allowed[rows]
        keys = rows * grid.shape[1] + partners
        level = np.broadcast_to(np.arange(len(partners), dtype=np.int64)[:, None], keys.shape)
        return Ranking(space, (Listed(keys[kept], level[kept]),))
