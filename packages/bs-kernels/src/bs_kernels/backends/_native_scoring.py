"""Scores of pairs of blocks by the native core."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _native_lib
from ._native_lib import ISA_NAMES, addresses

__all__ = ["native_perceptron", "native_scores"]

#: As in csrc/call.h.
_LANES, _MAX_LAYERS, _PERCEPTRON_ROWS, _SCORE_ROWS, _SCORE_LANES = 16, 8, 48, 48, 128


class _Perceptron(ctypes.Structure):
    """``bsa_perceptron``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "isa", "num_threads", "layers")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "widest")),
        ("widths", ctypes.c_int64 * (_MAX_LAYERS + 1)),
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * _MAX_LAYERS),
        ("biases", ctypes.c_void_p * _MAX_LAYERS),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


class _Scores(ctypes.Structure):
    """``bsa_scores``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "isa", "num_threads", "means", "extremes")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("batch", "q_heads", "kv_heads", "q_blocks", "kv_blocks", "dim")),
        *((name, ctypes.c_int64) for name in ("q_parts", "kv_parts", "rank")),
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "f", "g", "gain", "slope", "distance", "scores")),
        ("workspace", ctypes.c_void_p),
        ("workspace_floats", ctypes.c_int64),
    )


def native_perceptron(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float) -> Tensor | None:
    """`head_perceptron` of plain tensors, in float32.

    Args:
        x, weights, biases: those of `head_perceptron`.
        epsilon: added to the variance.

    Returns:
        [B, H, N, R] in float32; None where the core cannot compute it: other devices, float64, more than 8
        layers, or no core.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or len(weights) > _MAX_LAYERS or _native_lib.missing_reason():
        return None
    core = _native_lib.load()
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
    scratch = torch.empty(core.threads * 2 * _PERCEPTRON_ROWS * max(widths), dtype=torch.float32)
    spare = [None] * (_MAX_LAYERS - len(layers))
    core.run_own(
        "head_perceptron",
        _Perceptron(
            abi_version=_native_lib.ABI_VERSION,
            isa=ISA_NAMES.index(core.isa),
            num_threads=core.threads,
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


def native_scores(
    queries: Tensor,
    keys: Tensor,
    embeddings: tuple[Tensor, Tensor],
    gain: Tensor,
    slope: Tensor,
    distance: Tensor,
    scale: float,
    terms: str,
) -> Tensor | None:
    """`block_scores` of plain tensors, in float32.

    Args:
        queries, keys, embeddings, gain, slope, distance, scale, terms: those of `block_scores`.

    Returns:
        [B, H, QB, KB] in float32; None where the core cannot compute it: other devices, float64, or no core.
    """
    given = (queries, keys, *embeddings)
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in given) or _native_lib.missing_reason():
        return None
    core = _native_lib.load()
    batch, heads, q_blocks, q_parts, dim = queries.shape
    kv_heads, kv_blocks, kv_parts = keys.shape[1:4]
    rank, means, extremes = embeddings[0].shape[-1], terms != "max", terms != "mean"
    arrays = {"queries": queries, "keys": keys, "f": embeddings[0], "g": embeddings[1]}
    arrays |= {"gain": gain, "slope": slope, "distance": distance}
    arrays = {name: x.float().contiguous() for name, x in arrays.items()}
    width = _whole(dim * (means + 2 * extremes)) + _whole(rank)
    panels = batch * kv_heads * width * _whole(kv_blocks)
    workspace = torch.empty(panels + core.threads * _SCORE_ROWS * (width + _SCORE_LANES), dtype=torch.float32)
    scores = torch.empty((batch, heads, q_blocks, kv_blocks), dtype=torch.float32)
    core.run_own(
        "block_scores",
        _Scores(
            abi_version=_native_lib.ABI_VERSION,
            isa=ISA_NAMES.index(core.isa),
            num_threads=core.threads,
            means=means,
            extremes=extremes,
            scale=scale,
            batch=batch,
            q_heads=heads,
            kv_heads=kv_heads,
            q_blocks=q_blocks,
            kv_blocks=kv_blocks,
            dim=dim,
            q_parts=q_parts,
            kv_parts=kv_parts,
            rank=rank,
            workspace_floats=workspace.numel(),
            **addresses(**arrays, scores=scores, workspace=workspace),
        ),
    )
    return scores


def _whole(n: int) -> int:
    return -(-n // _LANES) * _LANES
