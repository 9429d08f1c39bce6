"""Dilated diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _check
from .._levels import rings
from .._stages import Space
from ..density import Ranking
from ..pattern import Pattern


@dataclass(frozen=True)
class DilatedSparse(Pattern):
    """The diagonals ±m·r blocks from the main one, for every dilation rate r and m = 0, 1, 2, …; by m, then r.

    Distances are counted in key blocks from the one that holds the query block's first position. Rate 1 alone covers
    every block, so it needs a density or candidates to bound it.

    Args:
        dilation_rates: Rates in blocks, ≥ 1; their order breaks ties.
        head_offsets: In layouts of several heads, move head h's diagonals (h mod r) blocks closer, to ±(m·r − h mod r),
            so that the heads together reach every distance; head 0 keeps ±m·r.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers", 2019 (strided attention); the per-head
    shift follows Ding et al., "LongNet", 2023, section 3.3.
    """

    dilation_rates: Sequence[int]
    head_offsets: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilation_rates", _check.integers("dilation_rates", self.dilation_rates))
        object.__setattr__(self, "head_offsets", _check.boolean("head_offsets", self.head_offsets))

    def _differs_by_head(self) -> bool:
        return self.head_offsets

    def _ranking(self, space: Space, head: int) -> Ranking:
        farthest = max(space.grid.shape[1], 1)
        shift = head if self.head_offsets else 0
        beyond = farthest + shift + 1  # any rate this large leaves the main diagonal alone
        rates = np.array([min(rate, beyond) for rate in dict.fromkeys(self.dilation_rates)], np.int64)
        multiples = [np.arange(1, farthest // rate + 2, dtype=np.int64) for rate in rates.tolist()]
        m = np.concatenate(multiples)
        rate_index = np.repeat(np.arange(len(rates)), [len(item) for item in multiples])
        distances = (m * rates[rate_index] - shift % rates[rate_index])[np.lexsort((rate_index, m))]
        unbounded = None
        if 1 in self.dilation_rates and space.candidates is None:
            unbounded = (
                "dilation_rates: expected rates ≥ 2 when there is neither density nor candidates, "
                f"got {self.dilation_rates} (rate 1 is every block)"
            )
        return Ranking(space, (rings(np.concatenate(([0], distances[distances <= farthest]))),), unbounded=unbounded)
