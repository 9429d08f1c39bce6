"""How `bench_cpu.py` measures: contestants take turns in one process, and nothing else may run in their place."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bs_kernels.dispatch import BACKENDS

__all__ = ["etas", "machine", "only", "take_turns", "watched"]


def take_turns(
    contestants: dict[str, Callable[[], Any]], rounds: int, keep_rounds: bool = False, cold: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Median and quartiles in milliseconds, contestants interleaved; one round warms up, but those in ``cold``."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for at in range(rounds + 1):
        for name, run in contestants.items():
            if not at and name in cold:
                continue
            begin = time.perf_counter()
            run()
            if at:
                times[name].append((time.perf_counter() - begin) * 1e3)
    found = {}
    for name, values in times.items():
        low, mid, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[name] = {"ms": round(mid, 4), "q1": round(low, 4), "q3": round(high, 4), "best": round(min(values), 4)}
        if keep_rounds:
            found[name]["rounds"] = [round(value, 4) for value in values]
    return found


@contextmanager
def only(name: str) -> Iterator[None]:
    """Fail if any backend but this one runs, or if this one does not."""
    calls = {backend.name: 0 for backend in BACKENDS}
    originals = []
    for backend in BACKENDS:
        for method in ("forward", "backward"):
            inner = getattr(backend, method)

            def counted(*args: Any, _inner: Callable[..., Any] = inner, _name: str = backend.name) -> Any:
                calls[_name] += 1
                return _inner(*args)

            originals.append((backend, method))
            setattr(backend, method, counted)
    try:
        yield
    finally:
        for backend, method in originals:
            delattr(backend, method)
    others = {other: count for other, count in calls.items() if other != name and count}
    if others or not calls[name]:
        raise SystemExit(f"bench_cpu: meant to measure {name!r}, but these calls ran: {calls}")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")}
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "instructions": [flag for flag in wanted if flag in flags],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def watched(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, failing if another backend than ``name`` computes it."""

    def inner() -> None:
        with only(name):
            run()

    return inner


def etas(record: dict[str, Any]) -> dict[str, list[float]]:
    """η of every contestant but dense: median, least and most over the rounds, each round against its own dense run."""
    times, found = record["times"], {}
    for name in times:
        if not name.startswith("dense"):
            pairs = zip(times[f"dense {name.split()[1]}"]["rounds"], times[name]["rounds"], strict=True)
            ratios = [record["density"] * dense / sparse for dense, sparse in pairs]
            found[name] = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return found
