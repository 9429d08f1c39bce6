"""The registered operators: block-sparse attention and its backward, with fake and autograd registrations.

`api` checks arguments and calls `attention`; the registered operators see tensors and numbers only, so that they can be
traced, compiled and checkpointed. Backends are called below autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._double_backward import differentiable_backward
from ._identities import attention_delta, sinks_gradient
from .backends.base import Call, Needs, Problem
from .dispatch import select
from .plan import LayoutPlan
from .token_mask import TokenMask

__all__ = ["attention", "attention_backward", "plan_sizes", "problem_of", "run_backward", "run_forward"]


def plan_sizes(plan: LayoutPlan) -> list[int]:
    """The numbers of a plan that the operators take beside its tensors; the inverse of `_plan_of`."""
    left, right = plan.token_mask.window or (None, None)
    window = [-1 if side is None else side for side in (left, right)]
    return [*plan.block_size, *plan.seq_len, int(plan.token_mask.causal), *window]


def _plan_of(tensors: Sequence[Tensor], sizes: Sequence[int], layout_nnz: int) -> LayoutPlan:
    block_q, block_kv, len_q, len_kv, causal, left, right = sizes
    window = None if left == right == -1 else (None if left == -1 else left, None if right == -1 else right)
    return LayoutPlan(
        *tensors,
        block_size=(block_q, block_kv),
        seq_len=(len_q, len_kv),
        token_mask=TokenMask(bool(causal), window),
        layout_nnz=layout_nnz,
    )


def problem_of(call: Call, flags: Sequence[int]) -> Problem:
    """What dispatch is asked.

    Args:
        call: the call.
        flags: whether gradients will be asked for: of anything, of attn_bias, of block_bias. They travel with the
            call, so that forward and backward resolve to the same backend.
    """
    bias = call.attn_bias
    return Problem(
        device=call.q.device.type,
        dtype=call.q.dtype,
        batch=call.q.shape[0],
        q_heads=call.q.shape[2],
        kv_heads=call.k.shape[2],
        head_dim=call.q.shape[3],
        value_dim=call.v.shape[3],
        seq_len=call.plan.seq_len,
        block_size=call.plan.block_size,
        layout_heads=call.plan.heads,
        layout_batch=call.plan.batch,
        causal=call.plan.token_mask.causal,
        window=call.plan.token_mask.window is not None,
        key_padding=call.key_padding_mask is not None,
        segments=call.q_segments is not None,
        attn_bias=None if bias is None else "bool" if bias.dtype == torch.bool else "float",
        block_bias=call.block_bias is not None,
        sinks=call.sinks is not None,
        dropout=call.dropout_p > 0,
        paged=call.page_table is not None,
        backward=bool(flags[0]),
        attn_bias_grad=bool(flags[1]),
        block_bias_grad=bool(flags[2]),
        deterministic=call.deterministic,
    )


def _call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    key_padding_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    attn_bias: Tensor | None,
    block_bias: Tensor | None,
    sinks: Tensor | None,
    page_table: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    deterministic: bool,
) -> Call:
    return Call(
        q=q,
        k=k,
        v=v,
        plan=_plan_of(plan, sizes, 0 if block_bias is None else block_bias.shape[-1]),
        scale=scale,
        key_padding_mask=key_padding_mask,
        q_segments=q_segments,
        kv_segments=kv_segments,
        attn_bias=attn_bias,
        block_bias=block_bias,
        sinks=sinks,
        page_table=page_table,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("bs_kernels::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    key_padding_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    attn_bias: Tensor | None,
    block_bias: Tensor | None,
    sinks: Tensor | None,
    page_table: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    deterministic: bool,
    accumulate_out: bool,
    flags: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a checked call; see `Call` for the tensors.

    Args:
        plan: the tensors of a `LayoutPlan`, with ``sizes`` from `plan_sizes`.
        accumulate_out: return the output in the accumulation dtype.
        flags: whether gradients will be asked for: of anything, of attn_bias, of block_bias.
        backend: a name, or "auto".
    """
    call = _call_of(
        q,
        k,
        v,
        plan,
        sizes,
        scale,
        key_padding_mask,
        q_segments,
        kv_segments,
        attn_bias,
        block_bias,
        sinks,
        page_table,
        dropout_p,
        dropout_seed,
        deterministic,
    )
    out_dtype = call.accumulate_dtype if accumulate_out else q.dtype
    return select(backend, problem_of(call, flags)).forward(call, out_dtype)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Tensor], sizes: Sequence[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    accumulate_out = rest[11]
    dtype = _accumulate_dtype(q.dtype)
    batch, length, heads, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[-1]), dtype=dtype if accumulate_out else q.dtype)
    return out, q.new_empty((batch, heads, length), dtype=dtype)


