"""Checks on what a request for a buffer may be."""

import operator
from collections.abc import Sequence


def check_budget(max_bytes: object) -> None:
    """Checks a byte budget.

    Raises:
        TypeError: if it is neither an int nor None.
        ValueError: if it is not positive.
    """
    if max_bytes is None:
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes: expected an int or None, got {type(max_bytes).__name__}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a number of bytes > 0, got {max_bytes}")


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of plain ints.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if a dimension is negative.
    """
    if isinstance(shape, str | bytes) or not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of ints, got {type(shape).__name__}")
    sizes = []
    for size in shape:
        try:
            sizes.append(operator.index(size))  # numpy's integers are welcome, as in torch
        except TypeError:
            raise TypeError(f"shape: expected ints, got {size!r} ({type(size).__name__})") from None
        if sizes[-1] < 0:
            raise ValueError(f"shape: expected dimensions ≥ 0, got {tuple(shape)}")
    return tuple(sizes)
