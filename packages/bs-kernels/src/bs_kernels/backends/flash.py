"""The `flash` backend: the dense flash-attention kernels inside torch, for layouts that leave nothing out.

On CPUs ``aten::_scaled_dot_product_flash_attention_for_cpu``, on GPUs ``aten::_scaled_dot_product_flash_attention``;
both return the LSE. Causal attention is theirs where queries and keys stand at the same positions.

Their backward takes the output to compute ``Σ_d dout · out``; a backward here is given that number (with the gradient
that arrives through the LSE in it) and no output. So operands get two more columns: zeros in q, k and v, (1, 1) in
dout, and in the place of the output (δ rounded, δ − δ rounded). Then ``Σ_d dout · out`` is δ, and nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Call, Gradients, Needs, Problem

__all__ = ["FlashBackend"]

_MAX_DIM = 256  # of the GPU kernels
_EXTRA = 2
_NEG_INF = float("-inf")


class FlashBackend:
    """Dense attention through torch's own kernels."""

    name = "flash"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        reasons = []
        if problem.dense_offset is None:
            reasons.append("it computes dense layouts, and this one leaves blocks out or has gaps between positions")
        elif problem.causal and (problem.seq_len[0] != problem.seq_len[1] or problem.dense_offset):
            reasons.append("it has causal attention only where queries and keys stand at the same positions")
        refused = {
            "window": problem.window,
            "key padding": problem.key_padding,
            "segment ids": problem.segments,
            "attn_bias": problem.attn_bias is not None,
            "block_bias": problem.block_bias,
            "sinks": problem.sinks,
            "dropout by position": problem.dropout,
            "paged K/V": problem.paged,
        }
        reasons += [f"it has no {what}" for what, asked in refused.items() if asked]
        if problem.device == "cuda":
            reasons += _gpu_reasons(problem)
        elif problem.device == "cpu":
            if problem.dtype not in (torch.float32, torch.float64):  # measured: LSE off by 5e-5, outside the tolerance
                name = str(problem.dtype).removeprefix("torch.")
                reasons.append(f"torch's CPU kernel is less exact in {name} than backends here are held to")
        else:
            reasons.append(f"it runs on CPUs and on CUDA and ROCm GPUs, not on {problem.device}")
        return reasons

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        batch, len_q, heads, _ = call.q.shape
        if call.q.numel() == 0:
            out = call.q.new_zeros((batch, len_q, heads, call.v.shape[3]), dtype=out_dtype)
            return out, call.q.new_full((batch, heads, len_q), _NEG_INF, dtype=call.accumulate_dtype)
        out, lse, *_ = _attend(call, *_operands(call, 0))
        out = out[..., : call.v.shape[3]].transpose(1, 2)
        return out.to(out_dtype).contiguous(), lse[..., :len_q].to(call.accumulate_dtype).contiguous()

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        if call.q.numel() == 0:
            return Gradients(*(torch.zeros_like(x, dtype=grad_dtype) for x in (call.q, call.k, call.v)))
        q, k, v = _operands(call, _EXTRA)
        value_dim, width = call.v.shape[3], v.shape[3]
        do = F.pad(dout.to(q.dtype).transpose(1, 2), (0, width - value_dim))
        out = torch.zeros_like(do)
        do[..., width - _EXTRA :] = 1
        rounded = delta.to(q.dtype)
        out[..., width - 2] = rounded
        out[..., width - 1] = (delta - rounded.to(delta.dtype)).to(q.dtype)
        dq, dk, dv = _differentiate(call, do, q, k, v, out, lse)
        group = call.q.shape[2] // call.k.shape[2]
        return Gradients(
            (dq[..., : call.q.shape[3]] * _sign(call)).transpose(1, 2).to(grad_dtype).contiguous(),
            _to_key_heads(dk[..., : call.k.shape[3]], group, call.accumulate_dtype).to(grad_dtype),
            _to_key_heads(dv[..., :value_dim], group, call.accumulate_dtype).to(grad_dtype),
        )


def _gpu_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"on GPUs it computes float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    widest = max(problem.head_dim, problem.value_dim)
    if _padded(widest + (_EXTRA if problem.backward else 0), "cuda") > _MAX_DIM:
        reasons.append(f"on GPUs it has head dims up to {_MAX_DIM}, less {_EXTRA} with a backward, not {widest}")
    if problem.backward and problem.deterministic:
        reasons.append("on GPUs its backward does not promise the same bits (deterministic=False allows it)")
    if not reasons and not torch.backends.cuda.is_flash_attention_available():
        reasons.append("this torch was built without flash attention")
    return reasons


def _padded(width: int, device: str) -> int:
    return width if device == "cpu" else -(-width // 8) * 8


def _operands(call: Call, extra: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v head-major, as many key heads as query heads, of one width with at least ``extra`` zero columns."""
    width = _padded(max(call.q.shape[3], call.v.shape[3]) + extra, call.q.device.type)
    group = call.q.shape[2] // call.k.shape[2]
    found = []
    # The kernels mask before they scale: a scale that is not positive would turn −∞ around. Its sign goes into q.
    for x, repeats in ((call.q if call.scale > 0 else call.q * _sign(call), 1), (call.k, group), (call.v, group)):
        x = x.detach().transpose(1, 2)
        x = x.repeat_interleave(repeats, 1) if repeats > 1 else x
        found.append(F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x)
    return found[0], found[1], found[2]


def _sign(call: Call) -> int:
    return (call.scale > 0) - (call.scale < 0)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Any:
    causal, scale = call.plan.token_mask.causal, abs(call.scale) or 1.0
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)


def _differentiate(call: Call, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    causal, scale = call.plan.token_mask.causal, abs(call.scale) or 1.0
    if q.device.type == "cpu":
        # The CPU kernel reads rows of the LSE by the strides that its own forward gives it.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    none = torch.empty(0, dtype=torch.int64, device=q.device)  # no dropout, no variable lengths
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, out, lse, none, none, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
    )


def _to_key_heads(gradient: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """[B, Hq, S, X] → [B, S, Hkv, X], the heads of a group summed."""
    if group > 1:
        gradient = gradient.unflatten(1, (-1, group)).to(dtype).sum(2)
    return gradient.transpose(1, 2).contiguous()
