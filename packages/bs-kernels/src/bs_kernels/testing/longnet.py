"""LongNet's definition as dense masks, and the float64 oracle of `dilated_attention` made of them.

Nothing here shares code with `bs_kernels.dilated`: a mask is three comparisons of positions, and the multiset of keys
is an attention over the keys repeated once per branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout

from .case import Case
from .oracle import dense_results, oracle_results
from .tolerance import rounding_band

__all__ = ["DilatedCase", "branch_masks", "check_dilated_against_oracle", "make_dilated_case"]

_NEG_INF = float("-inf")


@dataclass(frozen=True, eq=False)
class DilatedCase:
    """One call of `dilated_attention` with what a backward pass needs.

    Attributes:
        q, k, v: the operands.
        segment_lengths, dilation_rates: the branches.
        dout, dlse: cotangents of the results; that of the LSE is used where it is finite.
        arguments: keyword arguments of the call, but for ``backend`` and ``return_lse``. The oracle knows a boolean
            ``attn_bias`` only, and no ``segment_layout``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    dout: Tensor
    dlse: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        given = {name: list(x.shape) if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        shapes = ", ".join(f"{name}={list(x.shape)}" for name, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        branches = f"w={list(self.segment_lengths)}, r={list(self.dilation_rates)}"
        return f"DilatedCase({shapes}, dtype={self.q.dtype}, {branches}, arguments={given})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would print every element


def make_dilated_case(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    seed: int = 0,
    batch: int = 1,
    seq_len: tuple[int, int] = (24, 24),
    q_heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> DilatedCase:
    """Random operands. "attn_bias", "key_padding_mask" and "segment_ids" may be True, and are then drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = head_dim if value_dim is None else value_dim
    (len_q, len_kv), wide = seq_len, torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    draw = {
        "attn_bias": lambda: torch.rand(batch, q_heads, len_q, len_kv, generator=generator) < 0.7,
        "key_padding_mask": lambda: torch.rand(batch, len_kv, generator=generator) < 0.7,
        "segment_ids": lambda: tuple(
            torch.randint(0, 3, (batch, length), generator=generator).sort(-1).values for length in (len_q, len_kv)
        ),
    }
    return DilatedCase(
        q=normal(batch, len_q, q_heads, head_dim),
        k=normal(batch, len_kv, kv_heads, head_dim),
        v=normal(batch, len_kv, kv_heads, value_dim),
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        dout=normal(batch, len_q, q_heads, value_dim),
        dlse=normal(batch, q_heads, len_q, of=wide),
        arguments={name: draw[name]() if x is True and name in draw else x for name, x in arguments.items()},
    )


def branch_masks(
    q_positions: Tensor,
    kv_positions: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    *,
    causal: bool = False,
) -> Tensor:
    """Which keys each query sees under each branch: bool[branches, heads, Sq, Sk].

    Source:
        The definition in `bs_kernels.dilated`, word for word.
    """
    masks = []
    i, j = q_positions[:, None], kv_positions[None, :]
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        per_head = []
        for h in range(heads):
            keeps_i, keeps_j = i % w % r == h % r, j % w % r == h % r
            sees = keeps_i & keeps_j & (i.div(w, rounding_mode="floor") == j.div(w, rounding_mode="floor"))
            per_head.append(sees & (j <= i) if causal else sees)
        masks.append(torch.stack(per_head))
    return torch.stack(masks)


def _positions(case: DilatedCase) -> tuple[Tensor, Tensor]:
    """Absolute positions of queries and keys."""
    len_q, len_kv = case.q.shape[1], case.k.shape[1]
    kv_start, q_start = case.arguments.get("kv_start", 0), case.arguments.get("q_start")
    q_start = kv_start + len_kv - len_q if q_start is None else q_start
    return q_start + torch.arange(len_q), kv_start + torch.arange(len_kv)


def _masks_of(case: DilatedCase) -> Tensor:
    """bool[branches, B, Hq, Sq, Sk] with padding and segment ids taken out and, for a union, what came earlier."""
    given, batch = case.arguments, case.q.shape[0]
    masks = branch_masks(
        *_positions(case),
        case.segment_lengths,
        case.dilation_rates,
        case.q.shape[2],
        causal=given.get("causal", False),
    )
    masks = masks.unsqueeze(1).expand(-1, batch, -1, -1, -1)
    if (padding := given.get("key_padding_mask")) is not None:
        masks = masks & padding[:, None, None, :]
    if (ids := given.get("segment_ids")) is not None:
        of_query, of_key = ids if isinstance(ids, tuple) else (ids, ids)
        masks = masks & (of_query[:, None, :, None] == of_key[:, None, None, :])
    bias = given.get("attn_bias")
    if bias is not None and bias.dtype == torch.bool:
        masks = masks & bias
    if given.get("combine") == "union":
        first = masks.clone()
        for at in range(1, len(masks)):
            first[at] &= ~masks[:at].any(0)
        masks = first
    return masks


def _as_attention(case: DilatedCase, masks: Tensor, dout: Tensor, dlse: Tensor) -> Case:
    """The case as plain attention over the keys of all ``masks``, one after another."""
    branches, len_q, len_kv = len(masks), case.q.shape[1], case.k.shape[1] * len(masks)
    active = np.ones((1, -(-len_q // 64), -(-len_kv // 64)), np.bool_)
    q_positions, kv_positions = _positions(case)
    passed = {name: case.arguments[name] for name in ("scale", "dropout_p", "dropout_seed") if name in case.arguments}
    return Case(
        case.q,
        case.k.repeat(1, branches, 1, 1),
        case.v.repeat(1, branches, 1, 1),
        BlockLayout.from_dense(active, block_size=64, seq_len=(len_q, len_kv)),
        dout,
        dlse,
        {"attn_bias": torch.cat(tuple(masks), -1), **passed},
        q_positions=q_positions,
        kv_positions=kv_positions.repeat(branches),
    )


def _folded(found: dict[str, Tensor], branches: int) -> dict[str, Tensor]:
    """Results of `_as_attention`, the copies of each key summed."""
    sums = {name: found[name].unflatten(1, (branches, -1)).sum(1) for name in ("k", "v")}
    return {name: found[name] for name in ("out", "lse", "q")} | sums


Results = dict[str, Tensor]


def _results(case: DilatedCase) -> tuple[Results, Results, Results]:
    """The float64 oracle, a dense computation in the case's dtype, and the rounding band."""
    masks = _masks_of(case)
    whole = _as_attention(case, masks, case.dout, case.dlse)
    oracle = oracle_results(whole)
    everything = (oracle, dense_results(whole), rounding_band(whole, oracle))
    merged = [_folded({**x, "out": x["out"].double()}, len(masks)) for x in everything]
    if case.arguments.get("combine") != "longnet":
        return merged[0], merged[1], merged[2]
    # No gradient through the weights: every branch is an attention by itself whose output is multiplied by a constant,
    # and whose LSE has its share in the whole one.
    wide = _as_attention(case, masks, case.dout.double(), case.dlse.double())
    lse = oracle["lse"]
    totals: list[Results] = [{}, {}, {}]
    for mask in masks:
        alone = oracle_results(_as_attention(case, mask[None], wide.dout, wide.dlse))
        share = torch.where(alone["lse"] == _NEG_INF, 0, torch.exp(alone["lse"] - lse.masked_fill(lse == _NEG_INF, 0)))
        dout = wide.dout * share.transpose(1, 2).unsqueeze(-1)
        branch = _as_attention(case, mask[None], dout, wide.dlse * share)
        exact = oracle_results(branch)
        for total, found in zip(totals, (exact, dense_results(branch), rounding_band(branch, exact)), strict=True):
            for name in ("q", "k", "v"):
                total[name] = total.get(name, 0) + found[name].double()
    first, second, third = (values | total for values, total in zip(merged, totals, strict=True))
    return first, second, third


def check_dilated_against_oracle(
    case: DilatedCase, function: Callable[..., tuple[Tensor, Tensor]], **extra: Any
) -> dict[str, Tensor]:
    """Evaluate `dilated_attention`, or a function called like it, forward and backward, and check every result.

    Args:
        case: the case.
        function: called with ``return_lse=True``.
        extra: further keyword arguments, ``backend`` for example.

    Returns:
        "out", "lse" and the gradients "q", "k" and "v".

    Raises:
        AssertionError: a result is further from the oracle than twice the error of a dense computation in the same
            dtype plus the rounding band, or infinite where the oracle is not.
    """
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in ("q", "k", "v")}
    out, lse = function(
        *leaves.values(), case.segment_lengths, case.dilation_rates, return_lse=True, **case.arguments, **extra
    )
    finite = torch.where(lse.detach() == _NEG_INF, 0, lse)
    loss = (out * case.dout.to(out.dtype)).sum() + (finite * case.dlse.to(lse.dtype)).sum()
    got = {"out": out.detach(), "lse": lse.detach()} | dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    )
    oracle, dense, band = _results(case)
    for name, actual in got.items():
        want = oracle[name]
        assert actual.shape == want.shape, f"{name}: expected shape {list(want.shape)}, got {list(actual.shape)}"
        assert torch.equal(actual.isinf(), want.isinf()), f"{name}: infinite where the oracle is not, or the reverse"
        ends = want.isfinite()
        error = torch.where(ends, (actual.double() - want).abs(), 0)
        yardstick = torch.where(ends, (dense[name].double() - want).abs(), 0).max()
        excess = error - (2 * yardstick + band[name])
        assert not bool(actual.isnan().any()), f"{name}: NaN: {case}"
        assert not bool((excess > 0).any()), (
            f"{name}: off by {float(error.max()):.3g}; a dense computation is off by {float(yardstick):.3g} and the "
            f"rounding band is at most {float(band[name].max()):.3g}: {case}"
        )
    return got
