"""Checks on arguments, which the errors name."""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any


def integer(name: str, value: Any, least: int) -> int:
    """The value, an int that is at least ``least``.

    Raises:
        TypeError: if it is not an int (a bool is none).
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int ≥ {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int ≥ {least}, got {value}")
    return value


def number(name: str, value: Any, expected: str, least: float, most: float, *, open_ends: bool) -> None:
    """Checks a number between two bounds, both excluded or both included; NaN is between none.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not (least < float(value) < most if open_ends else least <= float(value) <= most):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def boolean(name: str, value: Any) -> None:
    """Checks a bool.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def function(name: str, value: Any) -> None:
    """Checks something to call.

    Raises:
        TypeError: if it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")


def bound(name: str, value: Any) -> None:
    """Checks the most there may be of something: an int above 0, or None.

    Raises:
        TypeError: if it is neither an int nor None.
        ValueError: if it is not positive.
    """
    if value is not None:
        integer(name, value, 1)


def shape(value: Sequence[int]) -> tuple[int, ...]:
    """A tensor's shape as a tuple of plain ints.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if a dimension is negative.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"shape: expected a sequence of ints, got {type(value).__name__}")
    sizes = []
    for size in value:
        try:
            sizes.append(operator.index(size))  # numpy's integers are welcome, as in torch
        except TypeError:
            raise TypeError(f"shape: expected ints, got {size!r} ({type(size).__name__})") from None
        if sizes[-1] < 0:
            raise ValueError(f"shape: expected dimensions ≥ 0, got {tuple(value)}")
    return tuple(sizes)
