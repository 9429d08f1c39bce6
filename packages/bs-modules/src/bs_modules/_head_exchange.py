"""Tokens for heads: between ranks that each hold some tokens of all heads, and all tokens of some heads.

Shape legend: B batch, S own tokens, N tokens of all ranks of the group, H heads, h = H / ranks, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_comm import RollCall


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
