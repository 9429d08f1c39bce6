"""The `torch` backend: block-sparse attention as chunks of batched matrix products, on any device and in any dtype.

Q, K and V are copied head-major once, Q in the order of chunks; chunks of rows gather their key blocks, so that every
product is dense. Nothing larger than a chunk's score tile is ever held. Scores are products in the accumulation dtype,
in units of log 2, since torch computes 2^x several times faster than e^x. The other products take bfloat16 operands
where the inputs are bfloat16 and the CPU has instructions for them; sums over chunks stay float32. Same bits from run
to run.
"""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack

import torch
from torch import Tensor

from bs_memory import default_pool

from ._packing import KeyBlocks, QueryBlocks, add_rows_
from ._places import ChunkPlace, Grouping, places_of
from ._scores import ChunkScores, Frame
from .base import Call, Gradients, Needs, Problem

__all__ = ["TorchBackend"]

_NEG_INF = float("-inf")
_LOG2_E = math.log2(math.e)

#: What a chunk's score tile, keys and values are for each CPU thread, in elements of scores: a few L2 caches.
_PER_THREAD = 3 << 18
_MOST_THREADS = 16  # beyond, more workspace buys nothing
#: Elements of a chunk's score tile that fill a GPU.
_ELSEWHERE = 1 << 25


