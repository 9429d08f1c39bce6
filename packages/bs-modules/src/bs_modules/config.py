"""What a block-sparse module attends to, as plain validated data."""

from __future__ import annotations

import dataclasses
import math
import numbers
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bs_patterns import DilatedSparse, GlobalLocal, LocalWindow

PATTERN_TYPES = ("local_window", "dilated_sparse", "global_local")
DEFAULT_DENSITY = 0.1
DEFAULT_WINDOW = 256
DEFAULT_GLOBAL_TOKENS = 64
DEFAULT_DILATION_RATES = (1, 2, 4, 8)

# The geometry fields that each pattern reads; a field set for another pattern is an error, never ignored.
_GEOMETRY = {
    "local_window": {"window_size"},
    "dilated_sparse": {"dilation_rates"},
    "global_local": {"window_size", "global_tokens"},
}


@dataclasses.dataclass
class SparsePatternConfig:
    """A pattern and its density.

    Assigning to a field checks it at once and takes effect at the next call of the modules that hold the config.

    Args:
        pattern_type: `"local_window"`, `"dilated_sparse"`, `"global_local"`, or a `bs_patterns` pattern object
            (anything with a `layout` method), which then carries its own geometry.
        sparsity_ratio: The **density** to meet, in (0, 1]: the share of allowed blocks that is kept, so 0.1 is
            "90 % sparse". `None` lets the geometry decide, or means 0.1 when no geometry is given either.
        block_size: Tokens per block, or a (query, key) pair.
        window_size: Tokens of the local window (256 where the pattern needs one).
        global_tokens: Leading tokens that every query sees (`"global_local"` only).
        dilation_rates: Block strides of `"dilated_sparse"` (`[1, 2, 4, 8]` when not given).

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or belongs to another pattern and would have no effect.
    """

    pattern_type: Any = "dilated_sparse"
    sparsity_ratio: float | None = None
    block_size: int | tuple[int, int] = 64
    window_size: int | None = None
    global_tokens: int = DEFAULT_GLOBAL_TOKENS
    dilation_rates: list[int] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is None:
            raise AttributeError(f"SparsePatternConfig has no field {name!r}; fields: {', '.join(_CHECKS)}")
        object.__setattr__(self, name, check(name, value))

    @property
    def density(self) -> float | None:
        """The density asked for; `None` when the geometry alone decides."""
        if self.sparsity_ratio is not None or self._given_geometry():
            return self.sparsity_ratio
        return DEFAULT_DENSITY if isinstance(self.pattern_type, str) else None

    def validate(self) -> None:
        """Checks the fields against one another.

        Raises:
            ValueError: A geometry field is set that this pattern does not read.
        """
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        used = _GEOMETRY.get(self.pattern_type, set()) if isinstance(self.pattern_type, str) else set()
        for name in sorted(self._given_geometry() - used):
            reads = ", ".join(sorted(used)) or "its own geometry"
            raise ValueError(
                f"{name}: has no effect with pattern_type={self._pattern_name()!r}, which reads {reads}; leave it out"
            )

    def pattern(self) -> Any:
        """Builds the `bs_patterns` pattern this config describes."""
        self.validate()
        if not isinstance(self.pattern_type, str):
            return self.pattern_type
        window = DEFAULT_WINDOW if self.window_size is None else self.window_size
        if self.pattern_type == "local_window":
            return LocalWindow(window)
        if self.pattern_type == "global_local":
            return GlobalLocal(self.global_tokens, window)
        return DilatedSparse(tuple(self.dilation_rates or DEFAULT_DILATION_RATES))

    def replace(self, **changes: Any) -> SparsePatternConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data (no `None`), which `from_dict` reads back.

        Raises:
            TypeError: `pattern_type` is a pattern object, which has no name to write down.
        """
        if not isinstance(self.pattern_type, str):
            raise TypeError(
                f"pattern_type: expected a name to convert to a dict, got the object {self.pattern_type!r}; "
                f"names: {', '.join(PATTERN_TYPES)}"
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if "global_tokens" not in _GEOMETRY[self.pattern_type]:
            del values["global_tokens"]
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsePatternConfig:
        """Builds a config from a mapping.

        Raises:
            ValueError: An unknown field; the nearest known one is suggested.
        """
        check_names(values, list(_CHECKS), "field of SparsePatternConfig")
        return cls(**values)

    def to_toml(self) -> str:
        """Returns the fields as TOML (needs the extra `train`)."""
        from ._extras import require

        return require("tomli_w").dumps(self.to_dict())

    @classmethod
    def from_toml(cls, source: str | Path) -> SparsePatternConfig:
        """Reads TOML: a `Path` is a file, a `str` is the text itself."""
        return cls.from_dict(tomllib.loads(source.read_text() if isinstance(source, Path) else source))

    def fingerprint(self) -> tuple[Any, ...]:
        """What a layout cache keys on: changes with every change of a field."""
        rates = None if self.dilation_rates is None else tuple(self.dilation_rates)
        return (self.pattern_type, self.sparsity_ratio, self.block_size, self.window_size, self.global_tokens, rates)

    def _given_geometry(self) -> set[str]:
        given = {"window_size": self.window_size, "dilation_rates": self.dilation_rates}
        names = {name for name, value in given.items() if value is not None}
        return names | ({"global_tokens"} if self.global_tokens != DEFAULT_GLOBAL_TOKENS else set())

    def _pattern_name(self) -> str:
        return self.pattern_type if isinstance(self.pattern_type, str) else type(self.pattern_type).__name__


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


def check_density(name: str, value: Any) -> float | None:
    """Checks an optional density: `None` or a number in (0, 1]."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number in (0, 1] or None, got {value!r}")
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError(f"{name}: expected a density in (0, 1] (0.1 keeps 10 % of the blocks), got {value!r}")
    return float(value)


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


def _check_pattern_type(name: str, value: Any) -> Any:
    if callable(getattr(value, "layout", None)) and not isinstance(value, type):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(PATTERN_TYPES)} or a bs_patterns pattern, got {value!r}")
    if value not in PATTERN_TYPES:
        near = suggest(value, list(PATTERN_TYPES))
        raise ValueError(f"{name}: expected one of {', '.join(PATTERN_TYPES)}, got {value!r}{near}")
    return value


def _check_block_size(name: str, value: Any) -> int | tuple[int, int]:
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an integer or a (query, key) pair, got {value!r}")
        return check_int(f"{name}[0]", value[0]), check_int(f"{name}[1]", value[1])
    return check_int(name, value)


_CHECKS = {
    "pattern_type": _check_pattern_type,
    "sparsity_ratio": check_density,
    "block_size": _check_block_size,
    "window_size": lambda name, value: None if value is None else check_int(name, value),
    "global_tokens": check_int,
    "dilation_rates": lambda name, value: None if value is None else check_int_list(name, value),
}
