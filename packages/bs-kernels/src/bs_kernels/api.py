"""What block-sparse attention means: one function, every argument, and the same call explained."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from bs_patterns import BlockLayout

from . import _autograd as _autograd  # registers the gradients
from ._arguments import AttentionArguments, make_call
from .backends.base import Call
from .batched import BatchedLayout
from .dispatch import BackendTable, explain, get_backend
from .op import problem_of, run_forward
from .plan import LayoutPlan

__all__ = ["block_sparse_attention", "explain_backends"]

Layout = BlockLayout | LayoutPlan | BatchedLayout
SegmentIds = Tensor | tuple[Tensor, Tensor] | None
Window = int | tuple[int | None, int | None] | None


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    **arguments: Unpack[AttentionArguments],
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
    **arguments: Unpack[AttentionArguments],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool | None = None,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    attn_bias: Tensor | None = None,
    block_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    order: Any = "auto",
    deterministic: bool = True,
    backend: str = "auto",
    page_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the active blocks of a layout.

    Every query attends to the keys of its active blocks that no mask removes, under **one** softmax. A query without
    keys gets output 0, LSE −inf and zero gradients. Differentiable in q, k, v, a floating ``attn_bias``,
    ``block_bias`` and ``sinks``, through the output and through the LSE; twice in eager mode. Works under autocast,
    activation checkpointing and ``torch.compile`` (pass a `LayoutPlan` there).

    Args:
        q: [B, Sq, Hq, D]; float16, bfloat16, float32 or float64. Any strides.
        k: [B, Sk, Hkv, D] with ``Hq % Hkv == 0``, or pages [pages, block, Hkv, D] with ``page_table``.
        v: [B, Sk, Hkv, Dv], or pages [pages, block, Hkv, Dv].
        layout: which blocks are active. Heads 1 (shared) or Hq.
        causal: mask keys after the query. None takes the layout's flag; True on a layout that is not causal drops the
            blocks above the diagonal; False on a causal layout is an error. Positions are aligned at the last token of
            queries and keys; give a plan to say otherwise.
        window: ``(left, right)``, both inclusive: keys from ``query − left`` to ``query + right``; −1 or None for no
            bound.
            For causal attention also an int W: the W keys up to and including the query's own position.
        key_padding_mask: bool[B, Sk], True = a real token.
        segment_ids: int[B, S], or a (query, key) pair: a query attends only to keys of its own segment.
            Ids fit int32.
        attn_bias: broadcasts to [B, Hq, Sq, Sk]; bool (True = attend) or floating (added to scaled scores). Read, and
            differentiated, in active blocks only.
        block_bias: [nnz], [Hq, nnz] or [B, Hq, nnz], in the layout's CSR order: one number per active block, added to
            its scores. For a `BatchedLayout`: the shape of its indices.
        sinks: [Hq]; a logit per head that joins the softmax and attends to nothing. It is part of the LSE, which for a
            query without keys is then the sink's logit.
        dropout_p: probability in [0, 1) of dropping an attention weight; kept ones are scaled by 1 / (1 − p).
        dropout_seed: 64-bit seed (an int or an int64 scalar tensor). Entries are dropped by absolute position (see
            `bs_kernels.philox`), so the same seed drops the same entries in every backend. None draws one from torch's
            generator.
        scale: multiplies q · k; None for 1/√D.
        return_lse: also return the log-sum-exp of the scores.
        order: the order in which blocks are processed: "auto", "row", "longest_first", "hilbert", "morton" or an
            int64[nnz] permutation of the layout's entries. Changes results by rounding at most.
        deterministic: the same bits from run to run. False allows a backend a faster backward that does not promise it.
        backend: "auto", or a name that `explain_backends` lists; a named backend never falls back.
        page_table: int32 or int64 [B, key blocks]; the page of each key block. Entries of blocks that are not active
            are not read.

    Returns:
        ``out`` [B, Sq, Hq, Dv] in q's dtype, or ``(out, lse)`` with lse [B, Hq, Sq], natural logarithm, float32
        (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; a named backend that cannot compute this.
    """
    if backend != "auto":
        get_backend(backend)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {return_lse!r}")
    call = make_call(
        q,
        k,
        v,
        layout,
        causal=causal,
        window=window,
        key_padding_mask=key_padding_mask,
        segment_ids=segment_ids,
        attn_bias=attn_bias,
        block_bias=block_bias,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        order=order,
        deterministic=deterministic,
        page_table=page_table,
    )
    out, lse = run_forward(call, gradient_flags(call), backend, accumulate_out=False)
    return (out, lse) if return_lse else out


def explain_backends(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, **arguments: Unpack[AttentionArguments]
) -> BackendTable:
    """Which backends can compute a call, and why the others cannot. Computes nothing.

    Args:
        q, k, v, layout, arguments: those of `block_sparse_attention`, ``backend`` and ``return_lse`` left out.

    Returns:
        One report per backend, in the order in which ``backend="auto"`` tries them; ``print`` shows a table.
    """
    call = make_call(q, k, v, layout, **arguments)
    return explain(problem_of(call, gradient_flags(call)), call, call.q.device)


def gradient_flags(call: Call) -> list[int]:
    """Whether gradients will be asked for: of anything, of attn_bias, of block_bias."""
    if not torch.is_grad_enabled():
        return [0, 0, 0]
    attn, block = (x is not None and x.requires_grad for x in (call.attn_bias, call.block_bias))
    anything = attn or block or any(x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.sinks))
    return [int(anything), int(attn), int(block)]
