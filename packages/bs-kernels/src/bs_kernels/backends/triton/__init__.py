"""The `triton` backend. Importing it imports no Triton: that happens with the first call."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
