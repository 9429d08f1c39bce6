"""Argument checks: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any


def integer(name: str, value: Any, *, low: int = 1, high: int | None = None) -> int:
    """Return ``value`` as an int in ``[low, high]``; TypeError for a non-integer, ValueError outside the range."""
    expected = f"an integer ≥ {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def positive(name: str, value: Any, *, zero: bool = False) -> float:
    """Return ``value`` as a finite float > 0 (≥ 0 with ``zero``)."""
    expected = "a finite number ≥ 0" if zero else "a finite number > 0"
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; TypeError for anything but a bool."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")
    return bool(value)
