"""What a gate reads of blocks that live on several ranks: pooled keys of all, pooled queries of the own rows.

Shape legend: B batch, S own queries, N tokens of the whole sequence, H query heads, G key heads, D head dim, KB key
blocks of the whole sequence, R own query blocks, P what pooling leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_comm import Placement

from ._gate_scorer import pool_real_blocks
from ._ring_gather import Exchange, Gather
from ._ring_session import RingSession
from .adaptive import BlockSparseAdaptive


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of one side of a call live.

    Attributes:
        size: Tokens per block.
        tokens: N.
        by_rank: int64 per rank: its blocks, ascending.
        rank: This one.
    """

    size: int
    tokens: int
    by_rank: list[np.ndarray]
    rank: int

    @classmethod
    def of(cls, place: Placement, size: int, rank: int) -> Blocks:
        """Those of a placement, which is cut at multiples of ``size``."""
        place.check_aligned(size)
        return cls(size, place.seq_len, [place.blocks(r, block_size=size) for r in range(place.world_size)], rank)

    @property
    def own(self) -> np.ndarray:
        """This rank's blocks."""
        return self.by_rank[self.rank]

    @property
    def counts(self) -> list[int]:
        """Blocks by rank."""
        return [len(blocks) for blocks in self.by_rank]

    def positions(self, device: torch.device) -> Tensor:
        """int64: where the own tokens stand in the sequence."""
        tokens = (self.own[:, None] * self.size + np.arange(self.size)).ravel()
        return torch.from_numpy(tokens[tokens < self.tokens]).to(device)

    def in_order(self, x: Tensor) -> Tensor:
        """Rows of all ranks, in rank order, put into the order of the sequence."""
        order = np.argsort(np.concatenate(self.by_rank))
        return x if (np.diff(order) == 1).all() else x[torch.from_numpy(order).to(x.device)]


def pool_keys(
    gate: BlockSparseAdaptive, session: RingSession, k: Tensor, blocks: Blocks, real: Tensor | None
) -> Tensor:  # fmt: skip
    """``[B, G, KB, P, D]``: every rank's pooled keys; ``real`` are the own ones to pool."""
    parts = gate.scorer._parts
    if k.shape[1]:
        pooled = pool_real_blocks(k, blocks.size, real, parts)
    else:
        pooled = _wide(k.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1))
    everyone = Gather.apply(pooled.permute(2, 0, 1, 3, 4), session.roll_call, blocks.counts)
    return blocks.in_order(everyone).permute(1, 2, 0, 3, 4)  # pyright: ignore[reportArgumentType]


def pool_own_queries(
    gate: BlockSparseAdaptive, session: RingSession, q: Tensor, blocks: Blocks, is_causal: bool, real: Tensor | None
) -> Tensor:
    """``[B, H, R, P, D]``: pooled queries of the own rows; ``real`` are those of all queries to pool."""
    size, parts = blocks.size, min(gate.scorer._parts, 2)
    if size == 1:
        return _wide(q.transpose(1, 2)[:, :, :, None])
    nothing = _wide(q[:, :0].transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1))
    if not is_causal:
        own = None if real is None else real[:, blocks.positions(q.device)]
        return pool_real_blocks(q, size, own, parts) if q.shape[1] else nothing
    # A row's summary ends with its first query, so all but that one are the tail of the block before, which another
    # rank may have.
    last = -(-blocks.tokens // size) - 1
    owner = np.empty(last + 1, np.int64)
    for rank, theirs in enumerate(blocks.by_rank):
        owner[theirs] = rank
    has_next = blocks.own[blocks.own < last]
    full = q[:, : len(has_next) * size].unflatten(1, (len(has_next), size))
    go = [torch.from_numpy(np.flatnonzero(owner[has_next + 1] == r)).to(q.device) for r in range(len(blocks.by_rank))]
    come = [theirs[theirs < last] + 1 for theirs in blocks.by_rank]
    come = [rows[owner[rows] == blocks.rank] for rows in come]
    tails: Any = Exchange.apply(full[:, :, 1:].transpose(0, 1), session.roll_call, go, [len(rows) for rows in come])
    joined = np.concatenate(come)
    order = np.argsort(joined)
    firsts = q[:, ::size]
    starts = len(blocks.own) > 0 and blocks.own[0] == 0  # nothing comes before the first row's query
    made = [_wide(firsts[:, :1].transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1))] if starts else []
    if len(order):
        windows = torch.cat(
            (tails[torch.from_numpy(order).to(q.device)].transpose(0, 1), firsts[:, int(starts) :, None]), 2
        ).flatten(1, 2)
        if real is not None:
            at = joined[order][:, None] * size + np.arange(1 - size, 1)
            real = real[:, torch.from_numpy(at.ravel()).to(q.device)]
        made.append(pool_real_blocks(windows, size, real, parts))
    else:  # all the same part of the graph, since its backward is for all ranks
        made.append(nothing + tails.sum())
    return torch.cat(made, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_all_heads(gate: BlockSparseAdaptive, pooled: Tensor, share_heads: RingSession | None) -> Tensor:
    """Pooled blocks of all heads, or of their mean."""
    if share_heads is not None:
        roll_call = share_heads.roll_call
        counts = [pooled.shape[1]] * roll_call.world_size
        joined = Gather.apply(pooled.transpose(0, 1), roll_call, counts)
        pooled = joined.transpose(0, 1)  # pyright: ignore[reportOptionalMemberAccess]
    return pooled.mean(1, keepdim=True) if gate.scorer.share_across_heads else pooled
