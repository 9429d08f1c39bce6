"""What teaches a scorer beside the task: the true attention mass of blocks.

B batch, S queries or keys, H query heads, G key heads, D head dim, KB key blocks, R query blocks drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(scores: Tensor, mass: Tensor, readable: Tensor) -> Tensor:
    """How far the scorer's softmax over the blocks it reads is from the mass that dense attention gives them.

    Σⱼ mⱼ (log(mⱼ / Σ m) − log pⱼ), the mean over batch, heads and rows: a Kullback-Leibler divergence, weighted by the
    mass that lies outside the blocks that are kept anyway.

    Args:
        scores: `[B, H or 1, R, KB]`, without noise.
        mass: `[B, H, R, KB]`, from `block_mass`: a target, without gradient.
        readable: bool `[1 or H, R, KB]`; the blocks that the gate reads.
    """
    if scores.shape[1] == 1:
        mass = mass.mean(1, keepdim=True)
    mass = torch.where(readable, mass.detach(), 0).to(scores.dtype)
    share = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    # A row without readable blocks has mass 0 and would have log p = nan.
    chosen = torch.where(readable, scores, float("-inf"))
    chosen = torch.where(readable.any(-1, keepdim=True), chosen, 0)
    log_p = torch.where(readable, chosen.log_softmax(-1), 0)
    return (torch.xlogy(mass, share).sum(-1) - (mass * log_p).sum(-1)).mean()


def block_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    blocks: tuple[int, int],
    causal: bool,
    scale: float,
    key_padding_mask: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The true attention mass of every key block, for some query blocks: what a scorer should rank by.

    Args:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, G, D]`.
        rows: int64 `[R]`, query blocks.
        blocks: `(query, key)` tokens per block.
        causal: Whether keys after the query are masked.
        scale: Multiplies q · k.
        key_padding_mask: bool `[B, Sk]`, True = a real token.
        labels: int64 `[B, Sq]` and `[B, Sk]`; a query sees the keys of its own label only.

    Returns:
        `[B, H, R, KB]`, each row's softmax over all visible keys summed per block, mean over the block's queries; 0 for
        queries that see none.
    """
    size, width = blocks
    token = (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()
    inside = token < q.shape[1]
    token = token.clamp(max=q.shape[1] - 1)
    queries = q[:, token].transpose(1, 2).float()
    keys = k.transpose(1, 2).float().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    visible = torch.ones(1, 1, len(token), k.shape[1], dtype=torch.bool, device=k.device)
    if causal:
        visible = torch.arange(k.shape[1], device=k.device) <= (token + k.shape[1] - q.shape[1])[:, None]
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None]
    if labels is not None:
        visible = visible & (labels[0][:, None, token, None] == labels[1][:, None, None])
    mass = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    mass = F.pad(mass, (0, -k.shape[1] % width)).unflatten(-1, (-1, width)).sum(-1)
    mass = (mass * inside[:, None]).unflatten(2, (-1, size))
    return mass.sum(3) / inside.view(-1, size).sum(-1)[:, None].clamp(min=1)
