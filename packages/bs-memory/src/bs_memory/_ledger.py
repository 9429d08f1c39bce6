"""A ledger: the bytes that a pool holds on one device."""

import threading
from collections import deque
from typing import Any

import torch


class Ledger:
    """The bytes of one device. `lock` guards the numbers."""

    __slots__ = ("abandoned", "abandoned_count", "device", "evictions", "held", "high_water", "lock", "max_bytes")

    def __init__(self, device: torch.device, max_bytes: int | None) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.lock = threading.RLock()
        self.abandoned: deque[Any] = deque()  # blocks, by their __del__, wherever the collector strikes
        self.abandoned_count = 0
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

    def settle(self, nbytes: int, *, evicted: bool = False, abandoned: bool = False) -> None:
        """Stops counting a block of `nbytes` that was just taken out of its bucket, or will not return there.

        Called with the bucket's lock held, so that nobody sees the block neither idle nor leased and yet counted.
        """
        with self.lock:
            self.held -= nbytes
            self.evictions += evicted
            self.abandoned_count += abandoned
