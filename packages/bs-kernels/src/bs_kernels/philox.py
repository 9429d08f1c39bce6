"""Philox4x32-10 in integer tensor operations: the same dropout mask on every backend, device and world size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_threshold", "keep_mask", "philox_word"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox_word(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor | int) -> Tensor:
    """First output word of Philox4x32 with 10 rounds.

    Args:
        counter: four integer tensors that broadcast together; their low 32 bits are the counter words.
        seed: 64-bit key (its low and high words), an int or an int64 scalar tensor.

    Returns:
        int64 tensor of the broadcast shape with values in [0, 2³²).

    Source:
        Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    x0, x1, x2, x3 = (word.to(torch.int64) & _WORD for word in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The 64-bit product wraps, which keeps its bits; the shift is arithmetic, so the mask comes after it.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = ((p1 >> 32) & _WORD) ^ x1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ x3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return x0


def dropout_threshold(dropout_p: float) -> int:
    """``⌊p · 2³²⌋``: an entry is kept iff its word is at least this."""
    return int(dropout_p * 2**32)


def keep_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, seed: Tensor | int, dropout_p: float) -> Tensor:
    """Which probabilities dropout keeps.

    Args:
        batch, head, query, key: integer tensors that broadcast together; query and key are absolute positions.
        seed: 64-bit seed.
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        bool tensor of the broadcast shape, True = kept.
    """
    return philox_word((batch, head, query, key), seed) >= dropout_threshold(dropout_p)
