"""Dense, sliding windows and global blocks, with the arguments of the sparsity configs that DeepSpeed once had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .._levels import Columns, Random
from .._stages import Near, Space
from ..density import Ranking
from ._classic import ClassicPattern, check_random, global_blocks, rows_at, set_globals, sliding


@dataclass(frozen=True)
class Dense(ClassicPattern):
    """Every block; nearest first.

    Args:
        num_heads: See `ClassicPattern`.
        block: See `ClassicPattern`.
        different_layout_per_head: See `ClassicPattern`; the layouts are equal.
    """

    num_heads: int | None = None
    block: int = 16
    different_layout_per_head: bool = False

    def _ranking(self, space: Space, head: int) -> Ranking:
        return Ranking(space, (Near(),))


@dataclass(frozen=True)
class LocalSlidingWindow(ClassicPattern):
    """A sliding window; nearest first.

    Args:
        num_heads: Heads of the attention layer; None: as many as `layout` is asked for.
        block: Tokens per block, unless `layout` is given a block size.
        num_sliding_window_blocks: Blocks of the window: half of them (rounded down) on either side of the row's own.
        attention: "bidirectional", or "unidirectional" for causal layouts.

    Source: Beltagy et al., "Longformer", 2020, sliding window attention at block granularity as in DeepSpeed.
    """

    num_heads: int | None = None
    block: int = 16
    num_sliding_window_blocks: int = 3
    attention: str = "unidirectional"

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        return Ranking(space, (sliding(space.grid, self.num_sliding_window_blocks),))


@dataclass(frozen=True)
class BigBird(ClassicPattern):
    """A sliding window, then global columns and rows, then random blocks.

    Args:
        num_heads: See `ClassicPattern`.
        block: See `ClassicPattern`.
        different_layout_per_head: See `ClassicPattern`; random blocks differ.
        num_random_blocks: Random blocks per row (all there are, where a row has fewer).
        num_sliding_window_blocks: Blocks of the window: half of them (rounded down) on either side of the row's own.
        num_global_blocks: The first blocks, which attend to and are attended by all.
        attention: "bidirectional", or "unidirectional" for causal layouts.
        seed: Of the random blocks, ≥ 0; None: 0.

    Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020.
    """

    num_heads: int | None = None
    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 1
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_random(self.num_random_blocks, self.seed)

    def _differs_by_head(self) -> bool:
        return self.different_layout_per_head and self.num_random_blocks > 0

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = np.arange(min(self.num_global_blocks, space.grid.shape[1]), dtype=np.int64)
        return Ranking(
            space,
            (
                sliding(space.grid, self.num_sliding_window_blocks),
                Columns(columns),
                rows_at(space.grid, columns),
                Random(self.num_random_blocks, self.seed or 0, head),
            ),
        )


@dataclass(frozen=True)
class BSLongformer(ClassicPattern):
    """A sliding window, then global columns and rows.

    Args:
        num_heads: See `ClassicPattern`.
        block: See `ClassicPattern`.
        different_layout_per_head: See `ClassicPattern`; the layouts are equal.
        num_sliding_window_blocks: Blocks of the window: half of them (rounded down) on either side of the row's own.
        global_block_indices: Blocks that attend to and are attended by all; those past the end are left out.
        global_block_end_indices: If given, index n stands for the blocks from ``global_block_indices[n]`` up to,
            not including, ``global_block_end_indices[n]``.
        attention: "bidirectional", or "unidirectional" for causal layouts.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, at block granularity as in DeepSpeed.
    """

    num_heads: int | None = None
    block: int = 16
    different_layout_per_head: bool = False
    num_sliding_window_blocks: int = 3
    global_block_indices: Sequence[int] = (0,)
    global_block_end_indices: Sequence[int] | None = None
    attention: str = "bidirectional"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_globals(self, self.global_block_indices, self.global_block_end_indices)

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = global_blocks(space.grid, self.global_block_indices, self.global_block_end_indices)
        window = sliding(space.grid, self.num_sliding_window_blocks)
        return Ranking(space, (window, Columns(columns), rows_at(space.grid, columns)))
