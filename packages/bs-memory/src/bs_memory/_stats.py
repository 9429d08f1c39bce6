"""What a pool did and holds."""

from collections.abc import Iterable
from dataclasses import dataclass

from bs_memory._account import Account


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool did and holds. Bytes are sizes of buckets (plus alignment slack), unless said otherwise.

    Attributes:
        hits: leases served from an idle buffer.
        misses: leases that had to allocate.
        leases: leases held now.
        buffers: buffers held now, leased and idle.
        bytes_held: bytes of all buffers the pool holds, leased and idle; never above the budget.
        bytes_leased: bytes of the leased ones.
        bytes_idle: bytes of the idle ones.
        bytes_requested: bytes that the current leases asked for, before rounding up.
        high_water_bytes: the most bytes ever held at once (per device; the sum of the peaks over several devices).
        fragmentation: share of the held bytes that serves no request, `1 − bytes_requested / bytes_held`; 0 when
            nothing is held.
        evictions: idle buffers given up for the budget, for pressure or by `trim`.
        abandoned: leases that were garbage-collected without a release.
    """

    hits: int
    misses: int
    leases: int
    buffers: int
    bytes_held: int
    bytes_leased: int
    bytes_idle: int
    bytes_requested: int
    high_water_bytes: int
    fragmentation: float
    evictions: int
    abandoned: int


def collect(accounts: Iterable[Account]) -> PoolStats:
    """Adds up accounts bucket by bucket, each under its own lock."""
    hits = misses = leases = idle = leased_bytes = idle_bytes = requested = high_water = evictions = abandoned = 0
    for account in accounts:
        high_water += account.high_water
        evictions += account.evictions
        abandoned += account.abandoned_count
        for bucket in list(account.buckets):
            with bucket.lock:
                hits += bucket.hits
                misses += bucket.misses
                leases += bucket.leased
                leased_bytes += bucket.leased * bucket.charge
                requested += bucket.requested
                idle += len(bucket.free)
                idle_bytes += len(bucket.free) * bucket.charge
    held = leased_bytes + idle_bytes
    return PoolStats(
        hits=hits,
        misses=misses,
        leases=leases,
        buffers=leases + idle,
        bytes_held=held,
        bytes_leased=leased_bytes,
        bytes_idle=idle_bytes,
        bytes_requested=requested,
        high_water_bytes=high_water,
        fragmentation=1 - requested / held if held else 0.0,
        evictions=evictions,
        abandoned=abandoned,
    )
