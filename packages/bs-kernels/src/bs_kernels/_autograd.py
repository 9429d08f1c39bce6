"""Autograd of the registered operators: backward, and the backward of the backward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import op
from ._double_backward import differentiable_backward
from ._identities import attention_delta, sinks_gradient
from .op import OPERANDS, PLAN, call_of, run_backward

__all__: list[str] = []

#: Positions of attn_bias and block_bias among the operands.
_ATTN_BIAS, _BLOCK_BIAS = 9, 10


def _save(ctx: Any, operands: tuple[Any, ...], *extra: Tensor | None) -> None:
    """Keep operands for the backward: tensors through autograd, the rest as they are."""
    tensors = [x if isinstance(x, Tensor) else None for x in operands]
    ctx.rest = [None if isinstance(x, Tensor) or at == PLAN else x for at, x in enumerate(operands)]
    ctx.extra = len(extra)
    ctx.save_for_backward(*extra, *tensors, *operands[PLAN])


def _load(ctx: Any) -> tuple[list[Any], list[Any]]:
    """What `_save` kept: extra tensors, operands."""
    saved = ctx.saved_tensors
    extra, tensors, plan = saved[: ctx.extra], saved[ctx.extra : ctx.extra + OPERANDS], saved[ctx.extra + OPERANDS :]
    operands = [rest if x is None else x for x, rest in zip(tensors, ctx.rest, strict=True)]
    operands[PLAN] = list(plan)
    return list(extra), operands


def _gradients(by_position: Mapping[int, Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    return tuple(by_position.get(at) for at in range(count))


class _Attention(torch.autograd.Function):
    """Differentiable `attention`. The plan's tensors come last, since autograd looks for tensors one level deep."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        operands, (sinks, _, flags, backend) = args[:OPERANDS], args[OPERANDS:]
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.bs_kernels.attention.default(*args)
        _save(ctx, operands, sinks, out, lse)
        ctx.flags, ctx.backend = flags, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (sinks, out, lse), operands = _load(ctx)
        if dout is None and dlse is None:
            return (None,) * (OPERANDS + 4)
        dout = torch.zeros_like(out) if dout is None else dout
        delta = attention_delta(dout, out, lse, dlse)
        # Gradients come in the inputs' own dtype, whatever dtype the output had.
        call = call_of(operands)
        below = nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()  # one hop less
        with below:
            grads = run_backward(call, dout, lse, delta, ctx.flags, ctx.backend, accumulate_out=False)
        dq, dk, dv, d_attn, d_block = grads
        found = {0: dq, 1: dk, 2: dv}
        if ctx.flags[1]:
            found[_ATTN_BIAS] = d_attn.to(operands[_ATTN_BIAS].dtype)
        if ctx.flags[2]:
            found[_BLOCK_BIAS] = d_block.to(operands[_BLOCK_BIAS].dtype)
        if sinks is not None:
            found[OPERANDS] = sinks_gradient(sinks, lse, delta)
        return _gradients(found, OPERANDS + 4)


class _AttentionBackward(torch.autograd.Function):
    """Differentiable `attention_backward`; its own backward is a composite over the active blocks."""

    @staticmethod
    def forward(ctx: Any, dout: Tensor, lse: Tensor, delta: Tensor, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.bs_kernels.attention_backward.default(dout, lse, delta, *args)
        _save(ctx, args[:OPERANDS], dout, lse, delta)
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, operands = _load(ctx)
        inputs: dict[int, Tensor] = dict(enumerate(rows))
        for at in (0, 1, 2, _ATTN_BIAS, _BLOCK_BIAS):
            if operands[at] is not None and operands[at].is_floating_point():
                inputs[3 + at] = operands[at]
        with torch.enable_grad():
            leaves = {at: x.detach().requires_grad_() for at, x in inputs.items()}
            for at, leaf in leaves.items():
                if at >= 3:
                    operands[at - 3] = leaf
            outs = differentiable_backward(call_of(operands), leaves[0], leaves[1], leaves[2])
            pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None and out.numel()]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                list(leaves.values()),
                [grad.to(out.dtype) for out, grad in pairs],
                allow_unused=True,
            )
        by_position = {
            at: None if g is None else g.to(x.dtype) for (at, x), g in zip(inputs.items(), found, strict=True)
        }
        return _gradients(by_position, 3 + OPERANDS + 3)


def _needs_gradient(*tensors: Any) -> bool:
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError("attention has no forward-mode derivative (torch.func.jvp, forward_ad): use backward")
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    if _needs_gradient(*args):
        return _Attention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bs_kernels.attention.default(*args)


def _attention_backward(*args: Any) -> tuple[Tensor, ...]:
    if _needs_gradient(*args):
        return _AttentionBackward.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bs_kernels.attention_backward.default(*args)


op._library.impl("attention", _attention, "Autograd")
op._library.impl("attention_backward", _attention_backward, "Autograd")
