"""Random numbers that belong to a position: the same for a pair of blocks whichever rank draws them.

B batch, H heads, QB query blocks, KB key blocks, R rows at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def draw_seed(device: torch.device) -> Tensor:
    """int64, a scalar: drawn from torch's generator, as the seed of dropout is."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def random_words(counter: Tensor, seed: Tensor | int) -> Tensor:
    """int64 of the shape of `counter`: the outputs of SplitMix64 at these places of the seed's sequence.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    # Products wrap; shifts are arithmetic, so the bits that they drag in are masked.
    word = (counter + 1).mul_(_STEP).add_(seed)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))).mul_(factor)
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def draw_rows(seed: Tensor | int, blocks: int, count: int, device: torch.device) -> Tensor:
    """int64 `[count]`, or as many as there are: different query blocks, drawn from another sequence of the seed."""
    return random_words(torch.arange(blocks, device=device), ~seed).argsort()[:count]


def uniform(shape: torch.Size, seed: Tensor | int, device: torch.device, rows: Tensor | None, of: int | None) -> Tensor:
    """fp32 in (0, 1), both exclusive, keyed by batch element, head, query block and key block.

    Args:
        shape: `[..., R, KB]`.
        seed: From `draw_seed`.
        device: Of the result.
        rows: int64 `[R]`, which query blocks these are; `None`: all.
        of: QB, where there are `rows`.
    """
    above, columns = shape[:-2].numel(), shape[-1]
    if rows is None or of is None:
        of, rows = shape[-2], torch.arange(shape[-2], device=device)
    row = torch.arange(above, device=device)[:, None] * of + rows
    counter = (row[..., None] * columns + torch.arange(columns, device=device)).view(shape)
    return (((random_words(counter, seed) >> 40) & 0xFFFFFF).float() + 0.5) * 2**-24