class TorchBackend:
    """Pure PyTorch. Supports the whole contract."""

    name = "torch"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Nothing that the op accepts is refused."""
        return []

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        with _Run(call) as run:
            return run.forward(out_dtype)

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        with _Run(call) as run:
            return run.backward(dout, lse, delta, needs, grad_dtype)


class _Run(ExitStack):
    """Packed operands and buffers of one call. As a context manager it holds its workspace leased from the pool."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        plan, self.call = call.plan, call
        batch, q_heads, kv_heads = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        self.dtype = call.accumulate_dtype
        grouping = Grouping.of(plan, batch, q_heads, kv_heads)
        self.group, self.head_units = grouping.group, grouping.head_units
        self.rows = self.group * plan.block_size[0]
        narrow = call.q.dtype == torch.bfloat16 and call.q.device.type == "cpu" and _multiplies_bfloat16()
        self.operand = torch.bfloat16 if narrow else self.dtype
        width = (call.q.shape[3] + call.v.shape[3]) * self.operand.itemsize // self.dtype.itemsize
        self.places = places_of(plan, grouping, _budget(call.q.device, self.rows, width))
        used = self.places.schedule.used
        self.frame = Frame(call, used)
        self.queries = QueryBlocks.of(plan, batch, self.head_units, self.group, self.places.order)
        self.keys = KeyBlocks.of(plan, used, call.k, batch, call.page_table)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised workspace, given back when the call is done."""
        return self.enter_context(default_pool().lease(shape, dtype, self.call.q.device))

    def _full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return self.empty(shape, self.dtype).fill_(value)

    def _rows(self, width: int, dtype: torch.dtype, idle: float = 0) -> Tensor:
        """[units, rows, width] in the order of chunks: ``idle`` where there are no key blocks, else uninitialised."""
        rows = self.empty((self.places.units, self.rows, width), dtype)
        rows[self.places.busy :].fill_(idle)
        return rows

    def forward(self, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and LSE, chunk by chunk; the pieces of a long row merge."""
        call = self.call
        q = self.queries.pack(call.q, self.operand, self.empty)
        k, v = (self.keys.pack(x, self.operand, self.empty).flatten(1) for x in (call.k, call.v))
        dim_v = call.v.shape[-1]
        out = self._rows(dim_v, out_dtype if call.sinks is None else self.dtype)
        lse = self._rows(1, self.dtype, _NEG_INF)  # in units of log 2 until the end
        tiles = _Tiles(self, max(call.q.shape[-1], dim_v), scores=1, operands=2)
        merged: tuple[Tensor, Tensor] | None = None
        for place in self.places.chunks:
            at, chunk = ChunkScores(self.frame, place), place.chunk
            k_c, v_c = self._gather(k, place, tiles.operands[0]), self._gather(v, place, tiles.operands[1])
            (weights,) = tiles.view_scores(k_c)
            self._scores(q[place.span], k_c, tiles, weights)
            at.apply_(weights, _LOG2_E)
            total, lse_c = _exponentiate_(weights)
            if call.dropout_p:
                weights.view(at.shape).mul_(at.keep()).div_(1 - call.dropout_p)
            out_c = torch.bmm(tiles.as_operand(weights), v_c, out=tiles.view_rows(weights, v_c))
            if chunk.first and chunk.last:
                torch.div(out_c, total, out=out[place.span])
                lse[place.span] = lse_c
                continue
            out_c = out_c / total
            merged = (out_c, lse_c) if chunk.first or merged is None else _merge(*merged, out_c, lse_c)
            if chunk.last:
                out[place.span], lse[place.span] = merged
        lse.div_(_LOG2_E)
        if call.sinks is not None:
            lse = self._add_sinks_(out, lse, call.sinks)
        return self.queries.unpack(out, out_dtype), self.queries.unpack_rows(lse.squeeze(-1))

    def backward(self, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype) -> Gradients:
        """Gradients, recomputing each chunk's probabilities from the LSE."""
        call = self.call
        q, do = (self.queries.pack(x, self.operand, self.empty) for x in (call.q, dout))
        k, v = (self.keys.pack(x, self.operand, self.empty).flatten(1) for x in (call.k, call.v))
        lse, delta = (self.queries.pack_rows(x, self.empty) for x in (lse, delta))
        lse.masked_fill_(lse == _NEG_INF, float("inf")).mul_(_LOG2_E)  # 2^(score − inf) = 0, also if the score is −inf
        dq, (dk, dv) = self._rows(q.shape[-1], grad_dtype), (self._full(tuple(x.shape), 0) for x in (k, v))
        d_attn = self._gradient_of(call.attn_bias, needs.attn_bias)
        d_block = self._gradient_of(call.block_bias, needs.block_bias)
        tiles = _Tiles(self, max(q.shape[-1], do.shape[-1]), scores=2, operands=2)
        summed: Tensor | None = None
        for place in self.places.chunks:
            at, chunk = ChunkScores(self.frame, place), place.chunk
            k_c, v_c = self._gather(k, place, tiles.operands[0]), self._gather(v, place, tiles.operands[1])
            q_c, do_c = q[place.span], do[place.span]
            weights, dscores = tiles.view_scores(k_c)
            self._scores(q_c, k_c, tiles, weights)
            at.apply_(weights, _LOG2_E)
            weights.sub_(lse[place.span]).exp2_()
            keep = at.keep() if call.dropout_p else None
            dweights = torch.bmm(do_c, v_c.transpose(1, 2), out=tiles.view_product(dscores))
            if keep is not None:
                dweights.view(at.shape).mul_(keep).div_(1 - call.dropout_p)
            torch.sub(dweights, delta[place.span], out=dscores).mul_(weights)
            if keep is not None:
                weights.view(at.shape).mul_(keep).div_(1 - call.dropout_p)
            self._add_keys_(dv, place, tiles.as_operand(weights), do_c, tiles)
            if d_block is not None:
                add_rows_(d_block.view(-1), *at.block_bias_gradient(dscores))
            if d_attn is not None:
                add_rows_(d_attn.view(-1), *at.attn_bias_gradient(dscores))
            dscores = tiles.as_operand(dscores)
            dq_c = torch.bmm(dscores, k_c, out=tiles.view_rows(dscores, k_c))
            if not (chunk.first and chunk.last):
                dq_c = summed = dq_c.to(self.dtype, copy=True) if chunk.first or summed is None else summed.add_(dq_c)
            if chunk.last:
                torch.mul(dq_c, call.scale, out=dq[place.span])
            self._add_keys_(dk, place, dscores, q_c, tiles)
        block = call.plan.block_size[1]
        return Gradients(
            self.queries.unpack(dq, grad_dtype),
            self.keys.unpack(dk.mul_(call.scale).view(-1, block, q.shape[-1]), call.k, grad_dtype),
            self.keys.unpack(dv.view(-1, block, do.shape[-1]), call.v, grad_dtype),
            d_attn,
            d_block,
        )

    def _scores(self, q_c: Tensor, k_c: Tensor, tiles: _Tiles, out: Tensor) -> None:
        """Scaled scores of a chunk in units of log 2, products and sums in the accumulation dtype."""
        k_c, scale = tiles.widened(k_c), self.call.scale * _LOG2_E
        torch.baddbmm(out, q_c.to(self.dtype), k_c.transpose(1, 2), beta=0, alpha=scale, out=out)

    def _add_keys_(self, into: Tensor, place: ChunkPlace, left: Tensor, right: Tensor, tiles: _Tiles) -> None:
        """Add ``leftᵀ @ right`` to a packed gradient of keys or values."""
        left = left.transpose(1, 2)
        part = torch.bmm(left, right, out=tiles.view_rows(left, right))
        add_rows_(into, place.kv_index, tiles.widened(part).view(place.kv_index.numel(), -1))

    def _add_sinks_(self, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
        """Let sinks join the softmax: rescale ``out`` in place and return the LSE with them."""
        logits = sinks.to(self.dtype).view(1, self.head_units, 1, self.group, 1, 1)
        shape = (self.call.q.shape[0], self.head_units, self.call.plan.q_blocks, self.group, self.rows // self.group, 1)
        total = torch.logaddexp(lse, logits.expand(shape).flatten(0, 2)[self.places.order].view_as(lse))
        out.mul_(torch.exp(lse - total))
        return total

    def _gather(self, pool: Tensor, place: ChunkPlace, buffer: Tensor) -> Tensor:
        """Key blocks of a chunk: [units, n · bk, X]."""
        dim = pool.shape[1] // self.call.plan.block_size[1]
        rows = buffer[: place.kv_index.numel() * pool.shape[1]].view(-1, pool.shape[1])
        torch.index_select(pool, 0, place.kv_index, out=rows)
        return rows.view(place.q_index.numel(), -1, dim)

    def _gradient_of(self, x: Tensor | None, needed: bool) -> Tensor | None:
        return torch.zeros(x.shape, dtype=self.dtype, device=x.device) if x is not None and needed else None


class _Tiles:
    """Buffers that every chunk of a call reuses.

    Args:
        run: the call.
        width: the larger head dim.
        scores: how many score tiles.
        operands: how many gathered sets of key blocks.
    """

    def __init__(self, run: _Run, width: int, *, scores: int, operands: int) -> None:
        schedule, self.rows = run.places.schedule, run.rows
        gathered = schedule.gathered * width
        self.narrow = run.operand != run.dtype
        self.scores = run.empty((scores, schedule.workspace), run.dtype)
        self.operands = run.empty((operands, gathered), run.operand)
        self.part = run.empty((max(gathered, schedule.units * run.rows * width),), run.operand)
        self.wide = run.empty((gathered if self.narrow else 0,), run.dtype)
        self.product = run.empty((schedule.workspace if self.narrow else 0,), run.operand)

    def view_scores(self, k_c: Tensor) -> tuple[Tensor, ...]:
        """The score tiles as [units, rows, keys] of a chunk with these keys."""
        shape = (k_c.shape[0], self.rows, k_c.shape[1])
        return tuple(tile[: math.prod(shape)].view(shape) for tile in self.scores)

    def view_product(self, tile: Tensor) -> Tensor:
        """Where a product shaped like ``tile`` goes: itself, or a tile in the operands' dtype."""
        return self.product[: tile.numel()].view(tile.shape) if self.narrow else tile

    def as_operand(self, tile: Tensor) -> Tensor:
        """``tile`` in the dtype of the products' operands."""
        return self.view_product(tile).copy_(tile) if self.narrow else tile

    def widened(self, x: Tensor) -> Tensor:
        """``x`` (keys of a chunk) in the accumulation dtype."""
        return self.wide[: x.numel()].view(x.shape).copy_(x) if self.narrow else x

    def view_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """Where ``left @ right`` goes, until the next product that is no score."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return self.part[: math.prod(shape)].view(shape)


def _budget(device: torch.device, rows: int, width: int) -> int:
    """Elements of a chunk's score tile, where units have ``rows`` and a key and its value are as large as ``width``."""
    if device.type != "cpu":
        return _ELSEWHERE
    return _PER_THREAD * min(torch.get_num_threads(), _MOST_THREADS) * rows // (rows + width)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def _exponentiate_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``2^(score − the row's largest)`` in place.

    Returns:
        What to divide sums of these by, and the rows' log2-sum-exp2, both [..., 1]. A row of −inf: 1 and −inf.
    """
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # −inf − −inf would be NaN
    total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
    return total.clamp(min=1), top.add_(total.log2_())


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp2(lse_a, lse_b)
    weight_a, weight_b = (torch.where(x == _NEG_INF, 0.0, torch.exp2(x - lse)) for x in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse
