"""Exact LongNet: dilated attention at token granularity, with per-head offsets, on any block-sparse backend.

**Definition.** A branch is a segment length w with a dilation rate r. Positions are absolute. Head h *keeps* position p
in it iff ``(p mod w) mod r = h mod r``: in every segment of w positions, those whose index in the segment is h mod r,
by steps of r. Under a branch, query i of head h *sees* key j iff

    head h keeps i,  head h keeps j,  ⌊i / w⌋ = ⌊j / w⌋,  and j ≤ i if causal,

where h is always the query head, also with grouped key heads: head h then reads these positions of its key head. Key
padding and segment ids take keys away on top. Let a_b and l_b be the softmax attention and the log-sum-exp of a query
over the keys that it sees under branch b. A query that a branch does not keep sees nothing under it, and l_b = −∞.

- ``softmax``: ``Σ_b exp(l_b − l) a_b`` with ``l = log Σ_b exp(l_b)``: one softmax over the keys of all branches, where
  a key that is seen under two of them counts twice.
- ``longnet``: the same value; no gradient through the weights ``exp(l_b − l)``.
- ``union``: one softmax over the keys that are seen under at least one branch, each once.

Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023 (arXiv 2307.02486), sections 3.2 and
3.3; its weights are the shares of the branches' softmax denominators, which is the formula above. The released code
(torchscale) computes the weights without gradient, and gives heads their offsets in runs, ``⌊h / ⌈H / r⌉⌋`` instead of
``h mod r``: the same function up to the order of the heads where r divides H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._arguments import (
    check_attn_bias,
    check_dropout,
    check_flag,
    check_operands,
    check_padding,
    check_scale,
    check_segments,
    make_call,
)
from ._dilated_masks import bias_of_rows, dropout_mask
from ._dilated_pieces import overlap_mask
from ._dilated_plan import COMBINE, DilatedPlan, PlannedPiece, Question, SegmentLayout, ask
from .api import gradient_flags
from .dispatch import get_backend
from .merge import merge_weights
from .op import run_forward
from .plan import LayoutPlan

__all__ = ["COMBINE", "DilatedPlan", "dilated_attention"]

Combine = Literal["softmax", "longnet", "union"]
SegmentIds = Tensor | tuple[Tensor, Tensor] | None

_NEG_INF = float("-inf")


class DilatedArguments(TypedDict, total=False):
    """The optional arguments of `dilated_attention`, but for ``return_lse``."""

    causal: bool
    combine: Combine
    key_padding_mask: Tensor | None
    segment_ids: SegmentIds
    attn_bias: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    segment_layout: SegmentLayout | None
    scale: float | None
    q_start: int | None
    kv_start: int
    deterministic: bool
    backend: str
    plan: DilatedPlan | None


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    return_lse: Literal[False] = False,
    **arguments: Unpack[DilatedArguments],
) -> Tensor: ...


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    return_lse: Literal[True],
    **arguments: Unpack[DilatedArguments],
) -> tuple[Tensor, Tensor]: ...


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = False,
    combine: Combine = "softmax",
    key_padding_mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    segment_layout: SegmentLayout | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    kv_start: int = 0,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
    plan: DilatedPlan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact LongNet attention: the definition at the top of `bs_kernels.dilated`, at token granularity.

    Any lengths: the last segment may be short, w need not be a multiple of r, branches need not nest. Time and memory
    are linear in tokens: a branch computes S · w / r² pairs per head. Differentiable in q, k and v, through the output
    and the LSE, twice in eager mode. A query that sees no key gets output 0, LSE −inf and zero gradients.

    ``attn_bias`` and dropout cost one byte (a floating bias: its element) per pair that is computed, beside the time to
    gather or draw it; dropout computes every pair twice.

    Args:
        q: [B, Sq, Hq, D]; float16, bfloat16, float32 or float64. Any strides.
        k: [B, Sk, Hkv, D] with ``Hq % Hkv == 0``.
        v: [B, Sk, Hkv, Dv].
        segment_lengths: w of every branch, in tokens, ≥ 1.
        dilation_rates: r of every branch, ≥ 1; as many.
        causal: mask keys after the query.
        combine: "softmax", "longnet" or "union". "union" makes a mask of one byte per pair unless branches nest: sorted
            by rate, each length and rate is a multiple of those before it, and each length of the rates after it.
        key_padding_mask: bool[B, Sk], True = a real token.
        segment_ids: int[B, S], or a (query, key) pair: a query attends only to keys of its own id (packed documents;
            LongNet's segments are not moved by them).
        attn_bias: broadcasts to [B, Hq, Sq, Sk]; bool (True = attend) or floating (added to scaled scores), then
            differentiable.
        dropout_p: probability in [0, 1) of dropping an attention weight, by absolute position: a key that is seen under
            two branches is dropped from both or from none.
        dropout_seed: as in `block_sparse_attention`.
        segment_layout: block-sparse attention inside every segment: a function from n, the number of tokens that a head
            keeps in a segment, to a `BlockLayout` of (n, n) tokens and one head. None for dense segments. Not with
            "union", whose branches it would leave undefined.
        scale: multiplies q · k; None for 1/√D.
        q_start: absolute position of the first query; None aligns the last query with the last key.
        kv_start: absolute position of the first key. With ``q_start``, the results of shards of the keys merge by
            `merge_attention` into those of all keys ("longnet": the values do).
        return_lse: also return the log-sum-exp ("longnet": its gradient is not cut off).
        deterministic: as in `block_sparse_attention`.
        backend: as in `block_sparse_attention`.
        plan: from `DilatedPlan.build` with the same arguments; needed under ``torch.compile(fullgraph=True)`` only.

    Returns:
        ``out`` [B, Sq, Hq, Dv] in q's dtype, or ``(out, lse)`` with lse [B, Hq, Sq] in float32 (float64 for float64
        inputs). Under "softmax" and "longnet" a key seen under two branches is in the LSE twice.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; a named backend that cannot compute this.

    Source:
        Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023.
    """
    q, k, v = check_operands(q, k, v, paged=False)
    check_flag("return_lse", return_lse)
    if backend != "auto":
        get_backend(backend)
    asked = ask(
        segment_lengths,
        dilation_rates,
        (q.shape[1], k.shape[1]),
        q.shape[2],
        causal=causal,
        combine=combine,
        segment_layout=segment_layout,
        q_start=q_start,
        kv_start=kv_start,
        device=q.device,
    )
    if plan is None:
        plan = _plan_outside_graph(asked) if torch.compiler.is_compiling() else DilatedPlan.answer(asked)
    elif not isinstance(plan, DilatedPlan):
        raise TypeError(f"plan: expected a DilatedPlan, got {type(plan).__name__}")
    elif plan.question != asked:
        raise ValueError(f"plan: expected one for this call, got {plan}")
    if any(branch.rate > 1 for branch in asked.branches):
        q, k, v = (x.contiguous() for x in (q, k, v))  # once, rather than whenever cells are cut out of strided heads
    lengths = (q.shape[1], k.shape[1])
    q_ids, kv_ids = check_segments(segment_ids, q, lengths)
    dropout = check_dropout(dropout_p, dropout_seed, q.device)
    check_flag("deterministic", deterministic)
    inputs = _Inputs(
        q=q,
        k=k,
        v=v,
        padding=check_padding(key_padding_mask, q, lengths[1]),
        q_ids=q_ids,
        kv_ids=kv_ids,
        attn_bias=check_attn_bias(attn_bias, q, lengths),
        dropout_p=dropout[0],
        dropout_seed=dropout[1],
        starts=(plan.question.q_range[0], plan.question.kv_range[0]),
        scale=check_scale(scale, q),
        deterministic=deterministic,
        backend=backend,
    )
    parts = [[_Part(planned, inputs) for planned in branch] for branch in plan.branches]
    out, lse = _combine(parts, q, v, detach=combine == "longnet")
    if not any(parts):  # no query meets a key: connect the zeros to the inputs, as an attention call would
        out = torch.where(out == 0, out, q.sum() + k.sum() + v.sum())
    return (out, lse) if return_lse else out


