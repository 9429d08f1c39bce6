"""What pooling blocks of tokens means, block by block in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_pool"]


def dense_pool(x: Tensor, block_size: int, first: int | None = None) -> Tensor:
    """The definition of `bs_kernels.pool_blocks`.

    Args:
        x: [B, S, H, D].
        block_size: tokens per block.
        first: tokens of the first block; None: as of the others.

    Returns:
        [B, H, N, 3, D] in float64: mean, maximum and minimum.
    """
    first, x = first or block_size, x.double().transpose(1, 2)
    blocks = [b for b in (x[:, :, :first], *x[:, :, first:].split(block_size, dim=2)) if b.shape[2]]
    return torch.stack([torch.stack([b.mean(2), b.amax(2), b.amin(2)], dim=2) for b in blocks], dim=2)
