"""Cutting a ranking at a density.

A ranking orders every block of one head that may be picked: first each row's block nearest the diagonal, then the
stages of its geometry, then the rest by distance; ties by (row, column). A layout of density d is the prefix with
``max(round(d · allowed), rows that have a block)`` blocks, hence ``a ≤ b`` implies ``layout(a) ⊆ layout(b)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import floor

import numpy as np

from ._csr import Int64
from ._stages import Near, Space, Stage


@dataclass(frozen=True)
class Ranking:
    """The ranking of one head's blocks.

    Attributes:
        space: What may be picked.
        stages: The geometry, best stage first.
        closed: The geometry is all there is: nothing follows by distance.
        unbounded: If the geometry alone bounds nothing, why; asking for it is then an error.
    """

    space: Space
    stages: tuple[Stage, ...]
    closed: bool = False
    unbounded: str | None = None

    def geometry(self) -> Int64:
        """Ascending keys of the geometry."""
        if self.unbounded is not None:
            raise ValueError(self.unbounded)
        picked = np.empty(0, np.int64)
        for stage in self.stages:
            picked = stage.extend(self.space, picked, None, None)
        return picked

    def geometry_in_order(self, count: int | None = None) -> Int64:
        """The geometry's keys in rank order; at least its best ``count``, if there are so many."""
        trace: list[Int64] = []
        if count is None:
            geometry = self.geometry()
            self.prefix(len(self.first) + len(geometry), trace, rest=False)
            ordered = np.concatenate(trace)
            return ordered[np.isin(ordered, geometry, assume_unique=True)]
        self.prefix(max(count, len(self.first)), trace, rest=False)
        return np.concatenate(trace)

    @cached_property
    def first(self) -> Int64:
        """Each row's block nearest the diagonal, ascending."""
        if not self.closed:
            return self.space.nearest()
        keys = self.geometry()
        rows = keys // self.space.grid.shape[1]
        order = np.lexsort((keys, self.space.grid.distance(rows, keys - rows * self.space.grid.shape[1]), rows))
        return keys[order[np.unique(rows[order], return_index=True)[1]]]

    def target(self, density: float) -> int:
        """How many blocks the layout of this density has, if there are as many."""
        return max(len(self.first), floor(density * int(self.space.grid.allowed.sum()) + 0.5))

    def prefix(self, count: int, trace: list[Int64] | None = None, *, rest: bool = True) -> Int64:
        """Ascending keys of the best ``count`` blocks, or of all if there are fewer.

        Args:
            count: At least ``len(self.first)``.
            trace: If a list, the same keys are appended to it in rank order, in pieces.
            rest: Whether to go on by distance when the geometry is used up.
        """
        picked = self.first
        if trace is not None:
            trace.append(picked)
        stages = self.stages
        if rest and not self.closed:
            # What a last stage by distance holds is where the rest by distance begins.
            stages = (*(stages[:-1] if stages and isinstance(stages[-1], Near) else stages), Near())
        for stage in stages:
            if len(picked) >= count:
                break
            picked = stage.extend(self.space, picked, count, trace)
        return picked
