"""`ExchangePlan`: which key blocks go from which rank to which, in which step. No tensors, no network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._check import boolean, integer
from ._entries import block_tokens, resolve_kv_heads
from ._matching import schedule
from ._needs import Needs, needs_of_dense, needs_of_layout
from .placement import DEFAULT_BLOCK_SIZE, PLACEMENTS, Placement

if TYPE_CHECKING:
    from bs_patterns import BlockLayout

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

#: Beside its elements, a row of K and of V on a float8 wire takes a float32 scale each.
FLOAT8_ROW_BYTES = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes between ranks, forward and backward apart.

    Attributes:
        forward: ``int64[world, world]``, K and V from sender (axis 0) to receiver (axis 1).
        backward: ``int64[world, world]``, dK and dV on their way home; a backward pass that did not keep the remote K
            and V moves ``forward`` once more.
        forward_bound: Fewest bytes any direct exchange (no forwarding, no reduction on the way) moves forward under
            this placement: each rank receives what it reads and does not own, once.
        backward_bound: The same for gradients.
    """

    forward: Int64
    backward: Int64
    forward_bound: int
    backward_bound: int


@dataclass(frozen=True)
class NodeRows:
    """(kv head, key token) rows by the kind of link they take.

    Attributes:
        within: Sent between ranks of one node.
        across: Sent between nodes by the direct exchange.
        across_once: What would cross if every node fetched each row once and handed it on inside: what a hierarchical
            ring saves is ``across − across_once``.
    """

    within: int
    across: int
    across_once: int


