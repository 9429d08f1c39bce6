"""The classic configurations against loops written from DeepSpeed's documentation of its sparsity configs."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import BigBird, BSLongformer, Dense, Fixed, LocalSlidingWindow, Variable

BLOCK = 16
ATTENTION = ["bidirectional", "unidirectional"]


def blank(blocks):
    return np.zeros((blocks, blocks), bool)


def visible(mask, attention):
    """What a causal model sees: DeepSpeed left some blocks above the diagonal, for the caller's mask to hide."""
    return np.tril(mask) if attention == "unidirectional" else mask


def sliding_window(blocks, window):
    mask = blank(blocks)
    for row in range(blocks):
        mask[row, max(0, row - window // 2) : row + window // 2 + 1] = True
    return mask


def global_blocks(mask, starts, ends, horizontal=True):
    for start, end in zip(starts, ends or [start + 1 for start in starts], strict=True):
        mask[:, start:end] = True
        if horizontal:
            mask[start:end, :] = True
    return mask


def tiles(blocks, sizes):
    mask, start, n = blank(blocks), 0, 0
    while start < blocks:
        size = sizes[min(n, len(sizes) - 1)]
        mask[start : start + size, start : start + size] = True
        start, n = start + size, n + 1
    return mask


def made(config, blocks):
    layout = config.layout(blocks * BLOCK)
    assert layout.block_size == (BLOCK, BLOCK)
    return layout.to_dense()


@given(st.integers(1, 40), st.booleans())
def test_dense(blocks, per_head):
    mask = made(Dense(4, BLOCK, per_head), blocks)
    assert mask.shape == (4 if per_head else 1, blocks, blocks)
    assert mask.all()


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(ATTENTION))
def test_local_sliding_window(blocks, window, attention):
    mask = made(LocalSlidingWindow(4, BLOCK, window, attention), blocks)[0]
    np.testing.assert_array_equal(mask, visible(sliding_window(blocks, window), attention))


def test_local_sliding_window_is_unidirectional_by_default():
    assert LocalSlidingWindow(4).layout(64).causal


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(0, 50), max_size=4), st.sampled_from(ATTENTION))
def test_longformer(blocks, window, starts, attention):
    for ends in (None, [start + 3 for start in starts]):
        mask = made(BSLongformer(4, BLOCK, False, window, starts, ends, attention), blocks)[0]
        expected = global_blocks(sliding_window(blocks, window), starts, ends)
        np.testing.assert_array_equal(mask, visible(expected, attention))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 6), st.sampled_from(ATTENTION))
def test_big_bird(blocks, window, size, count, attention):
    mask = made(BigBird(4, BLOCK, True, count, window, size, attention), blocks)
    fixed = visible(global_blocks(sliding_window(blocks, window), [0], [size]), attention)
    assert mask.shape[0] == 4
    assert (mask >= fixed).all()
    extra = (mask & ~fixed).sum(axis=2)
    assert (extra <= count).all()
    if attention == "bidirectional" and count:
        # Random blocks are drawn from the whole row: what is missing fell onto fixed ones.
        assert (mask.sum(axis=2) >= np.minimum(count, blocks)).all()
    if not count:
        np.testing.assert_array_equal(mask, np.broadcast_to(fixed, mask.shape))


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.integers(0, 50), max_size=3),
    st.sampled_from([("bidirectional", False), ("bidirectional", True), ("unidirectional", False)]),
)
def test_variable(blocks, sizes, starts, direction):
    attention, horizontal = direction
    mask = made(Variable(4, BLOCK, False, 0, sizes, starts, None, attention, horizontal), blocks)[0]
    expected = global_blocks(tiles(blocks, sizes), starts, None, horizontal)
    np.testing.assert_array_equal(mask, visible(expected, attention))


@given(
    st.integers(1, 40),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([("bidirectional", False), ("bidirectional", True), ("unidirectional", False)]),
)
def test_fixed(blocks, sizes, direction):
    attention, horizontal = direction
    size, versions = sizes
    window = size * versions
    masks = made(Fixed(4, BLOCK, True, window, size, attention, horizontal, versions), blocks)
    for head, mask in enumerate(masks):
        expected = tiles(blocks, [window])
        first = window - (1 + head % versions) * size
        for start in range(0, blocks, window):
            begin = start + first if start + window <= blocks else max(0, min(start + first, blocks - size))
            global_blocks(expected, [begin], [begin + size], horizontal)
        np.testing.assert_array_equal(mask, visible(expected, attention))


