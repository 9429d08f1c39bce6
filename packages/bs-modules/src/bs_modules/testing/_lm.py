"""Small texts and settings, with which a whole training run takes a second."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..lm.data import Corpus
from ..lm.settings import Settings


def tiny_corpus(n_bytes: int = 20_000, seed: int = 0) -> Corpus:
    """Text with structure to learn: random words of a small vocabulary, `n_bytes` to train and a fifth to validate."""
    generator = np.random.default_rng(seed)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) + b" " for _ in range(40)]
    text = b"".join(words[i] for i in generator.integers(0, len(words), n_bytes))
    array = np.frombuffer(text[: n_bytes + n_bytes // 5], np.uint8)
    return Corpus(array[:n_bytes], array[n_bytes:], "random words")


def tiny_settings(**changes: Any) -> Settings:
    """Settings of a run of a few steps on the CPU in fp32."""
    values: dict[str, Any] = {
        "context": 96,
        "steps": 6,
        "width": 32,
        "layers": 2,
        "head_dim": 16,
        "block_size": 16,
        "density": 0.5,
        "warmup": 2,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    if changes.get("attention") == "dense":
        del values["block_size"], values["density"]
    return Settings(**{**values, **changes})
