"""The `torch` backend: block-sparse attention as chunks of batched matrix products, on any device and in any dtype.

Q, K and V are copied head-major once; chunks of rows gather their key blocks, so that every product is dense. Nothing
larger than a chunk's score tile is ever held. Products run in the accumulation dtype. Same bits from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._derived import derived
from ._chunks import Schedule, build_schedule
from ._packing import KeyBlocks, QueryBlocks, add_rows_
from ._scores import ChunkScores, Frame
from .base import Call, Gradients, Needs, Problem

__all__ = ["TorchBackend"]

_NEG_INF = float("-inf")

#: Elements of a chunk's score tile: about the size of a core's L2 cache on a CPU, enough to fill a GPU.
_BUDGET = {"cpu": 1 << 18}
_BUDGET_ELSEWHERE = 1 << 25


class TorchBackend:
    """Pure PyTorch. Supports the whole contract."""

    name = "torch"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Nothing that the op accepts is refused."""
        return []

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        run = _Run(call)
        return run.forward(out_dtype)

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        run = _Run(call)
        return run.backward(dout, lse, delta, needs, grad_dtype)


class _Run:
    """Packed operands and buffers of one call."""

    def __init__(self, call: Call) -> None:
        plan, self.call = call.plan, call
        batch, q_heads, kv_heads = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        self.dtype = call.accumulate_dtype
        self.group = q_heads // kv_heads if plan.heads == 1 else 1
        self.head_units = q_heads // self.group
        expansions = (batch if plan.batch == 1 else 1) * (self.head_units if plan.heads == 1 else 1)
        budget = _BUDGET.get(call.q.device.type, _BUDGET_ELSEWHERE)
        key = ("torch", self.group, expansions, budget)
        self.schedule: Schedule = derived(plan, key, lambda: build_schedule(plan, self.group, expansions, budget))
        self.frame = Frame(call, self.schedule, self.head_units, self.group)
        self.queries = QueryBlocks.of(plan, batch, self.head_units, self.group)
        self.keys = KeyBlocks.of(plan, self.schedule.used, call.k, batch, call.page_table)
        self.rows = self.group * plan.block_size[0]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.call.q.device)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.queries.pack(self.call.q, self.dtype).mul_(self.call.scale)
        k, v = (self.keys.pack(x, self.dtype).flatten(1) for x in (self.call.k, self.call.v))
        return q, k, v

    def forward(self, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and LSE, chunk by chunk; later pieces of a long row merge with the earlier ones."""
        call, schedule = self.call, self.schedule
        q, k, v = self._packed()
        dim_v = call.v.shape[-1]
        out = torch.zeros(q.shape[0], self.rows, dim_v, dtype=self.dtype, device=q.device)
        lse = torch.full((q.shape[0], self.rows, 1), _NEG_INF, dtype=self.dtype, device=q.device)
        tiles = self._empty(2, schedule.workspace)
        gathered = self._empty(2, schedule.gathered * max(call.q.shape[-1], dim_v))
        for chunk in schedule.chunks:
            at = ChunkScores(self.frame, chunk)
            k_c, v_c = (self._gather(x, at, buffer) for x, buffer in zip((k, v), gathered, strict=True))
            scores, weights = (tile[: k_c.shape[0] * self.rows * k_c.shape[1]] for tile in tiles)
            shape = (k_c.shape[0], self.rows, k_c.shape[1])
            scores, weights = scores.view(shape), weights.view(shape)
            torch.bmm(q.index_select(0, at.q_index), k_c.transpose(1, 2), out=scores)
            at.apply_(scores)
            lse_c = _softmax_(scores, weights, at.may_empty)
            if call.dropout_p:
                weights.view(at.shape).mul_(at.keep()).div_(1 - call.dropout_p)
            out_c = torch.bmm(weights, v_c)
            if not chunk.first:
                out_c, lse_c = _merge(out.index_select(0, at.q_index), lse.index_select(0, at.q_index), out_c, lse_c)
            out.index_copy_(0, at.q_index, out_c)
            lse.index_copy_(0, at.q_index, lse_c)
        if call.sinks is not None:
            sinks = call.sinks.to(self.dtype).view(1, self.head_units, 1, self.group, 1, 1)
            shape = (call.q.shape[0], self.head_units, call.plan.q_blocks, self.group, call.plan.block_size[0], 1)
            total = torch.logaddexp(lse.view(shape), sinks)
            out.view(*shape[:-1], dim_v).mul_(torch.exp(lse.view(shape) - total))
            lse = total.view_as(lse)
        return self.queries.unpack(out, out_dtype), self.queries.unpack_rows(lse.squeeze(-1))

    def backward(self, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype) -> Gradients:
        """Gradients, recomputing each chunk's probabilities from the LSE."""
        call, schedule = self.call, self.schedule
        q, k, v = self._packed()
        do = self.queries.pack(dout, self.dtype)
        lse, delta = self.queries.pack_rows(lse), self.queries.pack_rows(delta)
        lse.masked_fill_(lse == _NEG_INF, float("inf"))  # exp(score − inf) = 0, also where the score is −inf
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_attn = self._gradient_of(call.attn_bias, needs.attn_bias)
        d_block = self._gradient_of(call.block_bias, needs.block_bias)
        tiles = self._empty(2, schedule.workspace)
        gathered = self._empty(4, schedule.gathered * max(q.shape[-1], do.shape[-1]))
        for chunk in schedule.chunks:
            at = ChunkScores(self.frame, chunk)
            k_c, v_c = (self._gather(x, at, buffer) for x, buffer in zip((k, v), gathered[:2], strict=True))
            q_c, do_c = q.index_select(0, at.q_index), do.index_select(0, at.q_index)
            shape = (k_c.shape[0], self.rows, k_c.shape[1])
            weights, dscores = (tile[: shape[0] * shape[1] * shape[2]].view(shape) for tile in tiles)
            torch.bmm(q_c, k_c.transpose(1, 2), out=weights)
            at.apply_(weights)
            weights.sub_(lse.index_select(0, at.q_index)).exp_()
            torch.bmm(do_c, v_c.transpose(1, 2), out=dscores)
            if call.dropout_p:
                keep = at.keep()
                dscores.view(at.shape).mul_(keep).div_(1 - call.dropout_p)
                dscores.sub_(delta.index_select(0, at.q_index)).mul_(weights)
                weights.view(at.shape).mul_(keep).div_(1 - call.dropout_p)
            else:
                dscores.sub_(delta.index_select(0, at.q_index)).mul_(weights)
            dq_c = torch.bmm(dscores, k_c)
            dq.index_copy_(0, at.q_index, dq_c if chunk.first else dq_c.add_(dq.index_select(0, at.q_index)))
            for into, left, right, buffer in ((dk, dscores, q_c, gathered[2]), (dv, weights, do_c, gathered[3])):
                part = buffer[: shape[0] * shape[2] * right.shape[-1]].view(shape[0], shape[2], right.shape[-1])
                torch.bmm(left.transpose(1, 2), right, out=part)
                add_rows_(into, at.kv_index, part.view(at.kv_index.numel(), -1))
            if d_block is not None:
                at.add_block_bias_gradient_(d_block, dscores)
            if d_attn is not None:
                at.add_attn_bias_gradient_(d_attn, dscores)
        block = call.plan.block_size[1]
        return Gradients(
            self.queries.unpack(dq.mul_(call.scale), grad_dtype),
            self.keys.unpack(dk.view(-1, block, q.shape[-1]), call.k, grad_dtype),
            self.keys.unpack(dv.view(-1, block, do.shape[-1]), call.v, grad_dtype),
            d_attn,
            d_block,
        )

    def _gather(self, pool: Tensor, at: ChunkScores, buffer: Tensor) -> Tensor:
        """Key blocks of a chunk: [units, n · bk, X]."""
        dim = pool.shape[1] // self.call.plan.block_size[1]
        rows = buffer[: at.kv_index.numel() * pool.shape[1]].view(-1, pool.shape[1])
        torch.index_select(pool, 0, at.kv_index, out=rows)
        return rows.view(at.q_index.numel(), -1, dim)

    def _gradient_of(self, x: Tensor | None, needed: bool) -> Tensor | None:
        return torch.zeros(x.shape, dtype=self.dtype, device=x.device) if x is not None and needed else None


def _softmax_(scores: Tensor, weights: Tensor, may_empty: bool) -> Tensor:
    """Softmax over the last dimension into ``weights``; returns its LSE [..., 1]. A row of −inf gives 0 and −inf."""
    top = scores.amax(-1, keepdim=True)
    torch.softmax(scores, -1, out=weights)
    # The largest probability is 1 / Σ exp(s − top): what is missing for the LSE, at less cost than another sum.
    lse = top - weights.amax(-1, keepdim=True).log_()
    if may_empty:
        empty = top == _NEG_INF
        if empty.device.type != "cpu" or bool(empty.any()):
            weights.masked_fill_(empty, 0)
            lse.masked_fill_(empty, _NEG_INF)
    return lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.where(x == _NEG_INF, 0.0, torch.exp(x - lse)) for x in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse
