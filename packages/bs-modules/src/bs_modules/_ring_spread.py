"""Which ranks share a sequence, and which of its tokens each of them has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bs_comm import ExchangePlan, Placement, RingPeerError, Survivors
from bs_comm import regroup as _regroup
from bs_patterns import BlockLayout

from ._checks import check_int
from ._ring_dilated import segment_blocks
from ._ring_groups import groups_of, rank_of, regroup_mesh
from ._ring_pick import anywhere
from ._ring_placement import Placements
from .adaptive import BlockSparseAdaptive
from .attention import BlockSparseAttention
from .dilated import DilatedAttention
from .distributed_config import DistributedSparseConfig


class SpreadAttention(BlockSparseAttention):
    """An attention over tokens that ranks share: who they are, and where the tokens live. A subclass computes it.

    Attributes:
        attention: What it computes.
        distributed_config: Says where tokens live.
    """

    attention: BlockSparseAttention
    distributed_config: DistributedSparseConfig
    _placements: Placements
    _last_plan: ExchangePlan | None

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> Any:
        """The process group or two-dimensional mesh in use, or `None` for the default group."""
        return self._group if self._mesh is None else self._mesh

    @group.setter
    def group(self, group: Any) -> None:
        self._group, self._head_group = groups_of(group)
        self._mesh = group if self._head_group is not None else None

    @property
    def world_size(self) -> int:
        """Ranks that a sequence is spread over, by tokens and by heads: 1 without a process group.

        Raises:
            RuntimeError: `WORLD_SIZE` in the environment is more than 1 and there is no process group.
        """
        return self._ring()[1] * self._heads()[1]

    @property
    def rank(self) -> int:
        """Which of them this is; ranks that share heads follow one another."""
        return self._ring()[0] * self._heads()[1] + self._heads()[0]

    def _heads(self) -> tuple[int, int]:
        """(rank, ranks) in the group that shares heads."""
        return (0, 1) if self._head_group is None else rank_of(self._head_group)

    def _ring(self) -> tuple[int, int]:
        """(rank, ranks) in the ring."""
        return rank_of(self._group)

    def regroup(self, error: RingPeerError, *, patience: float = 10.0) -> Survivors:
        """After a failed call: go on with the ranks that are left; collective among them.

        The module's `group` becomes the new one. Shard again from the full tensors or the last checkpoint, and redo the
        step: it is the step of a fresh run at the new world size. Other modules are to be given the new group too.

        Of a two-dimensional mesh, the ranks that are left make a mesh with as many columns, where their number is a
        multiple of those; else one ring, whose ranks share tokens only.

        Args:
            error: What was raised.
            patience: Seconds to wait for the other survivors; with a two-dimensional mesh, and a `hop_timeout`.

        Returns:
            The survivors; see `bs_comm.regroup`. With a two-dimensional mesh, by their ranks in the default group.
        """
        if self._head_group is None:
            left = _regroup(error, self._group, patience=patience)
        else:
            # Ranks that share neither heads nor tokens with the one that failed may learn of it a deadline later.
            left = regroup_mesh(error, self._mesh, patience + self.distributed_config.hop_timeout)
        self.group = left.group
        return left

    # -- where tokens live -------------------------------------------------------------------------------------------

    def placement(self, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None) -> Placement:
        """Which rank of the ring holds which tokens of a sequence, by the placement of the config.

        Args:
            seq_len: Tokens of the whole sequence.
            is_causal: As in `forward`; matters for `"cost_balanced"`, like `num_heads`.
            num_heads: Query heads; `None` takes the module's.
        """
        layout = self._known_layout(seq_len, is_causal, num_heads)
        return self._placements.of(self.distributed_config.placement, layout, self._ring()[1])[0]

    def positions(self, seq_len: int, is_causal: bool = False) -> Tensor:
        """`int64[S]`: positions in the sequence of this rank's tokens, for rotary embeddings."""
        rank, heads_rank = self._ring()[0], self._heads()
        return _cut(torch.from_numpy(self.placement(seq_len, is_causal).positions(rank)), *heads_rank, dim=0)

    def shard(self, x: Tensor, is_causal: bool = False, *, dim: int = 1) -> Tensor:
        """Cuts this rank's tokens out of a tensor of the whole sequence."""
        mine = self.placement(x.shape[dim], is_causal).shard(x, self._ring()[0], dim=dim)
        return _cut(mine, *self._heads(), dim=dim)

    def exchange_plan(
        self, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None, kv_heads: int | None = None
    ) -> ExchangePlan:
        """What travels between ranks for one length; see `bs_comm.ExchangePlan`.

        Raises:
            ValueError: A live gate is inside, whose blocks depend on the input.
        """
        if isinstance(self.attention, BlockSparseAdaptive):
            self.layout(seq_len, is_causal)  # says why there is none
        layout, world = self._known_layout(seq_len, is_causal, num_heads), self._ring()[1]
        places = self._placements.of(self.distributed_config.placement, layout, world)
        return ExchangePlan.build(layout, world, places, kv_heads)

    def rebalance(self, step: int, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None) -> bool:
        """Every `load_balance_interval` steps, looks for a better `"cost_balanced"` placement of the present layout.

        A placement is held while the layout changes (a density schedule, an edited config, a live gate, whose layout is
        that of the last call), because the caller cuts its data by it. Call this on every rank between two steps, and
        cut the data of the next one anew when it says so.

        Args:
            step: Training steps taken.
            seq_len: Tokens of the whole sequence.
            is_causal: As in `forward`.
            num_heads: Query heads; `None` takes the module's.

        Returns:
            Whether `shard` and `positions` are others from now on.

        Raises:
            ValueError: Another placement than `"cost_balanced"`, which never changes.
        """
        config = self.distributed_config
        if config.placement != "cost_balanced":
            raise ValueError(f"placement: expected 'cost_balanced' to rebalance, got {config.placement!r}")
        if check_int("step", step, least=0) % config.load_balance_interval:
            return False
        layout = self._known_layout(seq_len, is_causal, num_heads)
        if isinstance(self.attention, BlockSparseAdaptive):
            picked = None if self._last_plan is None else self._last_plan.layout
            if picked is not None and (picked.seq_len, picked.causal) == (layout.seq_len, layout.causal):
                layout = picked
            elif not layout.nnz:
                return False
        return self._placements.rebalance(layout, self._ring()[1])

    def _known_layout(self, seq_len: int, is_causal: bool, num_heads: int | None) -> BlockLayout:
        """The layout that a placement is made for; the same as in `forward`, or an error."""
        if isinstance(self.attention, DilatedAttention):
            return segment_blocks(seq_len, self.attention.segment_lengths or (), is_causal)
        if isinstance(self.attention, BlockSparseAdaptive):
            return self._room_layout((seq_len, seq_len), is_causal, num_heads or self.num_heads)
        layout = self.layout(seq_len, is_causal, num_heads)
        if self.distributed_config.placement == "cost_balanced" and layout.heads == 1:
            known = num_heads or self.num_heads
            if known is None and self.layout(seq_len, is_causal, 2).heads != 1:
                raise ValueError("num_heads: expected the number of query heads, whose layouts differ, got None")
        return layout

    def _room_layout(self, lengths: tuple[int, int], is_causal: bool, num_heads: int | None) -> BlockLayout:
        """What a placement reads of a live gate: all that it may pick, whose shares by row are those of its picks."""
        gate, layout = self.attention, anywhere(self.attention.sparse_config.blocks, lengths, bool(is_causal))
        assert isinstance(gate, BlockSparseAdaptive)
        if self.distributed_config.placement != "cost_balanced" or self._placements.holds(layout, self._ring()[1]):
            return layout
        return gate.prepare(lengths, is_causal, num_heads)


def _cut(x: Tensor, rank: int, ranks: int, *, dim: int) -> Tensor:
    """One of as many consecutive pieces of equal length, within one."""
    return x.tensor_split(ranks, dim)[rank]
