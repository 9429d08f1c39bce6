"""``python -m bs_comm plan``: plan a ring on paper, without a GPU or a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bs_patterns import BlockLayout

from . import _units
from ._pattern_args import add_pattern_options, describe, make_layout, make_pattern, pattern_classes
from .cost import CostModel, hiding_bandwidth, scaling_curve, step_time
from .placement import PLACEMENTS
from .plan import ExchangePlan
from .report import plan_record, plan_report

#: Bytes per element on the wire.
ITEM_SIZES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m bs_comm") -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; default those of the process.
        prog: What to call the program in messages.

    Returns:
        Exit status: 0, or 2 for bad input, after one line on stderr.
    """
    parser = _Parser(prog=prog, description="Plan ring attention over a block-sparse layout.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    plan = commands.add_parser("plan", help="who sends what, what it costs", description=_PLAN_HELP)
    add_plan_options(plan)
    try:
        options = parser.parse_args(argv)
        return run_plan(options)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog} plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


_PLAN_HELP = "Prints the exchange plan of a layout and what it would cost on a given machine."


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """All options of ``plan``."""
    add = parser.add_argument
    add("pattern", help=f"dense, a .npz layout, or one of {', '.join(pattern_classes())}")
    add("--tokens", metavar="N", help="sequence length; K and M are 1024 and 1024²")
    add("--world-size", type=int, required=True, metavar="W", help="number of ranks")
    add("--placement", default="contiguous", choices=sorted(PLACEMENTS), help="default: %(default)s")
    add("--block-size", type=int, metavar="B", help="tokens per block, default 64")
    add("--causal", action="store_true", help="no key after its query")
    add("--density", type=float, metavar="D", help="active / allowed blocks, in (0, 1]")
    add("--per-head", action="store_true", help="one layout for each query head instead of one for all")
    sizes = parser.add_argument_group("tensors")
    sizes.add_argument("--kv-heads", type=int, metavar="N", help="default: the query heads")
    sizes.add_argument("--q-heads", type=int, metavar="N", help="default: the layout's heads, or 8")
    sizes.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: %(default)s")
    sizes.add_argument("--value-head-dim", type=int, metavar="D", help="default: the head dim")
    sizes.add_argument("--batch", type=int, default=1, metavar="N", help="default: %(default)s")
    sizes.add_argument("--dtype", default="bf16", choices=ITEM_SIZES, help="K and V on the wire; default: %(default)s")
    sizes.add_argument("--grad-dtype", default="fp32", choices=ITEM_SIZES, help="dK, dV; default: %(default)s")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--bandwidth", default="50GB/s", help="of a rank, each way; default: %(default)s")
    machine.add_argument("--latency", default="10us", help="per message; default: %(default)s")
    machine.add_argument("--flops", default="400T", help="sustained, per rank; default: %(default)s")
    machine.add_argument("--ranks-per-node", type=int, metavar="N", help="consecutive ranks on one node")
    machine.add_argument("--node-bandwidth", metavar="B", help="of a rank between nodes")
    machine.add_argument("--node-latency", metavar="T", help="between nodes")
    run = parser.add_argument_group("run and output")
    run.add_argument("--forward-only", action="store_true", help="leave out the backward pass")
    run.add_argument("--keep-kv", action="store_true", help="backward does not fetch K and V again")
    run.add_argument("--scaling", metavar="W,W,…", help="world sizes of the curve; default: powers of two up to W")
    run.add_argument("--json", action="store_true", help="numbers instead of text")
    run.add_argument("--width", type=int, default=64, metavar="N", help="widest picture; default: %(default)s")
    add_pattern_options(parser)


