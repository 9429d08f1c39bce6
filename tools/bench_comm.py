"""Measures bs-comm between real gloo processes on one machine; writes JSON and tables.

    python tools/bench_comm.py                      # everything, a few minutes
    python tools/bench_comm.py --only bytes links   # some of it

`bytes` counts at the transport and does not depend on the machine's load. `links` delays messages as a link of a given
speed would and sleeps where a kernel would compute, so that overlap is measured without needing a core per rank; the
planner's prediction stands beside it, as does its scaling curve for 1 to 8 processes. `module` times a training step of
the distributed module on real kernels and holds the bytes it sends against its plan. `packing` lets one packed message
and two separate ones take turns. `wire` tells the error of a narrower wire, `hooks` the loss that training reaches with
compressed gradients, both beside the bytes. `plans` times the planner itself.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import comm_report
import results
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bs_comm import CostModel, ExchangePlan, HierarchicalPlan, PackedRing, TopKState, compress_gradients, step_time
from bs_comm.testing import RankPool, dense_attention, ring_attention, slow_links
from bs_patterns import BlockLayout, DilatedSparse, GlobalLocal, Hierarchical, LocalWindow, Pattern

HEADS, DIM, BLOCK = 4, 32, 64
WORLDS, ROUNDS = (1, 2, 4, 8), 3
LAYOUTS: dict[str, tuple[Pattern, dict[str, Any]]] = {
    "local window 1,024": (LocalWindow(1024), {}),
    "global 64 + window 512": (GlobalLocal(64, 512), {}),
    "dilated 1, 2, 4, 8 at density 0.1": (DilatedSparse((1, 2, 4, 8)), {"density": 0.1}),
    "hierarchical": (Hierarchical(), {}),
}


def layout_of(name: str, tokens: int, heads: int = 1) -> BlockLayout:
    pattern, arguments = LAYOUTS[name]
    return pattern.layout(tokens, block_size=BLOCK, causal=True, heads=heads, **arguments)


# ---------------------------------------------------------------------- bytes


def sent(rank: int, world: int, plan: ExchangePlan) -> tuple[int, int]:
    x = torch.zeros(1, int(plan.kv_placement.lengths[rank]), plan.kv_heads, DIM)
    with PackedRing(plan, batch=1, head_dim=DIM) as ring:
        kept = ring.forward(x, x, lambda arrival: None, keep=True)
        ring.backward(x, x, lambda arrival: (torch.zeros_like(arrival.k), torch.zeros_like(arrival.v)), kept=kept)
        return int(ring.sent_bytes["kv"].sum()), int(ring.sent_bytes["grad"].sum())


def measure_bytes(pool: RankPool) -> Iterator[dict[str, Any]]:
    for name in LAYOUTS:
        for placement in ("contiguous", "zigzag", "cost_balanced"):
            plan = ExchangePlan.build(layout_of(name, 16_384), 4, placement, HEADS)
            counted = pool.run(sent, plan, world_size=4)
            traffic = plan.traffic(DIM, kv_itemsize=4)
            forward, backward = (sum(row[i] for row in counted) for i in (0, 1))
            yield {
                "layout": name,
                "placement": placement,
                "forward_bytes": forward,
                "forward_bound": traffic.forward_bound,
                "backward_bytes": backward,
                "backward_bound": traffic.backward_bound,
                "share_of_dense_ring": forward / (plan.dense_rows * 2 * DIM * 4),
                "work_imbalance": plan.work_imbalance,
            }


# ---------------------------------------------------------------------- links


def over_links(
    rank: int, world: int, plan: ExchangePlan, model: CostModel, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of forward and of backward per round; arithmetic is slept."""
    x = torch.zeros(1, int(plan.kv_placement.lengths[rank]), plan.kv_heads, DIM)
    forward_flops, backward_flops = 4 * DIM, 10 * DIM

    def compute(arrival: Any, flops: int) -> None:
        area = int(plan.work[arrival.peer, rank]) * HEADS
        time.sleep(area * flops / model.flops)

    def backward(arrival: Any) -> tuple[torch.Tensor, torch.Tensor]:
        compute(arrival, backward_flops)
        return torch.zeros_like(arrival.k), torch.zeros_like(arrival.v)

    seconds: tuple[list[float], list[float]] = ([], [])
    with slow_links(PackedRing(plan, batch=1, head_dim=DIM), model.bandwidth, model.latency) as ring:
        for _ in range(rounds):
            for i, call in enumerate(
                (lambda: ring.forward(x, x, lambda a: compute(a, forward_flops)), lambda: ring.backward(x, x, backward))
            ):
                dist.barrier()
                started = time.perf_counter()
                call()
                seconds[i].append(time.perf_counter() - started)
    return seconds


