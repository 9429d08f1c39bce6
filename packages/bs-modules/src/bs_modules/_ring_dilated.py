"""Exact LongNet over a ring: results for the keys of each arrival, merged branch-aware, differentiated part by part.

A query sees no key outside its own segments, so the exchange follows from the segment lengths alone, at blocks of
tokens; the dilation inside them differs from head to head and saves no transfer.

Shape legend: B batch, S own tokens, T tokens of an arrival, N tokens of the whole sequence, H heads, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_comm import Arrival
from bs_kernels import attention_delta, dilated_attention
from bs_patterns import BlockLayout

from ._ring_attention import NEG_INF, RingCall, add_part, reported
from .dilated import DilatedAttention

_BLOCK = 64


def segment_blocks(tokens: int, segment_lengths: Sequence[int], is_causal: bool, block: int = _BLOCK) -> BlockLayout:
    """Which key blocks hold a token of a segment that a query block reaches into.

    Rows are runs, and those of neighbouring rows overlap or touch, so that what a contiguous shard reads is one run.

    Args:
        tokens: N.
        segment_lengths: Of the branches.
        is_causal: Leave out blocks after the query block.
        block: Tokens per block.
    """
    start = np.arange(0, tokens, block)
    stop = np.minimum(start + block, tokens)
    low, high = start.copy(), stop.copy()
    for length in segment_lengths:
        low = np.minimum(low, start // length * length)
        high = np.maximum(high, -(-stop // length) * length)
    high = stop if is_causal else np.minimum(high, tokens)
    first, count = low // block, -(-high // block) - low // block
    indptr = np.concatenate(([0], np.cumsum(count)))
    indices = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - first, count)
    return BlockLayout((block, block), (tokens, tokens), indptr[None], indices.astype(np.int32), is_causal)


def common_block(lengths: Sequence[int]) -> int:
    """The largest block of at most 64 tokens, a power of two, at whose multiples all cuts between shards fall."""
    cuts = np.cumsum(lengths)[:-1]
    return math.gcd(_BLOCK, *(int(cut) for cut in cuts if cut != sum(lengths)))


@dataclass(frozen=True)
class DilatedCall:
    """One call over a ring.

    Attributes:
        ring: What it shares with other attentions.
        attention: The LongNet module.
        is_causal: As in its forward.
        q_start: Position of the first own query.
    """

    ring: RingCall
    attention: DilatedAttention
    is_causal: bool
    q_start: int

    @property
    def groups(self) -> list[tuple[list[int], list[int], str]]:
        """Branches under one softmax: (lengths, rates, combine). LongNet's weights have no gradient, so its branches
        are merged one by one."""
        lengths, rates = self.attention.segment_lengths, self.attention.dilation_rates
        assert lengths is not None
        assert rates is not None
        if self.attention.combine != "longnet":
            return [(lengths, rates, self.attention.combine)]
        return [([length], [rate], "softmax") for length, rate in zip(lengths, rates, strict=True)]

    def part(self, group: tuple[list[int], list[int], str], q: Tensor, arrival: Arrival, k: Tensor, v: Tensor,
             bias: Tensor | None) -> Any:  # fmt: skip
        """(out, lse) of the own queries over the keys of an arrival, in the dtype of ``q``, which accumulates."""
        lengths, rates, combine = group
        assert (np.diff(arrival.blocks) == 1).all(), "what a contiguous shard reads is one run"
        arguments = self.ring.arguments(arrival) | {
            "causal": self.is_causal,
            "combine": combine,
            "attn_bias": bias,
            "q_start": self.q_start,
            "kv_start": int(arrival.kv_start[0]),
            "return_lse": True,
        }
        return dilated_attention(q, k, v, lengths, rates, **arguments)

    def columns(self, bias: Tensor | None, arrival: Arrival) -> Tensor | None:
        """The part of a bias over all keys that an arrival meets."""
        if bias is None or bias.shape[-1] == 1:
            return bias
        return bias[..., self.ring.open_ring.columns(arrival)]


class DilatedRing(torch.autograd.Function):
    """(out ``[B, S, H, E]`` in the dtype of q, lse ``[B, H, S]``), as `RingAttention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: DilatedCall) -> Any:
        """Merge the parts as they arrive, each group of branches by itself."""
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = call.groups
        merged: list[list[Tensor]] = [[] for _ in groups]
        q_wide = q.to(wide)

        def merge(arrival: Arrival) -> None:
            k_wide, v_wide = arrival.k.to(wide), arrival.v.to(wide)
            for group, so_far in zip(groups, merged, strict=True):
                add_part(so_far, *call.part(group, q_wide, arrival, k_wide, v_wide, call.columns(bias, arrival)))

        keep = call.ring.keep_kv and any(ctx.needs_input_grad)
        with reported(call.ring.session):
            ctx.kept = call.ring.ring().forward(k, v, merge, keep=keep)
        for so_far in merged:
            if not so_far:
                so_far[:] = [
                    q_wide.new_zeros((*q.shape[:3], v.shape[3])),
                    q_wide.new_full((q.shape[0], q.shape[2], q.shape[1]), NEG_INF),
                ]
        weights, lse = _weights([so_far[1] for so_far in merged])
        out = sum(w.transpose(1, 2)[..., None] * so_far[0] for w, so_far in zip(weights, merged, strict=True))
        assert isinstance(out, Tensor)
        ctx.save_for_backward(q, k, v, bias, *(x for so_far in merged for x in so_far))
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Repeat each part and differentiate it against the merged LSE of its group.

        With ``w = exp(l_part − l)``: ``d out_part = w dout`` and ``d l_part = w (dout · out_part − delta)``.
        """
        q, k, v, bias, *saved = ctx.saved_tensors
        call: DilatedCall = ctx.call
        outs, lses = saved[::2], saved[1::2]
        wide = lses[0].dtype
        dout = torch.zeros_like(outs[0]) if dout is None else dout.to(wide)
        weights, _ = _weights(lses)
        douts = [w.transpose(1, 2)[..., None] * dout for w in weights]
        dlses = [None if dlse is None else w * dlse for w in weights]
        deltas = [attention_delta(*each) for each in zip(douts, outs, lses, dlses, strict=True)]
        wants_bias = bias is not None and bias.is_floating_point() and ctx.needs_input_grad[3]
        dbias = torch.zeros(bias.shape, dtype=wide, device=q.device) if wants_bias and bias is not None else None
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)

        def differentiate(arrival: Arrival) -> tuple[Tensor, Tensor]:
            leaves = [x.to(wide).detach().requires_grad_() for x in (q, arrival.k, arrival.v)]
            part_bias = call.columns(bias, arrival)
            if wants_bias and part_bias is not None:
                part_bias = part_bias.detach().requires_grad_()
                leaves.append(part_bias)
            parts, cotangents = [], []
            with torch.enable_grad():
                for group, do, lse, delta in zip(call.groups, douts, lses, deltas, strict=True):
                    out, part_lse = call.part(group, leaves[0], arrival, leaves[1], leaves[2], part_bias)
                    nothing = part_lse == NEG_INF
                    w = (part_lse - lse.masked_fill(lse == NEG_INF, 0)).exp().masked_fill(nothing, 0).detach()
                    inner = (do * out.detach()).sum(-1).transpose(1, 2)
                    parts += [out, part_lse]
                    cotangents += [w.transpose(1, 2)[..., None] * do, (w * (inner - delta)).masked_fill(nothing, 0)]
            # A branch may leave the own queries nothing to see here: what it gives is constant.
            pairs = [(x, c) for x, c in zip(parts, cotangents, strict=True) if x.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                found = torch.autograd.grad([x for x, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
            got = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
            dq.add_(got[0])
            if dbias is not None:
                if dbias.shape[-1] == 1:
                    dbias.add_(got[3])
                else:
                    dbias.index_add_(-1, call.ring.open_ring.columns(arrival), got[3].to(wide))
            return got[1], got[2]

        with reported(call.ring.session):
            dk, dv = call.ring.ring().backward(k, v, differentiate, kept=ctx.kept)
        grad_bias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), grad_bias, None


def _weights(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(share of each group in the softmax over all, lse of all); 0 where there is nothing."""
    if len(lses) == 1:
        return [torch.ones_like(lses[0])], lses[0]
    total = torch.logsumexp(torch.stack(list(lses)), 0)
    finite = total.masked_fill(total == NEG_INF, 0)
    return [(lse - finite).exp() for lse in lses], total
