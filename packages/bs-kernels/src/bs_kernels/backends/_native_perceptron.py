"""Perceptrons of many heads at once by the native core."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _native_lib
from ._native_lib import ISA_NAMES, addresses, team

__all__ = ["MAX_LAYERS", "native_perceptron"]

#: As in csrc/call.h.
MAX_LAYERS, _LANES, _ROWS = 8, 16, 48


class _Perceptron(ctypes.Structure):
    """``bsa_perceptron``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "isa", "num_threads", "layers")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "widest")),
        ("widths", ctypes.c_int64 * (MAX_LAYERS + 1)),
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * MAX_LAYERS),
        ("biases", ctypes.c_void_p * MAX_LAYERS),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


def native_perceptron(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float) -> Tensor | None:
    """`head_perceptron` of plain tensors, in float32.

    Args:
        x, weights, biases: those of `head_perceptron`.
        epsilon: added to the variance.

    Returns:
        [B, H, N, R] in float32; None where the core cannot compute it: other devices, float64, more than `MAX_LAYERS`
        layers, or no core.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or len(weights) > MAX_LAYERS or _native_lib.missing_reason():
        return None
    core, threads = team()
    batch, heads, rows, width = x.shape
    result = weights[-1].shape[2]
    x, widths, layers = x.float().contiguous(), [width], []
    for weight, bias in zip(weights, biases, strict=True):
        short = -weight.shape[2] % _LANES
        if short or widths[-1] != weight.shape[1]:  # zeros stay zeros from layer to layer
            weight, bias = F.pad(weight, (0, short, 0, widths[-1] - weight.shape[1])), F.pad(bias, (0, short))
        layers.append((weight.float().contiguous(), bias.float().contiguous()))
        widths.append(weight.shape[2])
    out = torch.empty((batch, heads, rows, widths[-1]), dtype=torch.float32)
    scratch = torch.empty(threads * 2 * _ROWS * max(widths), dtype=torch.float32)
    spare = [None] * (MAX_LAYERS - len(layers))
    core.run_own(
        "head_perceptron",
        _Perceptron(
            abi_version=_native_lib.ABI_VERSION,
            isa=ISA_NAMES.index(core.isa),
            num_threads=threads,
            layers=len(layers),
            batch=batch,
            heads=heads,
            rows=rows,
            widest=max(widths),
            widths=(*widths, *[0] * len(spare)),
            weights=(*(weight.data_ptr() for weight, _ in layers), *spare),
            biases=(*(bias.data_ptr() for _, bias in layers), *spare),
            epsilon=epsilon,
            **addresses(x=x, out=out, scratch=scratch),
        ),
    )
    return out[..., :result]
