"""What the classic configurations share: their arguments, their grid, and global and windowed blocks.

They count in key blocks. A query block stands at the key blocks that hold its positions, which with equal block sizes
and lengths is the block of the same index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import _check
from .._csr import Int64
from .._grid import Grid
from .._levels import Rows, Spans
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


def check_random(count: int, seed: int | None) -> None:
    _check.integer("num_random_blocks", count, low=0)
    if seed is not None:
        _check.integer("seed", seed, low=0, bits=64)
        if count == 0:
            raise ValueError(f"seed: expected None when num_random_blocks=0 (nothing is random), got {seed}")


def _integers_or_none(name: str, values: Sequence[int], low: int) -> tuple[int, ...]:
    """Check a sequence of integers that may be empty."""
    return () if isinstance(values, list | tuple) and not values else _check.integers(name, values, low=low)


def set_globals(pattern: ClassicPattern, starts: Sequence[int], ends: Sequence[int] | None) -> None:
    """Check and freeze the global block ranges."""
    starts = _integers_or_none("global_block_indices", starts, low=0)
    object.__setattr__(pattern, "global_block_indices", starts)
    if ends is None:
        return
    ends = _integers_or_none("global_block_end_indices", ends, low=1)
    object.__setattr__(pattern, "global_block_end_indices", ends)
    if len(starts) != len(ends):
        raise ValueError(f"global_block_end_indices: expected {len(starts)} of them, got {len(ends)}")
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end <= start:
            raise ValueError(f"global_block_end_indices[{n}]: expected more than {start}, got {end}")


def global_blocks(grid: Grid, starts: Sequence[int], ends: Sequence[int] | None) -> Int64:
    """The global key blocks that exist, in the order given."""
    blocks = grid.shape[1]
    stops = [start + 1 for start in starts] if ends is None else ends
    ranges = [np.arange(min(a, blocks), min(b, blocks), dtype=np.int64) for a, b in zip(starts, stops, strict=True)]
    return unique_in_order(np.concatenate([np.empty(0, np.int64), *ranges]))


def unique_in_order(values: Int64) -> Int64:
    return values[np.sort(np.unique(values, return_index=True)[1])]


def rows_at(grid: Grid, blocks: Int64) -> Rows:
    """The query blocks that stand at any of the key blocks, in the order of the key blocks."""
    first, last = grid.row_spans()
    begin, end = np.searchsorted(last, blocks), np.searchsorted(first, blocks, side="right")
    rows = [np.arange(a, b, dtype=np.int64) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    return Rows(unique_in_order(np.concatenate([np.empty(0, np.int64), *rows])))


def sliding(grid: Grid, blocks: int) -> Spans:
    """A window of this many blocks around each row."""
    first, last = grid.row_spans()
    return Spans(first, last, first - blocks // 2, last + blocks // 2 + 1)
