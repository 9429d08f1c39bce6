"""The Hilbert curve of any rectangle and box: a permutation, adjacent, classic where the classic curve exists."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns.ordering import hilbert, hilbert_index, hilbert_tokens

sides = st.integers(1, 70)


def curve(rows, columns):
    """Place of every cell, int64[rows, columns]."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return hilbert_index(row, column, (rows, columns)).reshape(rows, columns)


def steps(places):
    """Manhattan length of every step of the curve whose places these are."""
    cells = np.stack(np.unravel_index(np.argsort(places, axis=None), places.shape), axis=1)
    return np.abs(np.diff(cells, axis=0)).sum(axis=1)


def classic(side, x, y):
    """The textbook bit-by-bit conversion of one cell of a square of a power of two."""
    place, step = 0, side // 2
    while step:
        right, upper = int(x & step > 0), int(y & step > 0)
        place += step * step * ((3 * right) ^ upper)
        if not upper:
            if right:
                x, y = side - 1 - x, side - 1 - y
            x, y = y, x
        step //= 2
    return place


@given(sides, sides)
def test_curve_is_a_permutation_of_neighbours_on_every_rectangle(rows, columns):
    places = curve(rows, columns)
    assert sorted(places.ravel()) == list(range(rows * columns))
    assert places[0, 0] == 0
    assert (steps(places) == 1).all()


def test_every_small_rectangle_is_adjacent():
    for rows, columns in itertools.product(range(1, 25), repeat=2):
        assert (steps(curve(rows, columns)) == 1).all(), (rows, columns)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32, 64])
def test_square_of_a_power_of_two_is_the_classic_curve(side):
    expected = [[classic(side, x, y) for x in range(side)] for y in range(side)]
    assert curve(side, side).tolist() == expected


@given(st.data())
def test_large_square_of_a_power_of_two_is_the_classic_curve(data):
    side = 2 ** data.draw(st.integers(7, 30))
    points = data.draw(st.lists(st.tuples(*[st.integers(0, side - 1)] * 2), max_size=20))
    row, column = np.array(points, np.int64).reshape(-1, 2).T
    assert hilbert_index(row, column, (side, side)).tolist() == [classic(side, x, y) for y, x in points]


@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.data())
def test_on_huge_rectangles_the_next_place_is_a_neighbour(rows, columns, data):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    near = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    near = [(i, j) for i, j in near if 0 <= i < rows and 0 <= j < columns]
    place, *around = hilbert_index(*zip(*near, strict=True), (rows, columns)).tolist()
    assert 0 <= place < rows * columns
    assert around.count(place - 1) == (place > 0)
    assert around.count(place + 1) == (place < rows * columns - 1)


@pytest.mark.parametrize("leaf", [1, 6, 64])
@pytest.mark.parametrize("pieces", [2, 9, 2**14])
def test_cutting_finer_changes_no_place(monkeypatch, leaf, pieces):
    grids = [(1, 1), (1, 50), (50, 1), (16, 16), (33, 20), (20, 33), (31, 17), (2, 41), (64, 5)]
    expected = [curve(*grid) for grid in grids]
    monkeypatch.setattr(hilbert, "_LEAF_CELLS", leaf)
    monkeypatch.setattr(hilbert, "_MAX_PIECES", pieces)
    monkeypatch.setattr(hilbert, "_MAP_LENGTH", 16)
    monkeypatch.setattr(hilbert, "_CHUNK", 100)
    hilbert._pieces.cache_clear()
    try:
        for grid, places in zip(grids, expected, strict=True):
            assert np.array_equal(curve(*grid), places), grid
    finally:
        hilbert._pieces.cache_clear()


@given(st.one_of(st.tuples(sides, sides), st.tuples(*[st.integers(1, 14)] * 3)))
def test_tokens_come_back_and_every_step_is_to_a_neighbour(grid):
    permutation, inverse = hilbert_tokens(grid)
    tokens = np.arange(np.prod(grid))
    assert np.array_equal(np.sort(permutation), tokens)
    assert np.array_equal(tokens[permutation][inverse], tokens)
    assert np.array_equal(permutation[inverse], tokens)
    assert permutation[0] == 0
    assert (steps(inverse.reshape(grid)) == 1).all()


def test_every_small_box_is_adjacent():
    for grid in itertools.product(range(1, 9), repeat=3):
        assert (steps(hilbert_tokens(grid)[1].reshape(grid)) == 1).all(), grid


@given(sides, sides)
def test_tokens_of_an_image_follow_the_curve_of_its_rectangle(height, width):
    assert np.array_equal(hilbert_tokens((height, width))[1].reshape(height, width), curve(height, width))


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_cube_of_a_power_of_two_fills_each_subcube_in_one_go(side):
    places = hilbert_tokens((side, side, side))[1].reshape(side, side, side)
    half = side // 2
    while half:
        cells = half**3
        blocks = places.reshape(side // half, half, side // half, half, side // half, half)
        assert (blocks // cells == blocks[:, :1, :, :1, :, :1] // cells).all()
        half //= 2


def test_a_window_of_an_image_is_a_compact_patch():
    side, window = 96, 144
    cells = np.stack(np.divmod(hilbert_tokens((side, side))[0], side), axis=1)
    spans = [np.ptp(cells[k : k + window], axis=0).max() + 1 for k in range(0, side * side - window + 1, window)]
    assert np.median(spans) <= 3 * window**0.5  # a run of a scan line would span min(side, window) = 96


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], [0], (0, 4)), ValueError, r"grid\[0\]"),
        (([0], [0], (4, 2**31)), ValueError, r"grid\[1\]"),
        (([0], [0], "44"), TypeError, "grid"),
        (([4], [0], (4, 4)), ValueError, r"row: expected values in \[0, 3\], got 4"),
        (([0], [-1], (4, 4)), ValueError, r"column: expected values in \[0, 3\], got -1"),
        (([0.5], [0], (4, 4)), TypeError, "row: expected integers, got float64"),
        (([0, 1], [0], (4, 4)), ValueError, "row, column: expected equal lengths"),
        (([[0]], [0], (4, 4)), ValueError, "row: expected one dimension"),
    ],
)
def test_bad_points_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        hilbert_index(*arguments)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (16, TypeError, "grid"),
        ("12", TypeError, "grid"),
        ((16,), ValueError, "grid: expected .*got 1 sides"),
        ((2, 2, 2, 2), ValueError, "got 4 sides"),
        ((4, 0), ValueError, r"grid\[1\]"),
        ((4, 2.0), TypeError, r"grid\[1\]"),
        ((2**16, 2**15), ValueError, "fewer than"),
    ],
)
def test_bad_grids_are_refused(grid, error, message):
    with pytest.raises(error, match=message):
        hilbert_tokens(grid)
