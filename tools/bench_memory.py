"""Measures bs-memory against doing without it; writes JSON and a table.

    python tools/bench_memory.py                      # everything, a minute of hammering included
    python tools/bench_memory.py --only hot buffers   # some of it
    python tools/bench_memory.py --only hammer --seconds 5

Timings that are compared are interleaved in this process, round by round, so that a noisy neighbour meets both sides.
What a machine cannot measure is written down as not measured.
"""

import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import results
import torch

from bs_memory import BufferPool, DeviceCache, MemoryPressure, default_pool, oom_recovery

MIB = 1 << 20
NOT_MEASURED = "not yet measured"


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Seconds per call of each side, the sides taking turns; best, median and worst of the rounds."""
    return {
        name: {"best": min(times), "median": statistics.median(times), "worst": max(times)}
        for name, times in results.take_turns(sides, rounds, calls=calls).items()
    }


def bench_hot(rounds: int = 500, calls: int = 500) -> dict[str, Any]:
    """Get and release of a buffer that is there, and what an ask of the cache, the gauge and the recovery costs."""
    pool, device = BufferPool(), torch.device("cpu")
    shape, dtype = (8, 1024, 64), torch.float32
    cache, pressure = DeviceCache(), MemoryPressure(interval=0.1)
    cache.put("key", 1)

    def explicit() -> None:
        pool.lease(shape, dtype, device).release()

    def as_context() -> None:
        with pool.lease(shape, dtype, device):
            pass

    return interleaved(
        {
            "lease + release": explicit,
            "with lease": as_context,
            "torch.empty, same 2 MiB, untouched": lambda: torch.empty(shape, dtype=dtype, device=device),
            "DeviceCache.get_or_build, a hit": lambda: cache.get_or_build("key", dict),
            "MemoryPressure.level": lambda: pressure.level(device),
            "oom_recovery around nothing": lambda: oom_recovery(int, device=device),
        },
        rounds,
        calls,
    )


def bench_buffers(rounds: int = 40) -> list[dict[str, Any]]:
    """CPU buffers of 1–256 MiB, written once per use: pool against torch.empty, with the page faults of each.

    One thread, so that the figure is of memory and not of who else wants the second core.
    """
    rows = []
    pool = BufferPool(pressure=None)
    for mib in (1, 4, 16, 64, 256):
        shape, calls = (mib * MIB,), max(1, 64 // mib)

        def pooled(shape: tuple[int, ...] = shape) -> None:
            with pool.lease(shape, torch.uint8, "cpu") as tensor:
                tensor.fill_(1)

        def fresh(shape: tuple[int, ...] = shape) -> None:
            torch.empty(shape, dtype=torch.uint8).fill_(1)

        times = interleaved({"pool": pooled, "torch.empty": fresh}, rounds, calls)
        rows.append(
            {
                "mib": mib,
                "seconds": times,
                "page_faults_per_use": {"pool": faults(pooled, calls), "torch.empty": faults(fresh, calls)},
                "ratio_of_bests": times["torch.empty"]["best"] / times["pool"]["best"],
            }
        )
        pool.clear()
    return rows


def faults(run: Callable[[], object], calls: int) -> float:
    """Minor page faults per call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def bench_pinned(rounds: int = 15) -> list[dict[str, Any]] | str:
    """Pinned host buffers: pool against torch.empty(pin_memory=True), copied to the GPU once per use."""
    if not torch.cuda.is_available():
        return NOT_MEASURED
    rows = []
    pool = BufferPool(pressure=None)
    for mib in (1, 16, 256):
        shape = (mib * MIB,)
        target = torch.empty(shape, dtype=torch.uint8, device="cuda")

        def pooled(shape: tuple[int, ...] = shape, target: torch.Tensor = target) -> None:
            with pool.lease(shape, torch.uint8, "cpu", pinned=True) as tensor:
                target.copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()

        def pinned(shape: tuple[int, ...] = shape, target: torch.Tensor = target) -> None:
            target.copy_(torch.empty(shape, dtype=torch.uint8, pin_memory=True), non_blocking=True)
            torch.cuda.synchronize()

        times = interleaved({"pool": pooled, "torch.empty pinned": pinned}, rounds, 5)
        rows.append({"mib": mib, "seconds": times})
    return rows


def bench_cuda(rounds: int = 15) -> dict[str, Any] | str:
    """Device buffers on one stream: pool against the caching allocator, which is expected to do as well."""
    if not torch.cuda.is_available():
        return NOT_MEASURED
    pool, device, shape = BufferPool(pressure=None), torch.device("cuda", torch.cuda.current_device()), (16 * MIB,)

    def pooled() -> None:
        pool.lease(shape, torch.uint8, device).release()

    return interleaved(
        {"pool": pooled, "torch.empty": lambda: torch.empty(shape, dtype=torch.uint8, device=device)}, rounds, 1000
    )


