"""Several resolutions at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np

from .. import _check, _csr
from .._csr import Int64
from .._grid import Grid
from .._levels import rings
from .._stages import Levels, Space
from ..density import Ranking
from ..layout import BlockLayout
from ..pattern import Pattern
from ..segments import LongNetSegments


@dataclass(frozen=True)
class HierarchicalLevel:
    """One level of `Hierarchical`.

    Args:
        stride: Distances are multiples of this many level blocks, ≥ 1.
        window_size: Tokens between the nearest tokens of two blocks, at most; ≥ 1, or −1 for no limit.
        block_size: Tokens per block of this level, ≥ 1.
    """

    stride: int
    window_size: int
    block_size: int

    def __post_init__(self) -> None:
        _check.integer("stride", self.stride)
        if _check.integer("window_size", self.window_size, low=-1) == 0:
            raise ValueError("window_size: expected an integer ≥ 1, or -1 for everywhere, got 0")
        _check.integer("block_size", self.block_size)


_DEFAULT_LEVELS = (
    HierarchicalLevel(1, 256, 64),
    HierarchicalLevel(4, 1024, 64),
    HierarchicalLevel(16, -1, 64),
)


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """Levels of growing stride and reach, finest first.

    Each level cuts the positions into blocks of its own size and keeps the pairs of those whose distance in level
    blocks is a multiple of its stride and whose nearest tokens are at most ``window_size`` apart; nearest pairs first.
    A block of the layout belongs to every level pair that it overlaps. Levels are ranked by block size, equal ones as
    given.

    Args:
        levels: `HierarchicalLevel` objects or mappings with the same keys. Default: local (256 tokens), every 4th block
            within 1,024 tokens, every 16th everywhere, at 64 tokens per block.

    Source: Ye et al., "BP-Transformer", 2019, and the strided attention of Child et al., 2019, at block granularity.
    """

    levels: Sequence[HierarchicalLevel | Mapping[str, int]] = _DEFAULT_LEVELS

    def __post_init__(self) -> None:
        given = self.levels
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
            raise TypeError(f"levels: expected a sequence of levels, got {given!r}")
        if not given:
            raise ValueError("levels: expected at least one level, got an empty sequence")
        object.__setattr__(self, "levels", tuple(_as_level(n, level) for n, level in enumerate(given)))

    @classmethod
    def auto(cls, seq_len: int | tuple[int, int], density: float, *, block_size: int = 64) -> Hierarchical:
        """Pick the number of levels for a length and a density.

        With L levels, level n < L − 1 keeps every 4ⁿ-th block within 4ⁿ⁺¹ blocks, and the last every 4ᴸ⁻¹-th block
        everywhere. The fewest levels are taken whose geometry has at most the density asked for; if there is no such
        number, as many as the length can tell apart.

        Args:
            seq_len: Tokens of the (query, key) sequence; an integer stands for both.
            density: Active / allowed blocks, in (0, 1].
            block_size: Tokens per block, of every level.
        """
        block = _check.integer("block_size", block_size)
        space = Space(Grid((block, block), _check.pair("seq_len", seq_len), False), None)
        density = _check.density("density", density)
        farthest = max(space.grid.shape)
        levels: list[HierarchicalLevel] = []
        local = np.zeros(1, np.int64)
        while True:
            stride = 4 ** len(levels)
            everywhere = np.arange(0, farthest, stride, dtype=np.int64)
            blocks = int(rings(np.concatenate((local, everywhere))).sizes(space).sum())
            if blocks <= density * int(space.grid.allowed.sum()) or stride >= farthest:
                return cls((*levels, HierarchicalLevel(stride, -1, block)))
            levels.append(HierarchicalLevel(stride, 4 * stride * block, block))
            local = np.concatenate((local, np.arange(stride, 4 * stride + 1, stride, dtype=np.int64)))

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        block_size: int | tuple[int, int] | None = None,
        heads: int = 1,
        causal: bool = False,
        density: float | None = None,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """As `Pattern.layout`; the block size defaults to that of the level with the smallest blocks."""
        if block_size is None:
            block_size = min(level.block_size for level in self._levels())
        return self._make(seq_len, block_size, heads, causal, density, candidates)

    def _levels(self) -> list[HierarchicalLevel]:
        return list(cast(tuple[HierarchicalLevel, ...], self.levels))

    def _ranking(self, space: Space, head: int) -> Ranking:
        ordered = sorted(self._levels(), key=lambda level: level.block_size)
        return Ranking(space, tuple(_LevelPairs(level) for level in ordered))


def _as_level(n: int, level: Any) -> HierarchicalLevel:
    if isinstance(level, HierarchicalLevel):
        return level
    names = [field.name for field in fields(HierarchicalLevel)]
    if not isinstance(level, Mapping):
        raise TypeError(f"levels[{n}]: expected a HierarchicalLevel or a mapping with the keys {names}, got {level!r}")
    if set(level) != set(names):
        raise ValueError(f"levels[{n}]: expected the keys {names}, got {sorted(map(str, level))}")
    try:
        return HierarchicalLevel(**level)
    except (TypeError, ValueError) as error:
        raise type(error)(f"levels[{n}].{error}") from None


@dataclass(frozen=True)
class _LevelPairs(Levels):
    """The pairs of one level's blocks, by distance, projected onto the layout's grid.

    A row that stands at the level blocks ``first … last`` takes, at distance m · stride, the level blocks
    ``first ± m · stride … last ± m · stride``: one range of columns per row, side and m.
    """

    level: HierarchicalLevel

    def sizes(self, space: Space) -> Int64:
        stride, block = self.level.stride, self.level.block_size
        row_tokens, column_tokens = space.grid.block_size
        keys = -(-space.grid.seq_len[1] // block)
        m = np.arange(self._farthest(space) // stride + 1, dtype=np.int64)
        sides = np.where(m > 0, 1 if space.grid.causal else 2, 1)
        columns = max(-(-row_tokens // block) * block // column_tokens, 1)
        rows = space.grid.shape[0] * (keys - np.minimum(m * stride, keys - 1)) // keys
        return np.maximum(rows * sides * columns, 1)

    def _farthest(self, space: Space) -> int:
        """Greatest distance in level blocks."""
        window, block = self.level.window_size, self.level.block_size
        longest = -(-max(space.grid.seq_len) // block)
        return longest if window == -1 else min(longest, (window - 1) // block + 1)

    def blocks(self, space: Space, begin: int, end: int) -> tuple[Int64, Int64]:
        grid, stride, block = space.grid, self.level.stride, self.level.block_size
        block_k, len_k = grid.block_size[1], grid.seq_len[1]
        rows = np.nonzero(grid.allowed > 0)[0]
        first, last = (position[rows] // block for position in grid.query_spans())
        stop = (np.minimum(grid.allowed[rows] * block_k, len_k) - 1) // block + 1  # past the last level block in reach
        keys, levels = [], []
        for side, nearest, farthest in (
            (-1, -((stop - 1 - first) // stride), last // stride),
            (1, np.maximum(-(last // stride), 1), (stop - 1 - first) // stride),
        ):
            nearest = np.maximum(nearest, begin)
            count = np.maximum(np.minimum(farthest + 1, end) - nearest, 0)
            row = np.repeat(np.arange(len(rows)), count)
            m = _csr.concatenated_ranges(nearest, count)
            shift = side * stride * m
            low = np.maximum(first[row] + shift, 0) * block // block_k
            high = np.minimum((np.minimum(last[row] + shift, stop[row] - 1) + 1) * block, len_k)
            high = np.minimum((high - 1) // block_k + 1, grid.allowed[rows[row]])
            width = np.maximum(high - low, 0)
            keys.append(_csr.concatenated_ranges(rows[row] * grid.shape[1] + low, width))
            levels.append(np.repeat(m, width))
        return np.concatenate(keys), np.concatenate(levels)
