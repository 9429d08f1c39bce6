"""Hypothesis strategies for layouts, patterns and their arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Butterfly,
    Custom,
    Dense,
    Difference,
    DilatedSparse,
    Fixed,
    GlobalLocal,
    Hierarchical,
    HierarchicalLevel,
    Intersection,
    LocalSlidingWindow,
    LocalWindow,
    LongNetSegments,
    Pattern,
    PerHead,
    Union,
    Variable,
)


@st.composite
def seq_lens(draw: st.DrawFn, max_len: int = 48) -> tuple[int, int]:
    """(query, key) lengths from 1 to ``max_len``, equal half of the time."""
    length = draw(st.integers(1, max_len))
    return length, draw(st.just(length) | st.integers(1, max_len))


@st.composite
def block_sizes(draw: st.DrawFn, max_block: int = 8) -> tuple[int, int]:
    """(query, key) block sizes from 1 to ``max_block``, equal half of the time."""
    size = draw(st.integers(1, max_block))
    return size, draw(st.just(size) | st.integers(1, max_block))


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    max_len: int = 48,
    max_block: int = 16,
    max_heads: int = 4,
    causal: bool | None = None,
    seq_len: tuple[int, int] | None = None,
    block_size: tuple[int, int] | None = None,
    heads: int | None = None,
) -> BlockLayout:
    """Layouts of every kind: empty rows, no block at all, one block, everything, short last blocks, unequal sizes.

    Args:
        draw: Supplied by Hypothesis.
        max_len: Longest sequence in tokens.
        max_block: Largest block in tokens.
        max_heads: Most heads.
        causal: Fix the causal flag.
        seq_len: Fix the (query, key) lengths.
        block_size: Fix the (query, key) block sizes.
        heads: Fix the number of heads.
    """
    seq_len = draw(seq_lens(max_len)) if seq_len is None else seq_len
    block_size = draw(block_sizes(max_block)) if block_size is None else block_size
    heads = draw(st.integers(1, max_heads)) if heads is None else heads
    causal = draw(st.booleans()) if causal is None else causal
    shape = (heads, -(-seq_len[0] // block_size[0]), -(-seq_len[1] // block_size[1]))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = random.random(shape) < density
    if draw(st.booleans()):
        mask[:, random.random(shape[1]) < 0.3] = False
    return BlockLayout.from_dense(mask, block_size=block_size, seq_len=seq_len, causal=causal)


@st.composite
def segments(draw: st.DrawFn, max_len: int = 48) -> LongNetSegments:
    """One to three (segment length, dilation rate) pairs."""
    pairs = draw(st.lists(st.tuples(st.integers(1, max_len), st.integers(1, 5)), min_size=1, max_size=3))
    return LongNetSegments(tuple(w for w, _ in pairs), tuple(r for _, r in pairs))


def _hierarchical() -> st.SearchStrategy[Pattern]:
    windows = st.just(-1) | st.integers(1, 40)
    level = st.builds(HierarchicalLevel, st.integers(1, 5), windows, st.integers(1, 12))
    return st.builds(Hierarchical, st.lists(level, min_size=1, max_size=3))


def _dilated(min_rate: int) -> st.SearchStrategy[Pattern]:
    return st.builds(DilatedSparse, st.lists(st.integers(min_rate, 7), min_size=1, max_size=3), st.booleans())


@st.composite
def _globals(draw: st.DrawFn) -> dict[str, Any]:
    starts = draw(st.lists(st.integers(0, 9), max_size=3))
    lengths = draw(st.none() | st.just([draw(st.integers(1, 3)) for _ in starts]))
    ends = None if lengths is None else [a + n for a, n in zip(starts, lengths, strict=True)]
    return {"global_block_indices": starts, "global_block_end_indices": ends}


@st.composite
def _classic(draw: st.DrawFn) -> Pattern:
    kind = draw(st.sampled_from([Dense, LocalSlidingWindow, BSLongformer, BigBird, Fixed, Variable]))
    per_head = draw(st.booleans())
    count, seed = draw(st.sampled_from([(0, None), (1, 7), (3, 2**40)]))
    window = draw(st.integers(1, 7))
    if kind is Dense:
        return Dense()
    if kind is LocalSlidingWindow:
        return LocalSlidingWindow(num_sliding_window_blocks=window, attention="bidirectional")
    if kind is BSLongformer:
        return BSLongformer(num_sliding_window_blocks=window, **draw(_globals()))
    if kind is BigBird:
        return BigBird(
            different_layout_per_head=per_head,
            num_random_blocks=count,
            num_sliding_window_blocks=window,
            num_global_blocks=draw(st.integers(1, 3)),
            seed=seed,
        )
    if kind is Fixed:
        size, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        return Fixed(
            different_layout_per_head=per_head,
            num_local_blocks=size * groups,
            num_global_blocks=size,
            horizontal_global_attention=draw(st.booleans()),
            num_different_global_patterns=groups if per_head else 1,
        )
    return Variable(
        different_layout_per_head=per_head,
        num_random_blocks=count,
        local_window_blocks=draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        horizontal_global_attention=draw(st.booleans()),
        seed=seed,
        **draw(_globals()),
    )


@st.composite
def _custom(draw: st.DrawFn) -> Pattern:
    fractions = draw(st.lists(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), min_size=1, max_size=12))
    offsets = draw(st.lists(st.integers(-9, 9), min_size=1, max_size=4))

    def fn(q_blocks: int, kv_blocks: int, head: int) -> list[object]:
        pairs = [(int(a * q_blocks), [int(b * kv_blocks), head % kv_blocks]) for a, b in fractions]
        return [*pairs[: len(pairs) // 2], *offsets, *pairs[len(pairs) // 2 :]]

    return Custom(fn, per_head=draw(st.booleans()))


def patterns(*, bounded: bool = False, compositions: bool = True) -> st.SearchStrategy[Pattern]:
    """Patterns of one head, with small parameters.

    Args:
        bounded: Only patterns whose geometry alone is a layout (no dilation rate 1).
        compositions: Include unions, intersections, differences and user functions; the last three are closed: they
            yield their geometry and nothing else.
    """
    simple = st.one_of(
        st.builds(LocalWindow, st.integers(1, 40)),
        _dilated(2 if bounded else 1),
        st.builds(GlobalLocal, st.integers(1, 20), st.integers(1, 20)),
        _hierarchical(),
        st.builds(Butterfly, st.none() | st.integers(1, 8)),
        _classic(),
    )
    if not compositions:
        return simple
    closed = patterns(bounded=True, compositions=False) | _custom()
    members = st.lists(closed, min_size=1, max_size=3)
    combined = st.one_of(
        st.builds(Union, st.lists(simple | _custom(), min_size=1, max_size=3)),
        st.builds(Intersection, members),
        st.builds(Difference, members),
        _custom(),
    )
    return simple | combined


def per_head_patterns() -> st.SearchStrategy[PerHead]:
    """One pattern per head."""
    return st.builds(PerHead, st.lists(patterns(compositions=False), min_size=1, max_size=3))
