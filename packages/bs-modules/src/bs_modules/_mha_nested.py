"""Nested tensors, strided or jagged, through the multihead module: padded on the way in, nested on the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def check_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    batch_first: bool,
    is_causal: bool,
) -> None:
    """Checks a call with nested tensors.

    Raises:
        AssertionError: Only some inputs are nested, one is not three-dimensional, there is a mask, the module is not
            `batch_first`, keys and values differ in length, or queries and keys do in a causal call.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested:
            raise AssertionError(f"{name}: expected a NestedTensor, as are other inputs, got a dense tensor")
        if x.dim() != 3:
            raise AssertionError(
                f"{name}: {name} should be unbatched 2D or batched 3D tensor but received {x.dim()}-D {name} tensor"
            )
    if not batch_first:
        raise AssertionError("query: expected batch_first=True with NestedTensor inputs, got batch_first=False")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None:
            raise AssertionError(f"{name}: expected None with NestedTensor inputs, got shape {list(mask.shape)}")
    q_lengths, k_lengths, v_lengths = map(_lengths, (query, key, value))
    if len(q_lengths) != len(k_lengths) or k_lengths != v_lengths:
        raise AssertionError(
            f"key, value: expected as many sequences as query, values as long as keys, got lengths {q_lengths} of "
            f"query, {k_lengths} of key and {v_lengths} of value"
        )
    if is_causal and q_lengths != k_lengths:
        raise AssertionError(
            f"is_causal: expected False, or queries as long as their keys in NestedTensor inputs, got {q_lengths} "
            f"and {k_lengths}"
        )


def pad_nested(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value padded with zeros, and the key padding mask (True = ignore); one input stays one."""
    padded: dict[int, Tensor] = {}
    for x in (query, key, value):
        if id(x) not in padded:
            padded[id(x)] = pad_sequence(list(x.unbind()), batch_first=True)
    mask = _beyond(_lengths(key), padded[id(key)])
    return padded[id(query)], padded[id(key)], padded[id(value)], mask


def nest_like(query: Tensor, out: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cuts `out` `[N, L, E]` back to the sequences of `query`; `weights` stay padded, zero where there is no query."""
    lengths = _lengths(query)
    if weights is not None:
        beyond = _beyond(lengths, out).unsqueeze(-1)
        weights = weights.masked_fill(beyond if weights.dim() == 3 else beyond.unsqueeze(1), 0)
    rows = [x[:length] for x, length in zip(out, lengths, strict=True)]
    if query.layout == torch.jagged:  # the same offsets, so that a residual connection can add it to the query
        jagged: Any = query
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), jagged.offsets()), weights
    return torch.nested.as_nested_tensor(rows), weights


def _lengths(x: Tensor) -> list[int]:
    return [len(row) for row in x.unbind()]


def _beyond(lengths: list[int], padded: Tensor) -> Tensor:
    """bool `[N, L]`: where a sequence has ended."""
    positions = torch.arange(padded.shape[1], device=padded.device)
    return positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
