"""What scores of (query block, key block) pairs are made of: perceptrons of each head, and products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._plain import is_plain
from .backends._native_scoring import native_perceptron, native_scores

__all__ = ["block_scores", "head_perceptron"]

_EPSILON = 1e-5  # as torch.nn.LayerNorm
_TERMS = ("mean_max", "mean", "max")


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
        ValueError: shapes or devices that do not fit, or no layers.
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
        _check_device(x.device, **{f"weights[{i}]": weight, f"biases[{i}]": bias})
    if is_plain([x, *weights, *biases]) and (made := native_perceptron(x, weights, biases, _EPSILON)) is not None:
        return made
    wide, dtype = torch.promote_types(x.dtype, torch.float32), dtype or x.dtype
    x = F.layer_norm(x.to(dtype), x.shape[-1:], eps=_EPSILON)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x if i == 0 else F.gelu(x)
        x = x @ weight.to(dtype) + bias.to(dtype)
    return x.to(wide)


def block_scores(
    queries: Tensor,
    keys: Tensor,
    embeddings: tuple[Tensor, Tensor],
    gain: Tensor,
    slope: Tensor,
    distance: Tensor,
    scale: float,
    terms: str = "mean_max",
) -> Tensor:
    """Score every (query block, key block) pair by what pooling left of the blocks.

    With q̄ the mean query, k̄, k⁺ and k⁻ the mean, largest and smallest keys of a block, and f, g the embeddings::

        gain₁ · scale · q̄·k̄  +  gain₂ · scale · (relu(q̄)·k⁺ − relu(−q̄)·k⁻)  +  f·g  +  slope · distance

    The second term bounds every q̄·k in the block from above. On a CPU and without gradients the native core computes
    it, in fp32.

    Args:
        queries: [B, H, QB, P', D] as from `pool_blocks`; the mean is read.
        keys: [B, G, KB, P, D]; P is 1 with the terms `"mean"`, else 3. H is a multiple of G.
        embeddings: f [B, H, QB, R] and g [B, G, KB, R].
        gain: [H, 2].
        slope: [H].
        distance: [QB, KB].
        scale: as of the attention.
        terms: `"mean"` leaves out the second term, `"max"` the first.

    Returns:
        [B, H, QB, KB] in the dtype of ``queries``.

    Raises:
        TypeError: queries, keys and embeddings are not of one floating-point dtype.
        ValueError: shapes or devices that do not fit, or unknown terms.

    Source: the bound: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024.
    """
    _check_scores(queries, keys, embeddings, gain, slope, distance, terms)
    if is_plain([queries, keys, *embeddings, gain, slope, distance]):
        made = native_scores(queries, keys, embeddings, gain, slope, distance, scale, terms)
        if made is not None:
            return made
    dtype, (batch, heads) = queries.dtype, queries.shape[:2]
    groups = heads // keys.shape[1]
    mean, gain = queries[..., 0, :], gain.to(dtype)[:, None, None] * scale
    above = mean.relu()
    factors = [mean * gain[..., 0], above * gain[..., 1], (mean - above) * gain[..., 1]]
    factors = {"mean": factors[:1], "max": factors[1:]}.get(terms, factors)
    keys = (keys[..., 1:, :] if terms == "max" else keys).flatten(-2)
    scores = (slope.to(dtype)[:, None, None] * distance.to(dtype)).expand(batch, -1, -1, -1).flatten(0, 1)
    for left, right in ((torch.cat(factors, dim=-1), keys), embeddings):
        right = right if groups == 1 else right.repeat_interleave(groups, dim=1)
        scores = torch.baddbmm(scores, left.flatten(0, 1), right.flatten(0, 1).transpose(1, 2))
    return scores.unflatten(0, (batch, heads))


def _check_scores(
    queries: Tensor,
    keys: Tensor,
    embeddings: tuple[Tensor, Tensor],
    gain: Tensor,
    slope: Tensor,
    distance: Tensor,
    terms: str,
) -> None:
    if terms not in _TERMS:
        raise ValueError(f"terms: expected one of {', '.join(_TERMS)}, got {terms!r}")
    if len(embeddings) != 2:
        raise ValueError(f"embeddings: expected those of queries and of keys, got {len(embeddings)}")
    if queries.ndim != 5 or not queries.shape[3]:
        raise ValueError(f"queries: expected [B, H, QB, P, D] with at least one part, got {list(queries.shape)}")
    batch, heads, q_blocks, _, dim = queries.shape
    parts = 1 if terms == "mean" else 3
    if keys.ndim != 5 or keys.shape[0] != batch or keys.shape[3:] != (parts, dim):
        raise ValueError(f"keys: expected [{batch}, G, KB, {parts}, {dim}], got {list(keys.shape)}")
    kv_heads, kv_blocks = keys.shape[1:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"keys: expected a number of heads that divides {heads}, got {kv_heads}")
    for name, got in (("keys", keys), ("embeddings[0]", embeddings[0]), ("embeddings[1]", embeddings[1])):
        if not queries.is_floating_point() or got.dtype != queries.dtype:
            raise TypeError(f"{name}: expected the floating-point dtype of queries, {queries.dtype}, got {got.dtype}")
    _check_device(queries.device, keys=keys)
    rank = embeddings[0].shape[-1] if embeddings[0].ndim == 4 else "R"
    for name, got, want in (
        ("embeddings[0]", embeddings[0], [batch, heads, q_blocks, rank]),
        ("embeddings[1]", embeddings[1], [batch, kv_heads, kv_blocks, rank]),
        ("gain", gain, [heads, 2]),
        ("slope", slope, [heads]),
        ("distance", distance, [q_blocks, kv_blocks]),
    ):
        if list(got.shape) != want:
            raise ValueError(f"{name}: expected {want}, got {list(got.shape)}")
        _check_device(queries.device, **{name: got})


def _check_device(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