# For compiled code only: its first call imports the compiler, which eager users never wait for.
@_disable_dynamo
def _plan_outside_graph(asked: Question) -> DilatedPlan:
    return DilatedPlan.answer(asked)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The checked arguments of a call that every piece reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None
    q_ids: Tensor | None
    kv_ids: Tensor | None
    attn_bias: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    starts: tuple[int, int]
    scale: float
    deterministic: bool
    backend: str


class _Part:
    """One piece of a branch, computed: its output and LSE as the backend gives them."""

    def __init__(self, planned: PlannedPiece, inputs: _Inputs) -> None:
        self.piece, self.batch = planned.piece, inputs.q.shape[0]
        keep = overlap_mask(self.piece, planned.earlier, inputs.q.device)
        if self.batch == 0 or (keep is None and inputs.attn_bias is None and not inputs.dropout_p):
            self.out, self.lse = self._attend(inputs, slice(None), planned.plan, None)
            return
        # What is said about pairs is as large as the scores: one batch element after another.
        found = [self._attend_one(inputs, b, planned.plan, keep) for b in range(self.batch)]
        self.out, self.lse = (torch.cat(x) for x in zip(*found, strict=True))

    def _attend_one(self, inputs: _Inputs, at: int, plan: LayoutPlan, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """One batch element, with its bias and dropout."""
        bias, only = keep, slice(at, at + 1)
        if inputs.attn_bias is not None:
            given = inputs.attn_bias[only] if inputs.attn_bias.shape[0] > 1 else inputs.attn_bias
            bias = _both(bias_of_rows(self.piece, given, *inputs.starts), keep)
        out, lse = self._attend(inputs, only, plan, bias)
        if inputs.dropout_seed is None:
            return out, lse
        # Dropped weights stay in the denominator: attend to what is kept alone, and weigh by its share of the whole.
        kept = dropout_mask(self.piece, at, inputs.dropout_seed, inputs.dropout_p)
        out, of_kept = self._attend(inputs, only, plan, kept if bias is None else _both(bias, kept))
        nothing = of_kept == _NEG_INF
        share = torch.exp((of_kept - lse).masked_fill(nothing, 0)).masked_fill(nothing, 0) / (1 - inputs.dropout_p)
        return out * share.transpose(1, 2).unsqueeze(-1), lse

    def _attend(self, inputs: _Inputs, batch: slice, plan: LayoutPlan, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of the rows of some batch elements; ``bias`` [N, H, n, n] if there is one of them."""
        piece = self.piece
        q = piece.q.gather(piece.of_queries(inputs.q[batch]))
        k, v = (piece.kv.gather(piece.of_keys(x[batch])) for x in (inputs.k, inputs.v))
        padding, ids = self._padding(inputs, batch, k.shape[0]), None
        if inputs.q_ids is not None and inputs.kv_ids is not None:
            of_queries = piece.q.gather(piece.of_queries(inputs.q_ids[batch, :, None, None]))
            of_keys = piece.kv.gather(piece.of_keys(inputs.kv_ids[batch, :, None, None]))
            ids = (of_queries[:, :, 0, 0], of_keys[:, :, 0, 0])
        if bias is not None and piece.q.rate > 1:  # heads are folded into the batch
            bias = bias.flatten(0, 1).unsqueeze(1)
        call = make_call(
            q,
            k,
            v,
            plan,
            key_padding_mask=padding,
            segment_ids=ids,
            attn_bias=bias,
            scale=inputs.scale,
            deterministic=inputs.deterministic,
        )
        return run_forward(call, gradient_flags(call), inputs.backend, accumulate_out=True)

    def _padding(self, inputs: _Inputs, batch: slice, folded: int) -> Tensor | None:
        """The key padding of the operands: the user's, and the rows that have no token."""
        rows, real = self.piece.kv, None
        if inputs.padding is not None:
            of_keys = self.piece.of_keys(inputs.padding[batch, :, None, None])
            real = rows.gather(of_keys)[:, :, 0, 0]
        missing = None if rows.rate == 1 else rows.missing(inputs.q.device)
        if missing is None:
            return real
        present = (~missing).expand(folded // rows.heads, -1, -1).flatten(0, 1)
        return present if real is None else real & present

    def tokens(self, x: Tensor, fill: float) -> Tensor:
        """What belongs to the piece's rows [·, n, ·, X] as tokens [B, T, H, X]."""
        return self.piece.q.scatter(x, (self.batch, self.piece.segments), fill).flatten(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """Tokens [B, Sq, H, X] as the piece's rows."""
        return self.piece.q.gather(self.piece.of_queries(x))


def _both(bias: Tensor, keep: Tensor | None) -> Tensor:
    """A bias, boolean or floating, without the pairs that are not kept."""
    if keep is None:
        return bias
    return bias & keep if bias.dtype == torch.bool else bias.masked_fill(~keep, _NEG_INF)


def _combine(parts: list[list[_Part]], q: Tensor, v: Tensor, *, detach: bool) -> tuple[Tensor, Tensor]:
    """Merge the branches; see the definition."""
    batch, tokens, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lses = []
    for branch in parts:
        rows = [(part, part.lse.transpose(1, 2).unsqueeze(-1)) for part in branch]
        lses.append(
            _assemble(rows, tokens, lambda n: q.new_full((batch, n, heads, 1), _NEG_INF, dtype=dtype), _NEG_INF)
        )
    alone = len(parts) == 1
    weights, total = (None, lses[0]) if alone else merge_weights(torch.stack(lses))
    out = None
    for at, branch in enumerate(parts):
        rows = []
        for part in branch:
            if weights is None:
                rows.append((part, part.out))
            else:
                share = part.rows(weights[at].detach() if detach else weights[at])
                rows.append((part, part.out * share))
        found = _assemble(rows, tokens, lambda n: q.new_zeros((batch, n, heads, v.shape[3]), dtype=dtype), 0.0)
        out = found if out is None else out + found
    assert out is not None
    return out.to(q.dtype), total.squeeze(-1).transpose(1, 2).contiguous()


def _assemble(rows: list[tuple[_Part, Tensor]], tokens: int, empty: Callable[[int], Tensor], fill: float) -> Tensor:
    """Put the rows of a branch's pieces where their tokens are, and ``empty(n)`` for n tokens that no piece has."""
    spans, at = [], 0
    for part, x in rows:
        piece = part.piece
        if at < piece.q_offset:
            spans.append(empty(piece.q_offset - at))
        spans.append(part.tokens(x, fill))
        at = piece.q_offset + piece.q_tokens
    if at < tokens or not spans:
        spans.append(empty(tokens - at))
    return spans[0] if len(spans) == 1 else torch.cat(spans, 1)
