"""Checks of arguments and fields: the value back, or an error that names it, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_names(given: Mapping[str, Any], valid: list[str], what: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` for the first name that is not valid, listing the valid ones and suggesting the nearest."""
    for name in given:
        if name not in valid:
            raise error(f"{name}: not a {what}{suggest(name, valid)}; valid: {', '.join(valid)}")


def suggest(name: object, valid: list[str]) -> str:
    """Returns ` (did you mean '…'?)` for a near miss, else nothing."""
    import difflib

    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.6) or [v for v in valid if str(name) in v]
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool] = lambda _: True) -> float:
    """Checks a finite number that `fits`; `expected` says in words which do."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and fits(float(value))):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def check_density(name: str, value: Any) -> float | None:
    """Checks an optional density: `None` or a number in (0, 1]."""
    expected = "a density in (0, 1] (0.1 keeps 10 % of the blocks)"
    return None if value is None else check_number(name, value, expected, lambda x: 0 < x <= 1)


def check_sparsity(name: str, value: Any) -> float:
    """Checks a sparsity: a number in [0, 1)."""
    return check_number(name, value, "a sparsity in [0, 1) (0.9 drops 90 % of the blocks)", lambda x: 0 <= x < 1)


def check_positive(name: str, value: Any) -> float:
    """Checks a number above zero."""
    return check_number(name, value, "a finite number > 0", lambda x: x > 0)


def check_int(name: str, value: Any, *, least: int = 1) -> int:
    """Checks an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}, got {value}")
    return int(value)


def check_int_list(name: str, value: Any) -> list[int]:
    """Checks a non-empty sequence of positive integers."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of integers ≥ 1, got {value!r}")
    items = [check_int(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if not items:
        raise ValueError(f"{name}: expected at least one integer, got an empty sequence")
    return items


def check_choice(name: str, value: Any, valid: Sequence[str]) -> str:
    """Checks one of several words, suggesting the nearest."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
    if value not in valid:
        near = suggest(value, list(valid))
        raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {value!r}{near}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Checks a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def check_block_size(name: str, value: Any) -> int | tuple[int, int]:
    """Checks tokens per block: a positive integer, or a (query, key) pair of them."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an integer or a (query, key) pair, got {value!r}")
        return check_int(f"{name}[0]", value[0]), check_int(f"{name}[1]", value[1])
    return check_int(name, value)


def check_state(state: Any, names: tuple[str, ...]) -> list[Any]:
    """Checks a state dict of exactly these names; their values in order."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
    if set(state) != set(names):
        raise ValueError(f"state: expected the keys {', '.join(names)}, got {', '.join(map(str, state))}")
    return [state[name] for name in names]
