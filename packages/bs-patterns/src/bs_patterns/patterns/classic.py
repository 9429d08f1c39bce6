"""The classic configurations, with the arguments of the sparsity configs that DeepSpeed had until 2026.

They count in key blocks. A query block stands at the key blocks that hold its positions, which with equal block sizes
and lengths is the block of the same index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _check
from .._csr import Int64
from .._grid import Grid
from .._levels import Columns, Random, Rows, Spans
from .._stages import Near, Space, Stage
from ..density import Ranking
from ..layout import BlockLayout
from ..pattern import Pattern
from ..segments import LongNetSegments

_SIZES = (
    "num_local_blocks",
    "num_global_blocks",
    "num_different_global_patterns",
    "num_sliding_window_blocks",
)


class ClassicPattern(Pattern):
    """What the classic configurations share.

    Attributes:
        num_heads: Heads of the attention layer; None: as many as `layout` is asked for.
        block: Tokens per block, unless `layout` is given a block size.
        different_layout_per_head: Give each head its own layout (they differ where the pattern says so) instead of one
            that all heads share.
        attention: "bidirectional", or "unidirectional" for causal layouts.
    """

    num_heads: int | None
    block: int
    different_layout_per_head: bool = False
    attention: str = "bidirectional"

    def __post_init__(self) -> None:
        if self.num_heads is not None:
            _check.integer("num_heads", self.num_heads)
        _check.integer("block", self.block)
        _check.boolean("different_layout_per_head", self.different_layout_per_head)
        for name in _SIZES:
            if hasattr(self, name):
                _check.integer(name, getattr(self, name))
        if self.attention not in ("unidirectional", "bidirectional"):
            raise ValueError(f"attention: expected 'unidirectional' or 'bidirectional', got {self.attention!r}")

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        block_size: int | tuple[int, int] | None = None,
        heads: int | None = None,
        causal: bool | None = None,
        density: float | None = None,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """As `Pattern.layout`, with defaults of its own.

        ``block_size`` defaults to ``block``, ``heads`` to ``num_heads`` if layouts differ per head, else 1, and
        ``causal`` to whether ``attention`` is unidirectional. Any sequence length works; none has to be divisible.
        """
        if heads is None:
            heads = self.num_heads if self.different_layout_per_head and self.num_heads is not None else 1
        elif self.num_heads is not None and _check.integer("heads", heads) not in (1, self.num_heads):
            raise ValueError(f"heads: expected 1 or num_heads={self.num_heads}, got {heads}")
        if causal is None:
            causal = self._unidirectional
        return self._make(seq_len, self.block if block_size is None else block_size, heads, causal, density, candidates)

    @property
    def _unidirectional(self) -> bool:
        return self.attention == "unidirectional"

    def _check_direction(self, grid: Grid) -> None:
        if self._unidirectional and not grid.causal:
            raise ValueError("causal: expected True (or nothing) with attention='unidirectional', got False")


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
        return Ranking(space, (_sliding(space.grid, self.num_sliding_window_blocks),))


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
        _check_horizontal(self.attention, self.horizontal_global_attention)
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
        columns = (starts[:, None] + np.arange(self.num_global_blocks)).ravel()
        columns = _unique_in_order(columns[columns < blocks])
        stages = (_windows(space.grid, np.array([window])), Columns(columns))
        return Ranking(space, (*stages, _rows_at(space.grid, columns)) if self.horizontal_global_attention else stages)


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
        _check_horizontal(self.attention, self.horizontal_global_attention)
        _check_random(self.num_random_blocks, self.seed)
        object.__setattr__(
            self, "local_window_blocks", _check.integers("local_window_blocks", self.local_window_blocks)
        )
        _set_globals(self, self.global_block_indices, self.global_block_end_indices)

    def _differs_by_head(self) -> bool:
        return self.different_layout_per_head and self.num_random_blocks > 0

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = _global_blocks(space.grid, self.global_block_indices, self.global_block_end_indices)
        stages: list[Stage] = [_windows(space.grid, np.array(self.local_window_blocks)), Columns(columns)]
        if self.horizontal_global_attention:
            stages.append(_rows_at(space.grid, columns))
        return Ranking(space, (*stages, Random(self.num_random_blocks, self.seed or 0, head)))


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
        _check_random(self.num_random_blocks, self.seed)

    def _differs_by_head(self) -> bool:
        return self.different_layout_per_head and self.num_random_blocks > 0

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = np.arange(min(self.num_global_blocks, space.grid.shape[1]), dtype=np.int64)
        return Ranking(
            space,
            (
                _sliding(space.grid, self.num_sliding_window_blocks),
                Columns(columns),
                _rows_at(space.grid, columns),
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
        _set_globals(self, self.global_block_indices, self.global_block_end_indices)

    def _ranking(self, space: Space, head: int) -> Ranking:
        self._check_direction(space.grid)
        columns = _global_blocks(space.grid, self.global_block_indices, self.global_block_end_indices)
        window = _sliding(space.grid, self.num_sliding_window_blocks)
        return Ranking(space, (window, Columns(columns), _rows_at(space.grid, columns)))


def _check_horizontal(attention: str, horizontal: bool) -> None:
    if _check.boolean("horizontal_global_attention", horizontal) and attention != "bidirectional":
        raise ValueError(f"horizontal_global_attention: expected False with attention={attention!r}, got True")


def _check_random(count: int, seed: int | None) -> None:
    _check.integer("num_random_blocks", count, low=0)
    if seed is not None:
        _check.integer("seed", seed, low=0)
        if count == 0:
            raise ValueError(f"seed: expected None when num_random_blocks=0 (nothing is random), got {seed}")


def _set_globals(pattern: ClassicPattern, starts: Sequence[int], ends: Sequence[int] | None) -> None:
    """Check and freeze the global block ranges."""
    starts = _check.integers("global_block_indices", starts, low=0) if len(starts) else ()
    object.__setattr__(pattern, "global_block_indices", starts)
    if ends is None:
        return
    ends = _check.integers("global_block_end_indices", ends) if len(ends) else ()
    object.__setattr__(pattern, "global_block_end_indices", ends)
    if len(starts) != len(ends):
        raise ValueError(f"global_block_end_indices: expected {len(starts)} of them, got {len(ends)}")
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end <= start:
            raise ValueError(f"global_block_end_indices[{n}]: expected more than {start}, got {end}")


def _global_blocks(grid: Grid, starts: Sequence[int], ends: Sequence[int] | None) -> Int64:
    """The global key blocks that exist, in the order given."""
    blocks = grid.shape[1]
    stops = [start + 1 for start in starts] if ends is None else ends
    ranges = [np.arange(min(a, blocks), min(b, blocks), dtype=np.int64) for a, b in zip(starts, stops, strict=True)]
    return _unique_in_order(np.concatenate([np.empty(0, np.int64), *ranges]))


def _unique_in_order(values: Int64) -> Int64:
    return values[np.sort(np.unique(values, return_index=True)[1])]


def _rows_at(grid: Grid, blocks: Int64) -> Rows:
    """The query blocks that stand at any of the key blocks, in the order of the key blocks."""
    first, last = grid.row_spans()
    begin, end = np.searchsorted(last, blocks), np.searchsorted(first, blocks, side="right")
    rows = [np.arange(a, b, dtype=np.int64) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    return Rows(_unique_in_order(np.concatenate([np.empty(0, np.int64), *rows])))


def _sliding(grid: Grid, blocks: int) -> Spans:
    """A window of this many blocks around each row."""
    first, last = grid.row_spans()
    return Spans(first, last, first - blocks // 2, last + blocks // 2 + 1)


def _windows(grid: Grid, sizes: Int64) -> Spans:
    """Windows of these sizes that tile the key blocks; the last size repeats."""
    first, last = grid.row_spans()
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    repeats = max(grid.shape[1] - int(bounds[-1]), 0) // int(sizes[-1]) + 1
    bounds = np.concatenate((bounds, bounds[-1] + sizes[-1] * np.arange(1, repeats + 1)))
    low = np.searchsorted(bounds, np.maximum(first, 0), side="right") - 1
    high = np.searchsorted(bounds, np.maximum(last, 0), side="right")
    return Spans(first, last, bounds[low], np.where(last < 0, 0, bounds[high]))
