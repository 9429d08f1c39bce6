"""Tokens for heads: between ranks that each hold some tokens of all heads, and all tokens of some heads.

Shape legend: B batch, S own tokens, N tokens of all ranks of the group, H heads, h = H / ranks, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_comm import RollCall
from bs_kernels import BatchedLayout, partial_backward, partial_forward
from bs_kernels.partial import PartialGradients
from bs_patterns import BlockLayout

from ._ring_gather import Gather


class ToHeads(torch.autograd.Function):
    """``[B, S, H, D] → [B, N, h, D]``: this rank's heads of every rank's tokens, in rank order.

    Source: Jacobs et al., "DeepSpeed Ulysses", 2023.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, roll_call: RollCall, lengths: Sequence[int]) -> Tensor:
        """Send every rank its heads of the own tokens."""
        ctx.roll_call, ctx.lengths = roll_call, lengths
        return _to_heads(x, roll_call, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The way back."""
        return _to_tokens(dy, ctx.roll_call, ctx.lengths), None, None


class ToTokens(torch.autograd.Function):
    """``[B, N, h, D] → [B, S, H, D]``: undoes `ToHeads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, roll_call: RollCall, lengths: Sequence[int]) -> Tensor:
        """Send every rank its tokens of the own heads."""
        ctx.roll_call, ctx.lengths = roll_call, lengths
        return _to_tokens(x, roll_call, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The way back."""
        return _to_heads(dy, ctx.roll_call, ctx.lengths), None, None


def _to_heads(x: Tensor, roll_call: RollCall, lengths: Sequence[int]) -> Tensor:
    world = roll_call.world_size
    batch, _, heads, dim = x.shape
    shapes = [(batch, length, heads // world, dim) for length in lengths]
    return torch.cat(roll_call.swap(list(x.chunk(world, 2)), shapes), 1)


def _to_tokens(x: Tensor, roll_call: RollCall, lengths: Sequence[int]) -> Tensor:
    batch, _, heads, dim = x.shape
    shapes = [(batch, lengths[roll_call.rank], heads, dim)] * roll_call.world_size
    return torch.cat(roll_call.swap(list(x.split(list(lengths), 1)), shapes), 2)


@dataclass(frozen=True)
class AmongAll:
    """Own heads where they stand among all of them, for dropout, which is keyed by the head's number.

    The kernels then get tensors of all heads, of which those of other ranks are empty and read nothing.

    Attributes:
        rank: Which share.
        ranks: Of how many.
        heads: h, own query heads.
    """

    rank: int
    ranks: int
    heads: int

    def put(self, x: Tensor, dim: int, fill: float = 0.0) -> Tensor:
        """``h → H`` along a dimension; what belongs to other ranks is ``fill``."""
        size = x.shape[dim]
        wide = x.new_full((*x.shape[:dim], size * self.ranks, *x.shape[dim + 1 :]), fill)
        wide.narrow(dim, self.rank * size, size).copy_(x)
        return wide

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """``H → h``: undoes `put`."""
        size = x.shape[dim] // self.ranks
        return x.narrow(dim, self.rank * size, size)

    def layout(self, layout: BlockLayout | BatchedLayout) -> BlockLayout | BatchedLayout:
        """One of all heads, of which those of other ranks have no blocks."""
        if isinstance(layout, BatchedLayout):
            shape = (-1, self.heads, -1)
            indices, counts = layout.indices.expand(*shape, -1), layout.counts.expand(*shape)
            return replace(layout, indices=self.put(indices, 1), counts=self.put(counts, 1))
        if layout.heads == 1 < self.heads:
            layout = BlockLayout.stack_heads([layout] * self.heads)
        before, after = self.rank * self.heads, (self.ranks - self.rank - 1) * self.heads
        indptr = np.pad(layout.indptr, ((before, after), (0, 0)))
        indptr[before + self.heads :] = layout.nnz
        return BlockLayout(layout.block_size, layout.seq_len, indptr, layout.indices, layout.causal)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`partial_forward` of the own heads, under a plan of `layout`."""
        q, k, v = (self.put(x, 2) for x in (q, k, v))
        out, lse = partial_forward(q, k, v, plan, **self._biases(arguments))
        return self.cut(out, 2), self.cut(lse, 1)

    def backward(
        self,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Any,
        arguments: dict[str, Any],
    ) -> PartialGradients:
        """`partial_backward`, likewise."""
        q, k, v, dout = (self.put(x, 2) for x in (q, k, v, dout))
        delta, lse = self.put(delta, 1), self.put(lse, 1, float("-inf"))
        got = partial_backward(dout, delta, lse, q, k, v, plan, **self._biases(arguments))
        bias, block_bias = got.attn_bias, got.block_bias
        if bias is not None and arguments["attn_bias"].shape[1] > 1:
            bias = self.cut(bias, 1)
        if block_bias is not None:
            block_bias = self.cut(block_bias, 1)
            if arguments["block_bias"].shape[1] == 1:
                block_bias = block_bias.sum(1, keepdim=True)
        dq, dk, dv = (self.cut(x, 2) for x in got[:3])
        return PartialGradients(dq, dk, dv, bias, block_bias)

    def _biases(self, arguments: dict[str, Any]) -> dict[str, Any]:
        made = dict(arguments)
        bias, block_bias = made.get("attn_bias"), made.get("block_bias")
        if bias is not None and bias.shape[1] > 1:
            made["attn_bias"] = self.put(bias, 1)
        if block_bias is not None:
            made["block_bias"] = self.put(block_bias.expand(-1, self.heads, -1, -1), 1)
        return made


def bias_of_heads(
    bias: Tensor | None, roll_call: RollCall, lengths: Sequence[int], by_query: bool
) -> Tensor | None:  # fmt: skip
    """``attn_bias`` of all heads for own tokens, to own heads for all tokens of the group.

    Args:
        bias: Four dimensions: ``[B or 1, H or 1, S or 1, N or 1]``; or None.
        roll_call: Of the group that shares heads.
        lengths: Own queries by rank.
        by_query: Whether it differs by query.
    """
    if bias is None:
        return None
    rank, ranks = roll_call.rank, roll_call.world_size
    if not by_query:  # the same for every query, so nothing needs to travel
        return bias if bias.shape[1] == 1 else bias.chunk(ranks, 1)[rank]
    if bias.shape[1] == 1:
        whole: Any = Gather.apply(bias.permute(2, 0, 1, 3), roll_call, lengths)
        return whole.permute(1, 2, 0, 3)
    mine: Any = ToHeads.apply(bias.transpose(1, 2), roll_call, lengths)
    return mine.transpose(1, 2)