@torch.library.custom_op("bs_kernels::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    key_padding_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    attn_bias: Tensor | None,
    block_bias: Tensor | None,
    page_table: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    deterministic: bool,
    accumulate_out: bool,
    flags: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, attn_bias and block_bias (the last two empty unless flagged); see `Backend.backward`."""
    call = _call_of(
        q,
        k,
        v,
        plan,
        sizes,
        scale,
        key_padding_mask,
        q_segments,
        kv_segments,
        attn_bias,
        block_bias,
        None,
        page_table,
        dropout_p,
        dropout_seed,
        deterministic,
    )
    needs = Needs(attn_bias=bool(flags[1]), block_bias=bool(flags[2]))
    grad_dtype = call.accumulate_dtype if accumulate_out else q.dtype
    got = select(backend, problem_of(call, flags)).backward(
        call, dout, lse.contiguous(), delta.contiguous(), needs, grad_dtype
    )
    none = lse.new_empty(0)
    attn, block = (none.clone() if g is None else g for g in (got.attn_bias, got.block_bias))
    return got.q, got.k, got.v, attn, block


@attention_backward.register_fake
def _(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    attn_bias, block_bias = rest[6], rest[7]
    accumulate_out, flags = rest[12], rest[13]
    dq, dk, dv = (x.new_empty(x.shape, dtype=lse.dtype if accumulate_out else x.dtype) for x in (q, k, v))
    attn = lse.new_empty(attn_bias.shape if flags[1] else 0)
    block = lse.new_empty(block_bias.shape if flags[2] else 0)
    return dq, dk, dv, attn, block


# -- calling them ------------------------------------------------------------------------------------------------------


def run_forward(call: Call, flags: list[int], backend: str, *, accumulate_out: bool) -> tuple[Tensor, Tensor]:
    """Call `attention`; differentiable."""
    return attention(
        call.q,
        call.k,
        call.v,
        list(call.plan.tensors),
        plan_sizes(call.plan),
        call.scale,
        call.key_padding_mask,
        call.q_segments,
        call.kv_segments,
        call.attn_bias,
        call.block_bias,
        call.sinks,
        call.page_table,
        call.dropout_p,
        call.dropout_seed,
        call.deterministic,
        accumulate_out,
        flags,
        backend,
    )


def run_backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, flags: list[int], backend: str, *, accumulate_out: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call `attention_backward`; differentiable in eager mode."""
    return attention_backward(
        dout,
        lse,
        delta,
        call.q,
        call.k,
        call.v,
        list(call.plan.tensors),
        plan_sizes(call.plan),
        call.scale,
        call.key_padding_mask,
        call.q_segments,
        call.kv_segments,
        call.attn_bias,
        call.block_bias,
        call.page_table,
        call.dropout_p,
        call.dropout_seed,
        call.deterministic,
        accumulate_out,
        flags,
        backend,
    )


# -- autograd ----------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, sizes, scale, padding, q_seg, kv_seg, attn_bias, block_bias, sinks, table, p, seed, *rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, padding, q_seg, kv_seg, attn_bias, block_bias, sinks, table, seed, out, lse, *plan)
    ctx.sizes, ctx.scale, ctx.dropout_p = sizes, scale, p
    ctx.deterministic, _, ctx.flags, ctx.backend = rest


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, padding, q_seg, kv_seg, attn_bias, block_bias, sinks, table, seed, out, lse, *plan = ctx.saved_tensors
    delta = attention_delta(dout, out, lse, dlse)
    rest = (ctx.dropout_p, seed, ctx.deterministic)
    call = _call_of(
        q, k, v, plan, ctx.sizes, ctx.scale, padding, q_seg, kv_seg, attn_bias, block_bias, None, table, *rest
    )
    # Gradients come in the inputs' own dtype, whatever dtype the output had.
    dq, dk, dv, d_attn, d_block = run_backward(call, dout, lse, delta, ctx.flags, ctx.backend, accumulate_out=False)
    d_sinks = None if sinks is None else sinks_gradient(sinks, lse, delta)
    attn = d_attn.to(attn_bias.dtype) if ctx.flags[1] else None
    block = d_block.to(block_bias.dtype) if ctx.flags[2] else None
    return dq, dk, dv, [None] * len(plan), *(None,) * 5, attn, block, d_sinks, *(None,) * 7


attention.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dout, lse, delta, q, k, v, plan, sizes, scale, padding, q_seg, kv_seg, attn_bias, block_bias, *rest = inputs
    table, p, seed, deterministic = rest[:4]
    ctx.save_for_backward(dout, lse, delta, q, k, v, padding, q_seg, kv_seg, attn_bias, block_bias, table, seed, *plan)
    ctx.sizes, ctx.scale, ctx.dropout_p, ctx.deterministic = sizes, scale, p, deterministic


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    dout, lse, delta, q, k, v, padding, q_seg, kv_seg, attn_bias, block_bias, table, seed, *plan = ctx.saved_tensors
    with torch.enable_grad():
        wanted = [dout, lse, delta, q, k, v]
        wanted += [x for x in (attn_bias, block_bias) if x is not None and x.is_floating_point()]
        leaves = {id(x): x.detach().requires_grad_() for x in wanted}

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else leaves.get(id(x), x)

        tensors = (leaf(q), leaf(k), leaf(v), plan, ctx.sizes, ctx.scale, padding, q_seg, kv_seg)
        rest = (leaf(attn_bias), leaf(block_bias), None, table, ctx.dropout_p, seed, ctx.deterministic)
        call = _call_of(*tensors, *rest)  # type: ignore[arg-type]
        outs = differentiable_backward(call, *(leaves[id(x)] for x in (dout, lse, delta)))
        pairs = [
            (out, grad.to(out.dtype)) for out, grad in zip(outs, grads, strict=True) if out.numel() and grad.numel()
        ]
        found = torch.autograd.grad(
            [out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs], allow_unused=True
        )
    got = {key: None if g is None else g.to(x.dtype) for (key, x), g in zip(leaves.items(), found, strict=True)}
    attn, block = (got.get(id(x)) for x in (attn_bias, block_bias))
    before = [got[id(x)] for x in (dout, lse, delta, q, k, v)]
    return *before, [None] * len(plan), *(None,) * 5, attn, block, *(None,) * 7


attention_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
