"""Exchange plans and packed ring communication that move only the blocks a layout needs."""

from typing import TYPE_CHECKING, Any

from .cost import (
    CostModel,
    Phase,
    ScalingPoint,
    StepTime,
    hiding_bandwidth,
    hierarchical_transfer,
    scaling_curve,
    step_time,
)
from .health import RingMismatchError, RingPeerError
from .hierarchy import HierarchicalPlan
from .placement import Placement
from .plan import ExchangePlan, NodeRows, Traffic

if TYPE_CHECKING:
    from .hierarchical_ring import HierarchicalRing
    from .hooks import TopKState, compress_gradients, topk_hook
    from .recovery import Survivors, regroup
    from .ring import Arrival, PackedRing
    from .rollcall import RollCall

__version__ = "0.1.0"

__all__ = [
    "Arrival",
    "CostModel",
    "ExchangePlan",
    "HierarchicalPlan",
    "HierarchicalRing",
    "NodeRows",
    "PackedRing",
    "Phase",
    "Placement",
    "RingMismatchError",
    "RingPeerError",
    "RollCall",
    "ScalingPoint",
    "StepTime",
    "Survivors",
    "TopKState",
    "Traffic",
    "__version__",
    "compress_gradients",
    "hiding_bandwidth",
    "hierarchical_transfer",
    "regroup",
    "scaling_curve",
    "step_time",
    "topk_hook",
]

# Planning needs numpy alone, so torch is imported with the first name that needs it.
_WITH_TORCH = {
    "Arrival": "ring",
    "HierarchicalRing": "hierarchical_ring",
    "PackedRing": "ring",
    "RollCall": "rollcall",
    "Survivors": "recovery",
    "TopKState": "hooks",
    "compress_gradients": "hooks",
    "regroup": "recovery",
    "topk_hook": "hooks",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WITH_TORCH[name]}", __name__), name)
    globals()[name] = value
    return value
