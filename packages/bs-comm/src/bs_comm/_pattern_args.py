"""Patterns on a command line: names, and one option for every field that any pattern has."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import Any

import bs_patterns
from bs_patterns import BlockLayout, Pattern

#: Sizes for fields that a pattern requires and the command line leaves out.
DEFAULTS: dict[str, Any] = {"window_size": 256, "global_tokens": 64, "dilation_rates": (1, 2, 4, 8)}
#: What a dilation that reaches everything is cut to when no density is given.
DEFAULT_DENSITY = 0.1
#: Made of other patterns or of code, which a flag cannot say.
_COMPOSED = {"PerHead", "Union", "Custom"}


def pattern_classes() -> dict[str, type[Pattern]]:
    """Every pattern of bs-patterns by its snake_case name."""
    found = {}
    for name in bs_patterns.__all__:
        value = getattr(bs_patterns, name)
        is_pattern = inspect.isclass(value) and issubclass(value, Pattern) and dataclasses.is_dataclass(value)
        if is_pattern and name not in _COMPOSED:
            found[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()] = value
    return found


def add_pattern_options(parser: argparse.ArgumentParser) -> None:
    """One option per field name; `make_pattern` refuses those the chosen pattern lacks."""
    group = parser.add_argument_group("pattern parameters", "lists are written 1,2,4")
    owners: dict[str, list[str]] = {}
    for name, cls in pattern_classes().items():
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            owners.setdefault(field.name, []).append(name)
    taken = {option for action in parser._actions for option in action.option_strings}
    for field, patterns in owners.items():
        option = "--" + field.replace("_", "-")
        if option not in taken:
            group.add_argument(option, dest=f"pattern_{field}", metavar="VALUE", help=f"of {', '.join(patterns)}")


def make_pattern(name: str, options: argparse.Namespace) -> Pattern:
    """Build the pattern from the options given.

    Raises:
        ValueError: Unknown pattern, an option it does not have, a required one that is missing, or a bad value.
    """
    classes = pattern_classes()
    if name not in classes:
        raise ValueError(f"pattern: expected dense, a .npz layout or one of {', '.join(classes)}, got {name!r}")
    given = {key[8:]: text for key, text in vars(options).items() if key.startswith("pattern_") and text is not None}
    fields = {field.name: field for field in dataclasses.fields(classes[name])}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise ValueError(f"--{key.replace('_', '-')}: {name} has no such parameter; it has {_names(fields)}")
    values = {key: _value(key, text) for key, text in given.items()}
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key not in values and required:
            if key not in DEFAULTS:
                raise ValueError(f"--{key.replace('_', '-')}: {name} needs it")
            values[key] = DEFAULTS[key]
    return classes[name](**values)


def make_layout(pattern: Pattern, seq_len: int, **arguments: Any) -> BlockLayout:
    """`Pattern.layout`, at `DEFAULT_DENSITY` where the geometry alone is everything."""
    reaches_all = 1 in getattr(pattern, "dilation_rates", ()) and arguments.get("density") is None
    if reaches_all:
        arguments["density"] = DEFAULT_DENSITY
    return pattern.layout(seq_len, **arguments)


def describe(pattern: Pattern) -> str:
    """``local_window(window_size=512)``."""
    names = {cls: name for name, cls in pattern_classes().items()}
    fields = dataclasses.fields(pattern)  # type: ignore[arg-type]
    return f"{names[type(pattern)]}({', '.join(f'{f.name}={getattr(pattern, f.name)}' for f in fields)})"


def _names(fields: dict[str, Any]) -> str:
    return ", ".join("--" + key.replace("_", "-") for key in fields) or "none"


def _value(key: str, text: str) -> Any:
    """An integer, a number, true/false, or a comma-separated list of those."""
    if "," in text:
        return tuple(_value(key, part) for part in text.split(",") if part.strip())
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"--{key.replace('_', '-')}: expected a number, true, false or a list such as 1,2,4, got {text!r}")
