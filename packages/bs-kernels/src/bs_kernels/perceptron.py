"""Small perceptrons, one per head: what scorers of blocks are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._plain import is_plain
from .backends._native_perceptron import native_perceptron

__all__ = ["head_perceptron"]

_EPSILON = 1e-5  # as torch.nn.LayerNorm


def head_perceptron(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise every row, then apply linear layers with GELU between them; each head has weights of its own.

    On a CPU and without gradients the native core does it in one pass, in fp32.

    Args:
        x: [B, H, N, W], floating point.
        weights: one [H, W_i, W_i+1] per layer, at least one; W_0 is W.
        biases: one [H, 1, W_i+1] per layer.
        dtype: what the layers compute in elsewhere; None: the dtype of ``x``.

    Returns:
        [B, H, N, R] for the width R of the last layer, in fp32 (fp64 for fp64 inputs). There is no GELU after the last
        layer.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: shapes that do not fit, or no layers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 4 or not x.shape[3]:
        raise ValueError(f"x: expected [B, H, N, W] with at least one feature, got {list(x.shape)}")
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights, biases: expected one of each per layer, got {len(weights)} and {len(biases)}")
    width = x.shape[3]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim != 3 or weight.shape[:2] != (x.shape[1], width) or not weight.shape[2]:
            raise ValueError(f"weights[{i}]: expected [{x.shape[1]}, {width}, width], got {list(weight.shape)}")
        width = weight.shape[2]
        if bias.shape != (x.shape[1], 1, width):
            raise ValueError(f"biases[{i}]: expected {[x.shape[1], 1, width]}, got {list(bias.shape)}")
    if is_plain([x, *weights, *biases]) and (made := native_perceptron(x, weights, biases, _EPSILON)) is not None:
        return made
    wide, dtype = torch.promote_types(x.dtype, torch.float32), dtype or x.dtype
    x = F.layer_norm(x.to(dtype), x.shape[-1:], eps=_EPSILON)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x if i == 0 else F.gelu(x)
        x = x @ weight.to(dtype) + bias.to(dtype)
    return x.to(wide)
