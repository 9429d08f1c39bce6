"""What a gate picks where no rank has the whole sequence: every rank chooses for its own query blocks, then all tell.

Only pooled keys, a block's tokens at the borders between ranks, and the picks themselves travel.

Shape legend: B batch, S own queries, T own keys, N tokens of the whole sequence, H query heads, G key heads, D head
dim, QB and KB query and key blocks of the whole sequence, R own query blocks, P what pooling leaves, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bs_comm import Placement
from bs_kernels import BatchedLayout
from bs_patterns import BlockLayout

from ._gate_losses import distillation_loss
from ._gate_noise import draw_rows
from ._gate_room import Room
from ._gate_scorer import pool_blocks
from ._gate_select import logits_of
from ._ring_gather import Exchange, Gather
from ._ring_mass import mass_over_ring
from ._ring_operands import Operands
from ._ring_session import RingSession
from .adaptive import BlockSparseAdaptive, _dead_blocks


@dataclass(frozen=True, eq=False)
class Pick:
    """What a gate picked.

    Attributes:
        indices: int64[B, h, R, K], key blocks of the sequence; h is 1 or this rank's query heads.
        counts: int64[B, h, R], how many of a row's slots are used.
        bias: ``[B, h, R, K]``, the ``block_bias``; or None.
        layout: What all ranks picked for this rank's heads, for sequences and key heads one after another.
    """

    indices: Tensor
    counts: Tensor
    bias: Tensor | None
    layout: BlockLayout


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

    def in_order(self, x: Tensor) -> Tensor:
        """Rows of all ranks, in rank order, put into the order of the sequence."""
        order = np.argsort(np.concatenate(self.by_rank))
        return x if (np.diff(order) == 1).all() else x[torch.from_numpy(order).to(x.device)]


def pick_over_ring(
    gate: BlockSparseAdaptive,
    session: RingSession,
    x: Operands,
    places: tuple[Placement, Placement],
    is_causal: bool,
    seed: int | None,
    heads: tuple[int, int],
    share_heads: RingSession | None,
) -> Pick:
    """What the gate picks for the own queries, and what all ranks picked.

    Args:
        gate: On every rank with the same weights, which exist.
        session: Of the ring.
        x: The own tokens; queries and keys as the gate is to see them.
        places: Of (queries, keys).
        is_causal: As in ``forward``.
        seed: Of the noise; None: there is none.
        heads: Which of how many equal shares of heads these are.
        share_heads: Of the group whose ranks hold the other shares; None: there is one share.
    """
    q, k = x.given
    q_blocks, k_blocks = (
        Blocks.of(place, size, session.rank) for place, size in zip(places, gate.sparse_config.blocks, strict=True)
    )
    lengths = (q_blocks.tokens, k_blocks.tokens)
    whole = gate._room(lengths, is_causal, q.device, q.shape[2] * heads[1])
    own = torch.from_numpy(q_blocks.own).to(q.device)
    room = _rows_of(whole, own)
    queries = _all_heads(gate, _queries(gate, session, q, q_blocks, is_causal), share_heads)
    keys = _all_heads(gate, _keys(gate, session, k, x.key_padding, k_blocks), share_heads)
    pooled = (queries, keys)
    dead = None
    if x.key_padding is not None:
        dead = x.key_padding.new_zeros((x.key_padding.shape[0], 0))
        if k.shape[1]:
            dead = _dead_blocks(x.key_padding, k_blocks.size)
        dead = k_blocks.in_order(torch.cat(session.roll_call.tensors(dead.t(), k_blocks.counts))).t()
    if seed is not None and gate.sparse_config.distill_rows and torch.is_grad_enabled():
        rows = draw_rows(seed, whole.readable.shape[1], gate.sparse_config.distill_rows, q.device)
        mass = mass_over_ring(gate, session, (q, k), x.key_padding, (q_blocks, k_blocks), rows, is_causal)
        mass = _gathered_heads(mass, share_heads)
        share = _distilled(gate, pooled, room, own, rows, mass)
        gate.gate_losses["distillation"] = share / heads[1]
    if len(own):
        made = gate._choose(pooled, room, (q.shape[1], lengths[1]), False, dead, seed, own, whole.readable.shape[1])
        indices, counts, bias = made.layout.indices, made.layout.counts, made.bias
        if made.expected_density is not None and seed is not None:
            gate.gate_losses["sparsity"] = made.expected_density / heads[1]
    else:
        indices, counts, bias = _nothing_to_pick(gate, pooled, room, seed is not None)
    told = torch.cat((indices, counts[..., None]), -1).to(torch.int32).permute(2, 0, 1, 3)
    everyone = q_blocks.in_order(torch.cat(session.roll_call.tensors(told, q_blocks.counts)))
    _remember(gate, everyone, whole, lengths, is_causal)
    mine = slice(None)
    if indices.shape[1] > 1:
        mine = slice(q.shape[2] * heads[0], q.shape[2] * (heads[0] + 1))
    layout = _layout_of(everyone[:, :, mine].cpu().numpy(), k.shape[2], gate.sparse_config.blocks, lengths, is_causal)
    return Pick(indices[:, mine], counts[:, mine], None if bias is None else bias[:, mine], layout)


def anywhere(blocks: tuple[int, int], lengths: tuple[int, int], is_causal: bool) -> BlockLayout:
    """A layout without active blocks: all that placements other than the cost-balanced one read."""
    rows = -(-lengths[0] // blocks[0])
    return BlockLayout(blocks, lengths, np.zeros((1, rows + 1), np.int64), np.zeros(0, np.int32), is_causal)


def _rows_of(room: Room, rows: Tensor) -> Room:
    cut = {name: getattr(room, name)[:, rows] for name in ("readable", "kept", "budget", "least", "most")}
    return replace(room, **cut, distance=room.distance[rows])


def _keys(gate: BlockSparseAdaptive, session: RingSession, k: Tensor, padding: Tensor | None, blocks: Blocks) -> Tensor:
    """``[B, G, KB, P, D]``: every rank's pooled keys."""
    parts = gate.scorer._parts
    if k.shape[1]:
        pooled = pool_blocks(k, blocks.size, padding, parts)
    else:
        pooled = k.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1)
    everyone = Gather.apply(_wide(pooled).permute(2, 0, 1, 3, 4), session.roll_call, blocks.counts)
    return blocks.in_order(everyone).permute(1, 2, 0, 3, 4)  # pyright: ignore[reportArgumentType]


