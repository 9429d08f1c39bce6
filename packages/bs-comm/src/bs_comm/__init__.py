"""Exchange plans and packed ring communication that move only the blocks a layout needs."""

from .placement import Placement
from .plan import ExchangePlan, Traffic

__version__ = "0.1.0"

__all__ = ["ExchangePlan", "Placement", "Traffic", "__version__"]
