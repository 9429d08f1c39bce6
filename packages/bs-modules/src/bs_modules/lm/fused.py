"""Autograd functions that do a transformer block's element-wise work in few passes over memory.

On a CPU, eager RMSNorm, rotary embedding and SwiGLU cost as much as the matrix products around them, most of it in
temporaries and in copies between projections. Each function here reads and writes every activation about once.

Shape legend: B batch, S tokens, H heads, D head dim, E = H · D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-6


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) over the last dimension; the gain is folded into the weight that follows."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor) -> Tensor:
        scale_BS1 = _inverse_rms(x_BSE)
        y_BSE = x_BSE * scale_BS1
        ctx.save_for_backward(y_BSE, scale_BS1)
        return y_BSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSE: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_BSE, scale_BS1 = ctx.saved_tensors
        return _rms_norm_backward(dy_BSE, y_BSE, scale_BS1)


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) · up, from one fused projection [gate | up] and back into one gradient for it."""

    @staticmethod
    def forward(ctx: Any, x_BSG: Tensor) -> Tensor:
        gate_BSF, up_BSF = x_BSG.chunk(2, dim=-1)
        activated_BSF = F.silu(gate_BSF)
        ctx.save_for_backward(x_BSG, activated_BSF)
        return activated_BSF * up_BSF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BSF: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BSG, activated_BSF = ctx.saved_tensors
        gate_BSF, up_BSF = x_BSG.chunk(2, dim=-1)
        dx_BSG = torch.empty_like(x_BSG)
        dgate_BSF, dup_BSF = dx_BSG.chunk(2, dim=-1)
        torch.mul(activated_BSF, dh_BSF, out=dup_BSF)
        torch.ops.aten.silu_backward.grad_input(dh_BSF * up_BSF, gate_BSF, grad_input=dgate_BSF)
        return dx_BSG


class _NormRotate(torch.autograd.Function):
    """Splits a fused projection into q, k, v; rotates q and k by position and normalises them per head."""

    @staticmethod
    def forward(ctx: Any, qkv_BS3E: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = *qkv_BS3E.shape[:2], qkv_BS3E.shape[2] // 3
        first, second, v = qkv_BS3E.split(width, dim=-1)
        both = qkv_BS3E.new_empty(2, batch, tokens, heads, 2, width // heads // 2)  # q and k, head by head
        into = both.permute(4, 1, 2, 0, 3, 5)
        into[0] = torch.addcmul(first * cosine, second, sine, value=-1).view(into[0].shape)
        into[1] = torch.addcmul(second * cosine, first, sine).view(into[1].shape)
        # A rotation keeps norms, so normalising after it is the same function as before it.
        both = both.flatten(-2)
        scale = _inverse_rms(both)
        q_BSHD, k_BSHD = both.mul_(scale)
        ctx.save_for_backward(q_BSHD, k_BSHD, scale, cosine, sine)
        return q_BSHD, k_BSHD, v.unflatten(-1, (heads, -1)).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, None, None, None]:
        q_BSHD, k_BSHD, scale, cosine, sine = ctx.saved_tensors
        batch, tokens, heads, dim = q_BSHD.shape
        width = heads * dim
        halves = q_BSHD.new_empty(2, batch, tokens, 2, heads, dim // 2)
        for i, (grad, y) in enumerate(((dq, q_BSHD), (dk, k_BSHD))):
            normalised = _rms_norm_backward(grad, y, scale[i]).unflatten(-1, (2, dim // 2))
            halves[:, :, :, i] = normalised.permute(3, 0, 1, 2, 4)
        first, second = halves.view(2, batch, tokens, width)
        dqkv_BS3E = q_BSHD.new_empty(batch, tokens, 3 * width)
        into_first, into_second, into_v = dqkv_BS3E.split(width, dim=-1)
        torch.addcmul(first * cosine, second, sine, out=into_first)
        torch.addcmul(second * cosine, first, sine, value=-1, out=into_second)
        into_v.copy_(dv.flatten(-2))
        return dqkv_BS3E, None, None, None


def rms_norm(x_BSE: Tensor) -> Tensor:
    """Root-mean-square normalisation without a gain, over the last dimension.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    return _RMSNorm.apply(x_BSE)  # pyright: ignore[reportReturnType]


def swiglu(x_BSG: Tensor) -> Tensor:
    """SwiGLU of a fused projection: `[B, S, 2 F] → [B, S, F]`, gate first.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    return _SwiGLU.apply(x_BSG)  # pyright: ignore[reportReturnType]


def fuse_qkv(qkv_3EE: Tensor, heads: int) -> Tensor:
    """Query, key and value weights as one, in the row order that `norm_rotate` reads: `[3, E, E] → [3 E, E]`.

    First come the first halves of every query and key head, then their second halves, then the values, so that the
    rotation works on long contiguous runs.
    """
    _, width, width_in = qkv_3EE.shape
    qk = qkv_3EE[:2].view(2, heads, 2, width // heads // 2, width_in).permute(2, 0, 1, 3, 4)
    return torch.cat((qk.reshape(2 * width, width_in), qkv_3EE[2]))


def norm_rotate(qkv_BS3E: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection to attention inputs.

    Args:
        qkv_BS3E: `[B, S, 3 E]`, by a weight from `fuse_qkv`.
        cosine: `[1, S, E]` from `rotary_table`, in the dtype of `qkv_BS3E`.
        sine: Likewise.
        heads: H.

    Returns:
        `q`, `k` (rotated, RMS-normalised per head) and `v`, each `[B, S, H, D]` and contiguous.
    """
    return _NormRotate.apply(qkv_BS3E, cosine, sine, heads)  # pyright: ignore[reportReturnType]


def rotary_table(
    positions: Tensor, heads: int, head_dim: int, dtype: torch.dtype, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, repeated for every query and key head: two `[1, S, E]`.

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), half-split form.
    """
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None] * frequency
    cosine, sine = (table.to(dtype).repeat(1, 2 * heads)[None] for table in (angle.cos(), angle.sin()))
    return cosine, sine


def _inverse_rms(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # accumulates in fp32
    return (
        norm.to(torch.promote_types(x.dtype, torch.float32))
        .square_()
        .div_(x.shape[-1])
        .add_(EPSILON)
        .rsqrt_()
        .to(x.dtype)
    )


def _rms_norm_backward(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """dx = scale · (dy − y · mean(dy · y)); exact but for EPSILON, which it leaves out."""
    mean = torch.linalg.vecdot(dy, y)[..., None].div_(y.shape[-1])
    return torch.addcmul(dy, y, mean, value=-1).mul_(scale)
