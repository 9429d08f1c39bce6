"""What a plan costs on a given machine: step time, scaling, and where communication stops hiding behind compute.

A simulation on paper, step by step and rank by rank. It knows links, latency, arithmetic and the ring's two buffers per
direction; it does not know congestion between pairs, memory bandwidth, or kernels whose speed depends on shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._check import boolean, integer, positive
from .hierarchy import HierarchicalPlan
from .plan import ExchangePlan

Float64 = NDArray[np.floating]

#: Communication counts as hidden while it lengthens a phase by at most this share of its compute.
HIDDEN_SHARE = 0.01


@dataclass(frozen=True)
class CostModel:
    """A machine, all ranks alike.

    Attributes:
        bandwidth: Bytes per second that a rank can send, and at the same time receive.
        latency: Seconds per message before its first byte.
        flops: Floating-point operations per second that a rank sustains in attention.
        ranks_per_node: Consecutive ranks that share a node; None: all links are alike.
        node_bandwidth: Bytes per second of a rank's link to other nodes; default ``bandwidth``.
        node_latency: Seconds per message between nodes; default ``latency``.
    """

    bandwidth: float
    latency: float
    flops: float
    ranks_per_node: int | None = None
    node_bandwidth: float | None = None
    node_latency: float | None = None

    def __post_init__(self) -> None:
        positive("bandwidth", self.bandwidth)
        positive("latency", self.latency, zero=True)
        positive("flops", self.flops)
        if self.ranks_per_node is not None:
            integer("ranks_per_node", self.ranks_per_node)
        for name, value in (("node_bandwidth", self.node_bandwidth), ("node_latency", self.node_latency)):
            if value is None:
                continue
            positive(name, value, zero=name == "node_latency")
            if self.ranks_per_node is None:
                raise ValueError(f"{name}: expected None without ranks_per_node, got {value}")

    def links(self, world_size: int) -> tuple[Float64, Float64]:
        """Seconds per message and per byte, ``float64[world, world]`` by (sender, receiver)."""
        node = np.arange(world_size) // (self.ranks_per_node or world_size)
        apart = node[:, None] != node
        far_latency = self.latency if self.node_latency is None else self.node_latency
        far_bandwidth = self.bandwidth if self.node_bandwidth is None else self.node_bandwidth
        return np.where(apart, far_latency, self.latency), np.where(apart, 1 / far_bandwidth, 1 / self.bandwidth)


@dataclass(frozen=True)
class Phase:
    """One pass, forward or backward, over all steps.

    Attributes:
        seconds: Until the last rank has finished.
        compute_seconds: The busiest rank's arithmetic alone: what the pass would take on infinitely fast links.
        transfer_seconds: All transfers alone: what it would take with infinitely fast arithmetic.
    """

    seconds: float
    compute_seconds: float
    transfer_seconds: float

    @property
    def exposed_seconds(self) -> float:
        """Time that communication adds."""
        return max(0.0, self.seconds - self.compute_seconds)

    @property
    def hidden_share(self) -> float:
        """Share of the transfer time that passes behind arithmetic, in [0, 1]; 1 when nothing moves."""
        if not self.transfer_seconds:
            return 1.0
        return min(1.0, max(0.0, 1 - self.exposed_seconds / self.transfer_seconds))

    @property
    def is_hidden(self) -> bool:
        """Whether communication adds at most `HIDDEN_SHARE` of the compute time."""
        return self.exposed_seconds <= HIDDEN_SHARE * self.compute_seconds


@dataclass(frozen=True)
class StepTime:
    """Attention of one layer, forward and (unless left out) backward.

    Attributes:
        forward: The forward pass.
        backward: The backward pass, or None.
    """

    forward: Phase
    backward: Phase | None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The passes that run."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def seconds(self) -> float:
        """Both passes."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def compute_seconds(self) -> float:
        """Both passes on infinitely fast links."""
        return sum(phase.compute_seconds for phase in self.phases)

    @property
    def exposed_seconds(self) -> float:
        """Time that communication adds to both."""
        return sum(phase.exposed_seconds for phase in self.phases)

    @property
    def is_hidden(self) -> bool:
        """Whether communication hides behind compute in every pass."""
        return all(phase.is_hidden for phase in self.phases)


