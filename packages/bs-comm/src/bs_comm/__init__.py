"""Exchange plans and packed ring communication that move only the blocks a layout needs."""

from .cost import CostModel, Phase, ScalingPoint, StepTime, hiding_bandwidth, scaling_curve, step_time
from .placement import Placement
from .plan import ExchangePlan, Traffic

__version__ = "0.1.0"

__all__ = [
    "CostModel",
    "ExchangePlan",
    "Phase",
    "Placement",
    "ScalingPoint",
    "StepTime",
    "Traffic",
    "__version__",
    "hiding_bandwidth",
    "scaling_curve",
    "step_time",
]
