"""Exact block-sparse attention, forward and backward, on CPU and GPU."""

__version__ = "0.1.0"
