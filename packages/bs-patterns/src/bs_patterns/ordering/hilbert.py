"""Places on the Hilbert curve of any rectangle, for given points; Hilbert orders of 2-D and 3-D token grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _check
from . import _curve

Int64 = NDArray[np.int64]
Kind = tuple[_curve.Size, bool]

#: Rectangles up to this many cells are looked up in a table instead of being cut further.
_LEAF_CELLS = 2**14
#: A larger one is first cut into about this many boxes.
_MAX_PIECES = 2**14
#: Points looked up together: few enough for all their temporaries to stay in cache.
_CHUNK = 2**16
#: Sides up to this length have a table from coordinate to interval.
_MAP_LENGTH = 2**15
_INT32_MAX = 2**31 - 1


def hilbert_index(row: ArrayLike, column: ArrayLike, grid: tuple[int, int]) -> Int64:
    """The place of given cells on the Hilbert curve of a rectangle of any size.

    The curve visits every cell once and every step is to one of the four neighbours. It starts at (0, 0). On a square
    of a power of two it is the classic curve, ending at (0, columns - 1).

    Cost is O(points · log(rows + columns)); the grid itself is never built.

    Args:
        row: int ``[n]``, in ``[0, rows)``.
        column: int ``[n]``, in ``[0, columns)``.
        grid: (rows, columns).

    Returns:
        int64 ``[n]``, each in ``[0, rows · columns)``.

    Raises:
        TypeError: An argument is not made of integers.
        ValueError: A point lies outside the grid, or the lengths differ.

    Source: `bs_patterns.ordering._curve`; Hilbert (1891), Červený's gilbert (2018).
    """
    rows, columns = _check.pair("grid", grid)
    for name, size in (("grid[0]", rows), ("grid[1]", columns)):
        _check.integer(name, size, high=_INT32_MAX)
    i, j = _coordinates("row", row, rows), _coordinates("column", column, columns)
    if i.shape != j.shape:
        raise ValueError(f"row, column: expected equal lengths, got {list(i.shape)} and {list(j.shape)}")
    return places_in_grid(i, j, rows, columns)


def places_in_grid(row: NDArray[np.integer], column: NDArray[np.integer], rows: int, columns: int) -> Int64:
    """`hilbert_index` of points known to be valid, a cache-sized run of points at a time."""
    whole = _curve.whole((columns, rows, 1))
    u, v = (column, row) if whole.axes[0] == 0 else (row, column)
    out = np.empty(len(u), np.int64)
    for begin in range(0, len(out), _CHUNK):
        run = slice(begin, begin + _CHUNK)
        out[run] = _place((whole.size, whole.is_open), u[run], v[run])
    return out


class _Pieces(NamedTuple):
    """A rectangle cut into boxes of few distinct kinds, and the way from a point to its box.

    The curve enters box c at place ``at[4, c]``, in the cell ``at[:2, c]``. The box's own axes are swapped if
    ``at[2, c]``, and run in direction ``at[3, c]``. The boxes ``first … last - 1`` are of one kind.
    """

    cuts: tuple[Int64, Int64]
    box_of: Int64
    at: Int64
    kinds: list[tuple[Kind, int, int]]


def _place(kind: Kind, u: NDArray[np.integer], v: NDArray[np.integer]) -> Int64:
    """Places on the curve of a box, for points in its own coordinates."""
    (width, height, _), _ = kind
    if width * height <= _LEAF_CELLS:
        return _leaf(kind)[u * height + v]
    pieces = _pieces(kind)
    box = pieces.box_of[_interval(pieces.cuts[0], width, u), _interval(pieces.cuts[1], height, v)]
    place = pieces.at[4][box]
    for part, first, last in pieces.kinds:
        inside = np.flatnonzero((box >= first) & (box < last))
        if len(inside):
            start_u, start_v, turn, sign, _ = pieces.at[:, box[inside]]
            own_u, own_v = sign * (u[inside] - start_u), sign * (v[inside] - start_v)
            place[inside] += _place(part, np.where(turn, own_v, own_u), np.where(turn, own_u, own_v))
    return place


def _interval(cuts: Int64, length: int, values: NDArray[np.integer]) -> Int64:
    """Index of the last cut ≤ each value; `cuts` starts with 0."""
    if length <= _MAP_LENGTH:
        return np.repeat(np.arange(len(cuts)), np.diff(cuts, append=length))[values]
    return np.searchsorted(cuts, values, side="right") - 1


@lru_cache(maxsize=64)
def _leaf(kind: Kind) -> Int64:
    return _curve.table(*kind, {}).ravel()


@lru_cache(maxsize=16)
def _pieces(kind: Kind) -> _Pieces:
    """Cut a box, all boxes of one kind at a time, the largest first, until they are leaves or many enough."""
    (width, height, _), _ = kind
    limit = max(_LEAF_CELLS, width * height // _MAX_PIECES)
    waiting = {kind: [np.array([[0], [0], [0], [1], [0]])]}
    done: list[tuple[Kind, Int64]] = []
    while waiting:
        largest = max(waiting, key=lambda item: item[0][0] * item[0][1])
        start_u, start_v, turn, sign, base = boxes = np.concatenate(waiting.pop(largest), axis=1)
        if largest[0][0] * largest[0][1] <= limit:
            done.append((largest, boxes))
            continue
        for box in _curve.split(*largest):
            step_u, step_v = np.where(turn, box.start[1], box.start[0]), np.where(turn, box.start[0], box.start[1])
            child = [start_u + sign * step_u, start_v + sign * step_v, turn ^ box.axes[0], sign * box.signs[0], base]
            waiting.setdefault((box.size, box.is_open), []).append(np.array(child))
            base = base + box.size[0] * box.size[1]
    counts = np.cumsum([0] + [boxes.shape[1] for _, boxes in done]).tolist()
    kinds = [(part, first, last) for (part, _), first, last in zip(done, counts[:-1], counts[1:], strict=True)]
    at = np.concatenate([boxes for _, boxes in done], axis=1)
    sizes = np.concatenate([np.tile(part[0][:2], (boxes.shape[1], 1)) for part, boxes in done]).T
    return _Pieces(*_paint(at, sizes), at, kinds)


def _paint(at: Int64, sizes: Int64) -> tuple[tuple[Int64, Int64], Int64]:
    """All cut positions along both axes, and the box that covers each cell of the grid of those cuts."""
    turn, sign = at[2] != 0, at[3]
    cuts, corners = [], []
    for axis in (0, 1):
        length = np.where(turn, sizes[1 - axis], sizes[axis])
        low = np.where(sign > 0, at[axis], at[axis] - length + 1)
        lines, first = np.unique(low, return_inverse=True)
        cuts.append(lines)
        corners.append((first, np.searchsorted(lines, low + length)))
    box_of = np.zeros((len(cuts[0]) + 1, len(cuts[1]) + 1), np.int64)
    number = np.arange(at.shape[1])
    for end_u, end_v in ((0, 0), (0, 1), (1, 0), (1, 1)):  # two running sums turn ± at the corners into filled boxes
        np.add.at(box_of, (corners[0][end_u], corners[1][end_v]), number if end_u == end_v else -number)
    box_of = box_of.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    return (cuts[0], cuts[1]), box_of


def hilbert_tokens(grid: Sequence[int]) -> tuple[Int64, Int64]:
    """Reorder the tokens of an image or a video so that tokens near in the sequence are near in the grid, and back.

    Flatten the grid in C order (last axis fastest), then ``tokens[permutation]`` runs along a Hilbert curve: every
    token is a direct neighbour of the one before it, whatever the sides, and a window of n tokens is a compact patch.
    ``reordered[inverse]`` restores the grid order.

    Args:
        grid: (height, width) or (height, width, frames), or any other order of these axes: the order of the flattening.

    Returns:
        (permutation, inverse), each int64 ``[product of grid]``; ``permutation[inverse] == arange``.

    Raises:
        TypeError: `grid` is not a sequence of integers.
        ValueError: `grid` has not 2 or 3 sides, or one below 1, or 2**31 tokens or more.

    Source: `bs_patterns.ordering._curve`; Hilbert (1891), Červený's gilbert (2018).
    """
    sides = _check.integers("grid", grid)
    if len(sides) not in (2, 3):
        raise ValueError(f"grid: expected (height, width) or (height, width, frames), got {len(sides)} sides: {sides}")
    tokens = 1
    for side in sides:
        tokens *= side
    if tokens > _INT32_MAX:
        raise ValueError(f"grid: expected fewer than 2**31 tokens, got {tokens} from {sides}")
    a, b, c = (*reversed(sides), 1)[:3]
    whole = _curve.whole((a, b, c))
    places = np.empty((a, b, c), np.int64)
    _curve.place_in(places, whole, _curve.table(whole.size, whole.is_open, {}))
    inverse = np.ascontiguousarray(places.transpose(2, 1, 0)).ravel()
    permutation = np.empty_like(inverse)
    permutation[inverse] = np.arange(tokens, dtype=np.int64)
    return permutation, inverse


def _coordinates(name: str, value: Any, bound: int) -> NDArray[np.integer]:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(array.shape)}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= bound):
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ValueError(f"{name}: expected values in [0, {bound - 1}], got {wrong}")
    return array.astype(np.int64, copy=False)
