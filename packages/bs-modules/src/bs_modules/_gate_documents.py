"""Packed documents: what a gate may read so that no document steers the picks of another one.

B batch, S queries or keys, H heads, QB query blocks, KB key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._gate_room import Room


@dataclass(frozen=True, eq=False)
class Documents:
    """What segment ids leave a gate to pool and to choose from.

    A query block speaks for the document of its first query, a key block for that of its last key, and only tokens of
    that document are pooled. A pair of blocks of one document is scored, unless the query block also holds queries of
    a document with keys among its choices: what it picks would then depend on one document and be felt by another.
    Pairs that share a document and are not scored are picked by distance, which no token changes.

    Attributes:
        query_tokens: bool `[B, Sq]`, the queries to pool; `None`: all.
        key_tokens: bool `[B, Sk]`, the keys to pool.
        labels: int64 `[B, Sq]` and `[B, Sk]`, equal where queries and keys are of one document.
        room: The choices of every batch element.
    """

    query_tokens: Tensor | None
    key_tokens: Tensor
    labels: tuple[Tensor, Tensor]
    room: Room


def read_documents(
    segment_ids: Any,
    shape: tuple[int, int, int],
    blocks: tuple[int, int],
    causal: bool,
    room: Room,
    dead: Tensor | None,
) -> Documents:
    """Works out what a gate may read of packed documents, with tensor operations of static shape.

    Args:
        segment_ids: int `[B, S]`, or a (query, key) pair.
        shape: `(B, Sq, Sk)`.
        blocks: `(query, key)` tokens per block.
        causal: Whether a query block's summary ends with its first query.
        room: Of these lengths.
        dead: bool `[B, KB]`, key blocks without a real token, or `None`.

    Raises:
        TypeError: The ids are no integers.
        ValueError: Their shapes do not fit.
    """
    labels = _labels(*_check_ids(segment_ids, shape))
    (q_size, k_size), (of_query, of_key) = blocks, labels
    q_blocks, k_blocks = _blocked(of_query, q_size), _blocked(of_key, k_size)
    row, q_least, q_most = q_blocks[..., 0], q_blocks.amin(-1), q_blocks.amax(-1)
    column, k_least, k_most = k_blocks[..., -1], k_blocks.amin(-1), k_blocks.amax(-1)

    def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, None, :, None], y[:, None, None, :]

    # Labels rise with the first key of a document, so a range of them is what a block of whole runs holds, and no
    # less than what any block holds.
    low, high = pairs(q_least, k_most), pairs(q_most, k_least)
    shared = (low[0] <= low[1]) & (high[0] >= high[1])
    kept = room.kept & shared
    if dead is not None:
        shared = shared & ~dead[:, None, None]
    alone = (q_least == q_most)[:, None]
    if causal:
        latest = torch.where(room.readable, k_most[:, None, None], -1).amax(-1)  # [B, H, QB]
        alone = alone | ((row == q_least)[:, None] & (latest <= row[:, None]))
    same = torch.eq(*pairs(row, column)) & shared
    readable = room.readable & same & alone[..., None]
    unread = room.readable & shared & ~readable
    have = (readable | unread | kept).sum(-1)
    per_batch = replace(
        room,
        readable=readable,
        kept=kept,
        unread=unread,
        budget=torch.minimum(room.budget, have),
        least=torch.minimum(room.least, have),
        most=torch.minimum(room.most, have),
    )
    query_tokens = None
    if causal and q_size > 1:
        # The queries that end with a block's first one: token t belongs to the block that begins at or after it.
        ends = (torch.arange(of_query.shape[1], device=of_query.device) + q_size - 1) // q_size * q_size
        query_tokens = of_query == of_query[:, ends.clamp(max=of_query.shape[1] - 1)]
    key_tokens = of_key == column.repeat_interleave(k_size, dim=1)[:, : of_key.shape[1]]
    return Documents(query_tokens, key_tokens, labels, per_batch)


def _blocked(labels: Tensor, size: int) -> Tensor:
    """`[B, SB, size]`; a short last block is filled with its last label."""
    short = -labels.shape[1] % size
    filled = torch.cat((labels, labels[:, -1:].expand(-1, short)), dim=1) if short else labels
    return filled.unflatten(1, (-1, size))


def _labels(q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Names every document after its first key, or its first query after those: int64, equal where the ids are.

    Of causal tokens, whose later ones may not be read, the name of a document depends on earlier ids only.
    """
    ids = k_ids if q_ids is k_ids else torch.cat((k_ids, q_ids), dim=1)
    ids, order = ids.sort(dim=1, stable=True)
    begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    place = torch.arange(ids.shape[1], device=ids.device)
    start = torch.where(begins, place, 0).cummax(1).values
    labels = torch.empty_like(order).scatter_(1, order, order.gather(1, start))
    return labels[:, -q_ids.shape[1] :], labels[:, : k_ids.shape[1]]


def _check_ids(ids: Any, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    batch, *lengths = shape
    if isinstance(ids, Tensor):
        if lengths[0] != lengths[1]:
            raise ValueError(f"segment_ids: expected a (query, key) pair for lengths {tuple(lengths)}, got one tensor")
        ids = (ids, ids)
    if not isinstance(ids, tuple | list) or len(ids) != 2:
        raise TypeError(f"segment_ids: expected int[batch, S] or a (query, key) pair, got {type(ids).__name__}")
    for name, x, length in zip(("query", "key"), ids, lengths, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"segment_ids ({name}): expected a tensor, got {type(x).__name__}")
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
            raise TypeError(f"segment_ids ({name}): expected an integer dtype, got {x.dtype}")
        if x.shape != (batch, length):
            raise ValueError(f"segment_ids ({name}): expected [{batch}, {length}], got {list(x.shape)}")
    return ids[0], ids[1]
