"""The definitions of `bs_kernels.head_perceptron` and `bs_kernels.block_scores`, pair by pair in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dense_block_scores", "dense_perceptron"]


def dense_perceptron(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """What `head_perceptron` gives, head by head.

    Args:
        x, weights, biases: those of `head_perceptron`.

    Returns:
        [B, H, N, R] in float64.
    """
    made = []
    for head in range(x.shape[1]):
        rows = x[:, head].double()
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if i:
                rows = rows * (1 + torch.erf(rows / 2**0.5)) / 2
            rows = rows @ weight[head].double() + bias[head].double()
        made.append(rows)
    return torch.stack(made, dim=1)


def dense_block_scores(
    queries: Tensor,
    keys: Tensor,
    embeddings: tuple[Tensor, Tensor],
    gain: Tensor,
    slope: Tensor,
    distance: Tensor,
    scale: float,
    terms: str,
) -> Tensor:
    """What `block_scores` gives, one pair of blocks after another.

    Args:
        queries, keys, embeddings, gain, slope, distance, scale, terms: those of `block_scores`.

    Returns:
        [B, H, QB, KB] in float64.
    """
    batch, heads, q_blocks = queries.shape[:3]
    queries, keys, gain, slope, distance, f, g = (
        x.double() for x in (queries, keys, gain, slope, distance, *embeddings)
    )
    scores = torch.zeros(batch, heads, q_blocks, keys.shape[2], dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        mean, group = queries[b, h, i, 0], h * keys.shape[1] // heads
        pooled = keys[b, group, j]
        score = f[b, h, i] @ g[b, group, j] + slope[h] * distance[i, j]
        if terms != "max":
            score = score + gain[h, 0] * scale * (mean @ pooled[0])
        if terms != "mean":
            largest = torch.where(mean > 0, mean * pooled[1], mean * pooled[2]).sum()
            score = score + gain[h, 1] * scale * largest
        scores[b, h, i, j] = score
    return scores
