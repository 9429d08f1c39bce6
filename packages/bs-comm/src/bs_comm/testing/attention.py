"""Dense fp64 attention, whole and by arrivals: the oracle of a ring, and the smallest honest user of one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ..ring import Arrival, PackedRing


def arrival_mask(arrival: Arrival, ring: PackedRing, q_heads: int) -> Tensor:
    """bool ``[q_heads, Sq, T]``: which own queries see which tokens of an arrival."""
    plan = ring.plan
    (block_q, block_k), (len_q, len_k) = plan.block_size, plan.seq_len
    shift = len_k - len_q
    queries = np.concatenate(
        [np.arange(p, min(p + block_q, len_k)) for p in arrival.q_start.tolist()] or [np.zeros(0, int)]
    )
    keys = np.concatenate([np.arange(p, min(p + block_k, len_k)) for p in arrival.kv_start.tolist()])
    if arrival.layout is None:
        mask = np.ones((1, len(queries), len(keys)), np.bool_)
    else:
        mask = arrival.layout.token_mask()
    if plan.causal:
        mask = mask & (keys <= queries[:, None])
    assert (queries - shift == plan.placement.positions(ring.rank)).all()
    return torch.from_numpy(np.broadcast_to(mask, (q_heads, *mask.shape[1:])).copy())


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) in fp64 of softmax attention under a layout; queries without keys give 0.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, H, D]``.
        v: ``[B, Sk, H, E]``.
        layout: One head, or Hq.
        dout: ``[B, Sq, Hq, E]``.
    """
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    rep = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(rep, 2)) * q.shape[-1] ** -0.5
    mask = torch.from_numpy(layout.token_mask())
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top).detach())
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhqk,bkhe->bqhe", p, v.repeat_interleave(rep, 2))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return out.detach(), dq, dk, dv


def ring_attention(
    ring: PackedRing, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of this rank's shard: partial results merged by log-sum-exp, one arrival at a time.

    Args:
        ring: Made for these shapes.
        q: ``[B, Sq, Hq, D]``, this rank's queries.
        k: ``[B, S, H, D]``, this rank's keys.
        v: ``[B, S, H, E]``.
        dout: ``[B, Sq, Hq, E]``.
    """
    rep, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    acc = ring.grad_dtype
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=acc)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=acc)
    qa, da = q.to(acc), dout.to(acc)

    def scores_of(arrival: Arrival) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", qa, arrival.k.to(acc).repeat_interleave(rep, 2)) * scale
        return scores.masked_fill(~arrival_mask(arrival, ring, q.shape[2]), -torch.inf)

    def merge(arrival: Arrival) -> None:
        scores = scores_of(arrival)
        part = torch.logsumexp(scores, -1)
        p = torch.exp(scores - torch.where(part == -torch.inf, 0.0, part)[..., None])
        got = torch.einsum("bhqk,bkhe->bqhe", p, arrival.v.to(acc).repeat_interleave(rep, 2))
        total = torch.logaddexp(lse, part)
        for weight, x in ((lse, out), (part, got)):
            w = torch.where(weight == -torch.inf, 0.0, torch.exp(weight - torch.where(total == -torch.inf, 0.0, total)))
            x *= w.transpose(1, 2)[..., None]
        out.add_(got)
        lse.copy_(total)

    ring.forward(k, v, merge)
    dq = torch.zeros_like(qa)
    delta = (out * da).sum(-1).transpose(1, 2)

    def differentiate(arrival: Arrival) -> tuple[Tensor, Tensor]:
        p = torch.exp(scores_of(arrival) - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
        va = arrival.v.to(acc).repeat_interleave(rep, 2)
        ds = p * (torch.einsum("bqhe,bkhe->bhqk", da, va) - delta[..., None]) * scale
        dq.add_(torch.einsum("bhqk,bkhd->bqhd", ds, arrival.k.to(acc).repeat_interleave(rep, 2)))
        dk = torch.einsum("bhqk,bqhd->bkhd", ds, qa)
        dv = torch.einsum("bhqk,bqhe->bkhe", p, da)
        b, t = dk.shape[:2]
        kv_heads = arrival.k.shape[2]
        return dk.view(b, t, kv_heads, rep, -1).sum(3), dv.view(b, t, kv_heads, rep, -1).sum(3)

    dk, dv = ring.backward(k, v, differentiate)
    return out, dq, dk, dv
