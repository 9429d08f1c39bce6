"""What ranks hold apart, brought together as differentiable functions: gradients go home and add up in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_comm import RollCall


class Gather(torch.autograd.Function):
    """``[n, ...] → [N, ...]``: every rank's rows in rank order.

    Backward sums what all ranks have to say of a rank's rows, in rank order: the same bits every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, roll_call: RollCall, lengths: Sequence[int]) -> Tensor:
        """Gather; ``lengths`` are the rows by rank."""
        ctx.roll_call, ctx.lengths = roll_call, list(lengths)
        return torch.cat(roll_call.tensors(x, ctx.lengths))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Send every rank the gradient of its rows, and add up what comes."""
        roll_call, lengths = ctx.roll_call, ctx.lengths
        shape = (lengths[roll_call.rank], *dy.shape[1:])
        shares = roll_call.swap(list(dy.contiguous().split(lengths)), [shape] * roll_call.world_size)
        total = shares[0].clone()
        for share in shares[1:]:
            total += share
        return total, None, None


class Exchange(torch.autograd.Function):
    """``[n, ...] → [m, ...]``: some rows to each rank, and what comes from each, in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, roll_call: RollCall, rows: Sequence[Tensor], come: Sequence[int]) -> Tensor:
        """Swap; ``rows`` are the rows that go to each rank, ``come`` how many come from each."""
        ctx.roll_call, ctx.rows, ctx.come, ctx.shape = roll_call, list(rows), list(come), x.shape
        shapes = [(count, *x.shape[1:]) for count in ctx.come]
        return torch.cat(roll_call.swap([x[index] for index in ctx.rows], shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The way back."""
        shapes = [(len(index), *dy.shape[1:]) for index in ctx.rows]
        shares = ctx.roll_call.swap(list(dy.contiguous().split(ctx.come)), shapes)
        total = dy.new_zeros(ctx.shape)
        for index, share in zip(ctx.rows, shares, strict=True):
            total.index_add_(0, index, share)
        return total, None, None, None
