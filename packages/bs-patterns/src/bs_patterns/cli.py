"""The command line: ``python -m bs_patterns show PATTERN …``."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from . import _report
from . import options as _options
from .layout import BlockLayout
from .render import render_text, save_image
from .segments import LongNetSegments

_EPILOG = """\
PATTERN is one of {patterns}, or a layout saved as FILE.npz.
`{prog} show PATTERN --help` lists its options.

examples:
  {prog} show local_window --window-size 512 --tokens 8192 --causal
  {prog} show dilated_sparse --dilation-rates 1 2 4 8 --density 0.1 --order hilbert
  {prog} show global_local --density 0.1 --compare "big_bird --seed 3" --png compare.png
  {prog} show local_window --window-size 512 --union "dilated_sparse --dilation-rates 16"
"""
_ABOUT = "Draw a block-sparse attention layout and report its figures."
_TOKENS = 4096
_CACHE_BLOCKS = 64


class _UsageError(Exception):
    """A command line that cannot be followed."""


class _Parser(argparse.ArgumentParser):
    """Does not guess, and leaves reporting and exiting to `main`."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {"usage": "%(prog)s [options]", **kwargs}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.prog.split()[-1]}: {message}")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m bs_patterns") -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.
        prog: What help and errors call the program; a command that delegates here says its own name.

    Returns:
        The exit status: 0, 2 for bad input, 1 for want of memory. Errors and notes are single lines on standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and not _is_printable("≤"):
        sys.stdout.reconfigure(errors="replace")  # help quotes docstrings
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            text = _run(words, prog)
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
        print(text, flush=True)
    except SystemExit as done:  # argparse has printed help
        return int(done.code or 0)
    except BrokenPipeError:  # the reader has seen enough; keep the interpreter from flushing once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (_UsageError, ValueError, TypeError, OverflowError, OSError, ImportError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{prog}: error: out of memory: {error}", file=sys.stderr)
        return 1
    return 0


def _run(words: list[str], prog: str) -> str:
    epilog = _EPILOG.format(prog=prog, patterns=", ".join(_options.pattern_classes()))
    if not words or words[0] in ("-h", "--help"):
        parser = _Parser(prog=prog, usage="%(prog)s show PATTERN [options]", epilog=epilog, description=_ABOUT)
        parser.parse_args(["--help"])
    if words[0] != "show":
        raise _UsageError(f"expected the command 'show', got {words[0]!r}")
    prog, words = f"{prog} show", words[1:]
    if not words or words[0].startswith("-"):
        parser = _Parser(prog=prog, usage="%(prog)s PATTERN [options]", epilog=epilog, description=_ABOUT)
        parser.parse_args([word for word in words if word in ("-h", "--help")])
        raise _UsageError(f"expected a PATTERN first, got {words[0]!r}" if words else "expected a PATTERN, got nothing")
    parser = _source_parser(words[0], prog)
    _add_view_options(parser)
    given = vars(parser.parse_args(words[1:]))
    view = argparse.Namespace(**{name: given.pop(name) for name in _VIEW})
    if view.order is None and view.cache_blocks is not None:
        raise _UsageError("argument --cache-blocks: expected --order beside it, got none")
    layout = _layout(words[0], dict(given))
    sides = [_report.Side(_options.canonical(words[0]), layout, given.get("density"))]
    if view.compare is not None:
        sides.append(_other_side(view.compare, prog, sides[0], given))
    return _draw(sides, view)


def _draw(sides: list[_report.Side], view: argparse.Namespace) -> str:
    """Write the images that are asked for, and return the picture and the figures."""
    layouts = [side.layout for side in sides]
    options: dict[str, Any] = {}
    if len(sides) > 1:
        options["titles"] = (sides[0].name, sides[1].name)
    heads = None if view.head is None else [view.head]
    ascii_only = view.ascii or not _is_printable("░▒▓█·±┌┐└┘─│┴┤×≤…")
    width = view.width
    if width is None:
        columns = shutil.get_terminal_size((100, 24)).columns - 14
        width = min(max(columns, 16), 80 if len(sides) == 1 else 130)
    picture = render_text(*layouts, head=view.head, width=width, ascii_only=ascii_only, **options)
    figures = _report.figures(sides, head_dim=view.head_dim, dtype=view.dtype)
    order = []
    if view.order is not None:
        cache_blocks = _CACHE_BLOCKS if view.cache_blocks is None else view.cache_blocks
        order = [_report.misses(side, view.order, cache_blocks) for side in sides]
    for suffix, file in ((".png", view.png), (".svg", view.svg)):
        if file is not None:
            if not file.lower().endswith(suffix):
                raise ValueError(f"--{suffix[1:]}: expected a file name that ends in {suffix}, got {file!r}")
            save_image(file, *layouts, heads=heads, **options)
    return "\n".join([picture, "", figures, *order])


