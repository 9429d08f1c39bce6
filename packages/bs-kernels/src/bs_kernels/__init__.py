"""Exact block-sparse attention, forward and backward, on CPU and GPU."""

from .api import block_sparse_attention, explain_backends
from .batched import BatchedLayout
from .dilated import DilatedPlan, dilated_attention
from .dispatch import BackendReport, BackendTable
from .merge import merge_attention
from .partial import PartialGradients, attention_delta, partial_backward, partial_forward, sinks_gradient
from .picking import best_blocks
from .plan import LayoutPlan
from .pooling import pool_blocks
from .scoring import block_scores, head_perceptron
from .token_mask import TokenMask

__version__ = "0.1.0"

__all__ = [
    "BackendReport",
    "BackendTable",
    "BatchedLayout",
    "DilatedPlan",
    "LayoutPlan",
    "PartialGradients",
    "TokenMask",
    "__version__",
    "attention_delta",
    "best_blocks",
    "block_scores",
    "block_sparse_attention",
    "dilated_attention",
    "explain_backends",
    "head_perceptron",
    "merge_attention",
    "partial_backward",
    "partial_forward",
    "pool_blocks",
    "sinks_gradient",
]
