"""Exchange plans and packed ring communication that move only the blocks a layout needs."""

__version__ = "0.1.0"