@dataclass(frozen=True, eq=False, repr=False)
class ExchangePlan:
    """What every rank of a ring sends and receives, derived from the layout alone and identical on all ranks.

    A need is a (kv head, key block) that a rank's queries read and the rank does not own. Each need is one item of one
    transfer, straight from its owner. Transfers are arranged in steps; a step is a matching: every rank sends to at
    most one rank and receives from at most one. All matrices are ``[sender, receiver]``.

    Attributes:
        layout: The layout, or None for a dense ring.
        placement: Owner of each query token.
        kv_placement: Owner of each key token; the same object unless a pair was given.
        kv_heads: Number of key/value heads.
        block_size: (query, key) block sizes in tokens.
        causal: Whether keys after the query are dropped.
        is_transposed: Whether items travel home (dK, dV) instead of out (K, V); see `T`.
        is_stage: Whether this is one stage of a `HierarchicalPlan`, and so no exchange by itself.
        step: ``int32[world, world]``: the step of a transfer, from 1; 0 where nothing is sent.
        work: ``int64[world, world]``: query tokens × key tokens of active blocks by (key owner, query owner), summed
            over the layout's heads. The diagonal needs no transfer. A block that a token mask cuts counts in full.
    """

    layout: BlockLayout | None
    placement: Placement
    kv_placement: Placement
    kv_heads: int
    block_size: tuple[int, int]
    causal: bool
    is_transposed: bool
    step: Int32
    work: Int64
    _needs: Needs
    _groups: int
    is_stage: bool = False

    @classmethod
    def build(
        cls,
        layout: BlockLayout | None,
        world_size: int,
        placement: str | Placement | tuple[Placement, Placement] = "contiguous",
        kv_heads: int | None = None,
        *,
        seq_len: int | tuple[int, int] | None = None,
        block_size: int | None = None,
        causal: bool | None = None,
    ) -> ExchangePlan:
        """Plan the exchange for a layout, or for dense attention.

        Args:
            layout: Active blocks. None plans a dense ring, as other ring-attention code runs it.
            world_size: Number of ranks.
            placement: ``"contiguous"``, ``"zigzag"``, ``"stripe"``, ``"cost_balanced"`` (with a layout), a `Placement`,
                or a (query, key) pair of those, which is needed when the two lengths differ. Every cut must be aligned
                to the layout's blocks.
            kv_heads: Key/value heads: a divisor of the layout's heads, where heads h · rep … (h + 1) · rep − 1 read kv
                head h; any number for a layout that all heads share. Default: the layout's heads.
            seq_len: Dense ring only: tokens, or a (query, key) pair.
            block_size: Dense ring only: tokens per block; default the placement's, or 64.
            causal: Dense ring only: drop the blocks after each rank's last query; default False.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A value out of range, a cut inside a block, or an argument that would have no effect.
        """
        world = integer("world_size", world_size)
        if layout is None:
            lengths = _lengths(seq_len)
            if block_size is None:
                block_size = placement.block_size if isinstance(placement, Placement) else DEFAULT_BLOCK_SIZE
            block = integer("block_size", block_size)
            blocks = (block, block)
            is_causal = False if causal is None else boolean("causal", causal)
            heads, groups = 1 if kv_heads is None else integer("kv_heads", kv_heads), 1
        else:
            for name, value in (("seq_len", seq_len), ("block_size", block_size), ("causal", causal)):
                if value is not None:
                    raise ValueError(f"{name}: expected None, because the layout has its own, got {value!r}")
            if not hasattr(layout, "indptr"):
                raise TypeError(f"layout: expected a BlockLayout or None, got {type(layout).__name__}")
            layout.validate()
            lengths, blocks, is_causal = layout.seq_len, layout.block_size, layout.causal
            heads, groups = resolve_kv_heads(layout, kv_heads)
        q_place, kv_place = _placements(placement, layout, world, lengths, blocks, heads)
        q_place.check_aligned(blocks[0], "query block size")
        kv_place.check_aligned(blocks[1], "key block size")
        q_owner, kv_owner = q_place.owner_of_blocks(blocks[0]), kv_place.owner_of_blocks(blocks[1])
        if layout is None:
            needs = needs_of_dense(lengths, blocks, is_causal, q_owner, kv_owner, world)
        else:
            needs = needs_of_layout(layout, groups, q_owner, kv_owner, world)
        step = schedule(np.diff(needs.pair_start).reshape(world, world))
        return cls(layout, q_place, kv_place, heads, blocks, is_causal, False, step, needs.work, needs, groups)

    # ------------------------------------------------------------------ sizes

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.placement.world_size

    @property
    def seq_len(self) -> tuple[int, int]:
        """(query, key) tokens."""
        return self.placement.seq_len, self.kv_placement.seq_len

    @cached_property
    def num_steps(self) -> int:
        """Steps that move anything; step 0, a rank's own blocks, is not counted."""
        return int(self.step.max())

    @cached_property
    def rows(self) -> Int64:
        """``int64[world, world]``: (kv head, key token) rows in each transfer."""
        world = self.world_size
        tokens = block_tokens(self.seq_len[1], self.block_size[1])
        total = np.concatenate(([0], np.cumsum(tokens[self._needs.items % len(tokens)])))
        per_pair = np.diff(total[self._needs.pair_start]).reshape(world, world)
        return per_pair * (self.kv_heads // self._groups)

    @cached_property
    def needed_rows(self) -> Int64:
        """``int64[world]``: distinct remote (kv head, key token) rows each rank's queries read.

        Counted from the layout, not from the transfers: what any exchange without reduction must deliver to a rank. In
        a transposed plan they are what a rank must send.
        """
        return self._needs.needed * (self.kv_heads // self._groups)

    @property
    def dense_rows(self) -> int:
        """Rows that a ring moves which sends all of K and V past every rank."""
        return (self.world_size - 1) * self.seq_len[1] * self.kv_heads

    def traffic(
        self,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        batch: int = 1,
        kv_itemsize: int = 2,
        kv_row_bytes: int = 0,
        grad_itemsize: int = 4,
    ) -> Traffic:
        """Payload bytes between every two ranks.

        Args:
            head_dim: Elements of a key row.
            value_head_dim: Elements of a value row; default ``head_dim``.
            batch: Sequences per step.
            kv_itemsize: Bytes per element of K and V on the wire.
            kv_row_bytes: Bytes of a K and V row beside its elements, per sequence (scales of a float8 wire).
            grad_itemsize: Bytes per element of dK and dV on the wire.
        """
        width = integer("head_dim", head_dim)
        width += width if value_head_dim is None else integer("value_head_dim", value_head_dim)
        batch = integer("batch", batch)
        out = batch * (width * integer("kv_itemsize", kv_itemsize) + integer("kv_row_bytes", kv_row_bytes, low=0))
        home = batch * width * integer("grad_itemsize", grad_itemsize)
        forward = self.rows.T if self.is_transposed else self.rows
        bound = int(self.needed_rows.sum())
        return Traffic(forward * out, forward.T * home, bound * out, bound * home)

    # ------------------------------------------------------------------ balance

    @cached_property
    def rank_work(self) -> Int64:
        """``int64[world]``: query tokens × key tokens that each rank computes, summed over the layout's heads."""
        return self.work.sum(0)

    @property
    def work_imbalance(self) -> float:
        """Work of the busiest rank over the mean, ≥ 1 (1.0 when there is none)."""
        return _imbalance(self.rank_work)

    @property
    def row_imbalance(self) -> float:
        """Rows sent or received by the busiest rank over the mean, ≥ 1 (1.0 when nothing moves)."""
        return max(_imbalance(self.rows.sum(0)), _imbalance(self.rows.sum(1)))

    def node_rows(self, ranks_per_node: int) -> NodeRows:
        """Count what stays inside nodes and what crosses between them.

        Args:
            ranks_per_node: Consecutive ranks that share a node.
        """
        plan = self.T if self.is_transposed else self
        node = np.arange(self.world_size) // integer("ranks_per_node", ranks_per_node)
        apart = node[:, None] != node
        needs, blocks = plan._needs, -(-self.seq_len[1] // self.block_size[1])
        pair = np.repeat(np.arange(self.world_size**2), np.diff(needs.pair_start))
        crossing = apart.ravel()[pair]
        # An item has one owner, so (receiving node, item) says it all.
        items = np.unique(node[pair[crossing] % self.world_size] * (blocks * self._groups) + needs.items[crossing])
        tokens = block_tokens(self.seq_len[1], self.block_size[1])[items % blocks]
        once = int(tokens.sum()) * (self.kv_heads // self._groups)
        return NodeRows(int(plan.rows[~apart].sum()), int(plan.rows[apart].sum()), once)

    # ------------------------------------------------------------------ transfers

    def matching(self, step: int) -> Int64:
        """``int64[n, 2]``: the (sender, receiver) pairs of a step, by sender.

        Args:
            step: In ``[1, num_steps]``.
        """
        step = integer("step", step, low=1, high=self.num_steps)
        pairs, start = self._by_step
        return pairs[start[step] : start[step + 1]]

    @cached_property
    def _by_step(self) -> tuple[Int64, Int64]:
        """All (sender, receiver) pairs by step, and where each step starts."""
        pairs = np.argwhere(self.step)
        step = self.step[pairs[:, 0], pairs[:, 1]]
        order = np.argsort(step, kind="stable")
        return pairs[order], np.searchsorted(step[order], np.arange(self.num_steps + 2))

    def transfer(self, sender: int, receiver: int) -> tuple[Int64, Int64]:
        """The (kv head, key block) items of a transfer: two ``int64[n]``, ascending by head, then block."""
        sender = integer("sender", sender, low=0, high=self.world_size - 1)
        receiver = integer("receiver", receiver, low=0, high=self.world_size - 1)
        pair = sender * self.world_size + receiver
        return self._expand(self._needs.items[self._needs.pair_start[pair] : self._needs.pair_start[pair + 1]])

    def needs(self, rank: int) -> tuple[Int64, Int64]:
        """All remote (kv head, key block) items a rank reads: two ``int64[n]``, ascending by head, then block."""
        rank = integer("rank", rank, low=0, high=self.world_size - 1)
        start, world = self._needs.pair_start, self.world_size
        readers = rank * world + np.arange(world) if self.is_transposed else np.arange(world) * world + rank
        parts = [self._needs.items[start[pair] : start[pair + 1]] for pair in readers.tolist()]
        return self._expand(np.sort(np.concatenate(parts)))

    def _expand(self, items: Int64) -> tuple[Int64, Int64]:
        """Split items into heads and blocks; a shared head group stands for every kv head."""
        blocks = -(-self.seq_len[1] // self.block_size[1])
        if self._groups == self.kv_heads:
            return items // blocks, items % blocks
        return np.repeat(np.arange(self.kv_heads), len(items)), np.tile(items, self.kv_heads)

    @cached_property
    def T(self) -> ExchangePlan:
        """The way home: every transfer reversed, in the same step, for dK and dV; ``plan.T.T is plan``."""
        world = self.world_size
        counts = np.diff(self._needs.pair_start)
        swapped = np.arange(world * world).reshape(world, world).T.ravel()
        start = np.concatenate(([0], np.cumsum(counts[swapped])))
        # Each reversed pair takes its items from where the pair had them.
        move = np.repeat(self._needs.pair_start[swapped] - start[:-1], counts[swapped])
        items = self._needs.items[np.arange(len(self._needs.items)) + move]
        needs = replace(self._needs, pair_start=start, items=items)
        step = np.ascontiguousarray(self.step.T)
        out = replace(self, is_transposed=not self.is_transposed, step=step, _needs=needs)
        out.__dict__["T"] = self
        return out

    # ------------------------------------------------------------------ identity

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the whole plan; ranks compare it before the first byte moves."""
        content = hashlib.sha256(b"bs-comm plan 1\0")
        head = [self.kv_heads, self._groups, *self.block_size, int(self.causal), int(self.is_transposed)]
        content.update(np.array(head, "<i8").tobytes())
        for name in (self.layout.digest if self.layout else "dense", self.placement.digest, self.kv_placement.digest):
            content.update(name.encode() + b"\0")
        for array in (self.step, self._needs.pair_start, self._needs.items):
            content.update(np.ascontiguousarray(array, "<i8").tobytes())
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExchangePlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"ExchangePlan({'dense' if self.layout is None else 'sparse'}, world_size={self.world_size}, "
            f"seq_len={self.seq_len}, block_size={self.block_size}, kv_heads={self.kv_heads}, "
            f"placement={self.placement.name}, steps={self.num_steps}, rows={int(self.rows.sum())})"
        )


def _lengths(seq_len: Any) -> tuple[int, int]:
    if seq_len is None:
        raise ValueError("seq_len: expected the number of tokens when layout is None, got None")
    if isinstance(seq_len, tuple):
        if len(seq_len) != 2:
            raise ValueError(f"seq_len: expected an integer or a (query, key) pair, got {seq_len!r}")
        return integer("seq_len[0]", seq_len[0]), integer("seq_len[1]", seq_len[1])
    tokens = integer("seq_len", seq_len)
    return tokens, tokens


def _placements(
    placement: Any,
    layout: BlockLayout | None,
    world: int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    kv_heads: int,
) -> tuple[Placement, Placement]:
    if isinstance(placement, str):
        made = _placement_by_name(placement, layout, world, lengths, blocks, kv_heads)
        pair = (made, made)
    elif isinstance(placement, tuple):
        pair = placement
    else:
        pair = (placement, placement)
    if len(pair) != 2 or not all(isinstance(place, Placement) for place in pair):
        raise TypeError(f"placement: expected a name, a Placement or a (query, key) pair of them, got {placement!r}")
    for side, place, tokens in zip(("query", "key"), pair, lengths, strict=True):
        if place.world_size != world:
            raise ValueError(f"placement: expected one for {world} ranks, got {place!r}")
        if place.seq_len != tokens:
            raise ValueError(f"placement: expected one of {tokens} {side} tokens, got {place!r}")
    return pair


def _placement_by_name(
    name: str,
    layout: BlockLayout | None,
    world: int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    kv_heads: int,
) -> Placement:
    if name not in PLACEMENTS:
        raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {name!r}")
    if lengths[0] != lengths[1]:
        raise ValueError(f"placement: expected a (query, key) pair of Placement for seq_len {lengths}, got {name!r}")
    if name == "cost_balanced":
        if layout is None:
            raise ValueError("placement: 'cost_balanced' expected a layout; zigzag balances dense causal attention")
        return Placement.cost_balanced(layout, world, kv_heads=kv_heads)
    rule: Callable[..., Placement] = PLACEMENTS[name]
    return rule(lengths[0], world, block_size=math.lcm(*blocks))


def _imbalance(amount: Int64) -> float:
    total = int(amount.sum())
    return float(amount.max()) * len(amount) / total if total else 1.0