def _queries(gate: BlockSparseAdaptive, session: RingSession, q: Tensor, blocks: Blocks, is_causal: bool) -> Tensor:
    """``[B, H, R, P, D]``: pooled queries of the own rows."""
    size, parts = blocks.size, min(gate.scorer._parts, 2)
    if size == 1:
        return _wide(q.transpose(1, 2)[:, :, :, None])
    nothing = q[:, :0].transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1)
    if not is_causal:
        return _wide(pool_blocks(q, size, None, parts) if q.shape[1] else nothing)
    # A row's summary ends with its first query, so all but that one are the tail of the block before, which another
    # rank may have.
    last = -(-blocks.tokens // size) - 1
    owner = np.empty(last + 1, np.int64)
    for rank, theirs in enumerate(blocks.by_rank):
        owner[theirs] = rank
    has_next = blocks.own[blocks.own < last]
    full = q[:, : len(has_next) * size].unflatten(1, (len(has_next), size))
    go = [torch.from_numpy(np.flatnonzero(owner[has_next + 1] == r)).to(q.device) for r in range(len(blocks.by_rank))]
    come = [theirs[(theirs < last)] + 1 for theirs in blocks.by_rank]
    come = [rows[owner[rows] == blocks.rank] for rows in come]
    tails = Exchange.apply(full[:, :, 1:].transpose(0, 1), session.roll_call, go, [len(rows) for rows in come])
    order = torch.from_numpy(np.argsort(np.concatenate(come))).to(q.device)
    firsts = q[:, ::size]
    starts = len(blocks.own) > 0 and blocks.own[0] == 0  # nothing comes before the first row's query
    made = [firsts[:, :1].transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, parts, -1)] if starts else []
    if len(order):
        windows = torch.cat((tails[order].transpose(0, 1), firsts[:, int(starts) :, None]), 2)  # pyright: ignore[reportOptionalSubscript]
        made.append(pool_blocks(windows.flatten(1, 2), size, None, parts))
    else:  # all the same part of the graph, since its backward is for all ranks
        made.append(nothing + tails.sum())  # pyright: ignore[reportOptionalMemberAccess]
    return _wide(torch.cat(made, 2))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_heads(gate: BlockSparseAdaptive, pooled: Tensor, share_heads: RingSession | None) -> Tensor:
    """Pooled blocks of all heads, or of their mean."""
    if share_heads is not None:
        roll_call = share_heads.roll_call
        counts = [pooled.shape[1]] * roll_call.world_size
        joined = Gather.apply(pooled.transpose(0, 1), roll_call, counts)
        pooled = joined.transpose(0, 1)  # pyright: ignore[reportOptionalMemberAccess]
    return pooled.mean(1, keepdim=True) if gate.scorer.share_across_heads else pooled


