"""The backward of the backward, as a plain composite over the active blocks (eager mode only)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends._packing import KeyBlocks, QueryBlocks
from .backends._places import Grouping, places_of
from .backends._scores import ChunkScores, Frame
from .backends.base import Call

__all__ = ["differentiable_backward"]

_NEG_INF = float("-inf")

#: Elements of a chunk's score tile. Every tile is kept for autograd, so size only sets the number of operations.
_BUDGET = 1 << 20


def differentiable_backward(call: Call, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    """The gradients that `Backend.backward` returns, as differentiable operations. Memory is O(active pairs).

    Args:
        call: the inputs; q, k, v, a floating attn_bias and block_bias may require gradients.
        dout, lse, delta: as in `Backend.backward`; may require gradients.

    Returns:
        Gradients of q, k, v, attn_bias and block_bias; the last two empty where there is no such floating argument.
    """
    plan, dtype = call.plan, call.accumulate_dtype
    grouping = Grouping.of(plan, call.q.shape[0], call.q.shape[2], call.k.shape[2])
    places = places_of(plan, grouping, _BUDGET)
    used = places.schedule.used
    queries = QueryBlocks.of(plan, grouping.batch, grouping.head_units, grouping.group)
    keys = KeyBlocks.of(plan, used, call.k, grouping.batch, call.page_table)
    q, do = queries.pack(call.q, dtype), queries.pack(dout, dtype)
    k, v = keys.pack(call.k, dtype), keys.pack(call.v, dtype)
    lse_rows = queries.pack_rows(lse)
    lse_rows = lse_rows.masked_fill(lse_rows == _NEG_INF, float("inf"))
    delta_rows = queries.pack_rows(delta)

    float_bias = call.attn_bias if call.attn_bias is not None and call.attn_bias.is_floating_point() else None
    masks_only = replace(call, attn_bias=None if float_bias is not None else call.attn_bias, block_bias=None)
    masks, biases = Frame(masks_only, used), Frame(call, used)
    parts: dict[str, list[Any]] = {name: [] for name in ("q", "k", "v", "attn", "block", "qi", "ki", "ai", "bi")}
    for place in places.chunks:
        at, of_bias = ChunkScores(masks, place), ChunkScores(biases, place)
        units = place.q_index.numel()
        q_c, do_c = q.index_select(0, place.q_index), do.index_select(0, place.q_index)
        k_c, v_c = (x.index_select(0, place.kv_index).reshape(units, -1, x.shape[-1]) for x in (k, v))
        mask = torch.zeros(units, q_c.shape[1], k_c.shape[1], dtype=dtype, device=q.device)
        at.apply_(mask)
        scores = call.scale * (q_c @ k_c.transpose(1, 2)) + mask
        if float_bias is not None:
            scores = (scores.view(at.shape) + of_bias.attn_bias_values(dtype)).view(mask.shape)
        if call.block_bias is not None:
            scores = (scores.view(at.shape) + of_bias.block_bias_values(dtype)).view(mask.shape)
        weights = torch.exp(scores - lse_rows.index_select(0, place.q_index))
        factor = torch.ones((), dtype=dtype, device=q.device)
        if call.dropout_p:
            factor = (at.keep().to(dtype) / (1 - call.dropout_p)).view(mask.shape)
        dweights = factor * (do_c @ v_c.transpose(1, 2))
        dscores = weights * (dweights - delta_rows.index_select(0, place.q_index))
        parts["qi"].append(place.q_index)
        parts["ki"].append(place.kv_index)
        parts["q"].append(call.scale * (dscores @ k_c))
        parts["k"].append((call.scale * (dscores.transpose(1, 2) @ q_c)).view(-1, *k.shape[1:]))
        parts["v"].append(((weights * factor).transpose(1, 2) @ do_c).view(-1, *v.shape[1:]))
        if float_bias is not None:
            index, values = of_bias.attn_bias_gradient(dscores)
            parts["ai"].append(index)
            parts["attn"].append(values)
        if call.block_bias is not None:
            index, values = of_bias.block_bias_gradient(dscores)
            parts["bi"].append(index)
            parts["block"].append(values)

    def scattered(like: Tensor, name: str, index: str) -> Tensor:
        zeros = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return zeros.index_add(0, torch.cat(parts[index]), torch.cat(parts[name])) if parts[name] else zeros

    none = torch.zeros(0, dtype=dtype, device=q.device)
    block_bias = call.block_bias
    return (
        queries.unpack(scattered(q, "q", "qi"), dtype),
        keys.unpack(scattered(k, "k", "ki"), call.k, dtype),
        keys.unpack(scattered(v, "v", "ki"), call.v, dtype),
        none if float_bias is None else scattered(float_bias.flatten(), "attn", "ai").view(float_bias.shape),
        none if block_bias is None else scattered(block_bias.flatten(), "block", "bi").view(block_bias.shape),
    )
