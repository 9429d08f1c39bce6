"""The density promise from 1 token to 1,048,576, for every pattern."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import (
    BigBird,
    BSLongformer,
    Butterfly,
    Dense,
    DilatedSparse,
    Fixed,
    GlobalLocal,
    Hierarchical,
    LocalSlidingWindow,
    LocalWindow,
    LongNetSegments,
    Pattern,
    PerHead,
    Union,
    Variable,
)
from bs_patterns.testing import DenseGrid, patterns, seq_lens

PATTERNS: list[Pattern] = [
    LocalWindow(1024),
    DilatedSparse([1, 2, 4, 8]),
    DilatedSparse([3, 5], head_offsets=True),
    GlobalLocal(128, 1024),
    Hierarchical(),
    Hierarchical.auto(2**20, 0.01),
    Butterfly(),
    Dense(),
    BigBird(seed=1, different_layout_per_head=True, num_random_blocks=5),
    BSLongformer(global_block_indices=[0, 17, 99]),
    Fixed(different_layout_per_head=True, num_different_global_patterns=4, horizontal_global_attention=True),
    LocalSlidingWindow(num_sliding_window_blocks=9, attention="bidirectional"),
    Variable(local_window_blocks=[2, 8, 3], num_random_blocks=2),
    Union([LocalWindow(512), DilatedSparse([4]), BigBird()]),
    PerHead([LocalWindow(256), Hierarchical()]),
]

lengths = st.one_of(
    st.integers(1, 2**20),
    st.integers(0, 20).flatmap(lambda n: st.integers(2**n - 3, 2**n + 3)).filter(lambda n: 1 <= n <= 2**20),
)


def within_bound(layout, density):
    """|nnz − max(density · allowed, non-empty rows)| ≤ non-empty rows, per head."""
    allowed = layout.allowed // layout.heads
    for head in range(layout.heads):
        rows = np.diff(layout.indptr[head])
        filled = int((rows > 0).sum())
        assert abs(int(rows.sum()) - max(density * allowed, filled)) <= filled


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: repr(pattern)[:40])
@given(length=lengths, density=st.floats(0.001, 1.0), blocks=st.integers(1, 700), causal=st.booleans())
def test_met_density_is_within_the_bound_at_any_length(pattern, length, density, blocks, causal):
    block_size = -(-length // blocks)
    heads = {} if isinstance(pattern, PerHead) else {"heads": 2}
    layout = pattern.layout(length, block_size=block_size, causal=causal, density=density, **heads)
    within_bound(layout, density)
    assert (np.diff(layout.indptr, axis=1) > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: repr(pattern)[:40])
def test_a_million_tokens_nest(pattern):
    small, large = (pattern.layout(2**20, block_size=256, causal=True, density=d) for d in (0.002, 0.004))
    within_bound(small, 0.002)
    within_bound(large, 0.004)
    assert small <= large


@given(patterns(compositions=False), seq_lens(200), st.booleans(), st.floats(0.001, 1.0))
def test_bound_holds_for_cross_attention(pattern, seq_len, causal, density):
    layout = pattern.layout(seq_len, block_size=(5, 3), heads=2, causal=causal, density=density)
    within_bound(layout, density)
    grid = DenseGrid(seq_len, (5, 3), causal)
    np.testing.assert_array_equal(np.diff(layout.indptr[0]) > 0, grid.allowed.any(axis=1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: repr(pattern)[:40])
def test_full_density_is_everything(pattern):
    layout = pattern.layout((300, 500), block_size=(16, 32), causal=True, density=1.0)
    assert layout.density == 1.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: repr(pattern)[:40])
def test_density_relates_to_all_allowed_blocks_when_candidates_restrict(pattern):
    segments = LongNetSegments([2048, 8192, 65536], [1, 2, 8])
    layout = pattern.layout(65536, block_size=64, density=0.02, candidates=segments)
    within_bound(layout, 0.02)
    everything = Dense().layout(65536, block_size=64, candidates=segments)
    assert layout <= everything