def _gathered_heads(x: Tensor, share_heads: RingSession | None) -> Tensor:
    if share_heads is None:
        return x
    counts = [x.shape[1]] * share_heads.world_size
    return torch.cat(share_heads.roll_call.tensors(x.transpose(0, 1), counts)).transpose(0, 1)


def _nothing_to_pick(
    gate: BlockSparseAdaptive, pooled: tuple[Tensor, Tensor], room: Room, is_training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a rank without queries, connected to all that has a gradient, so that every rank's graph is the same."""
    scorer = gate.scorer
    logits = logits_of(scorer.score(*pooled, room.distance), room, gate.temperature, scorer.threshold)
    logits = logits[..., : min(room.slots, logits.shape[-1])]
    if scorer.threshold is not None and is_training:
        gate.gate_losses["sparsity"] = logits.sum()
    wanted = gate.sparse_config.gate == "soft" or (torch.is_grad_enabled() and logits.requires_grad)
    indices = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return indices, indices[..., 0] if indices.shape[-1] else indices.sum(-1), logits if wanted else None


def _distilled(
    gate: BlockSparseAdaptive,
    pooled: tuple[Tensor, Tensor],
    room: Room,
    own: Tensor,
    rows: Tensor,
    mass: Tensor,
) -> Tensor:
    """This rank's share of the distillation loss: that of the drawn rows that are its own."""
    here = rows[:, None] == own
    mine, at = here.any(1), here.int().argmax(1) if len(own) else rows.new_zeros(len(rows))
    at = at[mine]
    scores = gate.scorer.score(pooled[0][:, :, at], pooled[1], room.distance[at])
    if not len(at):
        return scores.sum()
    return distillation_loss(scores, mass[:, :, mine], room.readable[:, at]) * (len(at) / len(rows))


def _remember(gate: BlockSparseAdaptive, told: Tensor, room: Room, lengths: tuple[int, int], is_causal: bool) -> None:
    """What ``select`` notes for statistics and calibration; ``told`` is int32[QB, B, H, K + 1]."""
    counts = told[..., -1].permute(1, 2, 0)
    density = counts.sum((0, 2)).to(torch.float32).mean() / (max(room.allowed, 1) * told.shape[1])
    gate._met = (lengths, is_causal, density)
    if gate._calibration is not None:
        indices = told[..., :-1].permute(1, 2, 0, 3)
        gate._calibration.add(BatchedLayout(indices, counts, gate.sparse_config.blocks, lengths, is_causal))


def _layout_of(
    told: np.ndarray, kv_heads: int, blocks: tuple[int, int], lengths: tuple[int, int], is_causal: bool
) -> BlockLayout:
    """The layout of ``int32[QB, B, h, K + 1]`` picks: a head per sequence and head, so that each moves only its own."""
    if told.shape[2] == 1:
        told = np.repeat(told, kv_heads, 2)
    rows, batch, heads, _ = told.shape
    told = told.transpose(1, 2, 0, 3).reshape(batch * heads * rows, -1)
    columns, counts = -(-lengths[1] // blocks[1]), told[:, -1].astype(np.int64)
    picked = np.where(np.arange(told.shape[1] - 1) < counts[:, None], told[:, :-1], columns)
    picked.sort(axis=1)
    stop = np.cumsum(counts).reshape(batch * heads, rows)
    start = np.concatenate(([0], stop[:-1, -1]))[:, None]
    return BlockLayout(blocks, lengths, np.concatenate((start, stop), 1), picked[picked < columns], is_causal)
