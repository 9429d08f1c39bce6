"""Exchange plans and packed ring communication that move only the blocks a layout needs."""

from typing import TYPE_CHECKING, Any

from .cost import CostModel, Phase, ScalingPoint, StepTime, hiding_bandwidth, scaling_curve, step_time
from .health import RingMismatchError, RingPeerError
from .placement import Placement
from .plan import ExchangePlan, Traffic

if TYPE_CHECKING:
    from .ring import Arrival, PackedRing

__version__ = "0.1.0"

__all__ = [
    "Arrival",
    "CostModel",
    "ExchangePlan",
    "PackedRing",
    "Phase",
    "Placement",
    "RingMismatchError",
    "RingPeerError",
    "ScalingPoint",
    "StepTime",
    "Traffic",
    "__version__",
    "hiding_bandwidth",
    "scaling_curve",
    "step_time",
]

# Planning needs numpy alone, so torch is imported with the first name that needs it.
_WITH_TORCH = {"Arrival": "ring", "PackedRing": "ring"}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WITH_TORCH[name]}", __name__), name)
    globals()[name] = value
    return value
