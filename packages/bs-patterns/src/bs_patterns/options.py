"""Command-line options of patterns, for commands that take one: `python -m bs_patterns show`, `python -m bs_comm plan`.

Options are read off the fields of the pattern classes, so that a new pattern needs none of its own::

    parser = argparse.ArgumentParser()
    add_options(parser, pattern_classes()[canonical("big-bird")])
    pattern = build(pattern_classes()["big_bird"], vars(parser.parse_args(["--seed", "3"])))
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shlex
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .pattern import Pattern
from .patterns.compose import Difference, Intersection, Union
from .patterns.hierarchical import Hierarchical

__all__ = [
    "Joined",
    "add_composition",
    "add_options",
    "build",
    "canonical",
    "compose",
    "integer",
    "integers",
    "number",
    "pattern_classes",
]

#: What a field without a default is on the command line.
_DEFAULTS: dict[str, Any] = {"window_size": 256, "global_tokens": 64, "dilation_rates": (1, 2, 4, 8)}
#: Fields that only stand in for options of the layout: --block-size, --heads.
_HIDDEN = {"block", "num_heads"}
_SUFFIXES = {"k": 2**10, "m": 2**20}
_COMPOSITIONS: dict[str, tuple[Any, str]] = {
    "union": (Union, "the blocks of this pattern too, ranks interleaved"),
    "intersection": (Intersection, "only blocks of this pattern's geometry"),
    "difference": (Difference, "no block of this pattern's geometry"),
}


@dataclasses.dataclass(frozen=True)
class _Field:
    """One option of a pattern: its Python name, and what argparse needs to know."""

    name: str
    help: str
    parse: Callable[[str], Any] | None
    is_many: bool
    metavar: str


def pattern_classes() -> dict[str, type[Pattern]]:
    """Every pattern of this package that a command line can describe, by its name in snake case."""
    import bs_patterns

    found = {}
    for name in bs_patterns.__all__:
        item = getattr(bs_patterns, name)
        is_pattern = inspect.isclass(item) and issubclass(item, Pattern) and dataclasses.is_dataclass(item)
        if is_pattern and _fields(item) is not None:
            found[_snake(name)] = item
    return dict(sorted(found.items()))


def canonical(name: str) -> str:
    """The name of a pattern however it is written: BigBird, big_bird, bigbird, big-bird."""
    plain = {key.replace("_", ""): key for key in pattern_classes()}
    return plain.get(re.sub("[_-]", "", name).lower(), name)


def add_options(parser: argparse.ArgumentParser, cls: type[Pattern]) -> None:
    """Add one option per field of a pattern class, and `--auto-levels` to `Hierarchical`."""
    group = parser.add_argument_group(f"of {cls.__name__}")
    for field in _fields(cls) or ():
        flag = "--" + field.name.replace("_", "-")
        shared: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": field.help}
        if field.parse is None:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif field.is_many:
            group.add_argument(flag, nargs="+", action=Joined, type=field.parse, metavar=field.metavar, **shared)
        else:
            group.add_argument(flag, type=field.parse, metavar=field.metavar, **shared)
    if cls is Hierarchical:
        note = "pick the levels from the length and the density (see Hierarchical.auto)"
        group.add_argument("--auto-levels", action="store_true", default=argparse.SUPPRESS, help=note)


def add_composition(parser: argparse.ArgumentParser) -> None:
    """Add the options that combine a pattern with others; `compose` reads them."""
    group = parser.add_argument_group("of a composition (each may be given several times, all of one kind)")
    for name, (_, note) in _COMPOSITIONS.items():
        flag, metavar = f"--{name}", '"PATTERN …"'
        group.add_argument(flag, action="append", metavar=metavar, default=argparse.SUPPRESS, help=note)


def build(
    cls: type[Pattern], options: dict[str, Any], *, tokens: int | tuple[int, int] = 4096, block_size: int = 64
) -> Pattern:
    """Make a pattern of the options that were given; takes them out of `options`.

    Args:
        cls: One of `pattern_classes`.
        options: Parsed options by name. `density` is read and stays where it is.
        tokens: The length that automatic levels are picked for.
        block_size: Tokens per block of automatic levels.

    Raises:
        ValueError: Automatic levels without a density, or beside levels.
    """
    if options.pop("auto_levels", False):
        if "levels" in options:
            raise ValueError("--auto-levels: expected no --levels beside it, which it picks")
        if options.get("density") is None:
            raise ValueError("--auto-levels: expected --density beside it, got none")
        return Hierarchical.auto(tokens, options["density"], block_size=block_size)
    given = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name in options:
            given[field.name] = options.pop(field.name)
        elif field.name in _DEFAULTS and field.default is field.default_factory is dataclasses.MISSING:
            given[field.name] = _DEFAULTS[field.name]
    return cls(**given)


def compose(pattern: Pattern, options: dict[str, Any]) -> Pattern:
    """Combine a pattern with those that `add_composition`'s options name; takes them out of `options`.

    Raises:
        ValueError: More than one kind of composition, or a member that cannot be read.
    """
    kinds = [name for name in _COMPOSITIONS if options.get(name)]
    if len(kinds) > 1:
        raise ValueError(f"--{kinds[1]}: expected one kind of composition, got --{kinds[0]} too")
    if not kinds:
        return pattern
    members = [_member(kinds[0], text) for text in options.pop(kinds[0])]
    return _COMPOSITIONS[kinds[0]][0]((pattern, *members))


def _member(option: str, text: str) -> Pattern:
    """A pattern written with its own options in one string."""
    source, *words = shlex.split(text) or [""]
    classes, name = pattern_classes(), canonical(source)
    if name not in classes:
        raise ValueError(f"--{option}: unknown pattern {source!r}; expected one of {', '.join(classes)}")
    parser = _Strict(prog=f"--{option} {name}", add_help=False, allow_abbrev=False)
    add_options(parser, classes[name])
    given = vars(parser.parse_args(words))
    if "auto_levels" in given:
        raise ValueError(f"--{option}: --auto-levels works for the first pattern only; write the levels out")
    return build(classes[name], given)


class _Strict(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def integer(text: str) -> int:
    """An integer, perhaps with K or M behind it (2**10, 2**20)."""
    factor = _SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return int(text[: -1 if factor > 1 else None]) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer such as 4096 or 64K, got {text!r}") from None


def integers(text: str) -> list[int]:
    """Integers with commas between."""
    return [integer(part) for part in text.split(",")]


def number(text: str) -> float:
    """A floating-point number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


