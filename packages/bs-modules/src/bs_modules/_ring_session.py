"""What all distributed modules of a process group share: one roll call, exchange plans, and open rings.

Layers take turns, so one ring, with one set of buffers, serves every layer of the same layout and shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bs_comm import Arrival, ExchangePlan, PackedRing, Placement, RingMismatchError, RingPeerError, RollCall
from bs_comm.transport import CHANNELS
from bs_kernels import LayoutPlan, TokenMask
from bs_memory import BufferPool
from bs_patterns import BlockLayout

from ._head_exchange import AmongAll

_RINGS_KEPT = 8
_PLANS_KEPT = 32


@dataclass
class OpenRing:
    """A ring with the kernel plans of its arrivals.

    Attributes:
        ring: The ring.
        key: What it was opened for; `RingSession.ring` gives it back, opened again if need be.
    """

    ring: PackedRing
    key: tuple[Any, ...]
    _plans: dict[tuple[int, str, AmongAll | None], LayoutPlan] = field(default_factory=dict)
    _columns: dict[int, Tensor] = field(default_factory=dict)

    def kernel_plan(self, arrival: Arrival, order: str, among: AmongAll | None = None) -> LayoutPlan:
        """The kernel's plan of an arrival: its blocks at their absolute positions, its heads where they are told."""
        found = self._plans.get((arrival.step, order, among))
        if found is None:
            assert arrival.layout is not None
            layout = arrival.layout if among is None else among.layout(arrival.layout)
            found = LayoutPlan.build(
                layout, TokenMask(causal=self.ring.plan.causal), arrival.k.device,
                order=order, q_start=arrival.q_start, kv_start=arrival.kv_start,
            )  # fmt: skip
            self._plans[arrival.step, order, among] = found
        return found

    def columns(self, arrival: Arrival) -> Tensor:
        """int64[T]: positions in the whole sequence of an arrival's tokens."""
        found = self._columns.get(arrival.step)
        if found is None:
            plan = self.ring.plan
            tokens = arrival.kv_start[:, None] + np.arange(plan.block_size[1])
            found = torch.from_numpy(tokens[tokens < plan.seq_len[1]]).to(arrival.k.device)
            self._columns[arrival.step] = found
        return found


class RingSession:
    """One process group's rings.

    Args:
        group: The group; more than one rank.
        hop_timeout: Seconds a hop may take.
        device: Where messages live.
    """

    def __init__(self, group: Any, hop_timeout: float, device: torch.device) -> None:
        self.group = group
        self.hop_timeout = hop_timeout
        self.roll_call = RollCall(group, hop_timeout=hop_timeout, device=device)
        self.rank, self.world_size = self.roll_call.rank, self.roll_call.world_size
        self._rings: OrderedDict[tuple[Any, ...], OpenRing] = OrderedDict()
        self._plans: OrderedDict[tuple[Any, ...], ExchangePlan] = OrderedDict()
        self._opened = 0

    def agree(self, own: dict[str, int], alike: Sequence[str]) -> dict[str, np.ndarray]:
        """Every rank's numbers by name.

        Args:
            own: This rank's; the same names in the same order on every rank.
            alike: Those that must be equal on all ranks.

        Raises:
            RingMismatchError: They are not; on every rank.
            RingPeerError: A peer failed.
        """
        everyone = self.roll_call.words(list(own.values()))
        found = dict(zip(own, everyone.T, strict=True))
        different = {name: np.flatnonzero(found[name] != found[name][0]).tolist() for name in alike}
        if different := {name: ranks for name, ranks in different.items() if ranks}:
            raise RingMismatchError(different)
        return found

    def whole(self, x: Tensor, placement: Placement) -> Tensor:
        """A tensor of tokens ``[B, S, ...]`` gathered from every rank's shard, in sequence order."""
        shards = self.roll_call.tensors(x.transpose(0, 1), placement.lengths.tolist())
        return placement.unshard(shards, dim=0).transpose(0, 1)

    def plan(self, layout: BlockLayout, placement: tuple[Placement, Placement], kv_heads: int) -> ExchangePlan:
        """The exchange plan; the last few are kept."""
        key = (layout.digest, placement[0].digest, placement[1].digest, kv_heads)
        found = self._plans.get(key)
        if found is None:
            found = ExchangePlan.build(layout, self.world_size, placement, kv_heads)
            self._plans[key] = found
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return found

    def ring(
        self,
        plan: ExchangePlan,
        batch: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        wire_dtype: torch.dtype | None,
        pooled: bool,
    ) -> OpenRing:
        """A ring for these shapes, kept from an earlier call or opened now; collective in the order of calls.

        Args:
            plan: The exchange plan.
            batch: Sequences.
            dims: Head dims of K and V.
            dtype: Of K and V.
            device: Of K and V.
            wire_dtype: Of K and V on the wire, or None.
            pooled: Lease buffers from the process's pool, or from one of the ring's own.
        """
        key = (plan, batch, dims, dtype, device, wire_dtype, pooled)
        found = self._rings.get(key)
        if found is None:
            # A channel of its own, so that ranks that disagree on the order of calls wait and never mix messages up.
            # Numbers come round again, long after the rings that had them are closed; 0 and the last are others'.
            self._opened = self._opened % (CHANNELS - 2) + 1
            ring = PackedRing(
                plan, batch=batch, head_dim=dims[0], value_head_dim=dims[1], dtype=dtype, device=device,
                group=self.group, pool=None if pooled else BufferPool(), wire_dtype=wire_dtype,
                hop_timeout=self.hop_timeout, channel=self._opened,
            )  # fmt: skip
            found = self._rings[key] = OpenRing(ring, key)
            while len(self._rings) > _RINGS_KEPT:
                self._rings.popitem(last=False)[1].ring.close()
        self._rings.move_to_end(key)
        return found

    def failed(self, error: RingPeerError) -> None:
        """A ring failed: every later call on this group raises the same, here and elsewhere."""
        self.roll_call.report(error)
        self.close_rings()

    @property
    def failure(self) -> RingPeerError | None:
        """What every later call raises."""
        return self.roll_call._failure

    def sent_bytes(self, plan: ExchangePlan) -> dict[str, np.ndarray]:
        """Payload bytes sent so far by the open rings of a plan, by receiver: ``"kv"`` and ``"grad"``."""
        totals = {name: np.zeros(self.world_size, np.int64) for name in ("kv", "grad")}
        for key, found in self._rings.items():
            if key[0] == plan:
                for name, sent in found.ring.sent_bytes.items():
                    totals[name] += sent
        return totals

    def close_rings(self) -> None:
        """Give all buffers back."""
        while self._rings:
            self._rings.popitem()[1].ring.close()


_sessions: dict[tuple[int, float, torch.device], RingSession] = {}


def session_of(group: Any, hop_timeout: float, device: torch.device) -> RingSession:
    """The session of a group, begun at its first call; those of groups that were destroyed are closed."""
    for key, session in list(_sessions.items()):
        if not _is_alive(session.group):
            session.close_rings()
            session.roll_call.close()
            del _sessions[key]
    key = (id(group), hop_timeout, device)
    if key not in _sessions:
        _sessions[key] = RingSession(group, hop_timeout, device)
    return _sessions[key]


def open_sessions(group: Any) -> list[RingSession]:
    """The sessions of a group, one per hop timeout and device in use."""
    return [session for key, session in _sessions.items() if key[0] == id(group)]


def _is_alive(group: Any) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True