@dataclass(frozen=True)
class ScalingPoint:
    """One world size on a scaling curve.

    Attributes:
        world_size: Number of ranks.
        plan: Its exchange plan.
        time: Its step time.
        speedup: Time on one rank over time here.
    """

    world_size: int
    plan: ExchangePlan
    time: StepTime
    speedup: float

    @property
    def efficiency(self) -> float:
        """Speedup per rank."""
        return self.speedup / self.world_size


def step_time(
    plan: ExchangePlan,
    model: CostModel,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    q_heads: int | None = None,
    batch: int = 1,
    kv_itemsize: int = 2,
    kv_row_bytes: int = 0,
    grad_itemsize: int = 4,
    backward: bool = True,
    keep_kv: bool = False,
) -> StepTime:
    """Time of one attention call over a ring.

    Args:
        plan: Who sends what (not a transposed plan).
        model: The machine.
        head_dim: Elements of a query and key row.
        value_head_dim: Elements of a value row; default ``head_dim``.
        q_heads: Query heads; default the layout's heads, or ``plan.kv_heads`` where all heads share the layout.
        batch: Sequences.
        kv_itemsize: Bytes per element of K and V on the wire.
        kv_row_bytes: As in `ExchangePlan.traffic`.
        grad_itemsize: Bytes per element of dK and dV on the wire.
        backward: Count the backward pass too.
        keep_kv: Backward finds the remote K and V where forward left them, instead of fetching them again.

    Source: 2 · 2 GEMM FLOPs per score forward, 2 · 5 backward (scores recomputed), as in FlashAttention-2
    (arXiv:2307.08691, section 3.2), for D and value D apart.
    """
    if plan.is_transposed:
        raise ValueError("plan: expected a forward plan, got a transposed one; pass plan.T")
    traffic = plan.traffic(
        head_dim, value_head_dim,
        batch=batch, kv_itemsize=kv_itemsize, kv_row_bytes=kv_row_bytes, grad_itemsize=grad_itemsize,
    )  # fmt: skip
    value_dim = head_dim if value_head_dim is None else value_head_dim
    scores = plan.work * (batch * _heads_per_layout_head(plan, q_heads))
    latency, per_byte = model.links(plan.world_size)

    def seconds(amount: NDArray[np.int64]) -> Float64:
        return np.where(amount > 0, latency + amount * per_byte, 0.0)

    out, home = seconds(traffic.forward), seconds(traffic.backward)
    forward = _phase(plan, scores * (2 * (head_dim + value_dim) / model.flops), out, None)
    if not boolean("backward", backward):
        if boolean("keep_kv", keep_kv):
            raise ValueError("keep_kv: expected False without a backward pass, got True")
        return StepTime(forward, None)
    again = np.zeros_like(out) if boolean("keep_kv", keep_kv) else out
    return StepTime(forward, _phase(plan, scores * (2 * (3 * head_dim + 2 * value_dim) / model.flops), again, home))


def _heads_per_layout_head(plan: ExchangePlan, q_heads: int | None) -> int:
    heads = 1 if plan.layout is None else plan.layout.shape[0]
    if heads > 1:
        if q_heads is not None and integer("q_heads", q_heads) != heads:
            raise ValueError(f"q_heads: expected the layout's {heads} heads, got {q_heads}")
        return 1
    count = plan.kv_heads if q_heads is None else integer("q_heads", q_heads)
    if count % plan.kv_heads:
        raise ValueError(f"q_heads: expected a multiple of {plan.kv_heads} kv heads, got {count}")
    return count


def _phase(plan: ExchangePlan, compute: Float64, out: Float64, home: Float64 | None) -> Phase:
    alone = np.zeros_like(compute)
    return Phase(
        _makespan(plan, compute, out, home),
        float(compute.sum(0).max()),
        _makespan(plan, alone, out, home),
    )


