"""The `reference` backend: dense attention under the layout's token mask. Any dtype, O(Sq · Sk) memory, the
semantics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import keep_mask
from .base import Call, Gradients, Needs, Problem

__all__ = ["ReferenceBackend"]

_NEG_INF = float("-inf")


class ReferenceBackend:
    """Dense scores, masked. For checking the others and for small inputs."""

    name = "reference"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Nothing that the op accepts is refused."""
        return []

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        dense = _Dense(call)
        scores = dense.scores()
        parts = scores
        if call.sinks is not None:
            sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            parts = torch.cat((scores, sinks), -1)
        lse = _logsumexp(parts)
        weights = dense.weights(scores, lse)
        if call.dropout_p:
            weights = weights * dense.dropout()
        out = _contained(weights, dense.v, dense.active)
        return out.transpose(1, 2).to(out_dtype).contiguous(), lse

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        dense = _Dense(call)
        weights = dense.weights(dense.scores(), lse)
        do = dout.transpose(1, 2).to(weights.dtype)
        dweights = do @ dense.v.transpose(-1, -2)
        dropped = weights
        if call.dropout_p:
            factor = dense.dropout()
            dropped, dweights = weights * factor, dweights * factor
        dscores = torch.where(dense.kept, weights * (dweights - delta[..., None]), 0)
        dq = _contained(dscores, dense.k, dense.active) * call.scale
        dk = _contained(dscores.transpose(-1, -2), dense.q, dense.active.transpose(-1, -2)) * call.scale
        dv = _contained(dropped.transpose(-1, -2), do, dense.active.transpose(-1, -2))
        return Gradients(
            dq.transpose(1, 2).to(grad_dtype).contiguous(),
            dense.to_keys(dk, call.k).to(grad_dtype),
            dense.to_keys(dv, call.v).to(grad_dtype),
            _reduce(dscores, call.attn_bias) if needs.attn_bias else None,
            dense.block_sums(dscores) if needs.block_bias else None,
        )


