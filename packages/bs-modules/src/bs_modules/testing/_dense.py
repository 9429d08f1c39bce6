"""Dense attention under a layout's token mask: the definition that modules are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bs_patterns import BlockLayout


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None = None) -> Tensor:
    """One softmax over the visible keys of every query, computed densely in the inputs' dtype.

    Args:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
        layout: Of the same lengths.
        scale: Multiplies the scores; `None` is `D ** -0.5`.

    Returns:
        `[B, Sq, H, Dv]`; 0 for a query without keys.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    visible = torch.from_numpy(layout.token_mask()).to(q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0) * visible.any(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def assert_matches_dense(out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, what: str = "out") -> None:
    """Raises AssertionError unless `out` is as near the fp64 oracle as a dense computation of its dtype is, twice over.

    Args:
        out: What a module returned for `q`, `k`, `v`.
        q, k, v, layout: As for `dense_attention`.
        what: Named in the message.
    """
    out, q, k, v = (x.detach() for x in (out, q, k, v))
    exact = dense_attention(q.double(), k.double(), v.double(), layout)
    own = dense_attention(q, k, v, layout)
    # The output is rounded once. Any order of summation may cost √n roundings of the longest sum, and an error of a
    # score, at most `largest` in absolute terms, is a relative error of its probability.
    accumulate = torch.promote_types(out.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    largest = scale * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    roundings = math.sqrt(k.shape[1] + q.shape[-1]) * torch.finfo(accumulate).eps / 2 * (1 + largest)
    band = torch.finfo(out.dtype).eps * exact.abs().max() + roundings * v.double().abs().max()
    allowed = 2 * (own.double() - exact).abs().max() + band
    error = (out.double() - exact).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g} against the fp64 oracle, allowed {allowed:.3g}"
