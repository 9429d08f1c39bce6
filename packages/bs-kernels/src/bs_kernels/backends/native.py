"""The native CPU backend: the C++ core of ``csrc/``, called on the tensors in place.

Shape legend: B batch, Hq query heads, Hkv key/value heads, Sq, Sk tokens, D head dim, Dv value head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..philox import dropout_threshold
from . import _native_lib
from ._native_lib import ISA_NAMES, PLAN_LISTS, CoreCall, CoreTensor
from ._results import empty_result
from .base import Call, Gradients, Needs, Problem

__all__ = ["NativeBackend", "native_delta", "native_pool"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeBackend:
    """Block-sparse attention in C++: flash-style forward, deterministic backward, the same bits at any thread count."""

    name = "native"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"it runs on CPU, not on {problem.device}")
        if problem.dtype not in _DTYPES:
            reasons.append(
                f"it computes float32, bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
            )
        if not reasons and (missing := _native_lib.missing_reason()):
            reasons.append(missing)
        return reasons

    def detail(self, problem: Problem) -> str:
        """The instruction set that runs, and why no faster one does."""
        core = _native_lib.load()
        narrow = problem.dtype == torch.bfloat16
        faster = core.faster() if narrow else {}
        return "; ".join([core.engine(narrow), *(f"not {name}: {reason}" for name, reason in faster.items())])

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        batch, q_len, q_heads, _ = call.q.shape
        out = empty_result((batch, q_len, q_heads, call.v.shape[-1]), out_dtype)
        lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32)
        if out.numel() or lse.numel():
            core, args, keep = _arguments(call, out_dtype)
            args.out, args.lse = _tensor(out, keep), lse.data_ptr()
            if call.sinks is not None:
                args.sinks = _keep(call.sinks.detach().to(torch.float32), keep)
            core.run("forward", args)
        return out, lse

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        dq, dk, dv = (empty_result(t.shape, grad_dtype) for t in (call.q, call.k, call.v))
        if call.page_table is not None:  # not every page has a reader
            dk.zero_()
            dv.zero_()
        dbias: Tensor | None = None
        dattn: Tensor | None = None
        if needs.attn_bias and call.attn_bias is not None:
            dattn = torch.zeros(call.attn_bias.shape, dtype=torch.float32)
        if needs.block_bias and call.block_bias is not None:
            # Where every batch element and head has slots of its own, they share one buffer: B · Hq times less memory.
            alone = (call.plan.batch, call.plan.heads) == (call.q.shape[0], call.q.shape[2])
            alone = alone and call.block_bias.shape[:2] == (1, 1)
            owners = (1, 1) if alone else (call.q.shape[0], call.q.shape[2])
            dbias = torch.zeros((*owners, call.block_bias.shape[-1]), dtype=torch.float32)
        if dq.numel() + dk.numel() + dv.numel():
            core, args, keep = _arguments(call, grad_dtype)
            args.dout = _tensor(dout.to(call.q.dtype), keep)
            args.dq, args.dk, args.dv = (_tensor(t, keep) for t in (dq, dk, dv))
            args.lse, args.delta = _keep(lse, keep), _keep(delta, keep)
            if dbias is not None:
                args.dblock_bias = dbias.data_ptr()
                if dbias.shape[:2] == (1, 1):
                    args.bias_entries = 0  # the distance between two owners
            if dattn is not None:
                args.dattn_bias = dattn.data_ptr()
                strides = _broadcast_strides(dattn)
                args.dattn_bias_batch, args.dattn_bias_head, args.dattn_bias_query, args.dattn_bias_key = strides
            core.run("backward", args)
        if dbias is not None and call.block_bias is not None:
            dbias = dbias.sum_to_size(call.block_bias.shape)
        return Gradients(dq, dk, dv, dattn, dbias)


def native_delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor | None:
    """`attention_delta` in one pass over plain tensors, without temporaries.

    Args:
        dout, out, lse, dlse: those of `attention_delta`.

    Returns:
        [B, H, S] in float32, outside autograd; None where the core cannot compute it: other devices and dtypes, shapes
        that broadcast, or no core.
    """
    if out.ndim != 4:
        return None
    batch, q_len, q_heads, v_dim = out.shape
    given = (lse,) if dlse is None else (lse, dlse)
    if any(x.dtype != torch.float32 or x.shape != (batch, q_heads, q_len) for x in given):
        return None
    if dout.shape != out.shape or not out.numel() or dout.dtype not in _DTYPES or out.dtype not in _DTYPES:
        return None
    if any(x.device.type != "cpu" for x in (dout, out, *given)) or _native_lib.missing_reason():
        return None
    core, keep = _native_lib.load(), []
    delta = torch.empty(lse.shape, dtype=torch.float32)
    args = _bare(
        core,
        dtype=_DTYPES[dout.dtype],
        result_dtype=_DTYPES[out.dtype],
        batch=batch,
        q_heads=q_heads,
        q_len=q_len,
        v_dim=v_dim,
        dout=_tensor(dout, keep),
        out=_tensor(out, keep),
        lse=_keep(lse, keep),
        dlse=None if dlse is None else _keep(dlse, keep),
        delta=delta.data_ptr(),
    )
    core.run_at_once("delta", args)
    return delta


def native_pool(x: Tensor, block_size: int, parts: int, first: int) -> Tensor | None:
    """`pool_blocks` in one pass over a plain tensor.

    Args:
        x, block_size, parts, first: those of `pool_blocks`.

    Returns:
        [B, H, N, P, D] in float32, outside autograd; None where the core cannot compute it: other devices and dtypes,
        or no core.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or not x.numel() or _native_lib.missing_reason():
        return None
    core, keep = _native_lib.load(), []
    batch, tokens, heads, dim = x.shape
    bounds = torch.arange(first - block_size, tokens + block_size, block_size, dtype=torch.int32).clamp_(0, tokens)
    blocks = len(bounds) - 1
    made = torch.empty((batch, heads, blocks, parts, dim), dtype=torch.float32)
    args = _bare(
        core,
        dtype=_DTYPES[x.dtype],
        batch=batch,
        kv_heads=heads,
        q_heads=heads,
        kv_len=tokens,
        dim=dim,
        v_dim=parts * dim,
        kv_blocks=blocks,
        kv_bounds=_keep(bounds, keep),
        k=_tensor(x, keep),
        out=_tensor(made.flatten(3).transpose(1, 2), keep),
    )
    core.run_at_once("pool", args)
    return made