def _makespan(plan: ExchangePlan, compute: Float64, out: Float64, home: Float64 | None) -> float:
    """Play all steps.

    A rank computes its own blocks first, then each arrival in turn. The transfer of step s needs both ends' links and
    the buffers that step s − 2 has left; gradients go home when their step is computed. A link carries one transfer
    per direction at a time.

    Args:
        plan: Gives the matchings.
        compute: Seconds by (key owner, query owner).
        out: Seconds of each K/V transfer by (sender, receiver); 0 where it need not travel.
        home: Seconds of each gradient transfer, or None.
    """
    world, steps = plan.world_size, plan.num_steps
    sending, receiving = np.zeros(world), np.zeros(world)
    done = np.diagonal(compute).copy()
    arrived: dict[int, Float64] = {}
    pairs = {step: plan.matching(step).T for step in range(1, steps + 1)}

    def move(senders: Any, receivers: Any, start: Float64, duration: Float64) -> Float64:
        end = np.maximum(np.maximum(sending[senders], receiving[receivers]), start) + duration
        sending[senders] = receiving[receivers] = end
        return end

    def post(step: int, ready: Float64) -> None:
        if step <= steps:
            s, r = pairs[step]
            arrived[step] = move(s, r, np.maximum(ready[s], ready[r]), out[s, r])

    post(1, np.zeros(world))
    post(2, np.zeros(world))
    last = 0.0
    for step in range(1, steps + 1):
        s, r = pairs[step]
        done[r] = np.maximum(done[r], arrived.pop(step)) + compute[s, r]
        if home is not None:
            last = max(last, float(move(r, s, done[r], home[r, s]).max()))
        post(step + 2, done)
    return max(last, float(done.max()))


def hierarchical_transfer(
    plan: HierarchicalPlan, model: CostModel, head_dim: int, value_head_dim: int | None = None, **step: Any
) -> tuple[float, ...]:
    """Seconds that the transfers of each pass take alone, one stage after the other.

    What a direct exchange takes is `Phase.transfer_seconds` of the direct plan.

    Args:
        plan: The two stages.
        model: The machine; its nodes are those of the plan.
        head_dim: As in `step_time`.
        value_head_dim: As in `step_time`.
        step: Further arguments of `step_time`.
    """
    if model.ranks_per_node != plan.ranks_per_node:
        raise ValueError(f"model: expected {plan.ranks_per_node} ranks per node, got {model.ranks_per_node}")
    stages = [step_time(stage, model, head_dim, value_head_dim, **step).phases for stage in (plan.across, plan.within)]
    return tuple(across.transfer_seconds + within.transfer_seconds for across, within in zip(*stages, strict=True))


def hiding_bandwidth(plan: ExchangePlan, model: CostModel, head_dim: int, **step: Any) -> float:
    """Least bandwidth, in bytes per second, at which communication hides in every pass; inf if latency forbids it.

    Args:
        plan: As in `step_time`.
        model: As in `step_time`; its bandwidths are scaled together, and the result is the one within a node.
        head_dim: As in `step_time`.
        step: Further arguments of `step_time`.
    """
    base = positive("bandwidth", model.bandwidth)
    far = model.node_bandwidth

    def hides(exponent: float) -> bool:
        scale = 2.0**exponent
        scaled = replace(model, bandwidth=base * scale, node_bandwidth=None if far is None else far * scale)
        return step_time(plan, scaled, head_dim, **step).is_hidden

    low, high = -60.0, 60.0
    if hides(low):
        return 0.0
    if not hides(high):
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if hides(middle) else (middle, high)
    return base * 2.0**high


def scaling_curve(
    plan_of: Callable[[int], ExchangePlan], world_sizes: Iterable[int], model: CostModel, head_dim: int, **step: Any
) -> list[ScalingPoint]:
    """Step time over world sizes, the sequence staying the same (strong scaling).

    Args:
        plan_of: Builds the plan of a world size, e.g. ``lambda world: ExchangePlan.build(layout, world, "zigzag", 8)``.
        world_sizes: Numbers of ranks.
        model: The machine.
        head_dim: As in `step_time`.
        step: Further arguments of `step_time`.

    Returns:
        One point per world size, in the given order.
    """
    alone = step_time(plan_of(1), model, head_dim, **step).seconds
    points = []
    for world in world_sizes:
        plan = plan_of(world)
        time = step_time(plan, model, head_dim, **step)
        points.append(ScalingPoint(world, plan, time, alone / time.seconds if time.seconds else 1.0))
    return points
