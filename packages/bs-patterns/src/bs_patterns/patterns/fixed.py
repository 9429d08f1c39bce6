"""Windows that tile the sequence, with the arguments of the sparsity configs that DeepSpeed once had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _check
from .._csr import Int64
from .._grid import Grid
from .._levels import Columns, Random, Spans
from .._stages import Space, Stage
from ..density import Ranking
from ._classic import ClassicPattern, check_random, global_blocks, rows_at, set_globals, unique_in_order


@dataclass(frozen=True)
class Fixed(ClassicPattern):
    """Windows that tile the sequence, then the last blocks of every window as global columns (and rows).

    Args:
        num_heads: See `ClassicPattern`.
        block: See `ClassicPattern`.
        different_layout_per_head: See `ClassicPattern`.
        num_local_blocks: Blocks per window.
        num_global_blocks: Consecutive blocks of each window that all others attend to; divides ``num_local_blocks``.
        attention: "bidirectional", or "unidirectional" for causal layouts.
        horizontal_global_attention: Whether global blocks also attend to everything (bidirectional only).
        num_different_global_patterns: Head h uses the (h mod this)-th last group of each window as its global blocks.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers", 2019.
    """

    num_heads: int | None = None
    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_horizontal(self.attention, self.horizontal_global_attention)
        groups, remainder = divmod(self.num_local_blocks, self.num_global_blocks)
        if remainder:
            raise ValueError(
                f"num_global_blocks: expected a divisor of num_local_blocks={self.num_local_blocks}, "
                f"got {self.num_global_blocks}"
            )
        if self.num_different_global_patterns > groups:
            raise ValueError(
                f"num_different_global_patterns: expected at most num_local_blocks / num_global_blocks = {groups}, "
                f"got {self.num_different_global_patterns}"
            )
        if self.num_different_global_patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                "num_different_global_patterns: expected 1 unless different_layout_per_head=True, "
                f"got {self.num_different_global_patterns}"
            )

    def _differs_by_head(self) -> bool:
        return self.num_different_global_patterns > 1

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        window, blocks = self.num_local_blocks, space.grid.shape[1]
        first = window - (1 + head % self.num_different_global_patterns) * self.num_global_blocks
        starts = np.arange(first, blocks - blocks % window, window, dtype=np.int64)
        if blocks % window:
            short = blocks - blocks % window + first
            starts = np.append(starts, max(min(short, blocks - self.num_global_blocks), 0))
        columns = (starts[:, None] + np.arange(min(self.num_global_blocks, blocks))).ravel()
        columns = unique_in_order(columns[columns < blocks])
        stages = (windows(space.grid, np.array([window])), Columns(columns))
        return Ranking(space, (*stages, rows_at(space.grid, columns)) if self.horizontal_global_attention else stages)


@dataclass(frozen=True)
class Variable(ClassicPattern):
    """Windows of given sizes, then global columns (and rows), then random blocks.

    Args:
        num_heads: See `ClassicPattern`.
        block: See `ClassicPattern`.
        different_layout_per_head: See `ClassicPattern`; random blocks differ.
        num_random_blocks: Random blocks per row (all there are, where a row has fewer).
        local_window_blocks: Blocks of the first, second, … window; the last size repeats.
        global_block_indices: Blocks that all others attend to; those past the end are left out.
        global_block_end_indices: If given, index n stands for the blocks from ``global_block_indices[n]`` up to,
            not including, ``global_block_end_indices[n]``.
        attention: "bidirectional", or "unidirectional" for causal layouts.
        horizontal_global_attention: Whether global blocks also attend to everything (bidirectional only).
        seed: Of the random blocks, ≥ 0; None: 0.

    Source: the Fixed pattern of Child et al., 2019, generalised as in DeepSpeed.
    """

    num_heads: int | None = None
    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 0
    local_window_blocks: Sequence[int] = (4,)
    global_block_indices: Sequence[int] = (0,)
    global_block_end_indices: Sequence[int] | None = None
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_horizontal(self.attention, self.horizontal_global_attention)
        check_random(self.num_random_blocks, self.seed)
        object.__setattr__(
            self, "local_window_blocks", _check.integers("local_window_blocks", self.local_window_blocks)
        )
        set_globals(self, self.global_block_indices, self.global_block_end_indices)

    def _differs_by_head(self) -> bool:
        return self.different_layout_per_head and self.num_random_blocks > 0

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = global_blocks(space.grid, self.global_block_indices, self.global_block_end_indices)
        stages: list[Stage] = [windows(space.grid, np.array(self.local_window_blocks)), Columns(columns)]
        if self.horizontal_global_attention:
            stages.append(rows_at(space.grid, columns))
        return Ranking(space, (*stages, Random(self.num_random_blocks, self.seed or 0, head)))


def check_horizontal(attention: str, horizontal: bool) -> None:
    if _check.boolean("horizontal_global_attention", horizontal) and attention != "bidirectional":
        raise ValueError(f"horizontal_global_attention: expected False with attention={attention!r}, got True")


def windows(grid: Grid, sizes: Int64) -> Spans:
    """Windows of these sizes that tile the key blocks; the last size repeats."""
    first, last = grid.row_spans()
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    repeats = max(grid.shape[1] - int(bounds[-1]), 0) // int(sizes[-1]) + 1
    bounds = np.concatenate((bounds, bounds[-1] + sizes[-1] * np.arange(1, repeats + 1)))
    low = np.searchsorted(bounds, np.maximum(first, 0), side="right") - 1
    high = np.searchsorted(bounds, np.maximum(last, 0), side="right")
    return Spans(first, last, bounds[low], np.where(last < 0, 0, bounds[high]))
