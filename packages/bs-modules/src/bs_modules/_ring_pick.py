"""What a gate picks where no rank has the whole sequence: every rank chooses for its own query blocks, then all tell.

Only pooled keys, a block's tokens at the borders between ranks, and the picks themselves travel.

Shape legend: B batch, S own queries, T own keys, N tokens of the whole sequence, H query heads, G key heads, D head
dim, QB and KB query and key blocks of the whole sequence, R own query blocks, P what pooling leaves, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_comm import Placement
from bs_kernels import BatchedLayout
from bs_patterns import BlockLayout

from ._gate_documents import read_documents
from ._gate_losses import distillation_loss
from ._gate_noise import draw_rows
from ._gate_room import Room
from ._gate_scorer import Pooled
from ._gate_select import logits_of
from ._ring_mass import mass_over_ring
from ._ring_operands import Operands
from ._ring_pool import Blocks, of_all_heads, pool_keys, pool_own_queries
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


def pick_over_ring(
    gate: BlockSparseAdaptive,
    session: RingSession,
    x: Operands,
    places: tuple[Placement, Placement],
    is_causal: bool,
    seed: int | None,
    heads: tuple[int, int],
    share_heads: RingSession | None,
    segment_ids: tuple[Tensor, Tensor] | None,
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
        segment_ids: Of all (queries, keys); or None.
    """
    q, k = x.given
    q_blocks, k_blocks = (
        Blocks.of(place, size, session.rank) for place, size in zip(places, gate.sparse_config.blocks, strict=True)
    )
    lengths = (q_blocks.tokens, k_blocks.tokens)
    whole = gate._room(lengths, is_causal, q.device, q.shape[2] * heads[1])
    own = torch.from_numpy(q_blocks.own).to(q.device)
    dead = None
    if x.key_padding is not None:
        dead = x.key_padding.new_zeros((x.key_padding.shape[0], 0))
        if k.shape[1]:
            dead = _dead_blocks(x.key_padding, k_blocks.size)
        dead = k_blocks.in_order(torch.cat(session.roll_call.tensors(dead.t(), k_blocks.counts))).t()
    real_q, real_k, labels = None, x.key_padding, None
    if segment_ids is not None:
        blocks = gate.sparse_config.blocks
        packed = read_documents(segment_ids, (q.shape[0], *lengths), blocks, is_causal, whole, dead)
        whole, real_q, at = packed.room, packed.query_tokens, k_blocks.positions(k.device)
        real_k = packed.key_tokens[:, at] if real_k is None else packed.key_tokens[:, at] & real_k
        labels = packed.labels[0], packed.labels[1][:, at]
    room = _rows_of(whole, own)
    queries = of_all_heads(gate, pool_own_queries(gate, session, q, q_blocks, is_causal, real_q), share_heads)
    keys = of_all_heads(gate, pool_keys(gate, session, k, k_blocks, real_k), share_heads)
    pooled, rows_in_all = Pooled(queries, keys, q.dtype), whole.readable.shape[-2]
    if seed is not None and gate.sparse_config.distill_rows and torch.is_grad_enabled():
        rows = draw_rows(seed, rows_in_all, gate.sparse_config.distill_rows, q.device)
        mass = mass_over_ring(gate, session, (q, k), x.key_padding, (q_blocks, k_blocks), rows, is_causal, labels)
        mass = _gathered_heads(mass, share_heads)
        share = _distilled(gate, pooled, room, own, rows, mass)
        gate.gate_losses["distillation"] = share / heads[1]
    if len(own):
        made = gate._choose(pooled, room, (q.shape[1], lengths[1]), False, dead, seed, own, rows_in_all)
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
    cut: dict[str, Any] = {name: getattr(room, name)[..., rows, :] for name in ("readable", "kept")}
    cut |= {name: getattr(room, name)[..., rows] for name in ("budget", "least", "most")}
    if room.unread is not None:
        cut["unread"] = room.unread[..., rows, :]
    return replace(room, **cut, distance=room.distance[rows])


def _gathered_heads(x: Tensor, share_heads: RingSession | None) -> Tensor:
    if share_heads is None:
        return x
    counts = [x.shape[1]] * share_heads.world_size
    return torch.cat(share_heads.roll_call.tensors(x.transpose(0, 1), counts)).transpose(0, 1)


def _nothing_to_pick(
    gate: BlockSparseAdaptive, pooled: Pooled, room: Room, is_training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a rank without queries, connected to all that has a gradient, so that every rank's graph is the same."""
    scorer = gate.scorer
    logits = logits_of(scorer.score(pooled, room.distance), room, gate.temperature, scorer.threshold)
    logits = logits[..., : min(room.slots, logits.shape[-1])]
    if scorer.threshold is not None and is_training:
        gate.gate_losses["sparsity"] = logits.sum()
    wanted = gate.sparse_config.gate == "soft" or (torch.is_grad_enabled() and logits.requires_grad)
    indices = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return indices, indices[..., 0] if indices.shape[-1] else indices.sum(-1), logits if wanted else None


def _distilled(
    gate: BlockSparseAdaptive,
    pooled: Pooled,
    room: Room,
    own: Tensor,
    rows: Tensor,
    mass: Tensor,
) -> Tensor:
    """This rank's share of the distillation loss: that of the drawn rows that are its own."""
    here = rows[:, None] == own
    mine, at = here.any(1), here.int().argmax(1) if len(own) else rows.new_zeros(len(rows))
    at = at[mine]
    scores = gate.scorer.score(pooled._replace(queries=pooled.queries[:, :, at]), room.distance[at])
    if not len(at):
        return scores.sum()
    return distillation_loss(scores, mass[:, :, mine], room.readable[..., at, :]) * (len(at) / len(rows))


def _remember(gate: BlockSparseAdaptive, told: Tensor, room: Room, lengths: tuple[int, int], is_causal: bool) -> None:
    """What ``select`` notes for statistics and calibration; ``told`` is int32[QB, B, H, K + 1]."""
    counts = told[..., -1].permute(1, 2, 0)
    density = counts.sum((0, 2)).to(torch.float32).mean() / (max(room.allowed, 1) * told.shape[1])
    gate._note_density(lengths, is_causal, density)
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
