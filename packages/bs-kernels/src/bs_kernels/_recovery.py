"""Getting a backend through running out of memory: the same call in pieces of (batch element, key/value head).

A unit is one batch element and one key/value head with its group of query heads. Units are independent but for what
they share (pages of K/V, broadcast biases), whose gradients add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bs_memory import oom_recovery

from .backends.base import Backend, Call, Gradients, Needs

__all__ = ["recovered_backward", "recovered_forward"]


class _Piece(NamedTuple):
    """Some batch elements and key/value heads, with the query heads of these."""

    batch: slice
    kv_heads: slice
    q_heads: slice


def _pieces(call: Call, start: int, stop: int) -> Iterator[_Piece]:
    """Rectangles that cover the units ``start … stop − 1``, batch elements outermost."""
    heads = call.k.shape[2]
    group = call.q.shape[2] // heads
    while start < stop:
        batch, head = divmod(start, heads)
        if head == 0 and stop - start >= heads:
            batches, last = (stop - start) // heads, heads
        else:
            batches, last = 1, min(heads, head + stop - start)
        kv_heads = slice(head, last)
        yield _Piece(slice(batch, batch + batches), kv_heads, slice(head * group, last * group))
        start += batches * (last - head)


def _narrowed(x: Tensor | None, *slices: slice) -> Tensor | None:
    """``x`` cut along its leading dimensions, those of size 1 left whole (they broadcast)."""
    if x is None:
        return None
    return x[tuple(slice(None) if size == 1 else cut for size, cut in zip(x.shape, slices, strict=False))]


def _cut(call: Call, piece: _Piece) -> Call:
    batch, kv_heads, q_heads = piece
    every = slice(None)
    kv_batch = every if call.page_table is not None else batch
    return replace(
        call,
        q=call.q[batch, :, q_heads],
        k=call.k[kv_batch, :, kv_heads],
        v=call.v[kv_batch, :, kv_heads],
        plan=call.plan.select(batch, q_heads),
        key_padding_mask=None if call.key_padding_mask is None else call.key_padding_mask[batch],
        q_segments=None if call.q_segments is None else call.q_segments[batch],
        kv_segments=None if call.kv_segments is None else call.kv_segments[batch],
        attn_bias=_narrowed(call.attn_bias, batch, q_heads),
        block_bias=_narrowed(call.block_bias, batch, q_heads),
        sinks=None if call.sinks is None else call.sinks[q_heads],
        page_table=None if call.page_table is None else call.page_table[batch],
        first_batch=call.first_batch + batch.start,
        first_head=call.first_head + q_heads.start,
        whole=call.whole or call,
    )


def _units(call: Call) -> int:
    return call.q.shape[0] * call.k.shape[2]


def recovered_forward(backend: Backend, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`Backend.forward`, again in smaller pieces if memory runs out.

    Raises:
        RecoveryError: memory runs out for a single unit, too.
    """
    if not _units(call):  # an empty batch: backends need not know it
        return call.nothing(out_dtype)
    results: list[tuple[Tensor, Tensor]] = []

    def work(start: int, stop: int) -> None:
        if stop - start == _units(call):
            results[:] = [backend.forward(call, out_dtype)]
            return
        if not results:
            shape = (*call.q.shape[:3], call.v.shape[3])
            out = torch.empty(shape, dtype=out_dtype, device=call.q.device)
            lse = call.q.new_empty((shape[0], shape[2], shape[1]), dtype=call.accumulate_dtype)
            results.append((out, lse))
        out, lse = results[0]
        for piece in _pieces(call, start, stop):
            out[piece.batch, :, piece.q_heads], lse[piece.batch, piece.q_heads] = backend.forward(
                _cut(call, piece), out_dtype
            )

    oom_recovery(work, size=_units(call), device=call.q.device, name="attention", unit="(batch, kv head) pairs")
    return results[0]


def recovered_backward(
    backend: Backend,
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    needs: Needs,
    grad_dtype: torch.dtype,
) -> Gradients:
    """`Backend.backward`, again in smaller pieces if memory runs out.

    Raises:
        RecoveryError: memory runs out for a single unit, too.
    """
    if not _units(call):
        return call.no_gradients(grad_dtype, needs)
    results: list[Gradients] = []
    # Pages are shared by batch elements, so their gradients add up, in the accumulation dtype.
    kv_dtype = grad_dtype if call.page_table is None else call.accumulate_dtype

    def work(start: int, stop: int) -> None:
        if stop - start == _units(call):
            results[:] = [backend.backward(call, dout, lse, delta, needs, grad_dtype)]
            return
        if not results:
            results.append(call.no_gradients(kv_dtype, needs))
        parts = []
        for piece in _pieces(call, start, stop):
            batch, _, q_heads = piece
            rows = [x[batch, q_heads].contiguous() for x in (lse, delta)]
            cut, dout_cut = _cut(call, piece), dout[batch, :, q_heads]
            parts.append((piece, backend.backward(cut, dout_cut, rows[0], rows[1], needs, kv_dtype)))
        for piece, gradients in parts:  # only now, so that a piece that ran out midway can be repeated
            _add_(results[0], gradients, piece, paged=call.page_table is not None)

    oom_recovery(
        work, size=_units(call), device=call.q.device, name="attention backward", unit="(batch, kv head) pairs"
    )
    whole = results[0]
    return whole._replace(q=whole.q.to(grad_dtype), k=whole.k.to(grad_dtype), v=whole.v.to(grad_dtype))


def _add_(total: Gradients, part: Gradients, piece: _Piece, *, paged: bool) -> None:
    batch, kv_heads, q_heads = piece
    kv_batch = slice(None) if paged else batch
    total.q[batch, :, q_heads] += part.q
    total.k[kv_batch, :, kv_heads] += part.k
    total.v[kv_batch, :, kv_heads] += part.v
    for name in ("attn_bias", "block_bias"):
        into, gradient = _narrowed(getattr(total, name), batch, q_heads), getattr(part, name)
        if into is not None and gradient is not None:
            into += gradient
