"""Oracles and Hypothesis strategies for layouts and patterns (needs hypothesis)."""

from .dense import DenseGrid, geometry_mask, is_closed, ranked_blocks
from .strategies import block_sizes, layouts, patterns, per_head_patterns, segments, seq_lens

__all__ = [
    "DenseGrid",
    "block_sizes",
    "geometry_mask",
    "is_closed",
    "layouts",
    "patterns",
    "per_head_patterns",
    "ranked_blocks",
    "segments",
    "seq_lens",
]
