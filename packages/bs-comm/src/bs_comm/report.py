"""A plan and its cost as text: a table, a picture of who sends to whom, and the scaling curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._units import show_bytes, show_seconds
from .cost import Phase, ScalingPoint, StepTime
from .hierarchy import HierarchicalPlan
from .plan import ExchangePlan, NodeRows, Traffic

_SHADES = np.array([" ", "░", "▒", "▓", "█"])
_ASCII_SHADES = np.array([" ", ".", "+", "*", "#"])
_ASCII = str.maketrans({"×": "x", "…": "...", "–": "-", "│": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+", "─": "-",
                        "≤": "<=", "→": ">", "µ": "u"})  # fmt: skip
#: Steps listed one by one.
_STEPS_SHOWN = 8
_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Nodes:
    """What nodes change.

    Attributes:
        staged: The exchange in two stages.
        seconds: What its transfers take alone, by pass.
    """

    staged: HierarchicalPlan
    seconds: tuple[float, ...]

    @property
    def rows(self) -> NodeRows:
        """Rows of the direct exchange, and how many of them cross for the first time."""
        return self.staged.direct.node_rows(self.staged.ranks_per_node)


def plan_report(
    plan: ExchangePlan,
    traffic: Traffic,
    time: StepTime,
    curve: Sequence[ScalingPoint],
    hiding: float,
    *,
    title: str,
    nodes: Nodes | None = None,
    width: int = 64,
    ascii_only: bool = False,
) -> str:
    """Everything worth knowing before a run.

    Args:
        plan: The plan.
        traffic: Its bytes.
        time: Its step time.
        curve: Its scaling curve, possibly empty.
        hiding: From `hiding_bandwidth`.
        title: First line.
        nodes: Count what crosses between nodes, directly and in two stages.
        width: Widest picture, in characters.
        ascii_only: Use no characters beyond ASCII.
    """
    parts = [title, _summary(plan, traffic), _steps(plan, traffic), _picture(plan, width, ascii_only)]
    parts.append(_times(time, hiding))
    if nodes is not None:
        parts.append(_nodes(nodes, time))
    if curve:
        parts.append(_scaling(curve))
    text = "\n\n".join(parts)
    return text.translate(_ASCII) if ascii_only else text


def plan_record(
    plan: ExchangePlan,
    traffic: Traffic,
    time: StepTime,
    curve: Sequence[ScalingPoint],
    hiding: float,
    *,
    nodes: Nodes | None = None,
) -> dict[str, Any]:
    """The same as numbers, for JSON: bytes, seconds; infinite bandwidth is None."""

    def phase(p: Phase | None) -> dict[str, float] | None:
        if p is None:
            return None
        names = ("seconds", "compute_seconds", "transfer_seconds", "exposed_seconds", "hidden_share")
        return {name: getattr(p, name) for name in names}

    def step(t: StepTime) -> dict[str, Any]:
        return {"seconds": t.seconds, "forward": phase(t.forward), "backward": phase(t.backward)}

    return {
        "world_size": plan.world_size,
        "seq_len": list(plan.seq_len),
        "block_size": list(plan.block_size),
        "kv_heads": plan.kv_heads,
        "causal": plan.causal,
        "placement": plan.placement.name,
        "digest": plan.digest,
        "tokens_per_rank": plan.placement.lengths.tolist(),
        "work_imbalance": plan.work_imbalance,
        "row_imbalance": plan.row_imbalance,
        "steps": plan.num_steps,
        "forward_bytes": int(traffic.forward.sum()),
        "forward_bound_bytes": traffic.forward_bound,
        "backward_bytes": int(traffic.backward.sum()),
        "backward_bound_bytes": traffic.backward_bound,
        "share_of_dense_ring": _share(plan),
        "node_rows": None if nodes is None else asdict(nodes.rows),
        "hierarchical": None
        if nodes is None
        else {
            "across_rows": int(nodes.staged.across.rows.sum()),
            "within_rows": int(nodes.staged.within.rows.sum()),
            "steps": [nodes.staged.across.num_steps, nodes.staged.within.num_steps],
            "transfer_seconds": dict(zip(_PASSES, nodes.seconds, strict=False)),
        },
        "forward_bytes_by_pair": traffic.forward.tolist(),
        "time": step(time),
        "hiding_bandwidth": None if np.isinf(hiding) else hiding,
        "scaling": [
            {"world_size": p.world_size, "speedup": p.speedup, "efficiency": p.efficiency, **step(p.time)}
            for p in curve
        ],
    }


def _share(plan: ExchangePlan) -> float:
    return int(plan.rows.sum()) / plan.dense_rows if plan.dense_rows else 0.0


def _range(values: NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


def _summary(plan: ExchangePlan, traffic: Traffic) -> str:
    def moved(matrix: NDArray[np.int64], bound: int) -> str:
        sent, got = int(matrix.sum(1).max()), int(matrix.sum(0).max())
        return (
            f"{show_bytes(matrix.sum())} in all (lower bound {show_bytes(bound)}); busiest rank sends "
            f"{show_bytes(sent)}, receives {show_bytes(got)}"
        )

    pairs = int((plan.rows > 0).sum())
    largest = int(traffic.forward.max())
    rows = [
        ("tokens per rank", _range(plan.placement.lengths)),
        ("work", f"busiest rank {plan.work_imbalance:.3f} × the mean"),
        ("traffic", f"busiest rank {plan.row_imbalance:.3f} × the mean; {pairs:,} of "
                    f"{plan.world_size * (plan.world_size - 1):,} pairs; {_share(plan):.2%} of a dense ring"),
        ("forward, K and V", moved(traffic.forward, traffic.forward_bound)),
        ("backward, dK and dV", moved(traffic.backward, traffic.backward_bound)),
        ("receive buffers", f"2 × {show_bytes(largest)} at most, per rank"),
        ("steps", f"{plan.num_steps} (a dense ring takes {plan.world_size - 1})"),
    ]  # fmt: skip
    return _aligned(rows)


def _steps(plan: ExchangePlan, traffic: Traffic) -> str:
    lines = [("step", "pairs", "largest", "mean")]
    for step in range(1, min(plan.num_steps, _STEPS_SHOWN) + 1):
        sender, receiver = plan.matching(step).T
        size = traffic.forward[sender, receiver]
        lines.append((str(step), f"{len(size):,}", show_bytes(size.max()), show_bytes(size.mean())))
    if plan.num_steps == 0:
        return "steps: none, every rank has all it reads"
    more = f"\n… {plan.num_steps - _STEPS_SHOWN} more" if plan.num_steps > _STEPS_SHOWN else ""
    return _aligned(lines, right=True) + more


def _picture(plan: ExchangePlan, width: int, ascii_only: bool) -> str:
    """Rows are senders, columns receivers; a cell is the mean over its ranks, the fullest cell the darkest."""
    per_cell = -(-plan.world_size // (width // 2))
    starts = np.arange(0, plan.world_size, per_cell)
    sums = np.add.reduceat(np.add.reduceat(plan.rows, starts, axis=0), starts, axis=1)
    spans = np.diff(starts, append=plan.world_size)
    mean = sums / (spans[:, None] * spans)
    top = float(mean.max())
    shade = np.ceil(mean / (top or 1.0) * 4 - 1e-9).astype(int)
    characters = (_ASCII_SHADES if ascii_only else _SHADES)[shade]
    body = [f"│{''.join(np.repeat(line, 2))}│" for line in characters]
    ranks = "one rank" if per_cell == 1 else f"{per_cell} ranks"
    head = f"who sends (down) to whom (across), {ranks} a cell; the darkest is {top:,.0f} key rows"
    rule = "─" * 2 * len(starts)
    return "\n".join([head, f"┌{rule}┐", *body, f"└{rule}┘"])


def _times(time: StepTime, hiding: float) -> str:
    lines: list[tuple[str, ...]] = [("pass", "time", "compute", "transfer", "exposed", "hidden")]
    for name, phase in zip(_PASSES, time.phases, strict=False):
        lines.append((name, *_phase_cells(phase)))
    if np.isinf(hiding):
        limit = "latency alone keeps it from hiding in every pass, whatever the bandwidth"
    elif hiding:
        limit = f"it hides in every pass from {show_bytes(hiding)}/s on"
    else:
        limit = "nothing moves"
    open_passes = [name for name, phase in zip(_PASSES, time.phases, strict=False) if not phase.is_hidden]
    verdict = f"adds time {' and '.join(open_passes)}" if open_passes else "hides behind compute"
    return _aligned(lines, right=True) + f"\ncommunication {verdict}; {limit}"


def _nodes(nodes: Nodes, time: StepTime) -> str:
    """The direct exchange beside the one in two stages: key rows by kind of link, steps, seconds without compute."""
    staged, rows = nodes.staged, nodes.rows
    lines: list[tuple[str, ...]] = [("exchange", "between nodes", "busiest rank", "inside nodes", "steps", *(
        f"{name} transfers" for name in _PASSES[: len(nodes.seconds)])
    )]  # fmt: skip
    node = np.arange(staged.direct.world_size) // staged.ranks_per_node
    far = np.where(node[:, None] != node, staged.direct.rows, 0)
    alone = tuple(phase.transfer_seconds for phase in time.phases)
    for name, across, within, steps, seconds in (
        ("direct", far, rows.within, str(staged.direct.num_steps), alone),
        ("in two stages", staged.across.rows, int(staged.within.rows.sum()),
         f"{staged.across.num_steps} + {staged.within.num_steps}", nodes.seconds),
    ):  # fmt: skip
        busiest = max(int(across.sum(0).max()), int(across.sum(1).max()))
        lines.append((name, f"{int(across.sum()):,} rows", f"{busiest:,} rows", f"{within:,} rows", steps,
                      *(show_seconds(s) for s in seconds)))  # fmt: skip
    return _aligned(lines, right=True) + "\n`PackedRing` runs the direct exchange, `HierarchicalRing` the other"


def _phase_cells(phase: Phase) -> tuple[str, ...]:
    seconds = (phase.seconds, phase.compute_seconds, phase.transfer_seconds, phase.exposed_seconds)
    return (*(show_seconds(s) for s in seconds), f"{phase.hidden_share:.0%}")


def _scaling(curve: Sequence[ScalingPoint]) -> str:
    lines = [("ranks", "step time", "speedup", "efficiency", "exposed", "moved per rank")]
    for point in curve:
        time = point.time
        rows = int(point.plan.rows.sum()) / point.world_size
        lines.append((f"{point.world_size:,}", show_seconds(time.seconds), f"{point.speedup:.4g}",
                      f"{point.efficiency:.0%}", show_seconds(time.exposed_seconds), f"{rows:,.0f} rows"))  # fmt: skip
    verdicts = []
    for i, name in enumerate(_PASSES[: len(curve[0].time.phases)]):
        first = next((p.world_size for p in curve if not p.time.phases[i].is_hidden), None)
        verdicts.append(f"{name} at {first:,} ranks" if first else f"{name} at none of these")
    return _aligned(lines, right=True) + f"\ncommunication stops hiding behind compute: {', '.join(verdicts)}"


def _aligned(rows: Sequence[tuple[str, ...]], *, right: bool = False) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(text: str, i: int) -> str:
        return text.rjust(widths[i]) if right else text.ljust(widths[i])

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(row)).rstrip() for row in rows)
