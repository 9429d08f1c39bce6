"""One process-wide cache of built plans, keyed by what determines them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")
_LIMIT = 64
_lock = threading.Lock()
_plans: OrderedDict[Hashable, object] = OrderedDict()


def cached_plan(key: Hashable, build: Callable[[], T]) -> T:
    """Return the plan of ``key``, building it on a miss."""
    with _lock:
        if key in _plans:
            _plans.move_to_end(key)
            return _plans[key]  # type: ignore[return-value]
    plan = build()
    with _lock:
        _plans[key] = plan
        while len(_plans) > _LIMIT:
            _plans.popitem(last=False)
    return plan
