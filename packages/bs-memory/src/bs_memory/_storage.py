"""What a pool is made of: blocks of memory, and the buckets that hold the idle ones."""

import threading
from typing import TYPE_CHECKING, Any

import torch

from bs_memory import _lifecycle
from bs_memory._streams import StreamBackend

if TYPE_CHECKING:
    from bs_memory._account import Account

OF_A_GRAPH = -1  # the epoch of a block that a captured graph uses: never recycled
_SCAN = 8  # idle blocks looked at before giving up on finding one whose work is done

Fence = tuple[Any, Any]  # (stream, event)


class Block:
    """One allocation. While idle it is in its bucket's `free`; while leased only its `Lease` knows it."""

    __slots__ = ("bucket", "epoch", "fences", "flat", "home", "nbytes", "origin", "priority", "tick", "view", "view_of")

    def __init__(self, bucket: "Bucket", flat: torch.Tensor, nbytes: int, epoch: int) -> None:
        self.bucket = bucket
        self.flat = flat  # 1-D, of the bucket's dtype
        self.nbytes = nbytes  # as charged to the account
        self.epoch = epoch
        self.tick = 0
        self.priority = 0
        self.view_of: object = None  # the request `view` was made for
        self.view: torch.Tensor = flat
        self.fences: list[Fence] = []  # work that may still use the block
        self.home: Any = None  # the stream it was leased on
        self.origin: Any = None  # the stream it was allocated on, which torch's allocator orders by itself

    def reshape(self, numel: int, shape: tuple[int, ...]) -> None:
        """Makes `view` show the first `numel` elements as `shape`."""
        # A view made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            self.view = self.flat[:numel].view(shape)


class Bucket:
    """Idle blocks of one device, dtype and size.

    `lock` guards everything mutable. It is per bucket, so two threads meet only when they want the very same kind of
    buffer. An uncontended lock costs about 60 ns; relying on the atomicity of `list.append` and `pop` instead would
    save that, but leave the counters inexact and free-threaded builds to luck.
    """

    __slots__ = (
        "account",
        "closed",
        "device",
        "discard",
        "dtype",
        "epoch",
        "free",
        "hits",
        "leased",
        "leased_bytes",
        "lock",
        "misses",
        "nbytes",
        "orphaned",
        "pinned",
        "requested",
        "streams",
    )

    def __init__(
        self, account: "Account", dtype: torch.dtype, nbytes: int, pinned: bool, streams: StreamBackend | None
    ) -> None:
        self.account = account
        self.device = account.device
        self.dtype = dtype
        self.nbytes = nbytes
        self.pinned = pinned
        self.streams = streams
        self.lock = threading.Lock()
        self.free: list[Block] = []  # oldest first; the end is the warmest in cache
        self.hits = 0
        self.misses = 0
        self.leased = 0
        self.leased_bytes = 0
        self.requested = 0  # bytes asked for by the current leases
        self.epoch = 0  # blocks of an earlier epoch are dropped on release
        self.discard = False  # memory is critical: keep nothing
        self.closed = False
        self.orphaned = False  # this is a forked child and the blocks are the parent's

    def count_lease(self, block: Block, requested: int, *, hit: bool) -> None:
        """Books a lease; the caller holds the lock."""
        if hit:
            self.hits += 1
        else:
            self.misses += 1
        self.leased += 1
        self.leased_bytes += block.nbytes
        self.requested += requested

    def count_return(self, block: Block, requested: int) -> None:
        """Books the end of a lease; the caller holds the lock."""
        self.leased -= 1
        self.leased_bytes -= block.nbytes
        self.requested -= requested

    def take_ready(self, stream: Any) -> Block | None:
        """Removes an idle block that `stream` may use at once; the caller holds the lock."""
        for index in range(len(self.free) - 1, max(-1, len(self.free) - 1 - _SCAN), -1):
            if self._ready(self.free[index], stream):
                return self.free.pop(index)
        return None

    def take_oldest(self) -> Block | None:
        """Removes the block that has been idle longest, ready or not; the caller holds the lock."""
        return self.free.pop(0) if self.free else None

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

    def fence(self, block: Block, extra: tuple[Any, ...]) -> bool:
        """Marks the work queued so far on every stream that used the block; whether it may be recycled after that."""
        streams = self.streams
        assert streams is not None
        if self.orphaned or block.epoch == OF_A_GRAPH:
            return False
        if streams.capturing():
            # An event recorded now belongs to the graph and can never be queried: torch's allocator takes over.
            block.fences = [(stream, None) for stream in (block.home, *extra)]
            return False
        users = dict.fromkeys((block.home, streams.current(), *extra))
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
        self.lock = threading.Lock()
        self.orphaned = True
        self.epoch += 1
        if self.streams is not None:
            _lifecycle.bury(self.free)
        self.free = []

    def allocate(self, slack: int) -> torch.Tensor:
        """Allocates the flat tensor of one block, aligned to `slack` bytes where that is not 0.

        A tensor made in inference mode could never be used in training afterwards, so that mode is left for the call.
        """
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
