"""Per-row permutations: bijective, seeded, even."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns._permutation import permuted


def row(seed, head, row_id, size):
    return permuted(seed, head, np.full(size, row_id), np.arange(size), np.full(size, size))


@given(st.integers(0, 2**70), st.integers(0, 64), st.integers(0, 2**31), st.integers(1, 300))
def test_each_row_is_a_permutation(seed, head, row_id, size):
    np.testing.assert_array_equal(np.sort(row(seed, head, row_id, size)), np.arange(size))


def test_mixed_sizes_agree_with_single_rows():
    rows, sizes = np.repeat(np.arange(50), 3), np.repeat(np.arange(3, 53), 3)
    positions = np.tile(np.arange(3), 50)
    together = permuted(5, 2, rows, positions, sizes)
    apart = [row(5, 2, i, i + 3)[:3] for i in range(50)]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("size", [2, 7, 16, 100])
def test_first_values_are_even_over_rows(size):
    """Chi-squared of the first value over 20,000 rows stays under its 1 − 1e−6 quantile (normal approximation)."""
    count = 20000
    first = permuted(0, 0, np.arange(count), np.zeros(count, np.int64), np.full(count, size))
    expected = count / size
    chi2 = ((np.bincount(first, minlength=size) - expected) ** 2 / expected).sum()
    assert chi2 < (size - 1) + 4.75 * np.sqrt(2 * (size - 1)) + 12


def test_seed_head_and_row_matter():
    base = row(1, 1, 1, 64)
    for other in (row(2, 1, 1, 64), row(1, 2, 1, 64), row(1, 1, 2, 64)):
        assert (base != other).sum() > 32
