"""Orders in which to visit blocks and tokens, and what an order does to a cache."""

from .hilbert import hilbert_index, hilbert_tokens
from .locality import Locality, locality, reuse_distances
from .orders import group_rows, hilbert_order, longest_first_order, morton_order, row_order

__all__ = [
    "Locality",
    "group_rows",
    "hilbert_index",
    "hilbert_order",
    "hilbert_tokens",
    "locality",
    "longest_first_order",
    "morton_order",
    "reuse_distances",
    "row_order",
]
