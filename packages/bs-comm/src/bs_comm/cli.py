"""``python -m bs_comm plan``: plan a ring on paper, without a GPU or a network."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# The options of a pattern are spelled as in `python -m bs_patterns show`, by the same code.
from bs_patterns import BlockLayout, LongNetSegments
from bs_patterns import options as _options

from . import _units
from .cost import CostModel, hiding_bandwidth, hierarchical_transfer, scaling_curve, step_time
from .hierarchy import HierarchicalPlan
from .placement import PLACEMENTS
from .plan import FLOAT8_ROW_BYTES, ExchangePlan
from .report import Nodes, plan_record, plan_report

#: Bytes per element on the wire.
ITEM_SIZES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
#: Query heads where neither the command line nor the layout says.
_QUERY_HEADS = 8
_ABOUT = "Print who sends what in a ring over a block-sparse layout, and what it costs on a given machine."
_EPILOG = """\
PATTERN is dense, a layout saved as FILE.npz, or one of {patterns}.
`{prog} PATTERN --help` lists its options.

examples:
  {prog} local_window --window-size 4096 --tokens 1M --world-size 64 --causal
  {prog} dense --tokens 128K --world-size 8 --causal --placement zigzag
  {prog} dilated_sparse --density 0.1 --tokens 256K --world-size 32 --placement cost_balanced --json
