"""Measures bs-comm between real gloo processes on one machine; writes JSON and tables.

    python tools/bench_comm.py                      # everything
    python tools/bench_comm.py --only bytes links   # some of it

`bytes` counts at the transport and does not depend on the machine's load. `links` delays messages as a link of a given
speed would and sleeps where a kernel would compute, so that overlap is measured without needing a core per rank; the
planner's prediction stands beside it. `packing` lets one packed message and two separate ones take turns. `plans` times
the planner itself.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bs_comm import CostModel, ExchangePlan, PackedRing, step_time
from bs_comm.testing import RankPool, slow_links
from bs_patterns import BlockLayout, DilatedSparse, GlobalLocal, Hierarchical, LocalWindow, Pattern

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
HEADS, DIM, BLOCK = 4, 32, 64
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


def measure_bytes(pool: RankPool) -> list[dict[str, Any]]:
    rows = []
    for name in LAYOUTS:
        for placement in ("contiguous", "zigzag", "cost_balanced"):
            plan = ExchangePlan.build(layout_of(name, 16_384), 4, placement, HEADS)
            counted = pool.run(sent, plan)
            traffic = plan.traffic(DIM, kv_itemsize=4)
            forward, backward = (sum(row[i] for row in counted) for i in (0, 1))
            rows.append(
                {
                    "layout": name,
                    "placement": placement,
                    "forward_bytes": forward,
                    "forward_bound": traffic.forward_bound,
                    "backward_bytes": backward,
                    "backward_bound": traffic.backward_bound,
                    "share_of_dense_ring": forward / (plan.dense_rows * 2 * DIM * 4),
                    "work_imbalance": plan.work_imbalance,
                }
            )
    return rows


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


def measure_links(pool: RankPool) -> list[dict[str, Any]]:
    rows = []
    layout = layout_of("dilated 1, 2, 4, 8 at density 0.1", 16_384)
    for world in (1, 2, 3, 4):
        plan = ExchangePlan.build(layout, world, "zigzag", HEADS)
        # One rank alone takes 0.8 s forward; a link so fast that it hides, one that cannot, one between.
        flops = plan.work.sum() * HEADS * 4 * DIM / 0.8
        for bandwidth in (800e6, 100e6, 25e6):
            model = CostModel(bandwidth=bandwidth, latency=1e-3, flops=float(flops))
            times = pool.run(over_links, plan, model, 3, world_size=world)
            planned = step_time(plan, model, DIM, kv_itemsize=4)
            for i, phase in enumerate(planned.phases):
                # The slowest rank of a round ends it; the best round has the least of the machine's noise.
                best = min(max(rank[i][n] for rank in times) for n in range(3))
                hidden = 1 - (best - phase.compute_seconds) / phase.transfer_seconds if phase.transfer_seconds else 1.0
                rows.append(
                    {
                        "ranks": world,
                        "bandwidth": bandwidth,
                        "pass": ("forward", "backward")[i],
                        "seconds": best,
                        "planned_seconds": phase.seconds,
                        "compute_seconds": phase.compute_seconds,
                        "transfer_seconds": phase.transfer_seconds,
                        "hidden": max(0.0, min(1.0, hidden)),
                        "planned_hidden": phase.hidden_share,
                    }
                )
    return rows


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


def measure_packing(pool: RankPool) -> list[dict[str, Any]]:
    rows = []
    for nbytes in (4 << 10, 64 << 10, 1 << 20, 16 << 20):
        packed, apart = (max(times) for times in zip(*pool.run(one_or_two, nbytes, 40, world_size=2), strict=True))
        rows.append({"bytes": nbytes, "packed_seconds": packed, "separate_seconds": apart, "ratio": apart / packed})
    return rows


# ---------------------------------------------------------------------- plans


def measure_plans(pool: RankPool) -> list[dict[str, Any]]:
    rows = []
    for name in LAYOUTS:
        if (
            "density" in name
        ):  # A tenth of a million tokens' blocks is 13 million per head: said as it is, for one head.
            shapes = [(1, 8)]
        else:
            shapes = [(1, 8), (8, 8)]
        for heads, kv_heads in shapes:
            layout = layout_of(name, 2**20, heads)
            for placement in ("contiguous", "cost_balanced"):
                seconds = []
                for _ in range(3):
                    started = time.perf_counter()
                    ExchangePlan.build(layout, 64, placement, kv_heads)
                    seconds.append(time.perf_counter() - started)
                plan, best = ExchangePlan.build(layout, 64, placement, kv_heads), min(seconds)
                rows.append({"layout": name, "layout_heads": heads, "active_blocks": layout.nnz, "placement": placement,
                             "seconds": best, "steps": plan.num_steps})  # fmt: skip
    return rows


# ---------------------------------------------------------------------- output

PARTS: dict[str, tuple[str, Callable[[RankPool], list[dict[str, Any]]]]] = {
    "bytes": ("Bytes sent by 4 ranks, 16,384 tokens, causal, float32, against a dense ring", measure_bytes),
    "links": ("Overlap over slow links, and what the planner says", measure_links),
    "packing": ("One packed message against separate K and V, both directions at once", measure_packing),
    "plans": ("Time to plan 1,048,576 tokens over 64 ranks", measure_plans),
}


def table(rows: list[dict[str, Any]]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if value < 1e5 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([show(row[key]) for key in heads] for row in rows)]
    return "\n".join("| " + " | ".join(key.replace("_", " ") for key in line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure bs-comm.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    file = FOLDER / "comm.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    with RankPool(4) as pool:
        for name in options.only:
            load = round(os.getloadavg()[0], 2)
            rows = PARTS[name][1](pool)
            machine = f"{os.cpu_count()} CPUs, torch {torch.__version__}, numpy {np.__version__}, load {load}"
            record[name] = {"machine": f"{platform.system()}, {machine}", "rows": rows}
            print(f"{PARTS[name][0]}\n{table(rows)}\n", flush=True)
    text = [
        "# bs-comm, measured\n",
        "Made by `python tools/bench_comm.py`; the raw figures are in `comm.json`. All ranks are gloo processes on one "
        "machine. NCCL: not yet measured.\n",
    ]
    for name, (title, _) in PARTS.items():
        if name in record:
            text += [f"## {title}\n", f"{record[name]['machine']}.\n", table(record[name]["rows"]) + "\n"]
    file.write_text(json.dumps(record, indent=1) + "\n")
    (FOLDER / "comm.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
