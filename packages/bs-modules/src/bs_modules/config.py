"""What a block-sparse module attends to, as plain validated data."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from bs_patterns import BlockLayout, DilatedSparse, GlobalLocal, LocalWindow, LongNetSegments, PerHead

from ._checks import check_block_size, check_choice, check_density, check_int, check_int_list, check_names, suggest

PATTERN_TYPES = ("local_window", "dilated_sparse", "global_local")
DEFAULT_PATTERN = "dilated_sparse"
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


class CheckedConfig:
    """What every config has: assignments checked at once, copies with changes, dicts and TOML both ways.

    A subclass is a dataclass that sets `_checks`, one function `(name, value) -> value` per field, and may extend
    `validate`.
    """

    _checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {}

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        if check is None:
            fields = ", ".join(self._checks)
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; fields: {fields}")
        object.__setattr__(self, name, check(name, value))

    def validate(self) -> None:
        """Checks the fields again (a list may have been changed in place), and against one another."""
        for name, check in self._checks.items():
            check(name, getattr(self, name))

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed."""
        check_names(changes, list(self._checks), f"field of {type(self).__name__}")
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data (no `None`), which `from_dict` reads back."""
        return {name: plain(value) for name in self._checks if (value := getattr(self, name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from a mapping.

        Raises:
            TypeError: `values` is not a mapping, or a field has the wrong type.
            ValueError: An unknown field, the nearest known one is suggested; or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a mapping of the fields of {cls.__name__}, got {values!r}")
        check_names(values, list(cls._checks), f"field of {cls.__name__}")
        return cls(**values)

    def to_toml(self) -> str:
        """Returns the fields as TOML (needs the extra `train`)."""
        from ._extras import require

        return require("tomli_w").dumps(self.to_dict())

    @classmethod
    def from_toml(cls, source: str | Path) -> Self:
        """Reads TOML: a `Path` is a file, a `str` is the text itself.

        Raises:
            TypeError: Neither of the two.
            ValueError: Not TOML, or as `from_dict`.
        """
        if not isinstance(source, str | Path):
            raise TypeError(f"source: expected TOML as a str or a file as a Path, got {source!r}")
        return cls.from_dict(tomllib.loads(source.read_text("utf-8") if isinstance(source, Path) else source))

    @classmethod
    def of(cls, name: str, value: Any) -> Self:
        """Reads an argument that is a config, a mapping of its fields, or `None` for the defaults.

        Raises:
            TypeError: Anything else.
        """
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, cls):
            raise TypeError(f"{name}: expected a {cls.__name__} or a mapping, got {value!r}")
        return value

    def fingerprint(self) -> tuple[Any, ...]:
        """What a layout cache keys on: changes with every change of a field, also in place."""
        return tuple(_frozen(getattr(self, name)) for name in self._checks)


@dataclasses.dataclass
class SparsePatternConfig(CheckedConfig):
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
        head_groups: A pattern of its own for each group of query heads, in the order of the heads: mappings with
            `heads` (how many) and fields of this config except `block_size` and `head_groups`. A group without a
            `sparsity_ratio` takes this config's. `None`: one pattern for all heads.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or would have no effect: geometry that belongs to another pattern, or that
            stands beside `head_groups`.
    """

    pattern_type: Any = DEFAULT_PATTERN
    sparsity_ratio: float | None = None
    block_size: int | tuple[int, int] = 64
    window_size: int | None = None
    global_tokens: int = DEFAULT_GLOBAL_TOKENS
    dilation_rates: list[int] | None = None
    head_groups: Sequence[Mapping[str, Any]] | None = None

    @property
    def density(self) -> float | None:
        """The density asked for; `None` when the geometry alone, or each head group, decides."""
        if self.sparsity_ratio is not None or self._given_geometry() or self.head_groups is not None:
            return self.sparsity_ratio
        return DEFAULT_DENSITY if isinstance(self.pattern_type, str) else None

    @property
    def heads(self) -> int | None:
        """The query heads that `head_groups` speak of; `None` without them."""
        return None if self.head_groups is None else sum(group["heads"] for group in self.head_groups)

    def validate(self) -> None:
        """Checks the fields again, and against one another.

        Raises:
            ValueError: A field is set that would have no effect.
        """
        super().validate()
        if self.head_groups is not None:
            self._check_beside_groups()
            return
        used = _GEOMETRY.get(self.pattern_type, set()) if isinstance(self.pattern_type, str) else set()
        for name in sorted(self._given_geometry() - used):
            reads = ", ".join(sorted(used)) or "its own geometry"
            raise ValueError(
                f"{name}: has no effect with pattern_type={self._pattern_name()!r}, which reads {reads}; leave it out"
            )

    def pattern(self) -> Any:
        """Builds the `bs_patterns` pattern this config describes (densities of head groups are not part of it)."""
        self.validate()
        if self.head_groups is not None:
            return PerHead([config.pattern() for config, count in self._groups() for _ in range(count)])
        if not isinstance(self.pattern_type, str):
            return self.pattern_type
        window = DEFAULT_WINDOW if self.window_size is None else self.window_size
        if self.pattern_type == "local_window":
            return LocalWindow(window)
        if self.pattern_type == "global_local":
            return GlobalLocal(self.global_tokens, window)
        return DilatedSparse(tuple(self.dilation_rates or DEFAULT_DILATION_RATES))

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        heads: int = 1,
        causal: bool = False,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """Builds the layout for a length.

        Args:
            seq_len: Tokens, or a (query, key) pair.
            heads: Query heads.
            causal: Whether queries see only keys up to their own position.
            candidates: Restricts the pattern to LongNet's geometry.

        Raises:
            ValueError: As `validate`, or `heads` is not the number of heads in `head_groups`.
        """
        if self.head_groups is None:
            return self.pattern().layout(
                seq_len,
                block_size=self.block_size,
                heads=heads,
                causal=causal,
                density=self.density,
                candidates=candidates,
            )
        self.validate()
        if heads != self.heads:
            raise ValueError(f"head_groups: expected {heads} heads in all groups, the query heads, got {self.heads}")
        layouts: list[BlockLayout] = []
        for config, count in self._groups():
            part = config.layout(seq_len, heads=count, causal=causal, candidates=candidates)
            layouts += [part] * (count // part.heads)
        return BlockLayout.stack_heads(layouts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data (no `None`), which `from_dict` reads back.

        Raises:
            TypeError: `pattern_type` is a pattern object, which has no name to write down.
        """
        values = super().to_dict()
        for part in (values, *values.get("head_groups", ())):
            kind = part.get("pattern_type", DEFAULT_PATTERN)
            if not isinstance(kind, str):
                raise TypeError(
                    f"pattern_type: expected a name to convert to a dict, got the object {kind!r}; "
                    f"names: {', '.join(PATTERN_TYPES)}"
                )
        if "global_tokens" not in _GEOMETRY[self.pattern_type]:
            del values["global_tokens"]
        if self.head_groups is not None:
            del values["pattern_type"]
        return values

    def _groups(self) -> list[tuple[SparsePatternConfig, int]]:
        """The config and the number of heads of each group."""
        groups = []
        for group in self.head_groups or ():
            fields = {name: value for name, value in group.items() if name != "heads"}
            if self.sparsity_ratio is not None:
                fields.setdefault("sparsity_ratio", self.sparsity_ratio)
            groups.append((SparsePatternConfig(**fields, block_size=self.block_size), group["heads"]))
        return groups

    def _check_beside_groups(self) -> None:
        given = self._given_geometry() | ({"pattern_type"} if self.pattern_type != DEFAULT_PATTERN else set())
        for name in sorted(given):
            raise ValueError(f"{name}: has no effect beside head_groups; give it to the groups")
        if self.sparsity_ratio is not None and all("sparsity_ratio" in group for group in self.head_groups or ()):
            raise ValueError("sparsity_ratio: has no effect beside head_groups that all have their own; leave one out")

    def _given_geometry(self) -> set[str]:
        given = {"window_size": self.window_size, "dilation_rates": self.dilation_rates}
        names = {name for name, value in given.items() if value is not None}
        return names | ({"global_tokens"} if self.global_tokens != DEFAULT_GLOBAL_TOKENS else set())

    def _pattern_name(self) -> str:
        if self.head_groups is not None:
            return " + ".join(f"{count} × {config._pattern_name()}" for config, count in self._groups())
        return self.pattern_type if isinstance(self.pattern_type, str) else type(self.pattern_type).__name__


def plain(value: Any) -> Any:
    """A field as data that TOML and JSON can hold: lists for sequences, dicts for mappings."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    """A field as something hashable."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value


def _check_pattern_type(name: str, value: Any) -> Any:
    if callable(getattr(value, "layout", None)) and not isinstance(value, type):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(PATTERN_TYPES)} or a bs_patterns pattern, got {value!r}")
    return check_choice(name, value, PATTERN_TYPES)


def _check_head_groups(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of mappings, got {value!r}")
    if not value:
        raise ValueError(f"{name}: expected at least one group, got an empty sequence")
    fields = [field for field in SparsePatternConfig._checks if field not in ("block_size", "head_groups")]
    groups = []
    for n, group in enumerate(value):
        where = f"{name}[{n}]"
        if not isinstance(group, Mapping):
            raise TypeError(f"{where}: expected a mapping, got {group!r}")
        for unknown in itertools.filterfalse(["heads", *fields].__contains__, group):
            near = suggest(unknown, ["heads", *fields])
            raise ValueError(
                f"{where}: {unknown}: not a field of a head group{near}; valid: heads, {', '.join(fields)}"
            )
        if "heads" not in group:
            raise ValueError(
                f"{where}: expected the field heads, the number of heads in the group, got {dict(group)!r}"
            )
        heads = check_int(f"{where}.heads", group["heads"])
        given = {field: item for field, item in group.items() if field != "heads" and item is not None}
        try:
            SparsePatternConfig(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        groups.append({"heads": heads, **given})
    return groups


SparsePatternConfig._checks = {
    "pattern_type": _check_pattern_type,
    "sparsity_ratio": check_density,
    "block_size": check_block_size,
    "window_size": lambda name, value: None if value is None else check_int(name, value),
    "global_tokens": check_int,
    "dilation_rates": lambda name, value: None if value is None else check_int_list(name, value),
    "head_groups": _check_head_groups,
}