class Joined(argparse.Action):
    """Joins the lists that the words of an option stand for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del parser, option_string
        setattr(namespace, self.dest, [item for part in values for item in part])


def _fields(cls: Any) -> list[_Field] | None:
    """The options of a pattern; None if a field is nothing that a command line can say."""
    hints = typing.get_type_hints(cls)
    notes = _notes(inspect.getdoc(cls) or "")
    found = []
    for field in dataclasses.fields(cls):
        if field.name in _HIDDEN:
            continue
        kind = _parser(hints[field.name])
        if kind is None:
            return None
        default = _DEFAULTS.get(field.name) if field.default is dataclasses.MISSING else field.default
        if field.default is dataclasses.MISSING and default is None:
            return None
        note = notes.get(field.name, "")
        found.append(_Field(field.name, f"{note} [{_shown(default)}]".strip().replace("%", "%%"), *kind))
    return found


def _parser(hint: Any) -> tuple[Callable[[str], Any] | None, bool, str] | None:
    """How to read one word of a field of this type, whether there are several, and what help calls one.

    The parser of a bool is None, and so is the answer for a type that words cannot say.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return _parser(parts[0]) if len(parts) == 1 else None
    if hint in (int, float, str):
        parse, metavar = {int: (integer, "N"), float: (number, "X"), str: (str, "NAME")}[hint]
        return parse, False, metavar
    if hint is bool:
        return None, False, ""
    if typing.get_origin(hint) is Sequence:
        (item,) = typing.get_args(hint)
        if item is int:
            return integers, True, "N"
        for part in typing.get_args(item) or (item,):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                return _record(part), True, ":".join(field.name for field in dataclasses.fields(part))
    return None


def _record(cls: type) -> Callable[[str], list[Any]]:
    """A reader of dataclasses of integers, written with colons between the fields."""
    names = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]

    def parse(text: str) -> list[Any]:
        values = text.split(":")
        if len(values) != len(names):
            raise argparse.ArgumentTypeError(f"expected {':'.join(names)}, got {text!r}")
        return [cls(*map(integer, values))]

    return parse


def _notes(doc: str) -> dict[str, str]:
    """First sentences of the arguments in a Google-style docstring."""
    _, _, arguments = doc.partition("Args:\n")
    notes = {}
    for match in re.finditer(r"^    (\w+): ((?:.|\n {6,})*)", arguments, re.M):
        text = " ".join(match[2].split())
        if not text.startswith("See `"):
            notes[match[1]] = re.split(r"(?<=[a-z0-9)`])[.;:] ", text)[0].rstrip(".")
    return notes


def _shown(default: Any) -> str:
    if isinstance(default, Sequence) and not isinstance(default, str):
        return " ".join(map(_shown, default))
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return ":".join(str(value) for value in dataclasses.astuple(default))
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
