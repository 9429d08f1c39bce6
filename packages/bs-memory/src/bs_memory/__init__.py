"""Buffer pool, caches, memory pressure and out-of-memory recovery for torch."""

__version__ = "0.1.0"
