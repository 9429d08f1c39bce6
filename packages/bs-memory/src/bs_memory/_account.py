"""An account: what a pool holds on one device, and how it makes room there."""

import threading

import torch

from bs_memory._storage import Block, Bucket, drop, evictable


class Account:
    """The buckets and bytes of one device. Only growing and shrinking come here; a lease that hits does not.

    Locks are never nested: `lock` guards the numbers, each bucket's own lock its blocks.
    """

    __slots__ = ("buckets", "device", "evictions", "held", "high_water", "lock", "max_bytes")

    def __init__(self, device: torch.device, max_bytes: int | None) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.buckets: list[Bucket] = []  # appended to under the pool's lock, copied here in one atomic step
        self.held = 0
        self.high_water = 0
        self.evictions = 0

    def book(self, nbytes: int) -> bool:
        """Counts `nbytes` as held if the budget allows."""
        with self.lock:
            if self.max_bytes is not None and self.held + nbytes > self.max_bytes:
                return False
            self.held += nbytes
            self.high_water = max(self.high_water, self.held)
            return True

    def unbook(self, nbytes: int) -> None:
        """Takes back a `book` whose allocation failed."""
        with self.lock:
            self.held -= nbytes

    def make_room(self, nbytes: int) -> bool:
        """Books `nbytes`, evicting idle blocks until they fit; False if they cannot."""
        while not self.book(nbytes):
            assert self.max_bytes is not None
            with self.lock:
                excess = self.held + nbytes - self.max_bytes
            if not self.evict(excess):
                return self.book(nbytes)  # another thread may have given something up meanwhile
        return True

    def trim(self, target_bytes: int) -> int:
        """Evicts until at most `target_bytes` are idle; returns the bytes given up."""
        return self.evict(sum(block.nbytes for block in self._idle()) - target_bytes)

    def halve(self) -> int:
        """Evicts half of the idle bytes; returns the bytes given up."""
        return self.evict(sum(block.nbytes for block in self._idle()) // 2)

    def evict(self, nbytes: int) -> int:
        """Gives up idle blocks worth at least `nbytes`, lowest priority first, then oldest; returns the bytes."""
        freed = 0
        if nbytes <= 0:
            return freed
        for block in sorted(self._idle(), key=lambda block: (block.priority, block.tick)):
            if freed >= nbytes:
                break
            with block.bucket.lock:
                # It may have been leased or evicted since the list was made.
                if block not in block.bucket.free or not evictable(block):
                    continue
                block.bucket.free.remove(block)
            freed += block.nbytes
            self.give_up(block, evicted=True)
        return freed

    def give_up(self, block: Block, *, evicted: bool = False, wait: bool = False) -> None:
        """Settles a block that is neither leased nor idle any more, and drops its memory."""
        with self.lock:
            self.held -= block.nbytes
            self.evictions += evicted
        drop(block, wait=wait)

    def orphan(self) -> None:
        """In a forked child: everything here belongs to the parent."""
        self.lock = threading.Lock()
        for bucket in self.buckets:
            bucket.orphan()

    def _idle(self) -> list[Block]:
        blocks: list[Block] = []
        for bucket in list(self.buckets):
            with bucket.lock:
                blocks += bucket.free
        return blocks
