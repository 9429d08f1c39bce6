"""What the tests share, and users may: a dense oracle for modules, and small runs of the trainer."""

from ._dense import assert_matches_dense, dense_attention
from ._lm import tiny_corpus, tiny_settings

__all__ = ["assert_matches_dense", "dense_attention", "tiny_corpus", "tiny_settings"]
