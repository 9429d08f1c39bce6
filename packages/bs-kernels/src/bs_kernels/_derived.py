"""What a backend works out from a plan once and wants back on the next call (host-side schedules, packed lists).

Inside the registered op a plan is only its tensors, so results are kept per tensor *object*, weakly: when the plan
goes, so does what was derived from it, and a plan that was edited in place is derived anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from .plan import LayoutPlan

__all__ = ["derived"]

T = TypeVar("T")
_lock = threading.Lock()
_by_tensor = WeakTensorKeyDictionary()


def derived(plan: LayoutPlan, key: Hashable, build: Callable[[], T]) -> T:
    """Return ``build()``, remembered for this plan's tensors and ``key``.

    Args:
        plan: the plan; only the identity and the version of its tensors matter.
        key: what else the result depends on; start it with the backend's name.
        build: makes the result; may run twice if two threads miss at once.
    """
    anchor = plan.row_begin  # not the entry lists: those are shared with the pieces that `LayoutPlan.select` makes
    stamp = None if anchor.is_inference() else (anchor._version, plan.row_end._version, plan.indices._version)
    with _lock:
        held: dict[Hashable, tuple[Any, Any]] | None = _by_tensor.get(anchor)
        if held is not None and key in held and held[key][0] == stamp:
            return held[key][1]
    value = build()
    with _lock:
        held = _by_tensor.get(anchor)
        if held is None:
            held = _by_tensor[anchor] = {}
        held[key] = (stamp, value)
    return value
