"""Hypothesis strategies: layouts, owners and whole planning problems, small but odd."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_patterns import BlockLayout

from ..placement import Placement


@st.composite
def layouts(
    draw: st.DrawFn, *, max_blocks: int = 9, square: bool = False, causal: bool | None = None, heads: int | None = None
) -> BlockLayout:
    """Any layout: uneven block sizes, a short last block, empty rows and columns, several heads.

    Args:
        draw: Given by Hypothesis.
        max_blocks: Most blocks along either axis, about.
        square: Queries and keys of one length.
        causal: Fix the flag.
        heads: Fix the number of heads.
    """
    block_q = draw(st.sampled_from([1, 2, 4, 6]))
    block_k = draw(st.sampled_from([1, 2, 3, 4]))
    len_q = draw(st.integers(1, max_blocks * max(block_q, block_k)))
    len_k = len_q if square else draw(st.integers(1, max_blocks * max(block_q, block_k)))
    n_heads = draw(st.sampled_from([1, 2, 4, 6])) if heads is None else heads
    shape = (n_heads, -(-len_q // block_q), -(-len_k // block_k))
    mask = draw(hnp.arrays(np.bool_, shape, elements=st.booleans(), fill=st.booleans()))
    flag = draw(st.booleans()) if causal is None else causal
    return BlockLayout.from_dense(mask, block_size=(block_q, block_k), seq_len=(len_q, len_k), causal=flag)


@st.composite
def owners(draw: st.DrawFn, seq_len: int, block_size: int, world_size: int) -> Placement:
    """Any placement of a sequence: one of the rules, or an arbitrary owner per block, ranks without tokens included."""
    rule = draw(st.sampled_from(["contiguous", "zigzag", "stripe", "owner"]))
    if rule != "owner":
        return getattr(Placement, rule)(seq_len, world_size, block_size=block_size)
    blocks = -(-seq_len // block_size)
    owner = draw(st.lists(st.integers(0, world_size - 1), min_size=blocks, max_size=blocks))
    return Placement.from_owner(owner, seq_len, world_size, block_size=block_size)


@st.composite
def plan_cases(draw: st.DrawFn, *, max_world: int = 6) -> tuple[BlockLayout, Placement, Placement, int]:
    """(layout, query placement, key placement, kv heads) that fit together."""
    layout = draw(layouts())
    world = draw(st.integers(1, max_world))
    heads = layout.shape[0]
    kv_heads = draw(
        st.sampled_from([1, 3]) if heads == 1 else st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])
    )
    if layout.seq_len[0] == layout.seq_len[1]:
        place = draw(owners(layout.seq_len[0], math.lcm(*layout.block_size), world))
        return layout, place, place, kv_heads
    place = draw(owners(layout.seq_len[0], layout.block_size[0], world))
    return layout, place, draw(owners(layout.seq_len[1], layout.block_size[1], world)), kv_heads
