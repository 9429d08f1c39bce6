"""Block-sparse attention modules, their factory, and the bsattn command."""

__version__ = "0.1.0"
