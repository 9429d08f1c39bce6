"""Memory pressure: a level per device that pools and caches ask before they grow."""

import enum
import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bs_memory import _check, _lifecycle
from bs_memory._devices import canonical_device
from bs_memory._readings import MemoryReading, read_memory

_log = logging.getLogger("bs_memory")


class PressureLevel(enum.IntEnum):
    """How scarce memory is. Ordered, so `level >= PressureLevel.HIGH` reads as it should."""

    NORMAL = 0
    HIGH = 1
    CRITICAL = 2


PressureCallback = Callable[[torch.device, PressureLevel, PressureLevel, MemoryReading], object]


@dataclass(slots=True)
class _Gauge:
    """What is known of one device."""

    reading: MemoryReading
    level: PressureLevel
    read_at: float
    margin: float = 1.0  # > 1 after an allocation failed although the reading said there was room
    margin_at: float = 0.0


class MemoryPressure:
    """Free memory per device as a level with hysteresis, cheap enough to ask on every allocation.

    A level is entered when the free bytes fall below its watermark and left when they exceed the watermark by
    `hysteresis`. Watermarks adapt twice: they are a share of the memory up to `ceiling` bytes (15 % of a 2 TiB host is
    not scarcity), and a reported allocation failure doubles them, since fragmentation made the reading too hopeful;
    that widening halves every `half_life` seconds.

    Between readings, `level` costs a clock and a dictionary look-up; it takes no lock. A copy of a gauge is the gauge
    itself; unpickled, it is a new one with the same thresholds and no subscribers.

    Args:
        high: share of the total below which free memory means `HIGH`, in (0, 1).
        critical: share below which it means `CRITICAL`, in (0, high).
        hysteresis: how far above its watermark, as a share of it, memory must rise to leave a level, ≥ 0.
        ceiling: the most bytes `high` may stand for; `critical` is bounded in proportion.
        interval: seconds a reading stays good, ≥ 0; 0 reads every time.
        half_life: seconds in which the widening after a failure halves, > 0.
        reader: `device -> MemoryReading`; `read_memory` by default.
        clock: seconds, monotonic.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is outside its range.
    """

    _MAX_MARGIN = 4.0

    def __init__(
        self,
        *,
        high: float = 0.15,
        critical: float = 0.05,
        hysteresis: float = 0.25,
        ceiling: int = 8 << 30,
        interval: float = 0.1,
        half_life: float = 60.0,
        reader: Callable[[torch.device], MemoryReading] = read_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check.number("high", high, "a number in (0, 1)", 0, 1, open_ends=True)
        _check.number("critical", critical, f"a number in (0, high={high})", 0, high, open_ends=True)
        _check.number("hysteresis", hysteresis, "a number ≥ 0", 0, math.inf, open_ends=False)
        _check.integer("ceiling", ceiling, 1)
        _check.number("interval", interval, "seconds ≥ 0", 0, math.inf, open_ends=False)
        _check.number("half_life", half_life, "finite seconds > 0", 0, math.inf, open_ends=True)
        _check.function("reader", reader)
        _check.function("clock", clock)
        self._options = {
            "high": high,
            "critical": critical,
            "hysteresis": hysteresis,
            "ceiling": ceiling,
            "interval": interval,
            "half_life": half_life,
            "reader": reader,
            "clock": clock,
        }
        self._shares = {PressureLevel.HIGH: high, PressureLevel.CRITICAL: critical}
        self._hysteresis = hysteresis
        self._ceiling = ceiling
        self._interval = interval
        self._half_life = half_life
        self._reader = reader
        self._clock = clock
        self._gauges: dict[torch.device, _Gauge] = {}
        self._lock = threading.RLock()
        self._callbacks: dict[object, tuple[torch.device | None, PressureCallback]] = {}
        _lifecycle.register(self)

    def level(self, device: torch.device | str = "cpu") -> PressureLevel:
        """The level of a device, from a reading at most `interval` seconds old.

        Args:
            device: the device to ask about.

        Returns:
            The level; `NORMAL` where the memory cannot be read.
        """
        # A dictionary read is atomic, and a gauge is replaced, never half written: no lock unless it is stale.
        gauge = self._gauges.get(device) if isinstance(device, torch.device) else None
        if gauge is not None and self._clock() - gauge.read_at < self._interval:
            return gauge.level
        return self._fresh(canonical_device(device)).level

    def reading(self, device: torch.device | str = "cpu") -> MemoryReading:
        """The reading behind `level`, at most `interval` seconds old."""
        return self._fresh(canonical_device(device)).reading

    def refresh(self, device: torch.device | str = "cpu") -> PressureLevel:
        """Reads now, whatever the interval; returns the level."""
        return self._update(canonical_device(device), wait=True).level

    def watermark(self, level: PressureLevel, device: torch.device | str = "cpu") -> int:
        """Free bytes below which `device` enters `level`, as adapted now.

        Raises:
            ValueError: if `level` is `NORMAL`, which has none.
        """
        if level not in self._shares:
            raise ValueError(f"level: expected HIGH or CRITICAL, got {level!r}")
        gauge = self._fresh(canonical_device(device))
        return self._watermark(level, gauge.reading.total, self._margin(gauge))

    def would_fit(self, nbytes: int, device: torch.device | str = "cpu") -> bool:
        """Whether `nbytes` more would leave the device above `CRITICAL`; True where the memory cannot be read.

        Raises:
            TypeError: if `nbytes` is not an int.
            ValueError: if it is negative.
        """
        _check.integer("nbytes", nbytes, 0)
        gauge = self._fresh(canonical_device(device))
        if gauge.reading.total == 0:
            return True
        floor = self._watermark(PressureLevel.CRITICAL, gauge.reading.total, self._margin(gauge))
        return gauge.reading.free - nbytes >= floor

    def note_failure(self, device: torch.device | str = "cpu") -> None:
        """Reports that an allocation failed: doubles the device's watermarks (at most ×4) and reads again."""
        device = canonical_device(device)
        self._fresh(device)
        with self._lock:
            gauge = self._gauges[device]
            margin = min(self._MAX_MARGIN, 2 * self._margin(gauge))
            self._gauges[device] = _Gauge(gauge.reading, gauge.level, gauge.read_at, margin, self._clock())
        self._update(device, wait=True)

    def subscribe(self, callback: PressureCallback, device: torch.device | str | None = None) -> Callable[[], None]:
        """Calls `callback(device, old_level, new_level, reading)` on every change of level.

        Changes are noticed when somebody asks; no thread watches. The callback runs in the asking thread, outside
        every lock; an exception in it is logged and does not reach the asker.

        Args:
            callback: what to call; held strongly until unsubscribed.
            device: only this device's changes; None for all.

        Returns:
            A function that unsubscribes; calling it again does nothing.
        """
        _check.function("callback", callback)
        token = object()
        where = None if device is None else canonical_device(device)
        with self._lock:
            self._callbacks[token] = (where, callback)

        def unsubscribe() -> None:
            self._callbacks.pop(token, None)

        return unsubscribe

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryPressure":
        return self

    def __copy__(self) -> "MemoryPressure":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self is _default:
            return default_pressure, ()
        return functools.partial(MemoryPressure, **self._options), ()

    def _fresh(self, device: torch.device) -> _Gauge:
        gauge = self._gauges.get(device)
        if gauge is not None and self._clock() - gauge.read_at < self._interval:
            return gauge
        return self._update(device, wait=gauge is None)

    def _update(self, device: torch.device, *, wait: bool) -> _Gauge:
        # One thread reads; the others make do with the old reading unless there is none.
        if not self._lock.acquire(blocking=wait):
            return self._gauges[device]
        try:
            reading = self._reader(device)
            before = self._gauges.get(device)
            now = self._clock()
            margin = 1.0 if before is None else self._margin(before)
            old = PressureLevel.NORMAL if before is None else before.level
            gauge = _Gauge(reading, self._next_level(old, reading, margin), now, margin, now)
            self._gauges[device] = gauge
            callbacks = list(self._callbacks.values()) if gauge.level != old else []
        finally:
            self._lock.release()
        for where, callback in callbacks:
            if where is None or where == device:
                try:
                    callback(device, old, gauge.level, reading)
                except Exception:
                    _log.exception("a memory-pressure callback failed on %s", device)
        return gauge

    def _next_level(self, old: PressureLevel, reading: MemoryReading, margin: float) -> PressureLevel:
        if reading.total == 0:
            return PressureLevel.NORMAL
        for level in (PressureLevel.CRITICAL, PressureLevel.HIGH):
            bound = self._watermark(level, reading.total, margin)
            if old >= level:  # already in it: leave only well above
                bound *= 1 + self._hysteresis
            if reading.free < bound:
                return level
        return PressureLevel.NORMAL

    def _watermark(self, level: PressureLevel, total: int, margin: float) -> int:
        share = self._shares[level]
        ceiling = self._ceiling * share / self._shares[PressureLevel.HIGH]
        return int(min(share * total, ceiling) * margin)

    def _margin(self, gauge: _Gauge) -> float:
        elapsed = max(0.0, self._clock() - gauge.margin_at)
        return 1.0 + (gauge.margin - 1.0) * 0.5 ** (elapsed / self._half_life)

    def _watches(self, device: torch.device) -> bool:
        return device in self._gauges

    def _reclaim(self, device: torch.device | None) -> int:
        return 0

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._gauges = {}


_default = MemoryPressure()  # made at import, which reads nothing, so that no lock guards it


def default_pressure() -> MemoryPressure:
    """The gauge that pools and caches of this process share unless given another."""
    return _default
