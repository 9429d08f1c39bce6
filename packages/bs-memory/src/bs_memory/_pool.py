"""BufferPool: exclusive, recycled buffers under a byte budget."""

import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from bs_memory import _check, _lifecycle
from bs_memory._account import Account
from bs_memory._buckets import ALIGNMENT, bucket_bytes
from bs_memory._devices import canonical_device
from bs_memory._errors import LeaseError, PoolBudgetError, PoolClosedError
from bs_memory._lease import Lease
from bs_memory._oom import is_oom_error
from bs_memory._pressure import MemoryPressure, PressureLevel, default_pressure
from bs_memory._readings import MemoryReading
from bs_memory._stats import PoolStats, collect
from bs_memory._storage import NONE, ONE_OFF, Block, Bucket, Request
from bs_memory._streams import StreamBackend, streams_of

_MAX_REQUESTS = 4096  # distinct requests remembered; shapes that never repeat must not pile up


class BufferPool:
    """Recycles buffers of memory as exclusive leases.

    Buffers are keyed by device, dtype and size bucket; a buffer belongs to at most one lease at a time. All methods
    may be called from any thread. A lease that finds an idle buffer takes one lock, of its own bucket.

    On an accelerator a buffer is reused only by work that comes after the work it was used for: on the same stream at
    once, on another stream when the events recorded at release have happened. Nothing waits for that: while events
    are pending another buffer is used, or a new one made. Only when the budget forbids a new one is there a wait: of
    the *stream* for device memory, of the host for pinned memory, which the host writes. While a CUDA graph is being
    captured, leases are plain allocations of the graph's own pool.

    After a fork the child's pool is empty. Leases taken before the fork stay readable in the child and are dropped,
    not recycled, when released there. A copy of a pool is the pool itself, so that a module which holds one can be
    copied; unpickled, it is a new and empty one with the same options.

    Args:
        max_bytes: the most bytes to hold per device, leased and idle together; None bounds nothing. When a lease would
            exceed it, idle buffers are given up, lowest priority first, then least recently used.
        alignment: what the address of every buffer is a multiple of, in bytes; a power of two ≥ 64.
        pressure: whom to ask before growing: "auto" for `default_pressure()`, None for nobody. At `HIGH` the pool
            keeps idle at most half of the most it ever held, at `CRITICAL` nothing.
        poison: overwrite every buffer on release, so that a use after release is seen: with 0xFF bytes (NaN) for
            floating and complex dtypes, with 0xCB elsewhere. Costs a write of the whole buffer.
        streams: `device, pinned -> StreamBackend | None`, to test reuse without an accelerator.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `max_bytes` is not positive or `alignment` is not a power of two ≥ 64.
    """

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        alignment: int = ALIGNMENT,
        pressure: MemoryPressure | Literal["auto"] | None = "auto",
        poison: bool = False,
        streams: Callable[..., StreamBackend | None] = streams_of,
    ) -> None:
        _check.bound("max_bytes", max_bytes)
        if _check.integer("alignment", alignment, ALIGNMENT) & (alignment - 1):
            raise ValueError(f"alignment: expected a power of two ≥ {ALIGNMENT}, got {alignment}")
        _check.boolean("poison", poison)
        _check.function("streams", streams)
        if not (pressure is None or pressure == "auto" or isinstance(pressure, MemoryPressure)):
            raise TypeError(f"pressure: expected a MemoryPressure, 'auto' or None, got {pressure!r}")
        self._max_bytes = max_bytes
        # torch aligns to 64 bytes on a CPU and to 512 on CUDA; only a wider wish needs room to shift in.
        self._slack = 0 if alignment <= ALIGNMENT else alignment
        self._pressure = default_pressure() if pressure == "auto" else pressure
        self._poison = poison
        self._streams = streams
        self._options = {
            "alignment": alignment,
            "pressure": pressure,
            "poison": poison,
            "streams": streams,
        }
        self._closed = False
        self._start()
        if self._pressure is not None:
            this = weakref.ref(self)

            def on_change(device: torch.device, _: PressureLevel, level: PressureLevel, __: MemoryReading) -> None:
                pool = this()
                if pool is not None and not pool._closed:
                    pool._relieve(device, level)

            weakref.finalize(self, self._pressure.subscribe(on_change)).atexit = False
        _lifecycle.register(self)

    def _start(self) -> None:
        """(Re)creates every lock and container, empty."""
        self._lock = threading.RLock()  # guards the three dictionaries below, on the slow path only
        self._buckets: dict[tuple[torch.device, torch.dtype, int, bool], Bucket] = {}
        self._accounts: dict[torch.device, Account] = {}
        self._requests: dict[Any, Request] = {}
        self._next_tick = itertools.count(1).__next__
        # Blocks and buckets know each other, so that a pool that is dropped would keep its memory until the collector
        # came by; the pool itself is in no such circle.
        weakref.finalize(self, _let_go, self._accounts).atexit = False

    # ---------------------------------------------------------------- leasing

    def lease(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        *,
        pinned: bool = False,
        priority: int = 0,
    ) -> Lease:
        """Leases a buffer: `with pool.lease(...) as tensor`, or `lease.tensor` and `lease.release()`.

        The tensor is contiguous, uninitialised, detached, and a new tensor object every time. It shares its version
        counter with every other tensor this buffer has been, so that autograd reports a buffer that was released (and
        overwritten by the next holder) while a backward pass still needed it, instead of using wrong numbers.

        Args:
            shape: the tensor's shape; empty for a scalar.
            dtype: its dtype; torch's default dtype if None.
            device: its device; torch's default device if None.
            pinned: page-locked host memory, for asynchronous copies from and to an accelerator.
            priority: who is given up last: idle buffers of a lower priority are evicted before those of a higher one.

        Returns:
            The lease.

        Raises:
            PoolBudgetError: if the buffer does not fit in the budget next to the leased ones.
            PoolClosedError: if the pool is closed.
            TypeError: if an argument has the wrong type.
            ValueError: if a dimension is negative, or `pinned` is asked of a device other than the CPU or on a machine
                without an accelerator.
            torch.OutOfMemoryError, RuntimeError: if the allocator runs out although the pool gave up its idle buffers.
        """
        if dtype is None:
            dtype = torch.get_default_dtype()
        if device is None:
            device = torch.get_default_device()
        if priority.__class__ is not int:
            raise TypeError(f"priority: expected an int, got {type(priority).__name__}")
        try:
            request = self._requests[shape, dtype, device, pinned]
        except (KeyError, TypeError):  # new, or a list
            request = self._resolve(shape, dtype, device, pinned)
        bucket = request.bucket
        if bucket.streams is not None:
            block = self._take_on_stream(request)
        else:
            with bucket.lock:
                try:
                    block = bucket.free.pop()
                except IndexError:
                    block = None
                else:
                    # Bucket.lend by hand: a call would cost a twentieth of the whole.
                    bucket.hits += 1
                    bucket.leased += 1
                    bucket.requested += request.nbytes
                    block.request = request
        if block is None:
            block = self._grow(request)
        block.priority = priority
        if block.view_of is not request:
            block.reshape(request)
        # detach() makes a tensor object without history: a graph or a requires_grad that the last holder hung on its
        # own tensor stays with that one.
        return Lease(self, block, block.view.detach())

    def release(self, lease: Lease) -> None:
        """Gives a lease of this pool back; the same as `lease.release()`.

        Raises:
            LeaseError: if another pool issued it, or it was released before.
            TypeError: if it is not a `Lease`.
        """
        if not isinstance(lease, Lease):
            raise TypeError(f"lease: expected a Lease, got {type(lease).__name__}")
        if lease._pool is not self:
            raise LeaseError("lease: expected one that this pool issued, got one of another pool")
        lease.release()

    # ---------------------------------------------------------------- shrinking

    def trim(self, target_bytes: int = 0, *, device: torch.device | str | int | None = None) -> int:
        """Gives idle buffers back to torch, lowest priority first, then least recently used.

        Args:
            target_bytes: idle bytes to leave on each device.
            device: only this device; None for all.

        Returns:
            The bytes given up. A pinned buffer that a copy still uses stays until a later call.

        Raises:
            PoolClosedError: if the pool is closed.
            TypeError: if `target_bytes` is not an int.
            ValueError: if it is negative.
        """
        self._check_open()
        _check.integer("target_bytes", target_bytes, 0)
        where = None if device is None else canonical_device(device)
        return sum(account.trim(target_bytes) for account in self._accounts_on(where))

    def clear(self) -> int:
        """Lets go of everything: idle buffers now, leased ones when they are released.

        Returns:
            The bytes given up now.

        Raises:
            PoolClosedError: if the pool is closed.
        """
        self._check_open()
        accounts = self._accounts_on(None)
        for account in accounts:
            for bucket in list(account.buckets):
                with bucket.lock:
                    bucket.renew()
        return sum(account.trim(0) for account in accounts)

    @property
    def max_bytes(self) -> int | None:
        """The budget per device, in bytes; None bounds nothing. Assigning a lower one evicts idle buffers at once."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int | None) -> None:
        _check.bound("max_bytes", value)
        with self._lock:
            self._max_bytes = value
            accounts = list(self._accounts.values())
        for account in accounts:
            account.set_budget(value)

    def close(self) -> None:
        """Lets go of everything and refuses new leases. Leases that are out stay valid; closing twice does nothing.

        Waits for copies that still use an idle pinned buffer.
        """
        with self._lock:
            self._closed = True
            self._requests.clear()
        for account in self._accounts_on(None):
            account.close()

    @property
    def closed(self) -> bool:
        """Whether `close` has happened."""
        return self._closed

    def __enter__(self) -> "BufferPool":
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "BufferPool":
        return self

    def __copy__(self) -> "BufferPool":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self is _default:
            return default_pool, ()
        return functools.partial(BufferPool, max_bytes=self._max_bytes, **self._options), ()

    # ---------------------------------------------------------------- looking

    def stats(self, device: torch.device | str | int | None = None) -> PoolStats:
        """Counters and bytes, of one device or of all.

        Taken bucket by bucket: exact when no other thread leases meanwhile, off by the leases under way otherwise.
        """
        accounts = self._accounts_on(None if device is None else canonical_device(device))
        for account in accounts:
            account.settle_abandoned()
        return collect(accounts)

    def __repr__(self) -> str:
        if self._closed:
            return "BufferPool(closed)"
        stats = self.stats()
        return f"BufferPool({stats.leases} leased, {stats.bytes_idle} bytes idle, max_bytes={self._max_bytes})"

    # ---------------------------------------------------------------- the slow path

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("pool: expected an open one, got one that was closed")

    def _accounts_on(self, device: torch.device | None) -> list[Account]:
        with self._lock:
            return [account for account in self._accounts.values() if device is None or account.device == device]

    def _resolve(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | int, pinned: bool
    ) -> Request:
        """Checks a request and finds its bucket; remembers it if it means the same next time."""
        self._check_open()
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
        _check.boolean("pinned", pinned)
        sizes = _check.shape(shape)
        where = canonical_device(device)
        if pinned and where.type != "cpu":
            raise ValueError(f"pinned: expected False on {where}, since only host memory can be pinned, got True")
        if pinned and self._streams is streams_of and not torch.accelerator.is_available():
            raise ValueError("pinned: expected False on a machine without an accelerator, got True")
        numel = math.prod(sizes)
        nbytes = numel * dtype.itemsize
        request = Request(self._bucket(where, dtype, bucket_bytes(nbytes), pinned), sizes, nbytes, numel)
        # "cuda" means another device after torch.cuda.set_device; only what names one device may be remembered.
        named = torch.device(device)
        if named.type in ("cpu", "meta") or (named.index is not None and not isinstance(device, int)):
            with self._lock:
                if len(self._requests) >= _MAX_REQUESTS:
                    self._requests.clear()
                if not self._closed:
                    self._requests[sizes, dtype, device, pinned] = request
        return request

    def _bucket(self, device: torch.device, dtype: torch.dtype, nbytes: int, pinned: bool) -> Bucket:
        streams = self._streams(device, pinned=pinned)
        with self._lock:
            self._check_open()
            account = self._accounts.get(device)
            if account is None:
                account = self._accounts.setdefault(device, Account(device, self._max_bytes))
            key = (device, dtype, nbytes, pinned)
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._buckets[key] = Bucket(
                    account,
                    dtype,
                    nbytes,
                    slack=self._slack,
                    pinned=pinned,
                    poisons=self._poison,
                    streams=streams,
                    next_tick=self._next_tick,
                )
                account.buckets.append(bucket)
            return bucket

    def _take_on_stream(self, request: Request) -> Block | None:
        """An idle block that the current stream may use at once."""
        bucket = request.bucket
        streams = bucket.streams
        assert streams is not None
        if streams.capturing():
            return None
        stream = streams.current()
        with bucket.lock:
            block = bucket.take_ready(stream)
            if block is not None:
                block.home = stream
                bucket.lend(block, request, hit=True)
        return block

    def _take_behind_a_wait(self, request: Request) -> Block | None:
        """The longest idle block of the bucket, once the work on it is waited for; None if there is none."""
        bucket = request.bucket
        streams = bucket.streams
        if streams is None:
            return None
        stream = streams.current()
        with bucket.lock:
            block = bucket.take_oldest()
            if block is None:
                return None
            block.home = stream
            bucket.lend(block, request, hit=True)
        fences, block.fences = block.fences, []
        for other, event in fences:
            if bucket.pinned:
                streams.synchronize(event)
            elif other != stream:
                streams.wait(stream, event)
            streams.recycle(event)
        return block

    def _grow(self, request: Request) -> Block:
        """Allocates a block, within the budget and with an eye on the pressure."""
        bucket = request.bucket
        account, streams = self._accounts[bucket.device], bucket.streams
        capturing = streams is not None and streams.capturing()
        if not capturing:
            account.settle_abandoned()
            if self._pressure is not None:
                level = self._pressure.level(bucket.device)
                if level is not PressureLevel.NORMAL or bucket.keeps == NONE:
                    self._relieve(bucket.device, level)
        if not account.book(bucket.charge):
            block = None if capturing else self._take_behind_a_wait(request)
            if block is not None:
                return block
            if capturing or not account.make_room(bucket.charge):
                raise PoolBudgetError(self._budget_message(bucket))
        try:
            flat = self._allocate(bucket, capturing)
        except BaseException:
            account.unbook(bucket.charge)
            raise
        # Fake tensors, under torch.compile's tracing, are as little for others as the memory of a graph.
        one_off = capturing or type(flat) is not torch.Tensor
        block = Block(bucket, flat, ONE_OFF if one_off else bucket.epoch)
        if streams is not None:
            block.origin = block.home = streams.current()
        with bucket.lock:
            closed = bucket.closed
            if not closed:
                bucket.lend(block, request, hit=False)
        if closed:  # while this thread allocated
            account.unbook(bucket.charge)
            self._check_open()
        return block

    def _allocate(self, bucket: Bucket, capturing: bool) -> torch.Tensor:
        try:
            return bucket.allocate()
        except Exception as error:
            if capturing or not is_oom_error(error):
                raise
        # Out of memory: whatever this pool keeps idle on the device goes first, then torch gets a second try.
        self._accounts[bucket.device].trim(0)
        if self._pressure is not None:
            self._pressure.note_failure(bucket.device)
        return bucket.allocate()

    def _budget_message(self, bucket: Bucket) -> str:
        stats = self.stats(bucket.device)
        return (
            f"pool: a buffer of {bucket.charge} bytes on {bucket.device} does not fit in max_bytes={self._max_bytes}: "
            f"{stats.bytes_leased} bytes are leased ({stats.leases} leases), so that at most "
            f"{max(0, (self._max_bytes or 0) - stats.bytes_leased)} more would fit"
        )

    def _relieve(self, device: torch.device, level: PressureLevel) -> None:
        """Adapts to a level of pressure on `device`."""
        for account in self._accounts_on(device):
            for bucket in list(account.buckets):
                bucket.discard(level is PressureLevel.CRITICAL)
            if level is PressureLevel.CRITICAL:
                account.trim(0)
            elif level is PressureLevel.HIGH:
                account.trim(account.high_water // 2)

    # ---------------------------------------------------------------- the process around it

    def _reclaim(self, device: torch.device | None) -> int:
        if self._closed:
            return 0
        return sum(account.trim(0) for account in self._accounts_on(device))

    def _after_fork(self) -> None:
        for account in self._accounts.values():
            account.orphan()
        self._start()


def _let_go(accounts: dict[torch.device, Account]) -> None:
    for account in accounts.values():
        account.close()


_default = BufferPool()  # made at import, which allocates nothing, so that no lock guards it


def default_pool() -> BufferPool:
    """The pool that the packages of this process share unless given another.

    It begins without a budget (set `default_pool().max_bytes` for one) and yields to `default_pressure()`.
    """
    return _default
