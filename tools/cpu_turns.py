"""How `bench_cpu.py` measures: contestants take turns in one process, and nothing else may run in their place."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import results

from bs_kernels.dispatch import BACKENDS

__all__ = ["etas", "only", "take_turns", "watched"]


def take_turns(
    contestants: dict[str, Callable[[], Any]], rounds: int, keep_rounds: bool = False, cold: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Median and quartiles in milliseconds, contestants interleaved; one round warms up, but those in ``cold``."""
    found = {}
    for name, seconds in results.take_turns(contestants, rounds, cold=cold).items():
        values = [x * 1e3 for x in seconds]
        low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if rounds > 1 else values * 3
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
        raise SystemExit(f"meant to measure {name!r}, but these calls ran: {calls}")


def watched(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, failing if another backend than ``name`` computes it."""

    def inner() -> None:
        with only(name):
            run()

    return inner


def etas(record: dict[str, Any]) -> dict[str, list[float]]:
    """η of every contestant but dense: median, least and most over the rounds, each round against its own dense run."""
    times = record["times"]
    found = {name: times[name]["rounds"] for name in times if not name.startswith("dense")}
    dense = {name: [record["density"] * x for x in times[f"dense {name.split()[1]}"]["rounds"]] for name in found}
    return {name: results.ratio(dense[name], rounds) for name, rounds in found.items()}