def bench_hammer(seconds: float, count: int = 8, max_bytes: int = 4 * MIB) -> dict[str, Any]:
    """Threads that lease, mark, wait, check and release at random, under a budget, with every release poisoned."""
    pool = BufferPool(max_bytes=max_bytes, pressure=None, poison=True)
    deadline = time.monotonic() + seconds
    leases, aliased = [0] * count, [0] * count

    def hammer(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        sizes = torch.randint(1, 20_000, (997,), generator=generator).tolist()
        held: list[tuple[Any, int]] = []
        while time.monotonic() < deadline:
            turn = leases[index]
            mark = turn * count + index
            lease = pool.lease((sizes[turn % 997 % (7 + index)],), torch.int64, "cpu", priority=turn % 3)
            lease.tensor.fill_(mark)
            held.append((lease, mark))
            leases[index] += 1
            if len(held) > 2:
                oldest, expected = held.pop(turn % 2)
                aliased[index] += not bool((oldest.tensor == expected).all())
                oldest.release()
            if turn % 1000 == 999:
                pool.trim(MIB)
        for lease, _ in held:
            lease.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=hammer, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    stats = pool.stats()
    return {
        "threads": count,
        "seconds": seconds,
        "leases": sum(leases),
        "aliased": sum(aliased),
        "still_leased": stats.leases,
        "abandoned": stats.abandoned,
        "evictions": stats.evictions,
        "hit_rate": stats.hits / (stats.hits + stats.misses),
        "max_bytes": max_bytes,
        "high_water_bytes": stats.high_water_bytes,
    }


def bench_training(steps: int = 3, rounds: int = 5) -> list[dict[str, Any]] | str:
    """Memory, allocations and time of a training step of the attention module, with and without the pool.

    Without, every lease is a buffer of its own that nobody uses again. Peaks count what the pool holds when the step
    begins.
    """
    try:
        from bs_modules import create_block_sparse_attention
    except ImportError:
        return NOT_MEASURED
    tokens, heads, head_dim = 2048, 4, 64
    q, k, v = (torch.randn(1, tokens, heads, head_dim, requires_grad=True) for _ in range(3))
    leases = [0]

    def lease_fresh(_: BufferPool, *arguments: Any, **options: Any) -> Any:
        leases[0] += 1
        return pooled_lease(BufferPool(pressure=None), *arguments, **options)

    pooled_lease = BufferPool.lease
    rows = []
    for backend in ("torch", "native"):
        try:
            attention = create_block_sparse_attention("base", sparsity_ratio=0.1, block_size=64, backend=backend)

            def step(attention: Any = attention) -> None:
                attention(q, k, v, is_causal=True).square().sum().backward()
                q.grad = k.grad = v.grad = None

            step()
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            rows.append({"backend": backend, "not_measured": str(error).splitlines()[0]})
            continue

        def fresh_step(step: Callable[[], None] = step) -> None:
            with mock.patch.object(BufferPool, "lease", lease_fresh):
                step()

        leases[0] = 0
        row: dict[str, Any] = {"backend": backend, "tokens": tokens, "heads": heads, "head_dim": head_dim}
        for name, run in (("with the pool", step), ("without", fresh_step)):
            default_pool().clear()
            run()
            idle = default_pool().stats("cpu").bytes_idle
            with torch.profiler.profile(profile_memory=True) as profile:
                for _ in range(steps):
                    run()
            raw: Any = profile.profiler
            events = [event for event in raw.kineto_results.events() if event.name() == "[memory]"]
            sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            held = peak = 0
            for size in sizes:
                held += size
                peak = max(peak, held)
            row[name] = {
                "allocations_per_step": sum(size > 0 for size in sizes) / steps,
                "bytes_allocated_per_step": sum(size for size in sizes if size > 0) / steps,
                "page_faults_per_step": faults(run, steps),
                "peak_bytes": peak + idle,
                "of_them_in_the_pool": idle,
            }
        row["leases_per_step"] = leases[0] / (2 * steps + 1)
        times = interleaved({"with the pool": step, "without": fresh_step}, rounds, 1)
        for name, seconds in times.items():
            row[name]["seconds"] = seconds
        rows.append(row)
    return rows


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    lines = [
        "# bs-memory, measured",
        "",
        "Made by `python tools/bench_memory.py`; the raw figures are in `memory.json`. Both sides of a comparison take "
        "turns in one process. Load is the machine's load average when the measurement began; under load, the best of "
        "many short rounds says most.",
    ]

    def heading(part: str, title: str) -> Any:
        lines.extend(["", f"## {title}", "", f"{results.described(found[part]['machine'])}.", ""])
        return found[part]["result"]

    if "hot" in found:
        rows = heading("hot", "What one call costs")
        lines += ["| call | best, µs | median, µs |", "|---|---:|---:|"]
        lines += [f"| {name} | {t['best'] * 1e6:.2f} | {t['median'] * 1e6:.2f} |" for name, t in rows.items()]
    if "buffers" in found:
        rows = heading("buffers", "CPU buffers, written once per use; best of the rounds")
        lines += [
            "| MiB | pool, ms | torch.empty, ms | torch.empty / pool | page faults, pool | page faults, torch.empty |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            pool, fresh = (row["seconds"][name]["best"] * 1e3 for name in ("pool", "torch.empty"))
            few, many = (row["page_faults_per_use"][name] for name in ("pool", "torch.empty"))
            lines.append(
                f"| {row['mib']} | {pool:.3f} | {fresh:.3f} | {row['ratio_of_bests']:.2f} | {few:.0f} | {many:.0f} |"
            )
    for key, title in (("pinned", "Pinned host buffers"), ("cuda", "Device buffers on one stream")):
        if key in found:
            rows = heading(key, title)
            if isinstance(rows, str):
                lines.append(f"{rows.capitalize()}: this machine has no GPU.")
                continue
            lines += ["| MiB | how | best, µs | median, µs |", "|---:|---|---:|---:|"]
            for row in [{"mib": 16, "seconds": rows}] if isinstance(rows, dict) else rows:
                for name, t in row["seconds"].items():
                    lines.append(f"| {row['mib']} | {name} | {t['best'] * 1e6:.1f} | {t['median'] * 1e6:.1f} |")
    if "hammer" in found:
        h = heading("hammer", "Threads that hammer one pool")
        lines.append(
            f"{h['threads']} threads for {h['seconds']:.0f} s under a budget of {h['max_bytes'] / MIB:.0f} MiB, every "
            f"release poisoned and every buffer checked: {h['leases']:,} leases, **{h['aliased']} aliased**, "
            f"{h['still_leased']} left over, {h['evictions']:,} evictions, hit rate {h['hit_rate']:.1%}, high water "
            f"{h['high_water_bytes'] / MIB:.2f} MiB."
        )
    if "training" in found:
        rows = heading("training", "A training step with and without the pool")
        if isinstance(rows, str):
            return "\n".join([*lines, f"{rows.capitalize()}.", ""])
        lines += [
            "`BlockSparseRingDilatedAttention`, causal, density 0.1, block 64, float32, 2,048 tokens, 4 heads of 64, "
            "forward and backward; best time of the rounds.",
            "",
            "| backend | pool | leases | allocations | MiB allocated | page faults | peak, MiB | in the pool | ms |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            if "not_measured" in row:
                lines.append(f"| {row['backend']} | {NOT_MEASURED}: {row['not_measured']} | | | | | | | |")
                continue
            for name in ("with the pool", "without"):
                t = row[name]
                lines.append(
                    f"| {row['backend']} | {name} | {row['leases_per_step']:.0f} | {t['allocations_per_step']:.0f} "
                    f"| {t['bytes_allocated_per_step'] / MIB:.1f} | {t['page_faults_per_step']:.0f} "
                    f"| {t['peak_bytes'] / MIB:.1f} | {t['of_them_in_the_pool'] / MIB:.1f} "
                    f"| {t['seconds']['best'] * 1e3:.1f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs what was asked for; updates the JSON and writes the page beside it."""
    parts = ("hot", "buffers", "pinned", "cuda", "hammer", "training")
    parser = results.parser(__doc__, "memory.json", parts)
    parser.add_argument("--seconds", type=float, default=60.0, metavar="X", help="how long the threads hammer")
    arguments = parser.parse_args()
    runs: dict[str, Callable[[], Any]] = {
        "hot": bench_hot,
        "buffers": bench_buffers,
        "pinned": bench_pinned,
        "cuda": bench_cuda,
        "hammer": lambda: bench_hammer(arguments.seconds),
        "training": bench_training,
    }
    torch.set_num_threads(1)
    aliased = 0
    for part in () if arguments.page else arguments.only:
        print(f"{part} …", file=sys.stderr, flush=True)
        section = {"machine": results.machine(), "result": runs[part]()}
        aliased += section["result"]["aliased"] if part == "hammer" else 0
        results.save(arguments.out, results.load(arguments.out) | {part: section}, page)
        print(page({part: section}))
    results.save(arguments.out, results.load(arguments.out), page)
    return 1 if aliased else 0


if __name__ == "__main__":
    sys.exit(main())