def run_plan(options: argparse.Namespace) -> int:
    """Plan, cost, print; returns the exit status."""
    layout, title = _layout(options)
    q_heads = _query_heads(options, layout)
    kv_heads = q_heads if options.kv_heads is None else options.kv_heads
    if options.width < 2:
        raise ValueError(f"--width: expected an integer ≥ 2, got {options.width}")
    model = CostModel(
        _units.bandwidth("--bandwidth", options.bandwidth),
        _units.duration("--latency", options.latency),
        _units.flops("--flops", options.flops),
        options.ranks_per_node,
        None if options.node_bandwidth is None else _units.bandwidth("--node-bandwidth", options.node_bandwidth),
        None if options.node_latency is None else _units.duration("--node-latency", options.node_latency),
    )

    def plan_of(world: int) -> ExchangePlan:
        if layout is not None:
            return ExchangePlan.build(layout, world, options.placement, kv_heads)
        seq_len, block = _units.tokens("--tokens", options.tokens), options.block_size
        return ExchangePlan.build(
            None, world, options.placement, kv_heads, seq_len=seq_len, block_size=block, causal=options.causal
        )

    sizes = {"kv_itemsize": ITEM_SIZES[options.dtype], "grad_itemsize": ITEM_SIZES[options.grad_dtype]}
    step = {
        "value_head_dim": options.value_head_dim,
        "q_heads": q_heads,
        "batch": options.batch,
        "backward": not options.forward_only,
        "keep_kv": options.keep_kv,
        **sizes,
    }
    plan = plan_of(options.world_size)
    traffic = plan.traffic(options.head_dim, options.value_head_dim, batch=options.batch, **sizes)
    time = step_time(plan, model, options.head_dim, **step)
    curve = scaling_curve(plan_of, _curve_sizes(options), model, options.head_dim, **step)
    hiding = hiding_bandwidth(plan, model, options.head_dim, **step)
    if options.json:
        print(json.dumps(plan_record(plan, traffic, time, curve, hiding), allow_nan=False))
        return 0
    title = (
        f"{title}, {plan.seq_len[1]:,} tokens over {plan.world_size:,} ranks, {plan.placement.name}; "
        f"{q_heads} query and {kv_heads} kv heads × {options.head_dim}, {options.dtype}"
    )
    text = plan_report(plan, traffic, time, curve, hiding, title=title, width=options.width, ascii_only=_is_ascii())
    print(text)
    return 0


def _layout(options: argparse.Namespace) -> tuple[BlockLayout | None, str]:
    """The layout and how to call it; None for a dense ring."""
    if options.pattern.endswith(".npz"):
        _refuse(options, "a layout file has its own", "tokens", "block_size", "causal", "density", "per_head")
        layout = BlockLayout.load(Path(options.pattern))
        return layout, f"{Path(options.pattern).name} (density {layout.density:.4g})"
    if options.tokens is None:
        raise ValueError("--tokens: expected a sequence length, got none")
    if options.pattern == "dense":
        _refuse(options, "dense has none", "density", "per_head")
        _refuse(options, "dense has no pattern parameters", *(k for k in vars(options) if k.startswith("pattern_")))
        return None, "dense, causal" if options.causal else "dense"
    pattern = make_pattern(options.pattern, options)
    heads = (8 if options.q_heads is None else options.q_heads) if options.per_head else 1
    layout = make_layout(
        pattern,
        _units.tokens("--tokens", options.tokens),
        block_size=64 if options.block_size is None else options.block_size,
        heads=heads,
        causal=options.causal,
        density=options.density,
    )
    return layout, f"{describe(pattern)}{', causal' if options.causal else ''} (density {layout.density:.4g})"


def _refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Raise for an option that was given and would have no effect."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.removeprefix('pattern_').replace('_', '-')}: expected none, {why}")


def _query_heads(options: argparse.Namespace, layout: BlockLayout | None) -> int:
    if options.q_heads is not None:
        return options.q_heads
    return layout.heads if layout is not None and layout.heads > 1 else 8


def _curve_sizes(options: argparse.Namespace) -> list[int]:
    if options.scaling is not None:
        parts = [part.strip() for part in options.scaling.split(",") if part.strip()]
        if not parts or not all(part.isdigit() and int(part) for part in parts):
            raise ValueError(f"--scaling: expected world sizes such as 1,2,4, got {options.scaling!r}")
        return [int(part) for part in parts]
    world = options.world_size
    if world < 1:
        raise ValueError(f"--world-size: expected an integer ≥ 1, got {world}")
    return sorted({2**i for i in range(world.bit_length()) if 2**i <= world} | {world})


def _is_ascii() -> bool:
    """Whether stdout cannot show the picture's characters."""
    try:
        "░▒▓█│─┌×…–µ→≤".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False