def measure_links(pool: RankPool) -> Iterator[dict[str, Any]]:
    """Overlap, and the planner's scaling curve beside that of real processes, forward and backward together."""
    layout = layout_of("dilated 1, 2, 4, 8 at density 0.1", 16_384)
    plans = {world: ExchangePlan.build(layout, world, "zigzag", HEADS) for world in WORLDS}
    # One rank alone takes 0.8 s forward; a link so fast that it hides, one that cannot, one between.
    flops = float(plans[1].work.sum() * HEADS * 4 * DIM / 0.8)
    alone: dict[float, tuple[float, float]] = {}
    times: list[Any] = []
    for world, plan in plans.items():
        for bandwidth in (800e6, 100e6, 25e6):
            model = CostModel(bandwidth=bandwidth, latency=1e-3, flops=flops)
            if world > 1 or not times:  # one rank needs no link
                times = pool.run(over_links, plan, model, ROUNDS, world_size=world)
            planned = step_time(plan, model, DIM, kv_itemsize=4)
            # The slowest rank of a round ends it; the best round has the least of the machine's noise.
            best = [min(max(rank[i][n] for rank in times) for n in range(ROUNDS)) for i in (0, 1)]
            totals = (sum(best), planned.seconds)
            alone.setdefault(bandwidth, totals)
            for i, phase in enumerate(planned.phases):
                hidden = 1 - (best[i] - phase.compute_seconds) / phase.transfer_seconds if phase.transfer_seconds else 1
                yield {
                    "ranks": world,
                    "bandwidth": bandwidth,
                    "pass": ("forward", "backward")[i],
                    "seconds": best[i],
                    "planned_seconds": phase.seconds,
                    "compute_seconds": phase.compute_seconds,
                    "transfer_seconds": phase.transfer_seconds,
                    "hidden": max(0.0, min(1.0, hidden)),
                    "planned_hidden": phase.hidden_share,
                    "speedup_of_both": alone[bandwidth][0] / totals[0],
                    "planned_speedup": alone[bandwidth][1] / totals[1],
                }


# ---------------------------------------------------------------------- module


