"""Orders of a layout's blocks against slow, obvious ones; LRU misses against a literal cache."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_patterns import BlockLayout
from bs_patterns.ordering import (
    Locality,
    group_rows,
    hilbert_index,
    hilbert_order,
    locality,
    longest_first_order,
    morton_order,
    reuse_distances,
    row_order,
)

ORDERS = [row_order, hilbert_order, morton_order, longest_first_order]


@st.composite
def layouts(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)))
    mask = draw(hnp.arrays(np.bool_, shape))
    return BlockLayout.from_dense(mask, block_size=(8, 4), seq_len=(shape[1] * 8 - 3, shape[2] * 4))


@st.composite
def layouts_with_orders(draw):
    layout = draw(layouts())
    make = draw(st.sampled_from([*ORDERS, None]))
    if make is None:
        return layout, np.array(draw(st.permutations(range(layout.nnz))), np.int64)
    return layout, make(layout)


def interleaved(row, column):
    bits = max(int(row), int(column)).bit_length()
    return sum(((row >> k & 1) << (2 * k + 1)) | ((column >> k & 1) << (2 * k)) for k in range(bits))


def sort_key(make, layout, head, row, column):
    if make is row_order:
        return (row, column)
    if make is hilbert_order:
        return int(hilbert_index([row], [column], layout.shape[1:])[0])
    if make is morton_order:
        return interleaved(row, column)
    return (-len(layout.rows(head, row)), row, column)


@pytest.mark.parametrize("make", ORDERS, ids=lambda make: make.__name__)
@given(layout=layouts())
def test_order_equals_a_plain_sort(make, layout):
    entries = list(zip(*(part.tolist() for part in layout.to_coo()), strict=True))
    expected = sorted(range(layout.nnz), key=lambda n: (entries[n][0], sort_key(make, layout, *entries[n])))
    order = make(layout)
    assert order.dtype == np.int64
    assert order.tolist() == expected


@pytest.mark.parametrize("side", [3, 8, 13, 32])
def test_hilbert_order_of_a_full_layout_steps_to_neighbours(side):
    layout = BlockLayout.from_dense(np.ones((2, side, side + 5), bool), block_size=4, seq_len=(4 * side, 4 * side + 20))
    head, row, column = (part[hilbert_order(layout)] for part in layout.to_coo())
    assert np.array_equal(head, np.repeat([0, 1], side * (side + 5)))
    moved = np.abs(np.diff(row)) + np.abs(np.diff(column))
    assert (moved[np.diff(head) == 0] == 1).all()


@given(layouts_with_orders())
def test_group_rows_keeps_first_visits_and_key_order(case):
    layout, order = case
    head, row, _ = layout.to_coo()
    rows: dict[tuple[int, int], list[int]] = {}
    for entry in order.tolist():
        rows.setdefault((head[entry], row[entry]), []).append(entry)
    assert group_rows(layout, order).tolist() == [entry for entries in rows.values() for entry in entries]


def simulated(layout, order, cache_blocks):
    """Misses of a literal LRU cache."""
    head, _, column = layout.to_coo()
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for entry in order.tolist():
        key = (int(head[entry]), int(column[entry]))
        if key in cache:
            cache.move_to_end(key)
            continue
        misses += 1
        cache[key] = None
        if len(cache) > cache_blocks:
            cache.popitem(last=False)
    return misses


@given(layouts_with_orders(), st.integers(1, 70))
def test_locality_equals_a_literal_lru_cache(case, cache_blocks):
    layout, order = case
    head, _, column = layout.to_coo()
    found = locality(layout, order, cache_blocks)
    compulsory = len(set(zip(head.tolist(), column.tolist(), strict=True)))
    assert found == Locality(cache_blocks, layout.nnz, compulsory, simulated(layout, order, cache_blocks))
    assert found.hits + found.misses == found.accesses
    assert found.miss_rate == (found.misses / layout.nnz if layout.nnz else 0.0)


@given(layouts_with_orders())
def test_reuse_distances_count_distinct_keys_in_between(case):
    layout, order = case
    head, _, column = layout.to_coo()
    keys = list(zip(head[order].tolist(), column[order].tolist(), strict=True))
    expected = []
    for n, key in enumerate(keys):
        before = [m for m in range(n) if keys[m] == key]
        expected.append(len(set(keys[before[-1] + 1 : n])) if before else -1)
    assert reuse_distances(layout, order).tolist() == expected


def test_a_large_order_against_the_literal_cache():
    rng = np.random.default_rng(7)
    layout = BlockLayout.from_coo(
        rng.integers(0, 2, 20_000), rng.integers(0, 500, 20_000), rng.integers(0, 333, 20_000),
        block_size=16, seq_len=(8000, 5328), heads=2,
    )  # fmt: skip
    for order in (hilbert_order(layout), rng.permutation(layout.nnz)):
        distances = reuse_distances(layout, order)
        for cache_blocks in (1, 32, 500):
            misses = simulated(layout, order, cache_blocks)
            assert locality(layout, order, cache_blocks).misses == misses
            assert ((distances < 0) | (distances >= cache_blocks)).sum() == misses


def test_hilbert_order_beats_row_order_where_rows_do_not_fit():
    layout = BlockLayout.from_dense(np.ones((1, 64, 64), bool), block_size=4, seq_len=256)
    by_row = locality(layout, row_order(layout), 16).misses
    by_curve = locality(layout, hilbert_order(layout), 16).misses
    assert by_row == 64 * 64
    assert by_curve < by_row / 4


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1], ValueError, r"order: expected one position per active block, \[3\], got \[2\]"),
        ([0, 1, 3], ValueError, r"order: expected positions in \[0, 2\], got 3"),
        ([0, 1, -1], ValueError, "got -1"),
        ([0, 1, 1], ValueError, "got none at 2"),
        ([0.0, 1.0, 2.0], TypeError, "order: expected integers, got float64"),
        ("row", TypeError, "order: expected integers"),
    ],
)
@pytest.mark.parametrize("use", [group_rows, lambda layout, order: locality(layout, order, 2)], ids=["group", "lru"])
def test_bad_orders_are_refused(use, order, error, message):
    layout = BlockLayout.from_dense(np.eye(3, dtype=bool)[None], block_size=4, seq_len=12)
    with pytest.raises(error, match=message):
        use(layout, order)


def test_bad_cache_and_layout_are_refused():
    layout = BlockLayout.from_dense(np.eye(3, dtype=bool)[None], block_size=4, seq_len=12)
    with pytest.raises(ValueError, match="cache_blocks: expected an integer ≥ 1, got 0"):
        locality(layout, row_order(layout), 0)
    with pytest.raises(TypeError, match="cache_blocks"):
        locality(layout, row_order(layout), 1.5)
    for make in ORDERS:
        with pytest.raises(TypeError, match="layout: expected a BlockLayout"):
            make(np.eye(3))
