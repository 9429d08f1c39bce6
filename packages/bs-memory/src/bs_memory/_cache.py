"""DeviceCache: values built once, kept per device while they are hot."""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from bs_memory import _check, _lifecycle
from bs_memory._devices import canonical_device
from bs_memory._flight import Flight
from bs_memory._footprint import FakeValueError, footprint, to_device
from bs_memory._pressure import MemoryPressure, PressureLevel, default_pressure
from bs_memory._readings import MemoryReading
from bs_memory._residence import residences
from bs_memory._segments import Entry, Segments
from bs_memory._streams import StreamBackend, streams_of

T = TypeVar("T")
# Under pressure, the share of the most it ever held that a cache may keep: emptying it would only make its users
# build everything anew, again and again, while memory stays scarce.
_KEPT = {PressureLevel.HIGH: 1 / 2, PressureLevel.CRITICAL: 1 / 8}
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache did and holds.

    Attributes:
        hits: look-ups that found their value.
        misses: look-ups that did not; of `get_or_build`, those that built.
        waits: look-ups that waited for another thread's build of the same key.
        failures: builds that raised.
        promotions: entries that became protected by a second look-up.
        evictions: entries given up for a bound or for pressure.
        oversize: values handed out but not kept, being larger than the byte bound by themselves.
        entries: entries held now.
        bytes_held: their bytes.
        high_water_bytes: the most bytes ever held.
    """

    hits: int
    misses: int
    waits: int
    failures: int
    promotions: int
    evictions: int
    oversize: int
    entries: int
    bytes_held: int
    high_water_bytes: int


class DeviceCache:
    """A thread-safe cache of values per key and device, bounded in bytes and in entries.

    Eviction is a segmented LRU: an entry starts on probation, its first hit promotes it to the protected segment (at
    most 80 % of either bound; the coldest there steps back), and evictions take from probation first. A key in
    steady use therefore survives any number of keys that are used once.

    A build runs outside the lock, in at most one thread per key; threads that want the same key meanwhile wait for
    it. A build that raises leaves nothing behind: its caller gets the exception, a waiting thread builds for itself.
    Builds run without gradients and outside inference mode, so that a value built in an evaluation loop can serve
    training. Values with fake tensors, built while torch.compile traces, are handed out and not kept. A value found on
    an accelerator stream other than the one that built it is made safe to read there.

    After a fork the child's cache is empty. A copy of a cache is the cache itself, so that a module which holds one can
    be copied; unpickled, it is a new and empty one with the same bounds.

    Args:
        max_bytes: the most bytes to hold; None bounds nothing. A larger value is returned but not kept.
        max_entries: the most entries to hold; None bounds nothing.
        weak_keys: hold keys weakly: an entry goes when its key is collected. Keys must then support weak references,
            and a value that refers to its key keeps it alive.
        pressure: whom to ask before growing: "auto" for `default_pressure()`, None for nobody. At `HIGH` the cache
            keeps at most half of the most it ever held, at `CRITICAL` an eighth.
        size_of: bytes of a value, instead of the sum over its tensors, arrays and containers.
        streams: `device -> StreamBackend | None`, to test without an accelerator.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a bound is not positive.

    Source:
        Karedla, Love and Wherry, "Caching strategies to improve disk system performance", 1994 (segmented LRU).
    """

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        max_entries: int | None = None,
        weak_keys: bool = False,
        pressure: MemoryPressure | Literal["auto"] | None = "auto",
        size_of: Callable[[Any], int] | None = None,
        streams: Callable[..., StreamBackend | None] = streams_of,
    ) -> None:
        _check.bound("max_bytes", max_bytes)
        _check.bound("max_entries", max_entries)
        _check.boolean("weak_keys", weak_keys)
        _check.function("size_of", size_of or footprint)
        _check.function("streams", streams)
        if not (pressure is None or pressure == "auto" or isinstance(pressure, MemoryPressure)):
            raise TypeError(f"pressure: expected a MemoryPressure, 'auto' or None, got {pressure!r}")
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._weak_keys = weak_keys
        self._pressure = default_pressure() if pressure == "auto" else pressure
        self._size_of = size_of
        self._streams = streams
        self._options = {
            "max_bytes": max_bytes,
            "max_entries": max_entries,
            "weak_keys": weak_keys,
            "pressure": pressure,
            "size_of": size_of,
            "streams": streams,
        }
        self._start()
        if self._pressure is not None:
            this = weakref.ref(self)

            def on_change(device: torch.device, _: PressureLevel, level: PressureLevel, __: MemoryReading) -> None:
                cache = this()
                if cache is not None:
                    cache._relieve(device, level)

            weakref.finalize(self, self._pressure.subscribe(on_change)).atexit = False
        _lifecycle.register(self)

    def _start(self) -> None:
        """(Re)creates the lock and every container, empty."""
        self._lock = threading.RLock()
        self._segments = Segments(self._max_bytes, self._max_entries)
        self._held_for: dict[Any, dict[torch.device | None, Any]] = {}  # key → device → the full key it is held under
        self._flights: dict[Any, Flight] = {}
        # Entries that were removed under the lock; destroyed after it, since a destructor may call this cache.
        self._trash: deque[Entry] = deque()
        self._dead: deque[Any] = deque()  # weak keys whose object is gone, not yet cleared away
        self._hits = self._misses = self._waits = self._failures = self._oversize = 0

    # ---------------------------------------------------------------- looking up

    def get_or_build(
        self, key: Hashable, build: Callable[[], T], *, device: torch.device | str | int | None = None
    ) -> T:
        """The value of `key` on `device`, built if it is not there.

        Args:
            key: anything hashable; together with `device` it names the value.
            build: makes the value; called without arguments, in this thread, with no lock held, at most once at a time.
            device: the device the value belongs to; None for a value that belongs to none.

        Returns:
            The value. Shared by everybody who asks, so it must not be modified.

        Raises:
            RuntimeError: if `build` needs its own result, directly or through another thread.
            TypeError: if `key` is not hashable, or not weakly referable in a cache with weak keys.
        """
        full = self._full_key(key, device)
        while True:
            with self._lock:
                entry = self._find(full)
                if entry is not None:
                    break
                flight = self._flights.get(full)
                mine = flight is None
                if flight is None:
                    flight = self._flights[full] = Flight()
                    self._misses += 1
                else:
                    self._waits += 1
            if mine:
                return self._build(full, flight, build)
            if flight.wait(key):
                entry = flight.entry
                break
        if self._trash:
            self._trash.clear()
        return entry.read()

    def get_or_copy(
        self,
        key: Hashable,
        build_host: Callable[[], T],
        *,
        device: torch.device | str | int,
        copy: Callable[[T, torch.device], Any] | None = None,
    ) -> Any:
        """A copy on `device` of a host value: the host value is built once, each device's copy made once.

        Args:
            key: as in `get_or_build`; the host value is the entry of `key` without a device.
            build_host: makes the host value.
            device: where the copy should be.
            copy: `(host_value, device) -> copy`; by default the value's own `.to(device)`, or every tensor's in
                containers and dataclasses. With the default, the host value itself serves `cpu`.

        Returns:
            The copy, shared by everybody who asks.

        Raises:
            TypeError: if `copy` is None and the host value holds nothing that can be moved.
        """
        where = canonical_device(device)
        if copy is None:
            if where.type == "cpu":
                return self.get_or_build(key, build_host)
            copy = to_device
        transfer = copy
        return self.get_or_build(key, lambda: transfer(self.get_or_build(key, build_host), where), device=where)

    def get(self, key: Hashable, default: Any = None, *, device: torch.device | str | int | None = None) -> Any:
        """The value of `key` on `device` if it is held, else `default`."""
        full = self._full_key(key, device)
        with self._lock:
            entry = self._find(full)
            if entry is None:
                self._misses += 1
        return default if entry is None else entry.read()

    def put(self, key: Hashable, value: Any, *, device: torch.device | str | int | None = None) -> None:
        """Stores a value, replacing the one held; a build of the same key under way will not replace it."""
        full = self._full_key(key, device)
        entry = self._entry(full, value)
        self._make_room_under_pressure(entry)
        with self._lock:
            self._flights.pop(full, None)
            self._remove(full)
            self._insert(full, entry)
        self._trash.clear()

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` is held for any device; does not count as a look-up."""
        full = self._full_key(key, None)
        with self._lock:
            return full[0] in self._held_for

    def __len__(self) -> int:
        return self.stats().entries

    # ---------------------------------------------------------------- letting go

    def invalidate(self, key: Hashable, *, device: torch.device | str | int | Literal["all"] | None = "all") -> int:
        """Forgets `key`, so that the next look-up builds anew.

        A build of it that is under way still serves those who wait for it, but is not kept.

        Args:
            key: the key.
            device: one device's value; None for the value without a device; "all" for every one.

        Returns:
            How many entries were forgotten.
        """
        everywhere = device == "all"
        head, where = self._full_key(key, None if everywhere else device)
        with self._lock:
            flights = [full for full in self._flights if full[0] == head and (everywhere or full[1] == where)]
            for full in flights:
                del self._flights[full]
            devices = list(self._held_for.get(head, ())) if everywhere else [where]
            removed = sum(self._remove((head, one)) is not None for one in devices)
        self._trash.clear()
        return removed

    def clear(self) -> int:
        """Forgets everything; returns the bytes let go."""
        with self._lock:
            self._flights.clear()
            self._dead.clear()
            freed = self._segments.nbytes["all"]
            for full, _ in self._segments.coldest_first():
                self._remove(full)
        self._trash.clear()
        return freed

    def trim(self, target_bytes: int = 0, *, device: torch.device | str | int | None = None) -> int:
        """Evicts until at most `target_bytes` are held, probation first, coldest first.

        Args:
            target_bytes: bytes to leave.
            device: count and evict only what lives on this device; None for all.

        Returns:
            The bytes let go.

        Raises:
            TypeError: if `target_bytes` is not an int.
            ValueError: if it is negative.
        """
        _check.integer("target_bytes", target_bytes, 0)
        return self._shrink(None if device is None else canonical_device(device), target_bytes)

    def stats(self) -> CacheStats:
        """Counters and bytes, consistent with one another."""
        with self._lock:
            self._bury_dead()
            stats = CacheStats(
                hits=self._hits,
                misses=self._misses,
                waits=self._waits,
                failures=self._failures,
                promotions=self._segments.promotions,
                evictions=self._segments.evictions,
                oversize=self._oversize,
                entries=len(self._segments),
                bytes_held=self._segments.nbytes["all"],
                high_water_bytes=self._segments.high_water,
            )
        self._trash.clear()
        return stats

    def __repr__(self) -> str:
        stats = self.stats()
        bounds = f"max_bytes={self._max_bytes}, max_entries={self._max_entries}"
        return f"DeviceCache({stats.entries} entries, {stats.bytes_held} bytes, {bounds})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceCache":
        return self

    def __copy__(self) -> "DeviceCache":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(DeviceCache, **self._options), ()

    # ---------------------------------------------------------------- inside

    def _full_key(self, key: Hashable, device: torch.device | str | int | None) -> tuple[Any, torch.device | None]:
        where = None if device is None else canonical_device(device)
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"key: expected something hashable, got {type(key).__name__}") from None
        if not self._weak_keys:
            return key, where
        try:
            # Equal to every other reference to an equal object while both live, like the objects themselves.
            return weakref.ref(key), where
        except TypeError:
            raise TypeError(
                f"key: expected something weakly referable (weak_keys=True), got {type(key).__name__}"
            ) from None

    def _build(self, full: Any, flight: Flight, build: Callable[[], Any]) -> Any:
        try:
            with torch.inference_mode(False), torch.no_grad():
                value = build()
            try:
                entry = self._entry(full, value)
                self._make_room_under_pressure(entry)
            except FakeValueError:  # torch.compile is tracing: its stand-ins are good for this caller only
                entry = None
        except BaseException:
            with self._lock:
                self._failures += 1
                if self._flights.get(full) is flight:
                    del self._flights[full]
            flight.fail()
            raise
        with self._lock:
            if self._flights.get(full) is flight:  # else it was invalidated meanwhile
                del self._flights[full]
                if entry is not None:
                    self._insert(full, entry)
        if entry is None:
            flight.fail()
        else:
            flight.land(entry)
        self._trash.clear()
        return value

    def _entry(self, full: Any, value: Any) -> Entry:
        nbytes, elsewhere = footprint(value)
        if self._size_of is not None:
            nbytes = self._size_of(value)
        place = full[1] or (elsewhere[0].device if elsewhere else _CPU)
        return Entry(value, nbytes, place, residences(elsewhere, self._streams))

    # From here to _bury_dead the caller holds the lock, and clears the trash after letting go of it.

    def _find(self, full: Any) -> Entry | None:
        self._bury_dead()
        stored = self._held_for.get(full[0], {}).get(full[1])
        entry = None if stored is None else self._segments.hit(stored)
        if entry is not None:
            self._hits += 1
        return entry

    def _insert(self, full: Any, entry: Entry) -> None:
        self._bury_dead()
        if self._max_bytes is not None and entry.nbytes > self._max_bytes:
            self._oversize += 1
            return
        head, where = full
        siblings = self._held_for.setdefault(head, {})
        if siblings:
            # One reference object stands for a weak key in all places: dead references equal only themselves.
            head = next(iter(siblings.values()))[0]
        elif self._weak_keys:
            head = weakref.ref(head(), self._on_death())
            self._held_for[head] = self._held_for.pop(full[0])
        stored = siblings[where] = (head, where)
        for victim in self._segments.add(stored, entry):
            self._remove(victim)

    def _remove(self, full: Any) -> Entry | None:
        entry = self._segments.remove(full)
        if entry is not None:
            siblings = self._held_for[full[0]]
            del siblings[full[1]]
            if not siblings:
                del self._held_for[full[0]]
            self._trash.append(entry)
        return entry

    def _bury_dead(self) -> None:
        while self._dead:
            head = self._dead.popleft()
            for full in list(self._held_for.get(head, {}).values()):
                self._remove(full)

    def _on_death(self) -> Callable[[Any], None]:
        this = weakref.ref(self)

        def note(head: Any) -> None:
            # The collector may strike while this very thread holds the lock, so only note it; clear away if we can.
            cache = this()
            if cache is None:
                return
            cache._dead.append(head)
            owned = cache._lock._is_owned()  # pyright: ignore[reportAttributeAccessIssue]  (Condition asks this, too)
            if not owned and cache._lock.acquire(blocking=False):
                try:
                    cache._bury_dead()
                finally:
                    cache._lock.release()
                cache._trash.clear()

        return note

    # ---------------------------------------------------------------- pressure and the process around it

    def _make_room_under_pressure(self, entry: Entry) -> None:
        if self._pressure is not None:
            level = self._pressure.level(entry.place)
            if level is not PressureLevel.NORMAL:
                self._relieve(entry.place, level, entry.nbytes)

    def _relieve(self, device: torch.device, level: PressureLevel, coming: int = 0) -> None:
        if level is not PressureLevel.NORMAL:
            self._shrink(device, int(_KEPT[level] * self._segments.high_water) - coming)

    def _shrink(self, device: torch.device | None, target_bytes: int) -> int:
        freed = 0
        with self._lock:
            self._bury_dead()
            rows = [row for row in self._segments.coldest_first() if device is None or row[1].place == device]
            held = sum(entry.nbytes for _, entry in rows)
            for full, entry in rows:
                if held - freed <= max(0, target_bytes):
                    break
                self._remove(full)
                freed += entry.nbytes
                self._segments.evictions += 1
        self._trash.clear()
        return freed

    def _reclaim(self, device: torch.device | None) -> int:
        return self._shrink(device, 0)

    def _after_fork(self) -> None:
        # Values may be on a device that this process must not touch, so nothing is destroyed.
        _lifecycle.bury(self._segments)
        self._start()
