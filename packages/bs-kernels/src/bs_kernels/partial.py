"""The partial form: attention over some of the keys, for rings that merge the parts.

Forward: `partial_forward` per part, then `merge_attention`; sinks, if any, join at the end. Backward: `attention_delta`
once from the merged output and LSE, then `partial_backward` per part, whose gradients add up. Neither is differentiable
itself: the caller's autograd function is.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ._arguments import AttentionArguments, make_call
from ._identities import attention_delta, sinks_gradient
from .batched import BatchedLayout
from .op import run_backward, run_forward
from .plan import LayoutPlan

__all__ = ["PartialGradients", "attention_delta", "partial_backward", "partial_forward", "sinks_gradient"]

Layout = BlockLayout | LayoutPlan | BatchedLayout


class PartialGradients(NamedTuple):
    """Gradients of one part, in the accumulation dtype.

    Attributes:
        q, k, v: shaped like the inputs.
        attn_bias: shaped like the argument, or None without a floating one.
        block_bias: shaped like the argument, or None without one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attn_bias: Tensor | None = None
    block_bias: Tensor | None = None


@torch.no_grad()
def partial_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Layout, *, backend: str = "auto", **arguments: Unpack[AttentionArguments]
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of one part.

    Args:
        q: [B, Sq, Hq, D].
        k, v: the keys and values at hand: [B, Sk, Hkv, ·], or pages.
        plan: which blocks are active; a plan carries the absolute positions of a shard.
        backend: as in `block_sparse_attention`.
        arguments: those of `block_sparse_attention` but for ``sinks``, ``return_lse`` and ``backend``.

    Returns:
        ``(out, lse)``: [B, Sq, Hq, Dv] and [B, Hq, Sq], both float32 (float64 for float64 inputs); 0 and −inf for a
        query without keys in this part.

    Raises:
        TypeError, ValueError: as `block_sparse_attention`.
    """
    call = make_call(q, k, v, plan, **_without_sinks(arguments))
    return run_forward(call, [0, 0, 0], backend, accumulate_out=True)


@torch.no_grad()
def partial_backward(
    dout: Tensor,
    delta: Tensor,
    lse_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Layout,
    *,
    backend: str = "auto",
    **arguments: Unpack[AttentionArguments],
) -> PartialGradients:
    """Gradients that flow through one part.

    Args:
        dout: [B, Sq, Hq, Dv]; gradient of the merged output.
        delta: [B, Hq, Sq]; `attention_delta` of the merged output.
        lse_final: [B, Hq, Sq]; the merged LSE, sinks included.
        q, k, v, plan, backend, arguments: those of this part's `partial_forward`; with dropout, give the seed.

    Returns:
        The gradients; those of k and v belong to this part's keys.

    Raises:
        TypeError, ValueError: as `block_sparse_attention`, and for dout, delta or lse_final of the wrong shape.
    """
    call = make_call(q, k, v, plan, **_without_sinks(arguments))
    if call.dropout_p and arguments.get("dropout_seed") is None:
        raise ValueError("dropout_seed: expected the seed of the forward, got None")
    out_shape = (*call.q.shape[:3], call.v.shape[3])
    row_shape = (call.q.shape[0], call.q.shape[2], call.q.shape[1])
    for name, x, shape in (("dout", dout, out_shape), ("delta", delta, row_shape), ("lse_final", lse_final, row_shape)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if tuple(x.shape) != shape or not x.is_floating_point():
            raise ValueError(f"{name}: expected floating {list(shape)}, got {x.dtype}{list(x.shape)}")
        if x.device != call.q.device:
            raise ValueError(f"{name}: expected device {call.q.device} (that of q), got {x.device}")
    bias = call.attn_bias is not None and call.attn_bias.is_floating_point()
    flags = [1, int(bias), int(call.block_bias is not None)]
    lse_final, delta = lse_final.to(call.accumulate_dtype), delta.to(call.accumulate_dtype)
    dq, dk, dv, attn, block = run_backward(call, dout, lse_final, delta, flags, backend, accumulate_out=True)
    return PartialGradients(
        dq,
        dk,
        dv,
        _shaped_like(attn, arguments.get("attn_bias")) if flags[1] else None,
        _shaped_like(block, arguments.get("block_bias")) if flags[2] else None,
    )


def _without_sinks(arguments: AttentionArguments) -> AttentionArguments:
    if arguments.get("sinks") is not None:
        raise ValueError("sinks: expected None in a partial form (they join once, after the merge), got a tensor")
    return arguments


def _shaped_like(gradient: Tensor, argument: Tensor | None) -> Tensor:
    assert argument is not None
    return gradient.view(argument.shape)
