"""Merging attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_attention", "merge_weights"]


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention results of the same queries over disjoint sets of keys into the result over all of them.

    Differentiable. Sums are float32 (float64 for float64 parts). A part without keys (LSE −inf) has no weight,
    whatever its output holds short of NaN.

    Args:
        parts: ``(out, lse)`` pairs: [B, S, H, D] and [B, H, S], as `block_sparse_attention` returns them with
            ``return_lse=True``. Sinks belong to at most one part.

    Returns:
        ``(out, lse)``; ``out`` in the dtype of the first part's, ``lse`` in the accumulation dtype.

    Raises:
        TypeError: not a sequence of pairs of floating tensors.
        ValueError: no parts, or shapes that differ.

    Source:
        ``l = logsumexp(l_i)``, ``o = Σ exp(l_i − l) o_i``: the identity that splits one softmax.
    """
    if isinstance(parts, Tensor) or not isinstance(parts, Sequence):
        raise TypeError(f"parts: expected a sequence of (out, lse) pairs, got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts: expected at least one (out, lse) pair, got none")
    for n, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise TypeError(f"parts[{n}]: expected a pair of tensors (out, lse), got {type(part).__name__}")
        out, lse = part
        if out.ndim != 4 or not out.is_floating_point() or not lse.is_floating_point():
            raise ValueError(f"parts[{n}]: expected floating out [B, S, H, D], got {out.dtype}{list(out.shape)}")
        if out.shape != parts[0][0].shape:
            raise ValueError(f"parts[{n}]: expected out of shape {list(parts[0][0].shape)}, got {list(out.shape)}")
        expected = (out.shape[0], out.shape[2], out.shape[1])
        if lse.shape != expected:
            raise ValueError(f"parts[{n}]: expected lse of shape {list(expected)}, got {list(lse.shape)}")
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in (*outs, *lses)) else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    weights, total = merge_weights(stacked)
    merged = sum(w.transpose(1, 2).unsqueeze(-1) * out.to(dtype) for w, out in zip(weights, outs, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outs[0].dtype), total


def merge_weights(lses: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of every part, and the LSE of all.

    Args:
        lses: [parts, …]; the parts' LSEs, stacked.

    Returns:
        ``exp(lses − total)`` [parts, …], 0 where a part has no key, and ``total`` […], −∞ where none has.
    """
    empty = lses == float("-inf")
    nowhere = empty.all(0)
    # −inf everywhere would make NaN gradients in logsumexp: such queries are computed on zeros and masked after.
    total = torch.logsumexp(lses.masked_fill(nowhere, 0), 0)
    weights = torch.exp((lses - total).masked_fill(empty, 0)).masked_fill(empty, 0)
    return weights, total.masked_fill(nowhere, float("-inf"))
