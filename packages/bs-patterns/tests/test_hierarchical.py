"""Levels: defaults, base block, projection, and the automatic choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import Hierarchical, HierarchicalLevel, LocalWindow


def test_default_levels():
    layout = Hierarchical().layout(4096)
    distance = np.abs(np.arange(64)[:, None] - np.arange(64))
    expected = (distance <= 4) | ((distance % 4 == 0) & (distance <= 16)) | (distance % 16 == 0)
    assert layout.block_size == (64, 64)
    np.testing.assert_array_equal(layout.to_dense()[0], expected)


def test_the_smallest_block_is_the_base():
    levels = [
        {"stride": 16, "window_size": -1, "block_size": 128},
        {"stride": 1, "window_size": 128, "block_size": 32},
        {"stride": 4, "window_size": 512, "block_size": 64},
    ]
    pattern = Hierarchical(levels)
    layout = pattern.layout(4096)
    assert layout.block_size == (32, 32)
    coarse = np.abs(np.arange(32)[:, None] - np.arange(32)) % 16 == 0
    assert layout.to_dense()[0][coarse.repeat(4, axis=0).repeat(4, axis=1)].all()
    assert pattern.layout(4096, block_size=(64, 32)).block_size == (64, 32)
    # Finest first: a small density holds the finest level's blocks, whatever the order they were given in.
    few = pattern.layout(4096, density=0.03)
    assert few <= LocalWindow(256).layout(4096, block_size=32)


@given(st.integers(1, 2**20), st.floats(0.001, 1.0), st.sampled_from([16, 64, 1024]))
def test_auto_takes_the_fewest_levels_that_fit(length, density, block_size):
    pattern = Hierarchical.auto(length, density, block_size=block_size)
    levels = pattern.levels
    assert levels[-1].window_size == -1
    assert [level.stride for level in levels] == [4**n for n in range(len(levels))]
    if -(-length // block_size) > 2000:
        return
    fits = [Hierarchical(_levels(n, block_size)).layout(length).density <= density for n in range(1, len(levels) + 1)]
    assert pattern == Hierarchical(_levels(len(levels), block_size))
    assert not any(fits[:-1])
    assert fits[-1] or levels[-1].stride * block_size >= length


def _levels(count, block):
    local = [HierarchicalLevel(4**n, 4 * 4**n * block, block) for n in range(count - 1)]
    return [*local, HierarchicalLevel(4 ** (count - 1), -1, block)]


def test_auto_is_the_default_in_the_middle():
    assert Hierarchical.auto(8192, 0.2) == Hierarchical()
    assert len(Hierarchical.auto(8192, 1.0).levels) == 1
    assert len(Hierarchical.auto(8192, 0.01).levels) == 5
    pattern = Hierarchical.auto((512, 8192), 0.2)
    assert pattern.layout((512, 8192)).density <= 0.2
    assert pattern.layout((512, 8192), density=0.2).density == pytest.approx(0.2, abs=8 / 1024)
