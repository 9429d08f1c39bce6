"""Slow links on one machine: messages arrive when a link of a given speed would have brought them."""

from __future__ import annotations

import time
from typing import Any

from ..ring import PackedRing
from ..transport import CONTROL, Hop


def slow_links(ring: PackedRing, bandwidth: float, latency: float) -> PackedRing:
    """Delay what a ring receives, one message at a time, counted from when both were ready to start.

    The waiting this causes is part of ``ring.wait_seconds``. Handshakes are not delayed.

    Args:
        ring: Changed in place.
        bandwidth: Bytes per second that the rank receives.
        latency: Seconds per message.

    Returns:
        The ring.
    """
    transport = ring._transport
    post, wait = transport.post, transport.wait
    due: dict[int, float] = {}
    free = 0.0

    def slow_post(kind: int, *args: Any) -> tuple[Hop | None, Hop | None]:
        nonlocal free
        got, put = post(kind, *args)
        if got is not None and kind != CONTROL:
            free = max(free, time.monotonic()) + latency + got.nbytes / bandwidth
            due[id(got)] = free
        return got, put

    def slow_wait(hop: Hop | None, phase: str) -> None:
        wait(hop, phase)
        rest = due.pop(id(hop), 0.0) - time.monotonic()
        if rest > 0:
            time.sleep(rest)
            transport.wait_seconds += rest

    transport.post, transport.wait = slow_post, slow_wait  # type: ignore[method-assign]
    return ring
