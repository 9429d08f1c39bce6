"""What attention modules do while they run: density, cache hits, backends, time per phase, recoveries.

A monitor costs nothing until it starts and leaves nothing behind when it stops: no hook, no wrapper, no attribute.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bs_kernels.watch import BackendRun, PlanLookup, Recovery, WatchEvent, watch

from ._checks import check_flag
from .attention import BlockSparseAttention
from .multihead import BlockSparseRingMultiheadDilatedAttention

#: Where work is counted that no module of the monitor can be held for: other modules, and compiled graphs.
ELSEWHERE = "(elsewhere)"
_KEYS_KEPT = 4096  # forwards whose backward may still come
_KINDS = (BlockSparseAttention, BlockSparseRingMultiheadDilatedAttention)


@dataclass
class PhaseTime:
    """How often a phase ran, and for how long.

    Args:
        count: Runs.
        seconds: In sum.
        longest: Seconds of the longest.
    """

    count: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one run."""
        self.count += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)


@dataclass
class ModuleMetrics:
    """What one module did since the monitor started (or was reset).

    Args:
        density: Active / allowed blocks of the last call; `None` before the first, and where none can be told.
        requested_density: What was asked for; `None` where geometry decides.
        layout_hits: Layouts found in the module's cache.
        layout_misses: Layouts built.
        plan_hits: Plans found in the process's cache.
        plan_misses: Plans built.
        backend_runs: (backend, `"forward"` or `"backward"`) → runs; a call that was split counts its pieces.
        phases: `"call"` (the module's forward as a whole), `"layout"`, `"plan"`, `"forward"` and `"backward"` (the
            backend's) → time.
        recoveries: Calls that ran out of memory and were computed in another way, with the same result.
        failures: Calls that ran out of memory for good.
    """

    density: float | None = None
    requested_density: float | None = None
    layout_hits: int = 0
    layout_misses: int = 0
    plan_hits: int = 0
    plan_misses: int = 0
    backend_runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    phases: dict[str, PhaseTime] = field(default_factory=dict)
    recoveries: int = 0
    failures: int = 0

    @property
    def calls(self) -> int:
        """Calls of the module."""
        return self.phases["call"].count if "call" in self.phases else 0

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that ran, by name."""
        return tuple(sorted({name for name, _ in self.backend_runs}))

    def add_time(self, phase: str, seconds: float) -> None:
        """Counts one run of a phase."""
        self.phases.setdefault(phase, PhaseTime()).add(seconds)


class Sink(Protocol):
    """Where a monitor writes to; see `bs_modules.sinks`."""

    def write(self, metrics: Mapping[str, ModuleMetrics], step: int | None = None) -> None:
        """Takes the metrics of all modules by qualified name."""
        ...


class Monitor:
    """Watches every block-sparse attention module inside a model, between `start` and `stop` or as a context manager.

    ::

        with Monitor(model, sinks=[LoggingSink()]) as monitor:
            for step in range(100):
                train(model)
            monitor.emit(step)

    Times are the host's: on an accelerator they end when work is launched, unless `synchronize` is set. Calls inside a
    graph that `torch.compile` made are counted under `"(elsewhere)"`, and so are calls of modules outside the model.

    Args:
        model: A module; modules added to it later are not watched.
        sinks: Where `emit` writes.
        synchronize: Wait for the device around each backend's work, which makes times those of the device and calls
            slower.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no block-sparse attention inside the model.
    """

    def __init__(self, model: nn.Module, *, sinks: Iterable[Sink] = (), synchronize: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        if not isinstance(sinks, Iterable):
            raise TypeError(f"sinks: expected a sequence of sinks, got {sinks!r}")
        self.sinks = list(sinks)
        for n, sink in enumerate(self.sinks):
            if not callable(getattr(sink, "write", None)):
                raise TypeError(f"sinks[{n}]: expected an object with a method write(metrics, step), got {sink!r}")
        self._synchronize = check_flag("synchronize", synchronize)
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        for name, module in model.named_modules():
            if isinstance(module, _KINDS):
                self._names[module] = name or type(module).__name__
        if not self._names:
            raise ValueError("model: expected a module with block-sparse attention inside, found none")
        self._lock = threading.Lock()
        self._local = threading.local()
        self._open: ExitStack | None = None
        self.reset()

    # -- on and off --------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it watches now."""
        return self._open is not None

    def start(self) -> Self:
        """Begins to watch. Metrics go on from where they were.

        Raises:
            RuntimeError: It is running.
        """
        if self._open is not None:
            raise RuntimeError("start: expected a monitor that is not running, got one that is")
        self._open = ExitStack()
        self._open.enter_context(watch(self._on_event, synchronize=self._synchronize))
        _begin(self)
        self._open.callback(_end, self)
        return self

    def stop(self) -> None:
        """Ends watching and takes away all it put in place; does nothing if it is not running."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it found -----------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, ModuleMetrics]:
        """The metrics of every module by qualified name: a copy, with the density of each module's last call."""
        with self._lock:
            found = copy.deepcopy(self._metrics)
        self._local.paused = True
        try:
            for module, name in list(self._names.items()):
                if found[name].calls and hasattr(getattr(module, "attention", module), "get_pattern_stats"):
                    stats: Any = module.get_pattern_stats()  # pyright: ignore[reportCallIssue]
                    found[name].density = stats["density"]
                    found[name].requested_density = stats.get("requested_density")
        finally:
            self._local.paused = False
        return found

    def emit(self, step: int | None = None) -> dict[str, ModuleMetrics]:
        """Writes the metrics to every sink, and returns them.

        Args:
            step: Of the training, for sinks that draw curves.
        """
        found = self.metrics()
        for sink in self.sinks:
            sink.write(found, step)
        return found

    def reset(self) -> None:
        """Forgets what was counted."""
        with self._lock:
            self._metrics = {name: ModuleMetrics() for name in [*self._names.values(), ELSEWHERE]}
            self._owners: OrderedDict[tuple[int, ...], str] = OrderedDict()

    # -- what happens while it runs ----------------------------------------------------------------------------------

    def _stack(self) -> list[str]:
        """Names of the modules that this thread is inside of."""
        if not hasattr(self._local, "stack"):
            self._local.stack, self._local.paused = [], False
        return self._local.stack

    def _on_event(self, event: WatchEvent) -> None:
        stack = self._stack()
        name = stack[-1] if stack else ELSEWHERE
        with self._lock:
            if isinstance(event, BackendRun):
                if event.phase == "forward":
                    self._own(event.key, name)
                else:  # a ring's backward reads other keys than its forward, and the same queries
                    name = self._owners.get(event.key) or self._owners.get(event.key[:1], name)
                self._metrics[name].backend_runs[event.backend, event.phase] += 1
                self._metrics[name].add_time(event.phase, event.seconds)
            elif isinstance(event, PlanLookup):
                self._metrics[name].plan_hits += event.hit
                self._metrics[name].plan_misses += not event.hit
                self._metrics[name].add_time("plan", event.seconds)
            elif isinstance(event, Recovery):
                self._metrics[name].recoveries += not event.failed
                self._metrics[name].failures += event.failed

    def _own(self, key: tuple[int, ...], name: str) -> None:
        for known in (key, key[:1]):
            self._owners[known] = name
            self._owners.move_to_end(known)
        while len(self._owners) > 2 * _KEYS_KEPT:
            self._owners.popitem(last=False)

    def _called(self, name: str, seconds: float) -> None:
        with self._lock:
            self._metrics[name].add_time("call", seconds)

    def _laid_out(self, name: str, seconds: float, hit: bool) -> None:
        if getattr(self._local, "paused", False):
            return
        with self._lock:
            self._metrics[name].layout_hits += hit
            self._metrics[name].layout_misses += not hit
            self._metrics[name].add_time("layout", seconds)


