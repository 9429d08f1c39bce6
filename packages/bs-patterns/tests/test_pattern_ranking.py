"""Every pattern against its dense oracle: the geometry, and the ranking cut at every density."""

import warnings
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import DilatedSparse, LongNetSegments, Pattern
from bs_patterns.testing import (
    DenseGrid,
    block_sizes,
    geometry_mask,
    is_closed,
    patterns,
    per_head_patterns,
    ranked_blocks,
    segments,
    seq_lens,
)

HEADS = 3


@given(patterns(bounded=True), seq_lens(), block_sizes(), st.booleans(), st.none() | segments())
def test_geometry_is_the_formula(pattern, seq_len, block_size, causal, candidates):
    layout = pattern.layout(seq_len, block_size=block_size, heads=HEADS, causal=causal, candidates=candidates)
    grid = DenseGrid(seq_len, block_size, causal, candidates)
    for head in range(HEADS):
        np.testing.assert_array_equal(layout.to_dense()[head], geometry_mask(pattern, grid, head))


@given(patterns(), seq_lens(), block_sizes(), st.booleans(), st.none() | segments(), st.floats(0.001, 1.0))
def test_layout_is_a_prefix_of_the_ranking(pattern, seq_len, block_size, causal, candidates, density):
    grid = DenseGrid(seq_len, block_size, causal, candidates)
    ranked = [ranked_blocks(pattern, grid, head) for head in range(HEADS)]
    rows = [len({i for i, _ in blocks}) for blocks in ranked]
    targets = [max(floor(density * grid.allowed.sum() + 0.5), count) for count in rows]
    arguments = {"block_size": block_size, "heads": HEADS, "causal": causal, "density": density}
    short = any(target > len(blocks) for target, blocks in zip(targets, ranked, strict=True))
    if short and candidates is None:
        assert is_closed(pattern)
        with pytest.raises(ValueError, match="density: expected at most"):
            pattern.layout(seq_len, **arguments)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout = pattern.layout(seq_len, candidates=candidates, **arguments)
    assert bool(caught) == short
    for head, blocks in enumerate(ranked):
        expected = np.zeros(grid.shape, bool)
        for block in blocks[: targets[head]]:
            expected[block] = True
        np.testing.assert_array_equal(layout.to_dense()[head], expected)
    layout.validate()


@given(per_head_patterns(), seq_lens(), block_sizes(), st.booleans(), st.floats(0.001, 1.0))
def test_per_head_stacks_its_patterns(pattern, seq_len, block_size, causal, density):
    layout = pattern.layout(seq_len, block_size=block_size, causal=causal, density=density)
    grid = DenseGrid(seq_len, block_size, causal)
    assert layout.heads == len(pattern.patterns)
    for head in range(layout.heads):
        count = int(layout.indptr[head, -1] - layout.indptr[head, 0])
        expected = sorted(ranked_blocks(pattern, grid, head)[:count])
        assert list(zip(*np.nonzero(layout.to_dense()[head]), strict=True)) == expected


@given(patterns(), seq_lens(), block_sizes(), st.booleans(), st.none() | segments(), st.data())
def test_layouts_nest(pattern: Pattern, seq_len, block_size, causal, candidates, data):
    low, high = sorted(data.draw(st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0))))
    arguments = {"block_size": block_size, "heads": 2, "causal": causal, "candidates": candidates}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            small, large = (pattern.layout(seq_len, density=density, **arguments) for density in (low, high))
        except ValueError:
            assert is_closed(pattern)
            assert candidates is None
            return
    assert small <= large


def test_rate_one_alone_is_an_error():
    pattern = DilatedSparse([1, 2])
    with pytest.raises(ValueError, match=r"dilation_rates: expected rates ≥ 2 .* got \(1, 2\)"):
        pattern.layout(256)
    assert pattern.layout(256, density=0.5).density == pytest.approx(0.5, abs=0.25)
    assert pattern.layout(256, candidates=LongNetSegments([128], [1])).nnz == 8


def test_too_few_candidates_warn_and_say_what_was_met():
    with pytest.warns(UserWarning, match=r"only 8 of 16 allowed blocks .* density 0.5 and not 0.9"):
        layout = DilatedSparse([2]).layout(256, density=0.9, candidates=LongNetSegments([128], [1]))
    assert layout.nnz == 8


@given(patterns(bounded=True), seq_lens(), block_sizes(), st.booleans())
def test_geometry_is_the_same_in_waves_of_any_size(pattern, seq_len, block_size, causal):
    whole = pattern.layout(seq_len, block_size=block_size, heads=2, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bs_patterns._stages._WAVE", 1)
        assert pattern.layout(seq_len, block_size=block_size, heads=2, causal=causal) == whole