def _keep(tensor: Tensor, keep: list[Tensor]) -> int:
    """The address of a contiguous copy of ``tensor`` that lives as long as ``keep``."""
    tensor = tensor.contiguous()
    keep.append(tensor)
    return tensor.data_ptr()


def _tensor(tensor: Tensor, keep: list[Tensor]) -> CoreTensor:
    """A 4-D tensor as the core sees it; copied only if its last dim is strided."""
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        tensor = tensor.contiguous()
    keep.append(tensor)
    batch, token, head, _ = tensor.stride()
    return CoreTensor(tensor.data_ptr(), batch, token, head)


def _broadcast_strides(tensor: Tensor) -> list[int]:
    """Strides with 0 where a dimension broadcasts."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _bare(core: _native_lib.NativeCore, **given: Any) -> CoreCall:
    """The arguments of a call without a plan; those not given are 1 where the core asks for a positive number."""
    needed = {"kv_heads": 1, "dim": 1, "layouts": 1, "layout_heads": 1}
    return CoreCall(
        abi_version=_native_lib.ABI_VERSION,
        isa=ISA_NAMES.index(core.isa),
        num_threads=core.threads,
        **needed | given,
    )


def _arguments(call: Call, result_dtype: torch.dtype) -> tuple[_native_lib.NativeCore, CoreCall, list[Tensor]]:
    """The core, the arguments that forward and backward share, and the tensors to keep alive."""
    core = _native_lib.load()
    plan, keep = call.plan, []
    batch, q_len, q_heads, dim = call.q.shape
    band_lo, band_hi = plan.token_mask.band
    args = CoreCall(
        abi_version=_native_lib.ABI_VERSION,
        isa=ISA_NAMES.index(core.isa),
        num_threads=core.threads,
        dtype=_DTYPES[call.q.dtype],
        result_dtype=_DTYPES[result_dtype],
        batch=batch,
        q_heads=q_heads,
        kv_heads=call.k.shape[2],
        q_len=q_len,
        kv_len=plan.seq_len[1],
        dim=dim,
        v_dim=call.v.shape[-1],
        scale=call.scale,
        layouts=plan.batch,
        layout_heads=plan.heads,
        q_blocks=plan.q_blocks,
        kv_blocks=plan.kv_blocks,
        band_lo=band_lo,
        band_hi=band_hi,
        q=_tensor(call.q, keep),
        k=_tensor(call.k, keep),
        v=_tensor(call.v, keep),
        **{name: getattr(plan, name).data_ptr() for name in PLAN_LISTS},
    )
    if call.key_padding_mask is not None:
        args.key_padding = _keep(call.key_padding_mask, keep)
    if call.q_segments is not None and call.kv_segments is not None:
        args.q_segments = _keep(call.q_segments, keep)
        args.kv_segments = _keep(call.kv_segments, keep)
    if call.block_bias is not None:
        bias = call.block_bias.detach().to(torch.float32)
        args.block_bias = _keep(bias, keep)
        entries = args.bias_entries = bias.shape[-1]
        args.bias_head = entries if bias.shape[1] > 1 else 0
        args.bias_batch = bias.shape[1] * entries if bias.shape[0] > 1 else 0
    if call.attn_bias is not None:
        bias = call.attn_bias.detach()
        args.attn_bias_bool = bias.dtype == torch.bool
        for dim, stride in enumerate(bias.stride()):
            if stride == 0:  # expanded: a copy in another dtype must not fill it in
                bias = bias.narrow(dim, 0, min(1, bias.shape[dim]))
        if not args.attn_bias_bool:
            bias = bias.to(torch.float32)
        keep.append(bias)
        args.attn_bias = bias.data_ptr()
        strides = _broadcast_strides(bias)
        args.attn_bias_batch, args.attn_bias_head, args.attn_bias_query, args.attn_bias_key = strides
    if call.page_table is not None:
        args.page_table = _keep(call.page_table.to(torch.int32), keep)
        args.pages = call.k.shape[0]
    if call.dropout_p and call.dropout_seed is not None:
        args.dropout_seed = _keep(call.dropout_seed, keep)
        args.dropout_threshold = dropout_threshold(call.dropout_p)
        args.dropout_scale = 1 / (1 - call.dropout_p)
        args.first_batch, args.first_head = call.first_batch, call.first_head
    return core, args, keep