# -- the wrappers, in place while any monitor runs ---------------------------------------------------------------------

_running: tuple[Monitor, ...] = ()
_running_lock = threading.Lock()
_layout = BlockSparseAttention.layout
_inside_layout = threading.local()


def _begin(monitor: Monitor) -> None:
    global _running
    with _running_lock:
        if not _running:
            for kind in _KINDS:
                kind.__call__ = _watched_call  # pyright: ignore[reportAttributeAccessIssue]
            BlockSparseAttention.layout = _watched_layout
        _running = (*_running, monitor)


def _end(monitor: Monitor) -> None:
    global _running
    with _running_lock:
        _running = tuple(other for other in _running if other is not monitor)
        if not _running:
            for kind in _KINDS:
                del kind.__call__
            BlockSparseAttention.layout = _layout


def _watched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return nn.Module.__call__(self, *args, **kwargs)
    entered = [(monitor, monitor._names[self]) for monitor in _running if self in monitor._names]
    for monitor, name in entered:
        monitor._stack().append(name)
    begin = time.perf_counter()
    try:
        return nn.Module.__call__(self, *args, **kwargs)
    finally:
        seconds = time.perf_counter() - begin
        for monitor, name in entered:
            monitor._stack().pop()
            monitor._called(name, seconds)


def _watched_layout(self: BlockSparseAttention, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or getattr(_inside_layout, "yes", False):  # a layout may ask for a larger one
        return _layout(self, *args, **kwargs)
    known = {id(layout) for layout in list(self._layouts.values())}
    _inside_layout.yes = True
    begin = time.perf_counter()
    try:
        found = _layout(self, *args, **kwargs)
    finally:
        _inside_layout.yes = False
    seconds = time.perf_counter() - begin
    for monitor in _running:
        if self in monitor._names:
            monitor._laid_out(monitor._names[self], seconds, id(found) in known)
    return found
