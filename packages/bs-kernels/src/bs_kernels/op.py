"""The registered operators `bs_kernels::attention` and `bs_kernels::attention_backward`.

`api` checks arguments and calls `run_forward`. The operators see tensors and numbers only, so that they can be traced,
compiled and checkpointed; their kernels choose a backend and run below autograd. They are defined through
`torch.library.Library` rather than the `custom_op` decorator, whose wrappers cost several hundred microseconds per call
for operators with this many tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._recovery import recovered_backward, recovered_forward
from .backends.base import Call, Needs, Problem
from .dispatch import choose
from .plan import LayoutPlan
from .token_mask import TokenMask

__all__ = ["call_of", "plan_sizes", "problem_of", "run_backward", "run_forward"]

#: Arguments that forward and backward share: `Call` without sinks, the plan taken apart.
_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor[] plan, SymInt[] sizes, float scale, Tensor? key_padding_mask, "
    "Tensor? q_segments, Tensor? kv_segments, Tensor? attn_bias, Tensor? block_bias, Tensor? page_table, "
    "float dropout_p, Tensor? dropout_seed, bool deterministic"
)
#: accumulate_out: results in the accumulation dtype. flags: whether gradients will be asked for, of anything, of
#: attn_bias, of block_bias; they travel with the call, so that forward and backward resolve to the same backend.
_MODE = "bool accumulate_out, int[] flags, str backend"

_library = torch.library.Library("bs_kernels", "DEF")
_library.define(f"attention({_OPERANDS}, Tensor? sinks, {_MODE}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention_backward(Tensor dout, Tensor lse, Tensor delta, {_OPERANDS}, {_MODE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

#: Number of operands in `_OPERANDS`, and where the plan is among them.
OPERANDS, PLAN = 15, 3


def plan_sizes(plan: LayoutPlan) -> list[int]:
    """The numbers of a plan that the operators take beside its tensors."""
    left, right = plan.token_mask.window or (None, None)
    window = [-1 if side is None else side for side in (left, right)]
    dense = (0, 0) if plan.dense_offset is None else (1, plan.dense_offset)
    return [*plan.block_size, *plan.seq_len, int(plan.token_mask.causal), *window, *dense]


def call_of(operands: Sequence[Any], sinks: Tensor | None = None) -> Call:
    """The call of an operator's operands; the inverse of `operands_of`."""
    q, k, v, tensors, sizes, scale, padding, q_seg, kv_seg, attn_bias, block_bias, table, p, seed, deterministic = (
        operands
    )
    block_q, block_kv, len_q, len_kv, causal, left, right, dense, offset = sizes
    window = None if left == right == -1 else (None if left == -1 else left, None if right == -1 else right)
    plan = LayoutPlan(
        *tensors,
        block_size=(block_q, block_kv),
        seq_len=(len_q, len_kv),
        token_mask=TokenMask(bool(causal), window),
        layout_nnz=0 if block_bias is None else block_bias.shape[-1],
        dense_offset=offset if dense else None,
    )
    return Call(
        q, k, v, plan, scale, padding, q_seg, kv_seg, attn_bias, block_bias, sinks, table, p, seed, deterministic
    )


def operands_of(call: Call) -> tuple[Any, ...]:
    """The operands of an operator."""
    return (
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
    )


def problem_of(call: Call, flags: Sequence[int]) -> Problem:
    """What dispatch is asked, with the ``flags`` of the operators."""
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
        dense_offset=call.plan.dense_offset,
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


def run_forward(call: Call, flags: list[int], backend: str, *, accumulate_out: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE of a checked call; differentiable."""
    return torch.ops.bs_kernels.attention.default(*operands_of(call), call.sinks, accumulate_out, flags, backend)


def run_backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, flags: list[int], backend: str, *, accumulate_out: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, attn_bias and block_bias, the last two empty unless flagged; differentiable in eager mode.

    ``call.sinks`` plays no part: see `Backend.backward`.
    """
    operands = operands_of(call)
    return torch.ops.bs_kernels.attention_backward.default(dout, lse, delta, *operands, accumulate_out, flags, backend)


def _check_pages(call: Call) -> None:
    """Refuse pages out of range, where looking costs no synchronisation: a native kernel would read past the pool."""
    table, plan = call.page_table, call.plan
    if table is None or table.device.type != "cpu":
        return
    active = (plan.col_end > plan.col_begin).any(1)  # [L, KB]
    pages = call.k.shape[0]
    wrong = ((table < 0) | (table >= pages)) & active
    if bool(wrong.any()):
        bad = int(table[wrong][0])
        raise ValueError(f"page_table: expected pages in [0, {pages}) for active blocks, got {bad}")


# -- kernels, below autograd -------------------------------------------------------------------------------------------


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    sinks, accumulate_out, flags, backend = args[OPERANDS:]
    call = call_of(args[:OPERANDS], sinks)
    _check_pages(call)
    out_dtype = call.accumulate_dtype if accumulate_out else call.q.dtype
    return recovered_forward(choose(backend, problem_of(call, flags), call), call, out_dtype)


def _attention_backward(dout: Tensor, lse: Tensor, delta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    accumulate_out, flags, backend = args[OPERANDS:]
    call = call_of(args[:OPERANDS])
    _check_pages(call)
    needs = Needs(attn_bias=bool(flags[1]), block_bias=bool(flags[2]))
    grad_dtype = call.accumulate_dtype if accumulate_out else call.q.dtype
    chosen = choose(backend, problem_of(call, flags), call)
    got = recovered_backward(chosen, call, dout, lse.contiguous(), delta.contiguous(), needs, grad_dtype)
    attn, block = (lse.new_empty(0) if g is None else g for g in (got.attn_bias, got.block_bias))
    return got.q, got.k, got.v, attn, block


def _fake_attention(*args: Any) -> tuple[Tensor, Tensor]:
    q, v, accumulate_out = args[0], args[2], args[OPERANDS + 1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, length, heads, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[-1]), dtype=dtype if accumulate_out else q.dtype)
    return out, q.new_empty((batch, heads, length), dtype=dtype)


def _fake_attention_backward(dout: Tensor, lse: Tensor, delta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    attn_bias, block_bias = args[9], args[10]
    accumulate_out, flags, _ = args[OPERANDS:]
    grads = [x.new_empty(x.shape, dtype=lse.dtype if accumulate_out else x.dtype) for x in args[:3]]
    return *grads, lse.new_empty(attn_bias.shape if flags[1] else 0), lse.new_empty(block_bias.shape if flags[2] else 0)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bs_kernels::attention", _fake_attention, lib=_library)
torch.library.register_fake("bs_kernels::attention_backward", _fake_attention_backward, lib=_library)
