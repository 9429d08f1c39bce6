"""What a buffer pool promises, in a few lines that are plainly right."""

from dataclasses import dataclass, field

from bs_memory._buckets import bucket_bytes
from bs_memory._stats import PoolStats


@dataclass
class PoolModel:
    """Tracks who holds which addresses, and what a pool's statistics must say.

    Attributes:
        max_bytes: the pool's budget.
        leased: handle → (address, bytes asked for).
        hits_and_misses: leases that succeeded.
    """

    max_bytes: int | None = None
    leased: dict[object, tuple[int, int]] = field(default_factory=dict)
    hits_and_misses: int = 0

    def lease(self, handle: object, address: int, nbytes: int) -> None:
        """A lease was granted.

        Raises:
            AssertionError: if its memory overlaps that of another lease.
        """
        for other, (start, length) in self.leased.items():
            apart = address + nbytes <= start or start + length <= address
            assert apart or nbytes == 0 or length == 0, f"{handle} aliases {other}"
        self.leased[handle] = (address, nbytes)
        self.hits_and_misses += 1

    def release(self, handle: object) -> None:
        """A lease was given back."""
        del self.leased[handle]

    @property
    def leased_bytes(self) -> int:
        """Bytes of the buckets of the leases that are out."""
        return sum(bucket_bytes(nbytes) for _, nbytes in self.leased.values())

    def must_fit(self, nbytes: int) -> bool:
        """Whether a lease of `nbytes` must be granted: it fits the budget next to the leased buffers."""
        return self.max_bytes is None or self.leased_bytes + bucket_bytes(nbytes) <= self.max_bytes

    def check(self, stats: PoolStats) -> None:
        """Compares a pool's statistics with the model.

        Raises:
            AssertionError: if they differ, or contradict one another.
        """
        assert stats.leases == len(self.leased)
        assert stats.bytes_leased == self.leased_bytes
        assert stats.bytes_requested == sum(nbytes for _, nbytes in self.leased.values())
        assert stats.hits + stats.misses == self.hits_and_misses
        assert stats.bytes_held == stats.bytes_leased + stats.bytes_idle
        assert stats.bytes_held <= stats.high_water_bytes
        assert stats.leases <= stats.buffers
        assert 0 <= stats.fragmentation <= 1
        if self.max_bytes is not None:
            assert stats.high_water_bytes <= self.max_bytes
