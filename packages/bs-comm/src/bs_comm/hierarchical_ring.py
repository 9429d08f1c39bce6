"""`HierarchicalRing`: carry out a `HierarchicalPlan` with two packed rings, one across nodes and one inside them.

The first ring is an ordinary one in which a rank reads only its own blocks and those it fetches. The second runs on a
sequence of its own: the blocks that each rank holds by then, own and fetched, rank after rank. A block that three nodes
fetched stands there four times, and every reader is pointed to the copy in its node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_patterns import BlockLayout

from ._check import boolean
from ._entries import block_tokens
from .hierarchy import HierarchicalPlan
from .placement import Placement
from .plan import ExchangePlan
from .ring import Arrival, Kept, OnArrival, PackedRing

Int64 = NDArray[np.int64]


class HierarchicalRing:
    """A `PackedRing` whose rows cross to a node once and are handed on inside; the same calls, the same guarantees.

    Own blocks and those a rank fetched are shown while the first stage is under way, the others in the second, which
    starts when the first has ended on all ranks. In a backward pass gradients are added up in the node first.

    Constructing it is collective, as is every call. Where the last block of the sequence is short, the second stage
    passes it on in full size.

    Args:
        plan: The same on every rank.
        ring: Arguments of `PackedRing` but for its plan.

    Attributes:
        plan: The direct plan.
        rank: This rank.
        grad_dtype: As in `PackedRing`.
        across: The ring of the first stage; counters and planned traffic are per stage.
        within: The ring of the second stage.

    Raises:
        TypeError: Not a `HierarchicalPlan`.
        ValueError, RingMismatchError, RingPeerError: As in `PackedRing`.
    """

    def __init__(self, plan: HierarchicalPlan, **ring: Any) -> None:
        if not isinstance(plan, HierarchicalPlan):
            raise TypeError(f"plan: expected a HierarchicalPlan, got {type(plan).__name__}")
        self.plan = plan.direct
        across, within, self._copies = _plans_of(plan)
        self.across = PackedRing(across, **ring)
        try:
            self.within = PackedRing(within, **ring)
        except BaseException:
            self.across.close()
            raise
        self.rank, self.grad_dtype = self.across.rank, self.across.grad_dtype
        self._size = self.plan.block_size[1]
        self._tokens = block_tokens(self.plan.seq_len[1], self._size)
        mine = self._copies // len(self._tokens) == self.rank
        self._held = self._copies[mine] % len(self._tokens)
        self._own = self.plan.kv_placement.blocks(self.rank, block_size=self._size)
        shift = self.plan.seq_len[1] - self.plan.seq_len[0]
        rows = self.plan.placement.blocks(self.rank, block_size=self.plan.block_size[0])
        self._q_start = rows * self.plan.block_size[0] + shift

    @torch.no_grad()
    def forward(
        self, k: Tensor, v: Tensor, on_arrival: OnArrival, *, keep: bool = False
    ) -> tuple[Kept, Kept] | None:  # fmt: skip
        """Show every key block that this rank's queries read to ``on_arrival``; as `PackedRing.forward`.

        Args:
            k: ``[B, S, H, D]``, this rank's shard.
            v: ``[B, S, H, E]``.
            on_arrival: Called once per arrival that holds something to read; steps of both stages are numbered on.
            keep: Return what came in, for `backward`.

        Returns:
            What came in, stage by stage, with ``keep``; else None.

        Raises:
            RingPeerError, ValueError: As `PackedRing.forward`.
        """
        held = self._room()

        def show(arrival: Arrival) -> None:
            if arrival.step:
                self._place(arrival.blocks, (arrival.k, arrival.v), held)
            on_arrival(arrival)

        came = self.across.forward(k, v, show, keep=boolean("keep", keep))
        self._place(self._own, (k, v), held)
        later = self.within.forward(*held, lambda arrival: on_arrival(self._real(arrival)), keep=keep)
        return None if came is None or later is None else (came, later)

    @torch.no_grad()
    def backward(
        self, k: Tensor, v: Tensor, on_arrival: OnArrival, *, kept: tuple[Kept, Kept] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Show every arrival again and bring gradients home; as `PackedRing.backward`.

        Args:
            k: ``[B, S, H, D]``, as in `forward`.
            v: ``[B, S, H, E]``.
            on_arrival: Returns (dk, dv) in ``grad_dtype`` for the arrival.
            kept: What `forward` returned with ``keep``. All ranks give it, or none.

        Returns:
            (dk ``[B, S, H, D]``, dv ``[B, S, H, E]``) in ``grad_dtype``.

        Raises:
            RingPeerError, TypeError, ValueError: As `PackedRing.backward`.
        """
        held = self._room()
        if kept is None:  # Nothing is computed meanwhile: the gradients of what is fetched come last.
            came = self.across.forward(
                k, v, lambda a: self._place(a.blocks, (a.k, a.v), held) if a.step else None, keep=True
            )
            self._place(self._own, (k, v), held)
            later = None
        else:
            came, later = kept

        def share_later(arrival: Arrival) -> Any:
            shares = on_arrival(self._real(arrival))
            missing = arrival.k.shape[1] - int(self._tokens[self._real_blocks(arrival)].sum())
            if missing and isinstance(shares, tuple):
                return tuple(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in shares)
            return shares

        sums = self.within.backward(*held, share_later, kept=later)

        def share(arrival: Arrival) -> Any:
            shares = on_arrival(arrival)
            if arrival.step and isinstance(shares, tuple):
                places = self._places(arrival.blocks)
                return tuple(x + total[:, places] for x, total in zip(shares, sums, strict=True))
            return shares

        home = self.across.backward(k, v, share, kept=came)
        places = self._places(self._own)
        for total, part in zip(home, sums, strict=True):
            total.add_(part[:, places])
        return home

    def close(self) -> None:
        """Give the buffers of both stages back; calls after it raise."""
        self.across.close()
        self.within.close()

    def __enter__(self) -> HierarchicalRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what a rank holds

    def _room(self) -> tuple[Tensor, Tensor]:
        """Zeros for K and V of all blocks that this rank holds after the first stage."""
        ring, tokens = self.across, len(self._held) * self._size
        k, v = (
            torch.zeros(ring._batch, tokens, self.plan.kv_heads, dim, dtype=ring._dtype, device=ring._device)
            for dim in ring._dims
        )
        return k, v

    def _places(self, blocks: Int64) -> Tensor:
        """Where the tokens of some of these blocks are."""
        starts = np.searchsorted(self._held, blocks) * self._size
        tokens = (starts[:, None] + np.arange(self._size)).ravel()[: int(self._tokens[blocks].sum())]
        return torch.from_numpy(tokens).to(self.across._device)

    def _place(self, blocks: Int64, parts: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> None:
        places = self._places(blocks)
        for part, into in zip(parts, held, strict=True):
            into.index_copy_(1, places, part)

    def _real_blocks(self, arrival: Arrival) -> Int64:
        return self._copies[arrival.blocks] % len(self._tokens)

    def _real(self, arrival: Arrival) -> Arrival:
        """An arrival of the second stage with blocks and positions of the sequence itself."""
        blocks = self._real_blocks(arrival)
        tokens, layout = int(self._tokens[blocks].sum()), arrival.layout
        if layout is not None and tokens < arrival.k.shape[1]:
            layout = BlockLayout(layout.block_size, (layout.seq_len[0], tokens), layout.indptr, layout.indices)
        return replace(
            arrival, step=self.across.plan.num_steps + arrival.step, k=arrival.k[:, :tokens], v=arrival.v[:, :tokens],
            blocks=blocks, kv_start=blocks * self._size, q_start=self._q_start, layout=layout,
        )  # fmt: skip


def _plans_of(plan: HierarchicalPlan) -> tuple[ExchangePlan, ExchangePlan, Int64]:
    """The direct plans of both stages, and the copies in the order of the second: ``rank · blocks + block``."""
    direct, layout = plan.direct, _layout_of(plan.direct)
    heads, rows, blocks = layout.shape
    counts = np.diff(layout.indptr, axis=1)
    head = np.repeat(np.arange(heads), counts.sum(1))
    row = np.repeat(np.tile(np.arange(rows), heads), counts.ravel())
    column = layout.indices.astype(np.int64)
    q_owner, kv_owner = (
        place.owner_of_blocks(size).astype(np.int64)
        for place, size in zip((direct.placement, direct.kv_placement), direct.block_size, strict=True)
    )
    reader, owner = q_owner[row], kv_owner[column]
    item = head // max(1, heads // direct.kv_heads) * blocks + column

    # Who fetched an item into a node, looked up by (node, item).
    world, items, needs = direct.world_size, direct.kv_heads * blocks, plan.across._needs
    fetcher = np.repeat(np.arange(world**2), np.diff(needs.pair_start)) % world
    key = fetcher // plan.ranks_per_node * items + needs.items
    order = np.argsort(key)
    crosses = reader // plan.ranks_per_node != owner // plan.ranks_per_node
    holder = owner.copy()
    wanted = reader[crosses] // plan.ranks_per_node * items + item[crosses]
    holder[crosses] = fetcher[order][np.searchsorted(key[order], wanted)]

    first = (reader == owner) | (crosses & (holder == reader))
    across = BlockLayout.from_coo(
        head[first], row[first], column[first],
        block_size=layout.block_size, seq_len=layout.seq_len, heads=heads, causal=layout.causal,
    )  # fmt: skip
    copies = np.unique(np.concatenate((kv_owner * blocks + np.arange(blocks), fetcher * blocks + needs.items % blocks)))
    size = direct.block_size[1]
    within = BlockLayout.from_coo(
        head[~first], row[~first], np.searchsorted(copies, holder[~first] * blocks + column[~first]),
        block_size=layout.block_size, seq_len=(layout.seq_len[0], len(copies) * size), heads=heads,
    )  # fmt: skip
    place = Placement.from_owner(copies // blocks, len(copies) * size, world, block_size=size)
    return (
        ExchangePlan.build(across, world, (direct.placement, direct.kv_placement), direct.kv_heads),
        ExchangePlan.build(within, world, (direct.placement, place), direct.kv_heads),
        copies,
    )


def _layout_of(plan: ExchangePlan) -> BlockLayout:
    """The plan's layout; for a dense ring, the full one."""
    if plan.layout is not None:
        return plan.layout
    shape = tuple(-(-tokens // size) for tokens, size in zip(plan.seq_len, plan.block_size, strict=True))
    return BlockLayout.from_dense(
        np.ones((1, *shape), np.bool_), block_size=plan.block_size, seq_len=plan.seq_len, causal=plan.causal
    )
