"""What a pool is made of: blocks of memory, and the buckets that hold the idle ones."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from bs_memory import _lifecycle
from bs_memory._ledger import Ledger
from bs_memory._streams import StreamBackend

ONE_OFF = -1  # the epoch of a block that is never recycled, such as one that a captured graph uses
NONE = -2  # the epoch of no block
_SCAN = 8  # idle blocks looked at before giving up on finding one whose work is done

Fence = tuple[Any, Any]  # (stream, event)


class Request:
    """A (shape, dtype, device, pinned) that was checked and has its bucket: what the hot path needs, computed once."""

    __slots__ = ("bucket", "nbytes", "numel", "shape")

    def __init__(self, bucket: "Bucket", shape: tuple[int, ...], nbytes: int, numel: int) -> None:
        self.bucket = bucket
        self.shape = shape
        self.nbytes = nbytes
        self.numel = numel


class Block:
    """One allocation. While idle it is in its bucket's `free`; while leased only its `Lease` knows it.

    A leased block that dies was abandoned: its lease was dropped without a release, or an interrupt struck before
    there was a lease. Somebody may still hold the tensor, so its memory must not be recycled, only booked out.
    """

    __slots__ = (
        "bucket",
        "epoch",
        "extra",
        "fences",
        "flat",
        "home",
        "origin",
        "priority",
        "request",
        "tick",
        "view",
        "view_of",
    )

    def __init__(self, bucket: "Bucket", flat: torch.Tensor, epoch: int) -> None:
        self.bucket = bucket
        self.flat = flat  # 1-D, of the bucket's dtype
        self.epoch = epoch
        self.request: Request | None = None  # what it is leased for; None while idle
        self.tick = 0
        self.priority = 0
        self.view: torch.Tensor = flat
        self.view_of: Request | None = None  # the request `view` was made for
        self.fences: list[Fence] = []  # work that may still use the block
        self.home: Any = None  # the stream it was leased on
        self.origin: Any = None  # the stream it was allocated on, which torch's allocator orders by itself
        self.extra: tuple[Any, ...] = ()  # further streams that its holder told of

    def reshape(self, request: Request) -> None:
        """Makes `view` what the request asks for."""
        # A view made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            self.view = self.flat[: request.numel].view(request.shape)
        self.view_of = request

    def __del__(self) -> None:
        # Runs wherever the collector strikes, possibly under one of the pool's locks: only an atomic append is safe.
        # It brings the block back to life until the pool has booked it out.
        if getattr(self, "request", None) is not None:  # an interrupt may strike before there is one
            self.bucket.account.abandoned.append(self)


class Bucket:
    """Idle blocks of one device, dtype and size.

    `lock` guards everything mutable. It is per bucket, so two threads meet only when they want the very same kind of
    buffer. An uncontended lock costs about 100 ns; relying on the atomicity of `list.append` and `pop` instead would
    save that, but leave the counters inexact and free-threaded builds to luck.
    """

    __slots__ = (
        "account",
        "charge",
        "closed",
        "device",
        "dtype",
        "epoch",
        "free",
        "hits",
        "keeps",
        "leased",
        "lock",
        "misses",
        "nbytes",
        "next_tick",
        "orphaned",
        "pinned",
        "plain",
        "poisons",
        "requested",
        "streams",
    )

    def __init__(
        self,
        account: Ledger,
        dtype: torch.dtype,
        nbytes: int,
        *,
        slack: int,
        pinned: bool,
        poisons: bool,
        streams: StreamBackend | None,
        next_tick: Callable[[], int],
    ) -> None:
        self.account = account
        self.device = account.device
        self.dtype = dtype
        self.nbytes = nbytes
        self.charge = nbytes + slack  # what a block takes from the budget
        self.pinned = pinned
        self.poisons = poisons
        self.streams = streams
        self.plain = streams is None and not poisons
        self.next_tick = next_tick
        self.lock = threading.RLock()
        self.free: list[Block] = []  # oldest first; the end is the warmest in cache
        self.hits = 0
        self.misses = 0
        self.leased = 0
        self.requested = 0  # bytes asked for by the current leases
        self.epoch = 0
        self.keeps = 0  # the epoch of blocks worth keeping on release: this one, or none
        self.closed = False
        self.orphaned = False  # this is a forked child and the blocks are the parent's

    def lend(self, block: Block, request: Request, *, hit: bool) -> None:
        """Books a lease; the caller holds the lock."""
        if hit:
            self.hits += 1
        else:
            self.misses += 1
        self.leased += 1
        self.requested += request.nbytes
        block.request = request

    def take_back(self, block: Block) -> bool:
        """Books the end of a lease and keeps the block if it is worth keeping; the caller holds the lock."""
        request = block.request
        assert request is not None
        block.request = None
        self.leased -= 1
        self.requested -= request.nbytes
        keep = block.epoch == self.keeps
        if not self.plain:
            try:
                if self.poisons:
                    self.poison(block)
                if self.streams is not None:
                    keep = self.fence(block) and keep
            except BaseException:  # a device that failed: the block is no use to anybody
                self.account.settle(self.charge)
                raise
        if keep:
            block.tick = self.next_tick()
            self.free.append(block)
        else:
            self.account.settle(self.charge)
        return keep

    def discard(self, yes: bool) -> None:
        """Whether nothing is to be kept on release from now on."""
        with self.lock:
            if not self.closed:
                self.keeps = NONE if yes else self.epoch

    def renew(self) -> None:
        """Begins a new epoch: what is leased now will not be kept; the caller holds the lock."""
        self.epoch += 1
        self.keeps = NONE if self.keeps == NONE else self.epoch

    def take_ready(self, stream: Any) -> Block | None:
        """Removes an idle block that `stream` may use at once; the caller holds the lock."""
        for block in reversed(self.free[-_SCAN:]):
            if self._ready(block, stream):
                return self.take(block)
        return None

    def take(self, block: Block) -> Block | None:
        """Removes this idle block, if it is still there; the caller holds the lock."""
        with contextlib.suppress(ValueError):
            self.free.remove(block)
            return block
        return None

    def take_oldest(self) -> Block | None:
        """Removes the block that has been idle longest, ready or not; the caller holds the lock."""
        with contextlib.suppress(IndexError):
            return self.free.pop(0)
        return None

    def _ready(self, block: Block, stream: Any) -> bool:
        streams = self.streams
        assert streams is not None
        waiting = []
        for fence in block.fences:
            if streams.done(fence[1]):
                streams.recycle(fence[1])
            else:
                waiting.append(fence)
        block.fences = waiting
        # What this stream does next comes after what it was given before, so its own fences need no wait (the lease's
        # release will fence it anew). Not so for pinned memory: there the host writes, and it writes now.
        if self.pinned or any(fence[0] != stream for fence in waiting):
            return not waiting
        block.fences = []
        return True

    def fence(self, block: Block) -> bool:
        """Marks the work queued so far on every stream that used the block; whether it may be recycled after that."""
        streams = self.streams
        assert streams is not None
        if self.orphaned or block.epoch == ONE_OFF:
            return False
        if streams.capturing():
            # An event recorded now belongs to the graph and can never be queried: torch's allocator takes over.
            block.fences = [(stream, None) for stream in (block.home, *block.extra)]
            return False
        users = dict.fromkeys((block.home, streams.current(), *block.extra))
        block.extra = ()
        block.fences += [(stream, streams.record(stream)) for stream in users]
        return True

    def poison(self, block: Block) -> None:
        """Overwrites a released block with 0xFF (a NaN in every IEEE format) or, for integers, 0xCB."""
        if self.orphaned:
            return
        if self.streams is not None and not self.streams.capturing():
            stream = self.streams.current()
            if stream != block.home:
                self.streams.wait(stream, self.streams.record(block.home))
        real = self.dtype.is_floating_point or self.dtype.is_complex
        with torch.inference_mode(False), torch.no_grad():
            block.flat.view(torch.uint8).fill_(0xFF if real else 0xCB)

    def orphan(self) -> None:
        """In a forked child: the blocks belong to the parent; locks may be held by threads that are not here."""
        self.lock = threading.RLock()
        self.orphaned = True
        self.keeps = NONE
        if self.streams is not None:
            _lifecycle.bury(self.free)
        self.free = []

    def allocate(self) -> torch.Tensor:
        """Allocates the flat tensor of one block, aligned to the slack where there is some.

        A tensor made in inference mode could never be used in training afterwards, so that mode is left for the call.
        """
        slack = self.charge - self.nbytes
        itemsize = self.dtype.itemsize
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(
                (self.nbytes + slack) // itemsize, dtype=self.dtype, device=self.device, pin_memory=self.pinned
            )
            if slack:
                shift = -raw.data_ptr() % slack // itemsize
                raw = raw[shift : shift + self.nbytes // itemsize]
        return raw


def drop(block: Block, *, wait: bool = False) -> None:
    """Gives a block's memory back to torch; the caller has settled the account.

    Device memory used on other streams than its own is kept by torch's allocator until they are done. Pinned memory
    must not go while a copy uses it, so that the caller passes only idle blocks whose fences are done, or `wait`.
    """
    streams = block.bucket.streams
    if streams is None:
        return
    if block.bucket.orphaned:
        _lifecycle.bury(block)
        return
    for stream, event in block.fences:
        if block.bucket.pinned:
            if wait and event is not None:
                streams.synchronize(event)
        elif stream != block.origin:
            streams.keep_alive(block.flat, stream)
    block.fences = []
    # The flat tensor goes with the last reference; here none is left but the caller's.


def evictable(block: Block) -> bool:
    """Whether an idle block's memory may be given up now without waiting."""
    streams = block.bucket.streams
    if streams is None or not block.bucket.pinned:
        return True
    return all(streams.done(event) for _, event in block.fences)
