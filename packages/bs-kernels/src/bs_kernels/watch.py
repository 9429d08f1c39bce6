"""Seeing what the op does from outside: which backend ran and for how long, plan look-ups, recoveries.

Nothing here is on the path of a call until a watch begins; when the last one ends, everything it put in place is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch

from bs_memory import RecoveryError, RecoveryReport

from . import _recovery, plan
from .backends.base import Backend, Call
from .dispatch import BACKENDS

__all__ = ["BackendRun", "PlanLookup", "Recovery", "WatchEvent", "watch"]


@dataclass(frozen=True, slots=True)
class BackendRun:
    """A backend computed a call, or a piece of one.

    Attributes:
        backend: its name.
        phase: forward or backward.
        seconds: how long it took on the host's clock; with ``synchronize`` until the device was done.
        key: the same for a forward and its backward, and for the pieces of one call; different for other calls as long
            as the tensors of this one are alive.
    """

    backend: str
    phase: Literal["forward", "backward"]
    seconds: float
    key: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanLookup:
    """The plan of a layout was asked for.

    Attributes:
        hit: whether the cache had it.
        seconds: how long that took, building included.
    """

    hit: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """Memory ran out.

    Attributes:
        what: "attention" or "attention backward".
        report: what was done about it.
        failed: whether nothing helped, so that a `bs_memory.RecoveryError` was raised.
    """

    what: str
    report: RecoveryReport
    failed: bool


WatchEvent: TypeAlias = BackendRun | PlanLookup | Recovery

_lock = threading.Lock()
_watchers: tuple[tuple[Callable[[WatchEvent], None], bool], ...] = ()
_undo: list[Callable[[], None]] = []


@contextmanager
def watch(callback: Callable[[WatchEvent], None], *, synchronize: bool = False) -> Iterator[None]:
    """Call ``callback`` with every event while the context is open.

    It sees the calls of all threads, from the thread that makes them (of a backward on CUDA: autograd's). What it
    raises reaches the caller of the attention.

    Args:
        callback: takes a `WatchEvent`.
        synchronize: wait for the device before and after each backend's work, so that times are the device's. It costs
            the overlap of host and device.
    """
    global _watchers
    entry = (callback, synchronize)
    with _lock:
        if not _watchers:
            _put_in_place()
        _watchers = (*_watchers, entry)
    try:
        yield
    finally:
        with _lock:
            at = next(n for n, other in enumerate(_watchers) if other is entry)
            _watchers = _watchers[:at] + _watchers[at + 1 :]
            if not _watchers:
                while _undo:
                    _undo.pop()()


def _tell(event: WatchEvent) -> None:
    for callback, _ in _watchers:
        callback(event)


def _put_in_place() -> None:
    for backend in BACKENDS:
        for phase in ("forward", "backward"):
            _replace(backend, phase, _timed(backend, phase, getattr(backend, phase)))
    _replace(plan._plans, "get_or_build", _looked_up(plan._plans.get_or_build))
    _replace(_recovery, "oom_recovery", _reported(vars(_recovery)["oom_recovery"]))


def _replace(holder: Any, name: str, function: Callable[..., Any]) -> None:
    """Set an attribute until the last watch ends."""
    missing = object()
    before = vars(holder).get(name, missing)
    setattr(holder, name, function)
    if before is missing:
        _undo.append(lambda: delattr(holder, name))
    else:
        _undo.append(lambda: setattr(holder, name, before))


def _timed(backend: Backend, phase: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    def run(call: Call, *args: Any) -> Any:
        wait = any(synchronize for _, synchronize in _watchers) and call.q.device.type != "cpu"
        if wait:
            torch.accelerator.synchronize(call.q.device)
        begin = time.perf_counter()
        found = inner(call, *args)
        if wait:
            torch.accelerator.synchronize(call.q.device)
        _tell(BackendRun(backend.name, phase, time.perf_counter() - begin, _key(call)))
        return found

    return run


def _key(call: Call) -> tuple[int, ...]:
    tensors = (call.q, call.k, call.v, call.plan.indices)
    return tuple(x.untyped_storage().data_ptr() for x in tensors)


def _looked_up(inner: Callable[..., Any]) -> Callable[..., Any]:
    def get_or_build(key: Any, build: Callable[[], Any], **arguments: Any) -> Any:
        built = False

        def counted() -> Any:
            nonlocal built
            built = True
            return build()

        begin = time.perf_counter()
        found = inner(key, counted, **arguments)
        _tell(PlanLookup(not built, time.perf_counter() - begin))
        return found

    return get_or_build


def _reported(inner: Callable[..., Any]) -> Callable[..., Any]:
    def oom_recovery(*args: Any, **arguments: Any) -> Any:
        what = arguments.get("name", "work")
        try:
            found = inner(*args, **arguments)
        except RecoveryError as error:
            _tell(Recovery(what, cast(RecoveryReport, error.report), True))
            raise
        if found[1].recovered:
            _tell(Recovery(what, found[1], False))
        return found

    return oom_recovery
