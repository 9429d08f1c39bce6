"""LongNet's segments and dilation rates, at block granularity, as a restriction on any pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _check, _csr
from ._csr import Bool, Int64
from ._grid import Grid


@dataclass(frozen=True)
class LongNetSegments:
    """The blocks that LongNet's geometry admits: ∪ₖ {same segment of length wₖ, (i − j) ≡ 0 mod rₖ}.

    Two blocks are in one segment if a token of each is; segments start at absolute position 0. The difference i − j is
    counted in key blocks from the one that holds the query block's first position, so that query and key blocks may
    differ in size and sequences in length.

    Args:
        segment_lengths: wₖ in tokens, ≥ 1.
        dilation_rates: rₖ in blocks, ≥ 1; as many as segment lengths.

    Raises:
        TypeError: A length or rate is not an integer.
        ValueError: A length or rate is below 1, or there are not equally many.

    Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023, section 3.2.
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]

    def __post_init__(self) -> None:
        lengths = _check.integers("segment_lengths", self.segment_lengths)
        rates = _check.integers("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                f"segment_lengths, dilation_rates: expected equally many, got {len(lengths)} and {len(rates)}"
            )
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    def admits(self, grid: Grid, rows: Int64, cols: Int64) -> Bool:
        """Whether each block (row, column) is a candidate."""
        columns = np.arange(grid.shape[1])
        admitted = np.zeros(len(rows), np.bool_)
        for low, high, rate in self._segments(grid):
            held = low[rows] <= cols
            held &= cols < high[rows]
            if rate > 1:
                held &= (grid.diagonal % rate)[rows] == (columns % rate)[cols]
            admitted |= held
        return admitted

    def admits_offsets(self, grid: Grid, offsets: Int64) -> Bool:
        """False for the offsets ±o from the diagonal at which no block can be a candidate (a quick, loose test)."""
        block_q, block_k = grid.block_size
        nearest = (offsets - 1) * block_k - block_q + 2
        possible = np.zeros(len(offsets), np.bool_)
        for length, rate in zip(self.segment_lengths, self.dilation_rates, strict=True):
            possible |= (offsets % rate == 0) & (nearest < length)
        return possible

    def within(self, grid: Grid, distance: int) -> Int64:
        """Ascending keys of the candidates at most ``distance`` tokens from their query block."""
        runs = []
        for first, count, rate in self._runs(grid, distance):
            rows = np.repeat(np.arange(len(count), dtype=np.int64), count)
            steps = _csr.concatenated_ranges(np.zeros_like(count), count)
            runs.append(rows * grid.shape[1] + first[rows] + steps * rate)
        return _csr.unique_keys(np.concatenate(runs)) if len(runs) > 1 else runs[0]

    def count_within(self, grid: Grid, distance: int) -> int:
        """At least the length of `within`, at most len(segment_lengths) times it; without building it."""
        return sum(int(count.sum()) for _, count, _ in self._runs(grid, distance))

    def _runs(self, grid: Grid, distance: int) -> list[tuple[Int64, Int64, int]]:
        """Per (w, r): each row's first column, the number of columns, and their step r."""
        near_low, near_high = grid.within(distance)
        runs = []
        for low, high, rate in self._segments(grid):
            low, high = np.maximum(low, near_low), np.minimum(high, near_high)
            first = low + (grid.diagonal - low) % rate
            runs.append((first, np.maximum(-((first - high) // rate), 0), rate))
        return runs

    def _segments(self, grid: Grid) -> list[tuple[Int64, Int64, int]]:
        """Per (w, r): the range of columns ``[low, high)`` that share a segment with each row, and r."""
        block_k, len_k = grid.block_size[1], grid.seq_len[1]
        q_first, q_last = grid.query_spans()
        segments = []
        for length, rate in zip(self.segment_lengths, self.dilation_rates, strict=True):
            low = np.maximum(q_first // length * length, 0) // block_k
            high = -(-np.clip((q_last // length + 1) * length, 0, len_k) // block_k)
            segments.append((low, high, rate))
        return segments
