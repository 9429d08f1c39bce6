"""A live gate over a ring: the plan of the exchange from what all ranks picked, and the picks among each arrival.

Shape legend: B batch, T tokens, G kv heads, D head dim, R own query blocks, K slots, U key blocks of an arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_comm import Arrival, ExchangePlan, Placement
from bs_kernels import BatchedLayout, LayoutPlan, TokenMask

from ._ring_attention import RingCall
from ._ring_operands import Operands
from ._ring_pick import Pick, pick_over_ring
from ._ring_session import RingSession
from .adaptive import BlockSparseAdaptive


@dataclass(frozen=True)
class GatedCall(RingCall):
    """A call whose layout differs per sequence.

    The ring moves ``[1, T, B · G, D]``: a (sequence, kv head) is a head of its exchange plan, so that each block goes
    only to who reads it for that very sequence and head.

    Attributes:
        pick: Of the own query blocks.
        batch: B.
        tokens: Own queries.
    """

    pick: Pick
    batch: int
    tokens: int
    _parts: dict[int, tuple[LayoutPlan, Tensor]] = field(default_factory=dict)

    def sent(self, x: Tensor) -> Tensor:
        """``[B, T, G, D] → [1, T, B · G, D]``."""
        return x.transpose(0, 1).flatten(1, 2)[None]

    def came(self, x: Tensor) -> Tensor:
        """``[1, T, B · G, D] → [B, T, G, D]``."""
        return x[0].unflatten(1, (self.batch, -1)).transpose(0, 1)

    def part(self, arrival: Arrival, block_bias: Tensor | None) -> tuple[Any, dict[str, Any]]:
        """The picks among the arrival, with their share of ``block_bias``."""
        plan, slots = self._part(arrival)
        return plan, {} if block_bias is None else {"block_bias": block_bias.gather(-1, slots)}

    def add_block_bias(self, total: Tensor, arrival: Arrival, share: Tensor) -> None:
        """To the slots that the arrival holds."""
        total.scatter_add_(-1, self._part(arrival)[1], share.to(total.dtype))

    def _part(self, arrival: Arrival) -> tuple[LayoutPlan, Tensor]:
        """(kernel plan, int64[B, h, R, K']: which slots of the pick the arrival holds, those first)."""
        found = self._parts.get(arrival.step)
        if found is not None:
            return found
        ring, pick = self.open_ring.ring.plan, self.pick
        device = pick.indices.device
        place = torch.full((-(-ring.seq_len[1] // ring.block_size[1]),), -1, device=device)
        place[torch.from_numpy(arrival.blocks).to(device)] = torch.arange(len(arrival.blocks), device=device)
        here = place[pick.indices]
        is_here = (here >= 0) & (torch.arange(here.shape[-1], device=device) < pick.counts[..., None])
        counts = is_here.sum(-1)
        slots = (~is_here).to(torch.uint8).sort(dim=-1, stable=True).indices[..., : int(counts.max())]
        layout = BatchedLayout(here.gather(-1, slots), counts, ring.block_size, (self.tokens, arrival.k.shape[1]))
        layout = layout if self.among is None else self.among.layout(layout)
        plan = LayoutPlan.build(
            layout, TokenMask(causal=ring.causal), device, order=self.order, q_start=arrival.q_start,
            kv_start=arrival.kv_start,
        )  # fmt: skip
        found = self._parts[arrival.step] = plan, slots
        return found


def pick_or_cached(
    gate: BlockSparseAdaptive,
    session: RingSession,
    x: Operands,
    places: tuple[Placement, Placement],
    is_causal: bool,
    seed: int,
    heads: tuple[int, int],
    share_heads: RingSession | None,
    segment_ids: tuple[Tensor, Tensor] | None,
) -> tuple[Pick, ExchangePlan]:
    """The pick of a call and its exchange plan; kept where the gate caches. Arguments as of `pick_over_ring`."""

    def made() -> tuple[Pick, ExchangePlan]:
        pick = pick_over_ring(
            gate, session, x, places, is_causal, seed if gate.training else None, heads, share_heads, segment_ids
        )  # fmt: skip
        kv_heads = x.k.shape[0] * x.k.shape[2]
        return pick, in_turn(ExchangePlan.build(pick.layout, session.world_size, places, kv_heads))

    if not gate.cache or gate.training:
        return made()
    shapes = (tuple(x.q.shape), tuple(x.k.shape), *(place.digest for place in places))
    key = (*shapes, session.rank, heads, is_causal, x.q.device, gate._fingerprint())
    if key not in gate._selections:
        with torch.no_grad():
            gate._selections[key] = made()  # pyright: ignore[reportArgumentType]
    return gate._selections[key]  # pyright: ignore[reportReturnType]


def in_turn(plan: ExchangePlan) -> ExchangePlan:
    """The same transfers, those to the s-th next rank in step s.

    The order in which parts are merged is then the same whatever the gate picks: what later tokens make it pick changes
    no bit of what earlier ones give.
    """
    ranks = np.arange(plan.world_size, dtype=np.int32)
    step = np.where(plan.step > 0, (ranks - ranks[:, None]) % plan.world_size, 0).astype(np.int32)
    return replace(plan, step=step)


def share_parameters(gate: BlockSparseAdaptive, session: RingSession) -> None:
    """Give every rank the first rank's scorer, where it has just been drawn."""
    own = [p.detach() for p in gate.scorer.parameters()]
    flat = torch.cat([p.flatten() for p in own])
    first = session.roll_call.tensors(flat, [len(flat)] * session.world_size)[0]
    for p, values in zip(own, first.split([p.numel() for p in own]), strict=True):
        p.copy_(values.view_as(p))
