"""Oracle, tolerance rule, input factories and Hypothesis strategies, shared by the tests and by users.

`bs_kernels.testing.strategies` needs hypothesis and is imported on its own.
"""

from .case import Case, evaluate
from .factories import make_batched_layout, make_case, make_layout, make_pages
from .longnet import DilatedCase, branch_masks, check_dilated_against_oracle, make_dilated_case
from .oracle import block_entries, dense_attention, dense_results, magnitudes, oracle_results, token_mask_of
from .picking import dense_best_blocks
from .pooling import dense_pool
from .scoring import dense_block_scores, dense_perceptron
from .tolerance import assert_close_to_oracle, check_against_oracle, rounding_band

__all__ = [
    "Case",
    "DilatedCase",
    "assert_close_to_oracle",
    "block_entries",
    "branch_masks",
    "check_against_oracle",
    "check_dilated_against_oracle",
    "dense_attention",
    "dense_best_blocks",
    "dense_block_scores",
    "dense_perceptron",
    "dense_pool",
    "dense_results",
    "evaluate",
    "magnitudes",
    "make_batched_layout",
    "make_case",
    "make_dilated_case",
    "make_layout",
    "make_pages",
    "oracle_results",
    "rounding_band",
    "token_mask_of",
]
