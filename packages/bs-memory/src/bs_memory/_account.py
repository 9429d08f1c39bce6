"""An account: what a pool holds on one device, and how it makes room there."""

import contextlib
import threading

import torch

from bs_memory._ledger import Ledger
from bs_memory._storage import NONE, Block, Bucket, drop, evictable


class Account(Ledger):
    """The buckets and bytes of one device. Only growing and shrinking come here; a lease that hits does not.

    `lock` guards the numbers, each bucket's own lock its blocks. Locks are taken in one order only: buckets in the
    order of the list, then `lock`.
    """

    __slots__ = ("buckets",)

    def __init__(self, device: torch.device, max_bytes: int | None) -> None:
        super().__init__(device, max_bytes)
        self.buckets: list[Bucket] = []  # appended to under the pool's lock, copied here in one atomic step

    def set_budget(self, max_bytes: int | None) -> None:
        """Changes the budget and evicts what is above it; leases above it stay, and nothing new fits until they end."""
        with self.lock:
            self.max_bytes = max_bytes
            excess = 0 if max_bytes is None else self.held - max_bytes
        self.settle_abandoned()
        self.evict(excess)

    def make_room(self, nbytes: int) -> bool:
        """Books `nbytes`, evicting idle blocks until they fit; False if they cannot."""
        while not self.book(nbytes):
            with self.lock:
                excess = 0 if self.max_bytes is None else self.held + nbytes - self.max_bytes
            if not self.evict(excess) and self._nothing_idle():
                return self.book(nbytes)
        return True

    def _nothing_idle(self) -> bool:
        """Whether no block can be given up at one moment: a walk alone may miss a block that moves between buckets."""
        with contextlib.ExitStack() as stack:
            buckets = list(self.buckets)
            for bucket in buckets:
                stack.enter_context(bucket.lock)
            return not any(evictable(block) for bucket in buckets for block in bucket.free)

    def trim(self, target_bytes: int) -> int:
        """Evicts until at most `target_bytes` are idle; returns the bytes given up."""
        self.settle_abandoned()
        return self.evict(sum(block.bucket.charge for block in self._idle()) - target_bytes)

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
                if not evictable(block) or block.bucket.take(block) is None:
                    continue
                self.settle(block.bucket.charge, evicted=True)
            freed += block.bucket.charge
            drop(block)
        return freed

    def settle_abandoned(self) -> None:
        """Books out abandoned blocks; their memory lives as long as the tensors that somebody may still hold."""
        while self.abandoned:
            try:
                block = self.abandoned.popleft()
            except IndexError:
                return
            bucket = block.bucket
            with bucket.lock:
                assert block.request is not None
                bucket.leased -= 1
                bucket.requested -= block.request.nbytes
                block.request = None
                self.settle(bucket.charge, abandoned=True)
            if bucket.streams is not None:
                block.fences = [(stream, None) for stream in (block.home, *block.extra)]
            drop(block)

    def close(self) -> None:
        """Drops all idle blocks and keeps no other from here on; waits for copies that use idle pinned ones."""
        for bucket in list(self.buckets):
            with bucket.lock:
                bucket.closed = True
                bucket.keeps = NONE
                idle, bucket.free = bucket.free, []
                for block in idle:
                    self.settle(block.bucket.charge)
            for block in idle:
                drop(block, wait=True)

    def orphan(self) -> None:
        """In a forked child: everything here belongs to the parent."""
        self.lock = threading.RLock()
        for bucket in self.buckets:
            bucket.orphan()

    def _idle(self) -> list[Block]:
        blocks: list[Block] = []
        for bucket in list(self.buckets):
            with bucket.lock:
                blocks += bucket.free
        return blocks