"""


class _UsageError(Exception):
    """A command line that cannot be followed."""


class _Parser(argparse.ArgumentParser):
    """Does not guess, and leaves reporting and exiting to `main`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m bs_comm") -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name, ``["plan", …]``; by default those of the process.
        prog: What help and errors call the program; a command that delegates here says its own name.

    Returns:
        The exit status: 0, or 2 for bad input, after one line on standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
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
    except (_UsageError, ValueError, TypeError, OverflowError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run(words: list[str], prog: str) -> str:
    wants_help = any(word in ("-h", "--help") for word in words)
    if words and words[0] != "plan" and not wants_help:
        raise _UsageError(f"expected the command 'plan', got {words[0]!r}")
    prog, words = f"{prog} plan", words[1:] if words[:1] == ["plan"] else words
    if not words or words[0].startswith("-"):
        if wants_help:
            epilog = _EPILOG.format(prog=prog, patterns=", ".join(_options.pattern_classes()))
            _Parser(prog=prog, usage="%(prog)s PATTERN [options]", epilog=epilog, description=_ABOUT).print_help()
            raise SystemExit(0)
        raise _UsageError(f"expected a PATTERN first, got {words[0]!r}" if words else "expected a PATTERN, got nothing")
    parser = _source_parser(words[0], prog)
    options = parser.parse_args(words[1:])
    return _plan(options, *_layout(words[0], options))


def _source_parser(source: str, prog: str) -> _Parser:
    """A parser with the options of one source of layouts, and those of any plan."""
    parser = _Parser(prog=f"{prog} {source}", usage="%(prog)s [options]", description=_ABOUT)
    if not source.endswith(".npz"):
        group = parser.add_argument_group("of the layout")
        group.add_argument("--tokens", type=_options.integer, required=True, metavar="N", help="64K = 65536")
        group.add_argument("--block-size", type=_options.integer, metavar="N", help="tokens per block [64]")
        group.add_argument("--causal", action="store_true", help="no key after its query")
        if source != "dense":
            name, patterns = _options.canonical(source), _options.pattern_classes()
            if name not in patterns:
                known = ", ".join(patterns)
                raise _UsageError(f"unknown pattern {source!r}; expected dense, FILE.npz or one of {known}")
            group.add_argument("--density", type=_options.number, metavar="D", help="active / allowed blocks")
            group.add_argument("--per-head", action="store_true", help="a layout for each query head")
            many: dict[str, Any] = {"type": _options.integers, "nargs": "+", "action": _options.Joined, "metavar": "N"}
            group.add_argument("--segment-lengths", help="restrict to LongNet segments of these lengths", **many)
            group.add_argument("--segment-rates", help="the segments' dilation rates", **many)
            _options.add_options(parser, patterns[name])
            _options.add_composition(parser)
    _add_plan_options(parser)
    return parser


def _add_plan_options(parser: _Parser) -> None:
    number: dict[str, Any] = {"type": _options.integer, "metavar": "N"}
    ring = parser.add_argument_group("of the ring")
    ring.add_argument("--world-size", required=True, help="ranks", **number)
    ring.add_argument("--placement", default="contiguous", choices=sorted(PLACEMENTS), help="[%(default)s]")
    tensors = parser.add_argument_group("of the tensors")
    tensors.add_argument("--q-heads", help=f"[the layout's heads, or {_QUERY_HEADS}]", **number)
    tensors.add_argument("--kv-heads", help="[the query heads]", **number)
    tensors.add_argument("--head-dim", default=128, help="[%(default)s]", **number)
    tensors.add_argument("--value-head-dim", help="[the head dim]", **number)
    tensors.add_argument("--batch", default=1, help="[%(default)s]", **number)
    tensors.add_argument("--dtype", default="bf16", choices=ITEM_SIZES, help="of K and V on the wire [%(default)s]")
    tensors.add_argument("--grad-dtype", default="fp32", choices=ITEM_SIZES, help="of dK and dV [%(default)s]")
    machine = parser.add_argument_group("of the machine")
    machine.add_argument("--bandwidth", default="50GB/s", help="of a rank, each way [%(default)s]")
    machine.add_argument("--latency", default="10us", help="per message [%(default)s]")
    machine.add_argument("--flops", default="400T", help="sustained, per rank [%(default)s]")
    machine.add_argument("--ranks-per-node", help="consecutive ranks that share a node", **number)
    machine.add_argument("--node-bandwidth", metavar="B", help="of a rank between nodes")
    machine.add_argument("--node-latency", metavar="T", help="between nodes")
    run = parser.add_argument_group("of the run and the output")
    run.add_argument("--forward-only", action="store_true", help="leave out the backward pass")
    run.add_argument("--keep-kv", action="store_true", help="backward does not fetch K and V again")
    run.add_argument(
        "--scaling", type=_options.integers, nargs="+", action=_options.Joined, metavar="W",
        help="world sizes of the curve [powers of two up to the world size]",
    )  # fmt: skip
    run.add_argument("--json", action="store_true", help="numbers instead of text")
    run.add_argument("--width", default=64, help="widest picture, in characters [%(default)s]", **number)


def _layout(source: str, options: argparse.Namespace) -> tuple[BlockLayout | None, str]:
    """The layout, None for a dense ring, and how to call it."""
    if source.endswith(".npz"):
        layout = BlockLayout.load(Path(source))
        return layout, f"{Path(source).name} (density {layout.density:.4g})"
    causal = ", causal" if options.causal else ""
    if source == "dense":
        return None, f"dense{causal}"
    given = {name: value for name, value in vars(options).items() if value is not None}
    grid = {name: given[name] for name in ("tokens", "block_size") if name in given}
    pattern = _options.build(_options.pattern_classes()[_options.canonical(source)], given, **grid)
    pattern = _options.compose(pattern, given)
    arguments: dict[str, Any] = {"density": options.density, "causal": options.causal}
    if options.block_size is not None:
        arguments["block_size"] = options.block_size
    if options.per_head:
        arguments["heads"] = _QUERY_HEADS if options.q_heads is None else options.q_heads
    if (options.segment_lengths is None) != (options.segment_rates is None):
        raise _UsageError("arguments --segment-lengths, --segment-rates: expected both or neither, got one")
    if options.segment_lengths is not None:
        arguments["candidates"] = LongNetSegments(options.segment_lengths, options.segment_rates)
    layout = pattern.layout(options.tokens, **arguments)
    return layout, f"{pattern}{causal} (density {layout.density:.4g})"


def _plan(options: argparse.Namespace, layout: BlockLayout | None, title: str) -> str:
    """Plan, cost, and say so."""
    q_heads = options.q_heads
    if q_heads is None:
        q_heads = layout.heads if layout is not None and layout.heads > 1 else _QUERY_HEADS
    kv_heads = q_heads if options.kv_heads is None else options.kv_heads
    if options.width < 2:
        raise ValueError(f"--width: expected an integer ≥ 2, got {options.width}")
    if options.world_size < 1:
        raise ValueError(f"--world-size: expected an integer ≥ 1, got {options.world_size}")
    model = CostModel(
        _units.bandwidth("--bandwidth", options.bandwidth),
        _units.duration("--latency", options.latency),
        _units.flops("--flops", options.flops),
        options.ranks_per_node,
        None if options.node_bandwidth is None else _units.bandwidth("--node-bandwidth", options.node_bandwidth),
        None if options.node_latency is None else _units.duration("--node-latency", options.node_latency),
    )
    dense: dict[str, Any] = {}
    if layout is None:
        dense = {"seq_len": options.tokens, "block_size": options.block_size, "causal": options.causal}

    def plan_of(world: int) -> ExchangePlan:
        return ExchangePlan.build(layout, world, options.placement, kv_heads, **dense)

    sizes = {
        "kv_itemsize": ITEM_SIZES[options.dtype],
        "kv_row_bytes": FLOAT8_ROW_BYTES if options.dtype == "fp8" else 0,
        "grad_itemsize": ITEM_SIZES[options.grad_dtype],
    }
    step = {
        "value_head_dim": options.value_head_dim,
        "q_heads": q_heads,
        "batch": options.batch,
        "backward": not options.forward_only,
        "keep_kv": options.keep_kv,
        **sizes,
    }
    world = options.world_size
    worlds = options.scaling or sorted({2**i for i in range(world.bit_length())} | {world})
    plan = plan_of(world)
    traffic = plan.traffic(options.head_dim, options.value_head_dim, batch=options.batch, **sizes)
    time = step_time(plan, model, options.head_dim, **step)
    curve = scaling_curve(plan_of, worlds, model, options.head_dim, **step)
    hiding = hiding_bandwidth(plan, model, options.head_dim, **step)
    nodes = None
    if options.ranks_per_node is not None:
        staged = HierarchicalPlan.build(plan, options.ranks_per_node)
        nodes = Nodes(staged, hierarchical_transfer(staged, model, options.head_dim, **step))
    if options.json:
        return json.dumps(plan_record(plan, traffic, time, curve, hiding, nodes=nodes), allow_nan=False)
    title = (
        f"{title}, {plan.seq_len[1]:,} tokens over {world:,} ranks, {plan.placement.name}; "
        f"{q_heads} query and {kv_heads} kv heads × {options.head_dim}, {options.dtype}"
    )
    ascii_only = not _is_printable("░▒▓█│┌┐└┘─×…–µ≤")
    return plan_report(
        plan, traffic, time, curve, hiding,
        title=title, nodes=nodes, width=options.width, ascii_only=ascii_only,
    )  # fmt: skip


def _is_printable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