class _Dense:
    """Dense, head-major operands [B, Hq, S, X] and masks [1 or B, 1 or Hq, Sq, Sk] of a call."""

    def __init__(self, call: Call) -> None:
        self.call, self.plan, dtype = call, call.plan, call.accumulate_dtype
        plan = call.plan
        self.group = call.q.shape[2] // call.k.shape[2]
        self.q_block = _block_of(plan.q_bounds)
        self.k_block = _block_of(plan.kv_bounds)
        self.q_pos = _positions(plan.q_bounds, plan.q_start, self.q_block)
        self.k_pos = _positions(plan.kv_bounds, plan.kv_start, self.k_block)
        self.q = call.q.transpose(1, 2).to(dtype)
        self.k, self.v = (self._keys(x).to(dtype) for x in (call.k, call.v))
        self.active, self.entries = self._blocks()
        self.kept = self._kept()

    def _pages(self) -> tuple[Tensor, Tensor]:
        """Page of every (batch, key token) and the token's slot in it."""
        assert self.call.page_table is not None
        table = self.call.page_table.to(torch.int64).clamp(0, max(self.call.k.shape[0] - 1, 0))
        slot = torch.arange(self.k_block.numel(), device=self.k_block.device) - self.plan.kv_bounds[self.k_block]
        return table[:, self.k_block], slot.to(torch.int64)

    def _keys(self, x: Tensor) -> Tensor:
        if self.call.page_table is not None:
            x = x[self._pages()]
        return x.transpose(1, 2).repeat_interleave(self.group, dim=1)

    def to_keys(self, gradient: Tensor, like: Tensor) -> Tensor:
        """[B, Hq, Sk, X] → the shape of K or V, heads of a group and shared pages summed."""
        gradient = gradient.unflatten(1, (like.shape[2], self.group)).sum(2).transpose(1, 2)
        if self.call.page_table is None:
            return gradient.contiguous()
        page, slot = self._pages()
        flat = (page * like.shape[1] + slot).flatten()
        out = torch.zeros(like.shape, dtype=gradient.dtype, device=like.device).flatten(0, 1)
        return out.index_add_(0, flat, gradient.flatten(0, 1)).view(like.shape)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Which pairs lie in active blocks, and the layout entry of their block (−1 elsewhere): each [L, H, Sq, Sk]."""
        plan = self.plan
        begin, end = plan.row_begin.flatten().to(torch.int64), plan.row_end.flatten().to(torch.int64)
        counts = end - begin
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
        ahead = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
        slot = begin[row] + ahead
        entries = torch.full((counts.numel(), plan.kv_blocks), -1, dtype=torch.int64, device=counts.device)
        entries[row, plan.indices[slot].to(torch.int64)] = plan.entries[slot].to(torch.int64)
        entries = entries.view(plan.batch, plan.heads, plan.q_blocks, plan.kv_blocks)
        entries = entries[:, :, self.q_block][..., self.k_block]
        return entries >= 0, entries

    def _kept(self) -> Tensor:
        call, kept = self.call, self.active
        lo, hi = self.plan.token_mask.band
        distance = self.k_pos - self.q_pos[:, None]
        kept = kept & (distance >= lo) & (distance <= hi)
        if call.key_padding_mask is not None:
            kept = kept & call.key_padding_mask[:, None, None, :]
        if call.q_segments is not None and call.kv_segments is not None:
            kept = kept & (call.q_segments[:, None, :, None] == call.kv_segments[:, None, None, :])
        if call.attn_bias is not None and call.attn_bias.dtype == torch.bool:
            kept = kept & call.attn_bias
        return kept

    def scores(self) -> Tensor:
        """Scaled, biased, masked scores [B, Hq, Sq, Sk]."""
        call = self.call
        scores = (self.q * call.scale) @ self.k.transpose(-1, -2)
        if call.attn_bias is not None and call.attn_bias.dtype != torch.bool:
            scores = scores + call.attn_bias.to(scores.dtype)
        if call.block_bias is not None:
            scores = scores + self._block_bias().to(scores.dtype)
        return scores.masked_fill(~self.kept, _NEG_INF)

    def _block_bias(self) -> Tensor:
        assert self.call.block_bias is not None
        bias, shape = self.call.block_bias, self._bias_shape()
        if bias.shape[-1] == 0:
            return bias.new_zeros(())
        index = self.entries.clamp(min=0).expand(shape).flatten(2)
        return bias.expand(*shape[:2], -1).gather(2, index).view(shape)

    def _bias_shape(self) -> tuple[int, ...]:
        return (self.call.q.shape[0], self.call.q.shape[2], *self.entries.shape[2:])

    def block_sums(self, dscores: Tensor) -> Tensor:
        """Gradient of ``block_bias``: sums of dscores per entry."""
        bias, shape = self.call.block_bias, self._bias_shape()
        assert bias is not None
        sums = dscores.new_zeros(*shape[:2], bias.shape[-1] + 1)  # one more for pairs outside of every block
        index = self.entries.where(self.entries >= 0, bias.shape[-1]).expand(shape).flatten(2)
        return sums.scatter_add_(2, index, dscores.flatten(2))[..., :-1].sum_to_size(bias.shape)

    def weights(self, scores: Tensor, lse: Tensor) -> Tensor:
        """Probabilities under a given LSE; 0 where it is −inf and where nothing is kept."""
        lse = lse.masked_fill(lse == _NEG_INF, float("inf"))[..., None]
        return torch.where(self.kept, torch.exp(scores - lse), 0)

    def dropout(self) -> Tensor:
        """0 or 1 / (1 − p) for every probability [B, Hq, Sq, Sk]."""
        call = self.call
        assert call.dropout_seed is not None
        batch, head = (torch.arange(n, device=call.q.device) for n in (call.q.shape[0], call.q.shape[2]))
        keep = keep_mask(
            call.first_batch + batch[:, None, None, None],
            call.first_head + head[:, None, None],
            self.q_pos[:, None],
            self.k_pos,
            call.dropout_seed,
            call.dropout_p,
        )
        return keep.to(call.accumulate_dtype) / (1 - call.dropout_p)


def _block_of(bounds: Tensor) -> Tensor:
    """int64[S]; block of every token."""
    return torch.repeat_interleave(
        torch.arange(bounds.numel() - 1, device=bounds.device), bounds.diff().to(torch.int64)
    )


def _positions(bounds: Tensor, start: Tensor, block: Tensor) -> Tensor:
    """int64[S]; absolute position of every token."""
    token = torch.arange(block.numel(), device=block.device)
    return token - bounds[block].to(torch.int64) + start[block].to(torch.int64)


def _logsumexp(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], _NEG_INF)
    return torch.logsumexp(scores, -1)


def _contained(weights: Tensor, x: Tensor, active: Tensor) -> Tensor:
    """``weights @ x`` where a NaN or infinite row of x reaches only the rows that ``active`` joins to it."""
    finite = x.isfinite()
    if bool(finite.all()):
        return weights @ x
    reached = active.to(weights.dtype) @ (~finite).to(weights.dtype)
    return (weights @ x.where(finite, 0)).masked_fill(reached > 0, float("nan"))


def _reduce(dscores: Tensor, like: Tensor | None) -> Tensor:
    assert like is not None
    return dscores.sum_to_size(like.shape)