def _source_parser(source: str, prog: str) -> _Parser:
    """A parser of what makes one layout: a pattern's own options and those of any layout, or none for a file."""
    if source.endswith(".npz"):
        return _Parser(prog=f"{prog} {source}", description="A layout that BlockLayout.save wrote.")
    name, patterns = _options.canonical(source), _options.pattern_classes()
    if name not in patterns:
        raise _UsageError(f"unknown pattern {source!r}; expected one of {', '.join(patterns)}, or FILE.npz")
    doc = (patterns[name].__doc__ or "").partition("\n\n")[0]
    parser = _Parser(prog=f"{prog} {name}", description=" ".join(doc.split()), argument_default=argparse.SUPPRESS)
    _options.add_options(parser, patterns[name])
    _options.add_composition(parser)
    group = parser.add_argument_group("of any layout")
    pair = {"type": _options.integers, "metavar": "N[,M]"}
    group.add_argument("--tokens", help=f"sequence length, or query,key lengths; 64K = 65536 [{_TOKENS}]", **pair)
    group.add_argument("--block-size", help="tokens per block, or per query,key block [the pattern's own]", **pair)
    group.add_argument(
        "--heads", type=_options.integer, metavar="N", help="heads with a layout each [1, shared by all]"
    )
    group.add_argument("--causal", action=argparse.BooleanOptionalAction, help="only keys up to the query")
    group.add_argument("--density", type=_options.number, metavar="D", help="active / allowed blocks [the geometry's]")
    many: dict[str, Any] = {"type": _options.integers, "nargs": "+", "action": _options.Joined, "metavar": "N"}
    group.add_argument("--segment-lengths", help="restrict to LongNet segments of these lengths", **many)
    group.add_argument("--segment-rates", help="the segments' dilation rates", **many)
    return parser


_VIEW = ("compare", "order", "cache_blocks", "head", "width", "ascii", "png", "svg", "head_dim", "dtype")


def _add_view_options(parser: _Parser) -> None:
    group = parser.add_argument_group("of the output")
    number: dict[str, Any] = {"type": _options.integer, "metavar": "N", "default": None}
    group.add_argument("--compare", metavar="OTHER", default=None, help="a second pattern with its options, in quotes")
    group.add_argument(
        "--order", choices=tuple(_report.ORDERS), default=None, help="count the misses of a key cache in this order"
    )
    group.add_argument("--cache-blocks", help=f"key blocks that the cache holds [{_CACHE_BLOCKS}]", **number)
    group.add_argument("--head", help="draw this head [all over one another; in images each alone]", **number)
    group.add_argument("--width", help="characters inside the frame [as the terminal has]", **number)
    group.add_argument("--ascii", action="store_true", default=False, help="draw without Unicode")
    group.add_argument("--png", metavar="FILE", default=None, help="write a picture (needs matplotlib)")
    group.add_argument("--svg", metavar="FILE", default=None, help="write a picture (needs matplotlib)")
    group.add_argument("--head-dim", **{**number, "default": 64}, help="for memory and FLOPs [64]")
    group.add_argument(
        "--dtype", choices=tuple(_report.ITEM_SIZES), default="bfloat16", help="of K and V, for memory [bfloat16]"
    )


def _layout(source: str, given: dict[str, Any]) -> BlockLayout:
    """Make or load a layout; what was not given is the pattern's own default."""
    if source.endswith(".npz"):
        return BlockLayout.load(source)
    for name in ("tokens", "block_size"):
        if name in given:
            given[name] = _pair(f"--{name.replace('_', '-')}", given[name])
    grid = {"tokens": given.get("tokens", _TOKENS)}
    if given.get("auto_levels") and "block_size" in given:
        if len(set(given["block_size"])) > 1:
            raise ValueError("--block-size: expected one size with --auto-levels, got a query,key pair")
        grid["block_size"] = given["block_size"][0]
    pattern = _options.build(_options.pattern_classes()[_options.canonical(source)], given, **grid)
    pattern = _options.compose(pattern, given)
    lengths, rates = given.pop("segment_lengths", None), given.pop("segment_rates", None)
    if (lengths is None) != (rates is None):
        raise _UsageError("arguments --segment-lengths, --segment-rates: expected both or neither, got one")
    if lengths is not None and rates is not None:
        given["candidates"] = LongNetSegments(lengths, rates)
    return pattern.layout(given.pop("tokens", _TOKENS), **given)


def _pair(option: str, values: Sequence[int]) -> tuple[int, int]:
    if len(values) > 2 or min(values) < 1:
        raise _UsageError(f"argument {option}: expected N or N,M, each at least 1, got {','.join(map(str, values))}")
    return values[0], values[-1]


def _other_side(text: str, prog: str, first: _report.Side, given: dict[str, Any]) -> _report.Side:
    """The layout to compare with: on the first one's grid and at its density, unless its own options say otherwise."""
    try:
        source, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise _UsageError(f"argument --compare: {error}: {text!r}") from None
    try:
        own = vars(_source_parser(source, prog).parse_args(words))
    except _UsageError as error:
        raise _UsageError(f"argument --compare: {error}") from None
    is_composed = {"union", "intersection", "difference"} & own.keys()
    name = text if is_composed or _options.canonical(source) == first.name else _options.canonical(source)
    if source.endswith(".npz"):
        return _report.Side(name, _layout(source, {}), None)
    shared = {key: given[key] for key in ("heads", "density", "segment_lengths", "segment_rates") if key in given}
    grid = {"tokens": first.layout.seq_len, "block_size": first.layout.block_size, "causal": first.layout.causal}
    merged = {**grid, **shared, **own}
    return _report.Side(name, _layout(source, dict(merged)), merged.get("density"))


def _is_printable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
