"""Argument checks: every message names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

INT32_MAX = 2**31 - 1


def integer(name: str, value: Any, *, low: int = 1, high: int | None = None, bits: int = 48) -> int:
    """Return ``value`` as an int in ``[low, high]``; TypeError for a non-integer, ValueError outside the range.

    Without ``high``, values of 2**bits and more are refused: sums and products of a few sizes must fit int64.
    """
    expected = f"an integer ≥ {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    if high is None and number >= 2**bits:
        raise ValueError(f"{name}: expected {expected} and below 2**{bits}, got {number}")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; TypeError for anything but a bool."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


def pair(name: str, value: Any, *, low: int = 1) -> tuple[int, int]:
    """Return an integer, or a (query, key) pair of them, as a pair."""
    if hasattr(value, "__index__"):
        number = integer(name, value, low=low)
        return number, number
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name}: expected an integer or a (query, key) pair, got {value!r}")
    return integer(f"{name}[0]", value[0], low=low), integer(f"{name}[1]", value[1], low=low)


def integers(name: str, value: Any, *, low: int = 1) -> tuple[int, ...]:
    """Return a non-empty sequence of integers ≥ ``low`` as a tuple."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a sequence of integers ≥ {low}, got {value!r} ({type(value).__name__})")
    items = tuple(integer(f"{name}[{i}]", item, low=low) for i, item in enumerate(value))
    if not items:
        raise ValueError(f"{name}: expected at least one integer ≥ {low}, got an empty sequence")
    return items


def density(name: str, value: Any) -> float:
    """Return ``value`` as a float in (0, 1]; NaN is refused."""
    expected = "a number in (0, 1]"
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number
