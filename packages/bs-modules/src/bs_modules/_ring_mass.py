"""The true attention mass of blocks over a ring: what distillation teaches a gate by.

Shape legend: B batch, H heads, D head dim, R drawn query blocks, T their tokens, U own key blocks, KB all key blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._ring_session import RingSession


@torch.no_grad()
def mass_over_ring(
    gate: Any,
    session: RingSession,
    operands: tuple[Tensor, Tensor],
    key_padding: Tensor | None,
    blocks: tuple[Any, Any],
    rows: Tensor,
    is_causal: bool,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `block_mass`, of keys that are spread over ranks: every query's largest score and sum are agreed on first.

    Args:
        gate: The gate.
        session: Of the ring.
        operands: (own queries, own keys).
        key_padding: bool, own keys; or None.
        blocks: Where (query, key) blocks live.
        rows: int64[R], the drawn query blocks, the same on every rank.
        is_causal: As in ``forward``.
        labels: int64[B, N] of all queries and own keys; a query sees the keys of its own label only. None: all.

    Returns:
        ``[B, H, R, KB]``, the same on every rank.
    """
    (q, k), (q_blocks, k_blocks) = operands, blocks
    roll_call, size = session.roll_call, q_blocks.size
    scale = q.shape[-1] ** -0.5 if gate.scale is None else gate.scale
    token = (rows[:, None] * size + torch.arange(size, device=q.device)).flatten()
    inside = token < q_blocks.tokens
    token = token.clamp(max=q_blocks.tokens - 1)
    drawn = rows.cpu().numpy()
    by_rank = [np.flatnonzero(np.isin(drawn, theirs)) for theirs in q_blocks.by_rank]
    mine = torch.from_numpy(np.searchsorted(q_blocks.own, drawn[by_rank[session.rank]])).to(q.device)
    own = (mine[:, None] * size + torch.arange(size, device=q.device)).clamp(max=max(q.shape[1] - 1, 0))
    sent = q[:, own.flatten()].unflatten(1, own.shape).transpose(0, 1)
    came = torch.cat(roll_call.tensors(sent, [len(which) for which in by_rank]))
    came = came[torch.from_numpy(np.argsort(np.concatenate(by_rank))).to(q.device)]
    queries = came.transpose(0, 1).flatten(1, 2).transpose(1, 2).float()

    keys = k.transpose(1, 2).float().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    visible = torch.ones(1, 1, len(token), k.shape[1], dtype=torch.bool, device=k.device)
    if is_causal:
        visible = k_blocks.positions(k.device) <= (token + k_blocks.tokens - q_blocks.tokens)[:, None]
    if key_padding is not None:
        visible = visible & key_padding[:, None, None]
    if labels is not None:
        visible = visible & (labels[0][:, None, token, None] == labels[1][:, None, None])
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible, lowest)
    top = scores.amax(-1) if k.shape[1] else scores.new_full(scores.shape[:3], lowest)
    top = _everyone(roll_call, top).amax(0)
    weights = (scores - top[..., None]).exp()
    total = _everyone(roll_call, weights.sum(-1)).sum(0)
    width = k_blocks.size
    mass = F.pad(weights * visible / total[..., None], (0, len(k_blocks.own) * width - k.shape[1]))
    mass = mass.unflatten(-1, (len(k_blocks.own), width)).sum(-1)
    mass = (mass * inside[:, None]).unflatten(2, (-1, size)).sum(3)
    mass = mass / inside.view(-1, size).sum(-1)[:, None].clamp(min=1)
    told = torch.cat(roll_call.tensors(mass.permute(3, 0, 1, 2), k_blocks.counts))
    return k_blocks.in_order(told).permute(1, 2, 3, 0)


def _everyone(roll_call: Any, x: Tensor) -> Tensor:
    """``[world, ...]``."""
    return torch.cat(roll_call.tensors(x[None], [1] * roll_call.world_size))