def test_random_blocks_are_seeded_and_differ_by_row_head_and_seed():
    def blocks(seed, per_head=True):
        config = BigBird(num_heads=2, different_layout_per_head=per_head, num_random_blocks=8, seed=seed)
        return config.layout(16 * 256)

    first = blocks(0)
    assert first == blocks(None) == blocks(0)
    assert first != blocks(1)
    dense = first.to_dense()
    assert (dense[0] != dense[1]).any()
    assert blocks(0, per_head=False).heads == 1
    copies = BigBird(num_random_blocks=8, seed=0).layout(16 * 256, heads=3).to_dense()
    assert (copies == copies[0]).all()
    np.testing.assert_array_equal(copies[0], blocks(0, per_head=False).to_dense()[0])


def test_layout_arguments_override_the_configuration():
    config = BSLongformer(num_heads=8, block=32)
    assert config.layout(256).block_size == (32, 32)
    assert config.layout(256, block_size=64).block_size == (64, 64)
    assert config.layout(256, heads=8).heads == 8
    assert config.layout(256, causal=True).causal
    assert config.layout(1000).seq_len == (1000, 1000)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Fixed(num_heads=0), ValueError, "num_heads: expected an integer ≥ 1, got 0"),
        (lambda: Fixed(block=1.5), TypeError, "block: expected an integer ≥ 1, got 1.5"),
        (lambda: Fixed(different_layout_per_head=1), TypeError, "different_layout_per_head: expected True or False"),
        (
            lambda: Fixed(num_local_blocks=5, num_global_blocks=2),
            ValueError,
            "num_global_blocks: expected a divisor of",
        ),
        (lambda: Fixed(num_local_blocks=0), ValueError, "num_local_blocks: expected an integer ≥ 1, got 0"),
        (
            lambda: Fixed(4, 16, True, num_different_global_patterns=5),
            ValueError,
            "num_different_global_patterns: expected at most num_local_blocks / num_global_blocks = 4, got 5",
        ),
        (
            lambda: Fixed(num_different_global_patterns=2),
            ValueError,
            "num_different_global_patterns: expected 1 unless different_layout_per_head=True, got 2",
        ),
        (
            lambda: Fixed(attention="unidirectional", horizontal_global_attention=True),
            ValueError,
            "horizontal_global_attention: expected False with attention='unidirectional', got True",
        ),
        (lambda: BSLongformer(attention="both"), ValueError, "attention: expected 'unidirectional' or 'bidirectional'"),
        (lambda: BSLongformer(num_sliding_window_blocks=0), ValueError, "num_sliding_window_blocks: expected"),
        (
            lambda: BSLongformer(global_block_indices=[-1]),
            ValueError,
            "global_block_indices[0]: expected an integer ≥ 0",
        ),
        (lambda: BSLongformer(global_block_indices=3), TypeError, "global_block_indices: expected a sequence"),
        (
            lambda: BSLongformer(global_block_indices=[1, 2], global_block_end_indices=[3]),
            ValueError,
            "global_block_end_indices: expected 2 of them, got 1",
        ),
        (
            lambda: Variable(global_block_indices=[4], global_block_end_indices=[4]),
            ValueError,
            "global_block_end_indices[0]: expected more than 4, got 4",
        ),
        (lambda: Variable(local_window_blocks=[]), ValueError, "local_window_blocks: expected at least one integer"),
        (
            lambda: Variable(seed=3),
            ValueError,
            "seed: expected None when num_random_blocks=0 (nothing is random), got 3",
        ),
        (
            lambda: BigBird(seed=2**64),
            ValueError,
            "seed: expected an integer ≥ 0 and below 2**64, got 18446744073709551616",
        ),
        (lambda: BigBird(seed=-1), ValueError, "seed: expected an integer ≥ 0, got -1"),
        (lambda: BigBird(num_random_blocks=-1), ValueError, "num_random_blocks: expected an integer ≥ 0, got -1"),
        (lambda: Fixed(num_heads=4).layout(64, heads=3), ValueError, "heads: expected 1 or num_heads=4, got 3"),
        (
            lambda: Fixed(attention="unidirectional").layout(64, causal=False),
            ValueError,
            "causal: expected True (or nothing) with attention='unidirectional', got False",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
