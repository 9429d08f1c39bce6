"""Attention weights, and keys that every query sees, around an attention that knows of neither.

Shapes: N batch, L queries, S keys, H heads, D head_dim, X appended keys.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._mha_masks import Masks

Appended = tuple[Tensor, Tensor] | None


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast out, on devices that have it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def append_keys(
    out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """Continues a finished softmax over more keys, which no mask hides.

    Args:
        out: `[N, L, H, Dv]`, the attention over the keys before.
        lse: `[N, H, L]`, the log-sum-exp of its scores; −inf for a query without keys.
        q: `[N, L, H, D]`.
        keys, values: `[X, H, D]` and `[X, H, Dv]`, the same for the whole batch.
        scale: Multiplies the scores.
        dropout: Probability with which a probability of the new keys is dropped.

    Returns:
        `[N, L, H, Dv]`, one softmax over all keys.
    """
    with _as_given(q):
        scores = torch.einsum("nlhd,xhd->nhlx", q.to(lse.dtype), keys.to(lse.dtype)) * scale
        total = torch.logaddexp(lse, scores.logsumexp(-1))
        before = (lse - total).exp().transpose(1, 2).unsqueeze(-1)
        weights = F.dropout((scores - total.unsqueeze(-1)).exp(), dropout)
        added = torch.einsum("nhlx,xhd->nlhd", weights, values.to(lse.dtype))
        return (out * before + added).to(out.dtype)


def dense_weights(q: Tensor, k: Tensor, visible: Tensor, masks: Masks, appended: Appended, *, scale: float) -> Tensor:
    """The attention probabilities, computed densely.

    Args:
        q: `[N, L, H, D]`.
        k: `[N, S, H, D]`.
        visible: `bool[1 or H, L, S]`, the token mask of the layout.
        masks: Of the call.
        appended: Keys and values that every query sees, `[X, H, D]` each, or `None`.
        scale: Multiplies the scores.

    Returns:
        `[N, H, L, S + X]`; zeros where a block is inactive and for a query without keys. Computed in at least fp32,
        returned in q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with _as_given(q):
        scores = torch.einsum("nlhd,nshd->nhls", q.to(wide), k.to(wide)) * scale
        if masks.key_padding is not None:
            visible = visible & masks.key_padding[:, None, None]
        if masks.bias is not None and masks.bias.dtype == torch.bool:
            visible = visible & masks.bias
        elif masks.bias is not None:
            scores = scores + masks.bias
        scores = scores.masked_fill(~visible, float("-inf"))
        if appended is not None:
            more = torch.einsum("nlhd,xhd->nhlx", q.to(wide), appended[0].to(wide)) * scale
            scores = torch.cat((scores, more), dim=-1)
        keyless = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.masked_fill(keyless, 0.0).softmax(-1).masked_fill(keyless, 0.0)
    return weights.to(q.dtype)


def unit_values(v: Tensor, appended: Appended) -> tuple[Tensor, Appended]:
    """Extends each value by its own unit vector, so that any attention returns its weights behind its output.

    Args:
        v: `[N, S, H, Dv]`.
        appended: Keys and values that follow, `[X, H, Dv]`, or `None`.

    Returns:
        `v` as `[N, S, H, Dv + S + X]`, and the appended keys with values widened likewise.
    """
    length, more = v.shape[1], 0 if appended is None else len(appended[0])
    units = torch.eye(length + more, dtype=v.dtype, device=v.device).unsqueeze(1)
    wide = torch.cat((v, units[:length].expand(*v.shape[:3], -1)), dim=-1)
    if appended is None:
        return wide, None
    keys, values = appended
    return wide, (keys, torch.cat((values, units[length:].expand(*values.shape[:2], -1)), dim=-1))