def with_module(rank: int, world: int, placement: str, keep_kv: bool, rounds: int) -> dict[str, Any]:
    """Best seconds of a training step of the module, the bytes of one, and the backend that ran."""
    from bs_kernels.backends.native import NativeBackend
    from bs_modules import BlockSparseRingDistributedDilatedAttention

    module = BlockSparseRingDistributedDilatedAttention(
        sparse_config={"pattern_type": "dilated_sparse", "sparsity_ratio": 0.1},
        distributed_config={"placement": placement, "keep_kv": keep_kv},
        backend="native",
    )
    ran = 0
    real = NativeBackend.forward

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal ran
        ran += 1
        return real(self, *arguments, **more)

    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 8192, heads, 64, generator=g) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    shards = [module.shard(x, True).clone().requires_grad_() for x in whole]
    best, sent, before = float("inf"), 0, 0
    NativeBackend.forward = counted
    try:
        for _ in range(rounds):
            if world > 1:
                dist.barrier()
            started = time.perf_counter()
            module(*shards, is_causal=True).sum().backward()
            best = min(best, time.perf_counter() - started)
            total = sum(int(x.sum()) for x in module.sent_bytes().values())
            sent, before = total - before, total
    finally:
        NativeBackend.forward = real
    if ran < rounds:
        raise RuntimeError("backend: expected the native one to run")
    plan = module.exchange_plan(8192, True, kv_heads=HEADS // 2)
    traffic = plan.traffic(64, kv_itemsize=4)
    planned = int(traffic.forward[rank].sum()) * (1 if keep_kv else 2) + int(traffic.backward[rank].sum())
    return {"seconds": best, "sent": sent, "planned": planned, "share": plan.rows.sum() / max(plan.dense_rows, 1)}


def measure_module(pool: RankPool) -> Iterator[dict[str, Any]]:
    """The module on real kernels; more ranks than cores share them, so seconds are told for as many as fit."""
    for world, placement in ((1, "contiguous"), (2, "contiguous"), (2, "zigzag"), (4, "zigzag")):
        for keep_kv in (False, True)[: 1 + (world > 1)]:
            got = pool.run(with_module, placement, keep_kv, ROUNDS, world_size=world)
            fits = world <= (os.cpu_count() or 1)
            yield {
                "ranks": world,
                "placement": placement,
                "keep_kv": keep_kv,
                "seconds": max(row["seconds"] for row in got) if fits else "more ranks than cores",
                "sent_bytes": sum(row["sent"] for row in got),
                "planned_bytes": sum(row["planned"] for row in got),
                "share_of_dense_ring": float(got[0]["share"]),
            }


# ---------------------------------------------------------------------- packing


def one_or_two(rank: int, world: int, nbytes: int, rounds: int) -> tuple[float, float]:
    """Best seconds of an exchange with the other rank: one message, and two of half the size."""
    best = [float("inf")] * 2
    buffers = [[torch.zeros(nbytes // n, dtype=torch.uint8) for _ in range(2 * n)] for n in (1, 2)]
    for _ in range(rounds):
        for i, n in enumerate((1, 2)):
            dist.barrier()
            started = time.perf_counter()
            ops = []
            for j in range(n):
                ops.append(dist.P2POp(dist.irecv, buffers[i][2 * j], 1 - rank, tag=j))
                ops.append(dist.P2POp(dist.isend, buffers[i][2 * j + 1], 1 - rank, tag=j))
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            best[i] = min(best[i], time.perf_counter() - started)
    return best[0], best[1]


def measure_packing(pool: RankPool) -> Iterator[dict[str, Any]]:
    for nbytes in (4 << 10, 64 << 10, 1 << 20, 16 << 20):
        packed, apart = (max(times) for times in zip(*pool.run(one_or_two, nbytes, 40, world_size=2), strict=True))
        yield {"bytes": nbytes, "packed_seconds": packed, "separate_seconds": apart, "ratio": apart / packed}


# ---------------------------------------------------------------------- plans


def measure_plans(pool: RankPool) -> Iterator[dict[str, Any]]:
    cases = [(name, layout_of(name, 2**20, heads)) for name in LAYOUTS if "density" not in name for heads in (1, 8)]
    # A tenth of a million tokens' blocks is 13 million per head: for one head, and half of that for eight that differ.
    cases.insert(4, ("dilated 1, 2, 4, 8 at density 0.1", layout_of("dilated 1, 2, 4, 8 at density 0.1", 2**20)))
    per_head = [
        DilatedSparse((rate, 2 * rate)).layout(2**20, block_size=BLOCK, causal=True, density=0.05)
        for rate in (1, 2, 3, 5, 7, 11, 13, 17)
    ]
    cases.insert(5, ("a dilation per head at density 0.05", BlockLayout.stack_heads(per_head)))
    for name, layout in cases:
        for placement in ("contiguous", "cost_balanced"):
            plan, seconds = ExchangePlan.build(layout, 64, placement, layout.heads), []
            for _ in range(3):
                started = time.perf_counter()
                ExchangePlan.build(layout, 64, placement, layout.heads)
                seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            HierarchicalPlan.build(plan, 8)
            staged = time.perf_counter() - started
            yield {"layout": name, "layout_heads": layout.heads, "active_blocks": layout.nnz,
                         "placement": placement, "seconds": min(seconds), "steps": plan.num_steps,
                         "seconds_more_in_two_stages": staged}  # fmt: skip


# ---------------------------------------------------------------------- what rounding costs


def rounded(rank: int, world: int, plan: ExchangePlan, whole: list[torch.Tensor], wire: torch.dtype | None) -> Any:
    """This rank's (out, dq, dk, dv) and the K/V bytes it sent."""
    q, k, v, dout = (plan.placement.shard(x, rank) for x in whole)
    with PackedRing(plan, batch=1, head_dim=DIM, wire_dtype=wire) as ring:
        return ring_attention(ring, q, k, v, dout), int(ring.sent_bytes["kv"].sum())


def measure_wire(pool: RankPool) -> Iterator[dict[str, Any]]:
    layout = layout_of("dilated 1, 2, 4, 8 at density 0.1", 2048)
    plan = ExchangePlan.build(layout, 4, "stripe", HEADS)  # neighbours apart, so that most of what is read travels
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2048, HEADS, DIM, generator=g) for _ in range(4)]
    q, k, v, dout = whole
    exact = dense_attention(q, k, v, layout, dout)
    for wire in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        got = pool.run(rounded, plan, whole, wire, world_size=4)
        row: dict[str, Any] = {"wire": str(wire).removeprefix("torch."), "sent_bytes": sum(sent for _, sent in got)}
        for name, parts, want in zip(
            ("out", "dq", "dk", "dv"), zip(*(x for x, _ in got), strict=True), exact, strict=True
        ):
            error = plan.placement.unshard(list(parts)).double() - want
            row[f"error_of_{name}"] = float(error.norm() / want.norm())
        yield row


def train(rank: int, world: int, method: str | None, arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """Loss of a small regression after some steps, and what the hook sent per step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 64, generator=g)
    y = torch.sin(x @ torch.randn(64, 16, generator=g) / 8)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
    dense = sum(p.nbytes for p in model.parameters())
    ring = 2 * (world - 1) / world
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that top-k may cost more than an all-reduce: the table says so
        state: Any = compress_gradients(ddp, method, **arguments) if method else None
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(ddp(x[rank::world]), y[rank::world]).backward()
            optimizer.step()
    if isinstance(state, TopKState):
        payload, wire = state.payload_bytes / steps, state.wire_bytes / steps
    else:
        # PowerSGD says what it compressed: all but the first steps and what is too small.
        share = 1 / state.compression_stats()[0] if method == "powersgd" else 0.5 if method else 1.0
        payload, wire = dense * share, dense * share * ring
    loss = float(nn.functional.mse_loss(model(x), y).detach())
    return {"loss": loss, "payload": payload / dense, "wire_bytes": wire, "all_reduce_bytes": dense * ring}


def measure_hooks(pool: RankPool) -> Iterator[dict[str, Any]]:
    runs: list[tuple[str, str | None, dict[str, Any]]] = [
        ("none", None, {}), ("top-k 0.1", "topk", {}), ("top-k 0.01", "topk", {"compression_ratio": 0.01}),
        ("PowerSGD 1", "powersgd", {}), ("bf16", "bf16", {}), ("fp16", "fp16", {}),
    ]  # fmt: skip
    for world in (2, 4):
        start = pool.run(train, None, {}, 0, world_size=world)[0]["loss"]
        plain = 0.0
        for name, method, arguments in runs:
            got = pool.run(train, method, arguments, 1000, world_size=world)[0]
            plain = plain or got["loss"]
            yield {
                "ranks": world, "hook": name, "loss_before": start, "loss_after_1,000_steps": got["loss"],
                "of_uncompressed": got["loss"] / plain, "payload_of_dense": got["payload"],
                "wire_bytes_a_step": int(got["wire_bytes"]), "all_reduce_bytes_a_step": int(got["all_reduce_bytes"]),
            }  # fmt: skip


# ---------------------------------------------------------------------- output

PARTS: dict[str, Callable[[RankPool], Iterator[dict[str, Any]]]] = {
    "bytes": measure_bytes,
    "links": measure_links,
    "module": measure_module,
    "packing": measure_packing,
    "wire": measure_wire,
    "hooks": measure_hooks,
    "plans": measure_plans,
}


def main() -> int:
    options = results.parser(__doc__, "comm.json", PARTS).parse_args()
    if not options.page:
        with RankPool(max(WORLDS)) as pool:
            for name in options.only:
                print(comm_report.SECTIONS[name][0], flush=True)
                rows = results.keep(options.out, name, PARTS[name](pool), comm_report.page, key="rows")
                print(f"{comm_report.table(rows)}\n", flush=True)
    results.save(options.out, results.load(options.out), comm_report.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
