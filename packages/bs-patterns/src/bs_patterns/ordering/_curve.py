"""The generalised Hilbert curve of a box of any size: one rule that cuts a box into smaller boxes.

A box is seen in its own coordinates ``(u, v, w)``. The curve enters at ``(0, 0, 0)`` and, unless the box is *open*,
leaves at ``(width - 1, 0, 0)``: at the other end of the first axis. `split` says which smaller boxes it runs through,
in which order and how each is turned; everything else here and in `hilbert.py` only composes turns.

Why every step is to a neighbour: colour the cells like a chessboard. A path through all cells between the two ends
exists only if `width` is even or ``height * depth`` is odd; call such a box *fair*. `split` cuts off even lengths, so
that every closed box made from a fair box is fair, and the whole box is entered along an axis that makes it fair. An
open box may leave anywhere, so it is never unfair: it drops even pieces until it is compact, then turns.

Source: D. Hilbert (1891); J. Červený, "gilbert" (2018), whose cuts these are, except that the axis choice by parity and
the open tail replace the diagonal steps that gilbert makes on odd sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Size = tuple[int, int, int]


class Box(NamedTuple):
    """A cell range of a parent box, with its own axes.

    ``axes[k]`` is the parent axis along which own axis `k` runs, ``signs[k]`` its direction, `start` the parent
    coordinates of the own origin, and `is_open` says that the curve may leave this box anywhere.
    """

    start: Size
    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    size: Size
    is_open: bool = False


def whole(size: Size) -> Box:
    """The box that a curve over `size` starts with: along the longest axis, the first of equals."""
    major = size.index(max(size))
    return _turned(size, major, is_open=True)


def _turned(size: Size, major: int, *, is_open: bool) -> Box:
    b, c = (axis for axis in range(3) if axis != major)
    return Box((0, 0, 0), (major, b, c), (1, 1, 1), (size[major], size[b], size[c]), is_open)


def _half(length: int) -> int:
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


def is_wide(size: Size) -> bool:
    """Whether a box is so much longer along its first axis that only that axis is cut."""
    width, height, depth = size
    return 2 * width > 3 * height and 2 * width > 3 * depth


def split(size: Size, is_open: bool = False) -> list[Box]:
    """The boxes that the curve of a box of more than one cell runs through, in its order.

    Args:
        size: Cells along the box's own axes.
        is_open: Whether the curve may leave the box anywhere.

    Returns:
        1 (turned only), 2, 3 or 5 boxes that tile the box.

    Source: the module docstring.
    """
    width, height, depth = size
    if is_wide(size):
        first = _half(width)
        return [
            Box((0, 0, 0), (0, 1, 2), (1, 1, 1), (first, height, depth)),
            Box((first, 0, 0), (0, 1, 2), (1, 1, 1), (width - first, height, depth), is_open),
        ]
    if width % 2 and height * depth % 2 == 0:  # unfair, hence open: enter along an even axis and close it
        return [_turned(size, 1 if height % 2 == 0 else 2, is_open=False)]
    if 3 * height > 4 * depth:
        return _split_plane(size, 1, 2)
    if 3 * depth > 4 * height:
        return _split_plane(size, 2, 1)
    if width % 2 == 0 and depth % 2 == 0:
        return _split_solid(size, 1, 2)
    if width % 2 == 0 and height % 2 == 0:
        return _split_solid(size, 2, 1)
    return _split_plane(size, 1, 2)  # no fair way to cut all three axes at once


def _box(start: dict[int, int], *turn: tuple[int, int, int]) -> Box:
    """A closed box from its origin by axis and, per own axis, (parent axis, direction, length)."""
    (a, sign_a, width), (b, sign_b, height), (c, sign_c, depth) = turn
    origin = (start.get(0, 0), start.get(1, 0), start.get(2, 0))
    return Box(origin, (a, b, c), (sign_a, sign_b, sign_c), (width, height, depth))


def _split_plane(size: Size, b: int, c: int) -> list[Box]:
    """Up along b, across along the first axis, down again; axis c stays whole."""
    width, tall, deep = size[0], size[b], size[c]
    w, t = _half(width), _half(tall)
    return [
        _box({}, (b, 1, t), (0, 1, w), (c, 1, deep)),
        _box({b: t}, (0, 1, width), (b, 1, tall - t), (c, 1, deep)),
        _box({0: width - 1, b: t - 1}, (b, -1, t), (0, -1, width - w), (c, 1, deep)),
    ]


def _split_solid(size: Size, b: int, c: int) -> list[Box]:
    """The eight octants of the 3-D curve, as five boxes (three of them two octants long)."""
    width, tall, deep = size[0], size[b], size[c]
    w, t, d = _half(width), _half(tall), _half(deep)
    return [
        _box({}, (b, 1, t), (c, 1, d), (0, 1, w)),
        _box({b: t}, (c, 1, deep), (0, 1, w), (b, 1, tall - t)),
        _box({b: t - 1, c: deep - 1}, (0, 1, width), (b, -1, t), (c, -1, deep - d)),
        _box({0: width - 1, b: t, c: deep - 1}, (c, -1, deep), (0, -1, width - w), (b, 1, tall - t)),
        _box({0: width - 1, b: t - 1}, (b, -1, t), (c, 1, d), (0, -1, width - w)),
    ]


def table(size: Size, is_open: bool, memo: dict[tuple[Size, bool], np.ndarray]) -> np.ndarray:
    """The place on the curve of every cell of a box, in the box's own coordinates.

    Equal boxes are computed once, and a box is put together from its parts by slicing, so the cost is that of writing
    the result a few times over.

    Args:
        size: Cells along the box's own axes.
        is_open: Whether the curve may leave the box anywhere.
        memo: Tables made so far; shared between calls to share the work.

    Returns:
        int64[size], a permutation of ``0 … cells - 1``. Not to be written to.

    Source: the module docstring.
    """
    key = (size, is_open)
    if key in memo:
        return memo[key]
    result = np.zeros(size, np.int64)
    if result.size > 1:
        base = 0
        for box in split(size, is_open):
            part = table(box.size, box.is_open, memo)
            place_in(result, box, part, base)
            base += part.size
    memo[key] = result
    return result


def place_in(target: np.ndarray, box: Box, part: np.ndarray, base: int = 0) -> None:
    """Write ``base + part``, given in the box's own coordinates, where the box lies in `target`."""
    ranges = [slice(0)] * 3
    for axis, sign, length in zip(box.axes, box.signs, box.size, strict=True):
        low = box.start[axis] if sign > 0 else box.start[axis] - length + 1
        ranges[axis] = slice(low, low + length)
    flipped = part[tuple(slice(None, None, sign) for sign in box.signs)]
    np.add(flipped.transpose(np.argsort(box.axes)), base, out=target[tuple(ranges)])
