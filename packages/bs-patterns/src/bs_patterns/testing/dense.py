"""Dense oracles: every pattern's geometry and ranking, written from its formula, token by token, for small sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import (
    BigBird,
    BSLongformer,
    Butterfly,
    Custom,
    Dense,
    Difference,
    DilatedSparse,
    Fixed,
    GlobalLocal,
    Hierarchical,
    Intersection,
    LocalSlidingWindow,
    LocalWindow,
    LongNetSegments,
    Pattern,
    PerHead,
    Union,
    Variable,
)
from .._permutation import permuted

Matrix = NDArray[np.int64]
Mask = NDArray[np.bool_]
Blocks = list[tuple[int, int]]

_FAR = 2**40


@dataclass(frozen=True)
class DenseGrid:
    """Blocks of two short token sequences, everything by brute force.

    Args:
        seq_len: Tokens of the (query, key) sequence.
        block_size: Tokens per (query, key) block.
        causal: Whether only blocks with a key ≤ query pair are allowed.
        candidates: LongNet segments that restrict what may be picked.
    """

    seq_len: tuple[int, int]
    block_size: tuple[int, int]
    causal: bool = False
    candidates: LongNetSegments | None = None

    @cached_property
    def queries(self) -> list[Matrix]:
        """Absolute positions of each query block's tokens."""
        tokens = np.arange(self.seq_len[0]) + self.seq_len[1] - self.seq_len[0]
        return [tokens[n : n + self.block_size[0]] for n in range(0, len(tokens), self.block_size[0])]

    @cached_property
    def keys(self) -> list[Matrix]:
        """Absolute positions of each key block's tokens."""
        tokens = np.arange(self.seq_len[1])
        return [tokens[n : n + self.block_size[1]] for n in range(0, len(tokens), self.block_size[1])]

    @property
    def shape(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return len(self.queries), len(self.keys)

    def over_pairs(self, value: Any) -> Matrix:
        """Per block the least ``value(query positions [:, None], key positions [None, :])`` over its token pairs."""
        out = np.empty(self.shape, np.int64)
        for i, q in enumerate(self.queries):
            for j, k in enumerate(self.keys):
                out[i, j] = value(q[:, None], k[None, :]).min()
        return out

    @cached_property
    def distance(self) -> Matrix:
        """Tokens between the nearest token pair of each block."""
        return self.over_pairs(lambda q, k: np.abs(q - k))

    @cached_property
    def allowed(self) -> Mask:
        """Blocks that hold a key ≤ query pair, or all."""
        return self.over_pairs(lambda q, k: k > q) == 0 if self.causal else np.ones(self.shape, np.bool_)

    @cached_property
    def own(self) -> list[set[int]]:
        """Key blocks at the positions of each query block (negative before all keys)."""
        return [set((q // self.block_size[1]).tolist()) for q in self.queries]

    @cached_property
    def diagonal(self) -> Matrix:
        """Key block at the first position of each query block."""
        return np.array([max(int(q[0]), 0) // self.block_size[1] for q in self.queries])

    @cached_property
    def offset(self) -> Matrix:
        """Key blocks from the diagonal."""
        return np.arange(self.shape[1]) - self.diagonal[:, None]

    @cached_property
    def may_pick(self) -> Mask:
        """Allowed blocks that are candidates."""
        if self.candidates is None:
            return self.allowed
        out = np.zeros(self.shape, np.bool_)
        for length, rate in zip(self.candidates.segment_lengths, self.candidates.dilation_rates, strict=True):
            same = self.over_pairs(lambda q, k, w=length: (q // w != k // w).astype(np.int64)) == 0
            out |= same & (self.offset % rate == 0)
        return out & self.allowed

    def where(self, holds: Any) -> Mask:
        """Mask of the blocks (i, j) for which ``holds(own key blocks of row i, j)``."""
        return np.array([[holds(own, j) for j in range(self.shape[1])] for own in self.own], np.bool_)


def geometry_mask(pattern: Pattern, grid: DenseGrid, head: int = 0) -> Mask:
    """bool ``[q_blocks, kv_blocks]``: the layout of this pattern without a density."""
    picked = np.zeros(grid.shape, np.bool_)
    for stage in _stages(pattern, grid, head):
        picked |= stage >= 0
    return picked & grid.may_pick


def ranked_blocks(pattern: Pattern, grid: DenseGrid, head: int = 0, *, rest: bool = True) -> Blocks:
    """All blocks that the pattern may pick, best first: what its layouts are prefixes of.

    Args:
        pattern: A pattern of this package.
        grid: The blocks.
        head: Head index.
        rest: Whether to go on by distance after the geometry (closed patterns never do).
    """
    stages = _stages(pattern, grid, head)
    closed = is_closed(pattern)
    pool = geometry_mask(pattern, grid, head) if closed else grid.may_pick
    first = {}
    for i, j in zip(*(item.tolist() for item in np.nonzero(pool)), strict=True):
        if i not in first or grid.distance[i, j] < grid.distance[i, first[i]]:
            first[i] = j
    if rest and not closed:
        stages = [*stages, grid.distance]
    order = []
    for i, j in zip(*(item.tolist() for item in np.nonzero(pool)), strict=True):
        levels = [(n, int(stage[i, j])) for n, stage in enumerate(stages) if stage[i, j] >= 0]
        if first[i] == j:
            order.append((-1, 0, i, j))
        elif levels:
            order.append((*levels[0], i, j))
    return [(i, j) for _, _, i, j in sorted(order)]


def is_closed(pattern: Pattern, head: int = 0) -> bool:
    """Whether the pattern yields only its geometry."""
    if isinstance(pattern, PerHead):
        return is_closed(pattern.patterns[head])
    if isinstance(pattern, Union):
        return all(is_closed(item) for item in pattern.patterns)
    return isinstance(pattern, Custom | Intersection | Difference)


@singledispatch
def _stages(pattern: Pattern, grid: DenseGrid, head: int) -> list[Matrix]:
    """Per stage of the geometry, each block's level in it, or −1 for blocks that are not in it."""
    raise TypeError(f"pattern: expected a pattern of bs_patterns, got {pattern!r}")


def _level(mask: Mask, level: Any) -> Matrix:
    return np.where(mask, level, -1)


@_stages.register
def _(pattern: LocalWindow, grid: DenseGrid, head: int) -> list[Matrix]:
    return [_window(pattern.window_size, grid)]


def _window(size: int, grid: DenseGrid) -> Matrix:
    if grid.causal:  # the last `size` keys, the query's own included
        held = grid.over_pairs(lambda q, k: ((q < k) | (k < q - size + 1)).astype(np.int64)) == 0
    else:
        held = grid.over_pairs(lambda q, k: (2 * np.abs(q - k) > size).astype(np.int64)) == 0
    return _level(held, grid.distance)


@_stages.register
def _(pattern: DilatedSparse, grid: DenseGrid, head: int) -> list[Matrix]:
    level = {0: 0}
    for m in range(1, max(grid.shape) + 1):
        for rate in pattern.dilation_rates:
            level.setdefault(m * rate - (head % rate if pattern.head_offsets else 0), len(level))
    return [np.vectorize(lambda offset: level.get(offset, -1))(np.abs(grid.offset))]


@_stages.register
def _(pattern: GlobalLocal, grid: DenseGrid, head: int) -> list[Matrix]:
    tokens = pattern.global_tokens
    columns = grid.over_pairs(lambda q, k: np.where(k < tokens, 0, 1) + 0 * q) == 0
    rows = grid.over_pairs(lambda q, k: np.where((q >= 0) & (q < min(tokens, grid.seq_len[1])), 0, 1) + 0 * k) == 0
    i, j = np.indices(grid.shape)
    return [
        _level(columns, j),
        *([] if grid.causal else [_level(rows, i)]),
        _window(pattern.window_size, grid),
    ]


@_stages.register
def _(pattern: Hierarchical, grid: DenseGrid, head: int) -> list[Matrix]:
    stages = []
    for level in sorted(pattern.levels, key=lambda item: item.block_size):  # type: ignore[union-attr]
        size, stride, window = level.block_size, level.stride, level.window_size  # type: ignore[union-attr]

        def steps(q: Matrix, k: Matrix, size: int = size, stride: int = stride, window: int = window) -> Matrix:
            apart = np.abs(q // size - k // size)
            nearest = np.where(apart == 0, 0, (apart - 1) * size + 1)
            kept = (apart % stride == 0) & ((window == -1) | (nearest <= window))
            return np.where(kept, apart // stride, _FAR)

        found = grid.over_pairs(steps)
        stages.append(_level(found < _FAR, found))
    return stages


@_stages.register
def _(pattern: Butterfly, grid: DenseGrid, head: int) -> list[Matrix]:
    strides = [0] + [2**n for n in range(40) if pattern.max_stride is None or 2**n <= pattern.max_stride]
    return [
        _level(grid.where(lambda own, j, s=stride: any(max(r, 0) ^ j == s for r in own)), n)
        for n, stride in enumerate(strides)
        if stride < 2 * max(grid.shape[1], 1)
    ]


@_stages.register
def _(pattern: Dense, grid: DenseGrid, head: int) -> list[Matrix]:
    return [grid.distance]


def _sliding(blocks: int, grid: DenseGrid) -> Matrix:
    return _level(grid.where(lambda own, j: any(abs(r - j) <= blocks // 2 for r in own)), _blocks_apart(grid))


def _blocks_apart(grid: DenseGrid) -> Matrix:
    return np.array([[min(abs(r - j) for r in own) for j in range(grid.shape[1])] for own in grid.own])


def _columns(blocks: list[int], grid: DenseGrid) -> Matrix:
    order = np.array([blocks.index(j) if j in blocks else -1 for j in range(grid.shape[1])])
    return np.broadcast_to(order, grid.shape)


def _rows(blocks: list[int], grid: DenseGrid) -> Matrix:
    """Rows in the order of the first global block they stand at, then by row."""
    at = [min((blocks.index(r) for r in own if r in blocks), default=None) for own in grid.own]
    ranked = sorted((place, i) for i, place in enumerate(at) if place is not None)
    order = np.full(grid.shape[0], -1)
    for place, (_, i) in enumerate(ranked):
        order[i] = place
    return np.broadcast_to(order[:, None], grid.shape)


def _random(count: int, seed: int | None, head: int, grid: DenseGrid) -> Matrix:
    stage = np.full(grid.shape, -1)
    for i, row in enumerate(grid.allowed):
        size = int(row.sum())
        for n in range(min(count, size)):
            picks = permuted(seed or 0, head, *(np.array([value]) for value in (i, n, size)))
            stage[i, picks[0]] = n
    return stage


@_stages.register
def _(pattern: LocalSlidingWindow, grid: DenseGrid, head: int) -> list[Matrix]:
    return [_sliding(pattern.num_sliding_window_blocks, grid)]


@_stages.register
def _(pattern: BSLongformer, grid: DenseGrid, head: int) -> list[Matrix]:
    blocks = _global_blocks(pattern, grid)
    return [_sliding(pattern.num_sliding_window_blocks, grid), _columns(blocks, grid), _rows(blocks, grid)]


@_stages.register
def _(pattern: BigBird, grid: DenseGrid, head: int) -> list[Matrix]:
    blocks = list(range(pattern.num_global_blocks))
    head = head if pattern.different_layout_per_head else 0
    return [
        _sliding(pattern.num_sliding_window_blocks, grid),
        _columns(blocks, grid),
        _rows(blocks, grid),
        _random(pattern.num_random_blocks, pattern.seed, head, grid),
    ]


@_stages.register
def _(pattern: Variable, grid: DenseGrid, head: int) -> list[Matrix]:
    blocks = _global_blocks(pattern, grid)
    head = head if pattern.different_layout_per_head else 0
    return [
        _tiles(list(pattern.local_window_blocks), grid),
        _columns(blocks, grid),
        *([_rows(blocks, grid)] if pattern.horizontal_global_attention else []),
        _random(pattern.num_random_blocks, pattern.seed, head, grid),
    ]


@_stages.register
def _(pattern: Fixed, grid: DenseGrid, head: int) -> list[Matrix]:
    window, size, total = pattern.num_local_blocks, pattern.num_global_blocks, grid.shape[1]
    first = window - (1 + head % pattern.num_different_global_patterns) * size
    blocks: list[int] = []
    for start in range(0, total, window):
        begin = start + first
        if start + window > total:
            begin = max(min(begin, total - size), 0)
        blocks += [j for j in range(begin, begin + size) if j < total and j not in blocks]
    return [
        _tiles([window], grid),
        _columns(blocks, grid),
        *([_rows(blocks, grid)] if pattern.horizontal_global_attention else []),
    ]


def _tiles(sizes: list[int], grid: DenseGrid) -> Matrix:
    tile = [n for n, size in enumerate(sizes) for _ in range(size)]
    while len(tile) <= 2 * max(grid.shape) * max(grid.block_size):
        tile += [tile[-1] + 1] * sizes[-1]
    same = grid.where(lambda own, j: any(r >= 0 and tile[r] == tile[j] for r in own))
    return _level(same, _blocks_apart(grid))


def _global_blocks(pattern: BSLongformer | Variable, grid: DenseGrid) -> list[int]:
    starts = list(pattern.global_block_indices)
    ends = (
        [start + 1 for start in starts]
        if pattern.global_block_end_indices is None
        else pattern.global_block_end_indices
    )
    blocks: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        blocks += [j for j in range(start, end) if j < grid.shape[1] and j not in blocks]
    return blocks


@_stages.register
def _(pattern: PerHead, grid: DenseGrid, head: int) -> list[Matrix]:
    return _stages(pattern.patterns[head], grid, _head_of(pattern.patterns[head], head))


def _listed(blocks: Blocks, grid: DenseGrid) -> list[Matrix]:
    stage = np.full(grid.shape, -1)
    for place, (i, j) in enumerate(blocks):
        if stage[i, j] < 0:
            stage[i, j] = place
    return [stage]


@_stages.register
def _(pattern: Union, grid: DenseGrid, head: int) -> list[Matrix]:
    members = [ranked_blocks(item, grid, _head_of(item, head), rest=False) for item in pattern.patterns]
    longest = max(len(member) for member in members)
    ranks = [member[place] for place in range(longest) for member in members if place < len(member)]
    everything = sum(geometry_mask(item, grid, _head_of(item, head)).astype(int) for item in pattern.patterns)
    return _listed([block for block in ranks if np.asarray(everything)[block]], grid)


@_stages.register
def _(pattern: Intersection, grid: DenseGrid, head: int) -> list[Matrix]:
    masks = [geometry_mask(item, grid, _head_of(item, head)) for item in pattern.patterns]
    kept = np.logical_and.reduce(masks)
    ranked = ranked_blocks(pattern.patterns[0], grid, _head_of(pattern.patterns[0], head), rest=False)
    return _listed([block for block in ranked if kept[block]], grid)


@_stages.register
def _(pattern: Difference, grid: DenseGrid, head: int) -> list[Matrix]:
    masks = [geometry_mask(item, grid, _head_of(item, head)) for item in pattern.patterns]
    kept = masks[0] & ~np.logical_or.reduce([np.zeros(grid.shape, np.bool_), *masks[1:]])
    ranked = ranked_blocks(pattern.patterns[0], grid, _head_of(pattern.patterns[0], head), rest=False)
    return _listed([block for block in ranked if kept[block]], grid)


@_stages.register
def _(pattern: Custom, grid: DenseGrid, head: int) -> list[Matrix]:
    blocks: Blocks = []
    for item in pattern.fn(*grid.shape, head if pattern.per_head else 0):
        if isinstance(item, int):
            blocks += [(i, int(d) + item) for i, d in enumerate(grid.diagonal) if 0 <= d + item < grid.shape[1]]
        else:
            pairs = np.stack(np.broadcast_arrays(*item), axis=-1).reshape(-1, 2)
            blocks += [(int(i), int(j)) for i, j in pairs]
    return _listed(blocks, grid)


def _head_of(pattern: Pattern, head: int) -> int:
    return head if pattern._differs_by_head() else 0
