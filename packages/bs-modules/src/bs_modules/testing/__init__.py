"""What the tests share, and users may: a dense oracle for modules, small gates, and small runs of the trainer."""

from ._dense import assert_matches_dense, dense_attention
from ._gates import SMALL_GATE, attention_inputs, layout_of_element, small_gate
from ._lm import tiny_corpus, tiny_settings

__all__ = [
    "SMALL_GATE",
    "assert_matches_dense",
    "attention_inputs",
    "dense_attention",
    "layout_of_element",
    "small_gate",
    "tiny_corpus",
    "tiny_settings",
]
