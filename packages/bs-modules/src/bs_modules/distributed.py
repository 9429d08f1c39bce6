"""Any block-sparse attention over a ring of ranks, each of which holds a shard of one sequence.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from bs_comm import ExchangePlan, Placement, RingPeerError, Survivors, compress_gradients
from bs_comm import regroup as _regroup
from bs_patterns import BlockLayout

from ._checks import check_flag, check_int
from ._ring_checks import check_attention, check_shards, check_tokens
from ._ring_dilated import segment_blocks
from ._ring_forward import as_computed, check_spreads, over_heads, over_ring
from ._ring_groups import groups_of, rank_of, regroup_mesh
from ._ring_operands import Operands
from ._ring_pick import anywhere
from ._ring_placement import Placements
from ._ring_session import open_sessions
from .adaptive import BlockSparseAdaptive
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .dilated import DilatedAttention
from .distributed_config import DistributedSparseConfig
from .explain import Explanation
from .hierarchical import BlockSparseHierarchical, HierarchicalConfig

_INNER_DEFAULTS: dict[str, Any] = {
    "segment_lengths": None,
    "dilation_rates": None,
    "sparse_config": None,
    "num_heads": None,
    "dropout": 0.0,
    "scale": None,
    "mixed_precision": False,
    "order": "auto",
    "backend": "auto",
    "deterministic": True,
}


def _of_attention(name: str) -> Any:
    """A property that reads and writes the attribute of the attention inside."""

    def get(self: Any) -> Any:
        return getattr(self.attention, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.attention, name, value)

    return property(get, put, doc=f"`{name}` of the attention inside.")


class BlockSparseRingDistributedDilatedAttention(BlockSparseAttention):
    """Exact block-sparse attention over a sequence whose tokens are spread over the ranks of a process group.

    Every rank calls it with its shard of q, k and v and gets its shard of the output: what the module inside would give
    for the whole sequence, within the rounding of the dtype, forward and backward. Only the (kv head, key block) pairs
    that a rank's queries read travel to it, once each way, while it computes with those already there.

    Calls are collective: every rank makes the same ones in the same order, backward included. Construction never
    communicates. Without a process group the module is the one inside. With the default placement rank r holds the
    r-th contiguous slice of the sequence; slices may differ in length, but cuts fall on block boundaries. `shard`,
    `positions` and `unshard` do the cutting.

    When a rank fails, the call raises `bs_comm.RingPeerError` on all others; see `regroup`.

    Args:
        segment_lengths: As for `BlockSparseRingDilatedAttention`.
        dilation_rates: As for `BlockSparseRingDilatedAttention`.
        sparse_config: A `SparsePatternConfig`, a `HierarchicalConfig` (the attention inside is then a
            `BlockSparseHierarchical`), or a mapping of the fields of the first. Pattern and density speak of the whole
            sequence.
        distributed_config: Placement, wire and upkeep, or a mapping of its fields. The module keeps this very object.
        attention: The attention to spread, instead of the one that the arguments around this one describe. A
            `BlockSparseAdaptive` goes to one rank as it is, and to several by its `freeze` (see `update_pattern`).
        group: A process group or a one-dimensional `DeviceMesh`; `None`: the default group. A two-dimensional
            `DeviceMesh` shares tokens by ring along its first dimension and heads along its second: ranks of one row
            hold consecutive pieces of that ring rank's shard, and exchange tokens for heads around the ring
            (DeepSpeed-Ulysses). Assign to `group` to move to another.
        use_memory_pool: As for `BlockSparseRingDilatedAttention`; and the ring leases its buffers from that pool, and
            not from one that goes with the ring.
        enable_deepspeed_integration: Mark this module as a leaf for ZeRO-3, so that parameters inside it are gathered
            when it is entered, on every rank alike, whatever a rank's shard holds.
        device: As for `BlockSparseRingDilatedAttention`, like the arguments below.
        dtype: See there.
        num_heads: See there.
        dropout: See there. Which probabilities are dropped depends on positions in the sequence, so it is the same at
            every world size; the seed is the first rank's.
        scale: See there.
        mixed_precision: See there.
        order: See there.
        backend: See there.
        deterministic: See there.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or would have no effect beside `attention`.

    Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023, for the merge of partial results;
    the exchange is `bs_comm.ExchangePlan`'s.
    """

    attention: BlockSparseAttention
    sparse_config = _of_attention("sparse_config")
    segment_lengths = _of_attention("segment_lengths")
    dilation_rates = _of_attention("dilation_rates")
    num_heads = _of_attention("num_heads")
    dropout = _of_attention("dropout")
    scale = _of_attention("scale")
    mixed_precision = _of_attention("mixed_precision")
    order = _of_attention("order")
    backend = _of_attention("backend")
    deterministic = _of_attention("deterministic")

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | HierarchicalConfig | Mapping[str, Any] | None = None,
        *,
        distributed_config: DistributedSparseConfig | Mapping[str, Any] | None = None,
        attention: BlockSparseAttention | None = None,
        group: Any = None,
        use_memory_pool: bool = False,
        enable_deepspeed_integration: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        mixed_precision: bool = False,
        order: str = "auto",
        backend: str = "auto",
        deterministic: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        inside = {
            "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates,
            "sparse_config": sparse_config,
            "num_heads": num_heads,
            "dropout": dropout,
            "scale": scale,
            "mixed_precision": mixed_precision,
            "order": order,
            "backend": backend,
            "deterministic": deterministic,
        }
        if attention is None:
            kind = BlockSparseHierarchical if isinstance(sparse_config, HierarchicalConfig) else None
            attention = (kind or BlockSparseRingDilatedAttention)(
                **inside, device=device, dtype=dtype, use_memory_pool=use_memory_pool
            )
        else:
            check_attention(attention, {**inside, "device": device, "dtype": dtype}, _INNER_DEFAULTS)
        self.attention = attention
        self.distributed_config = DistributedSparseConfig.of("distributed_config", distributed_config)
        self.use_memory_pool = check_flag("use_memory_pool", use_memory_pool)
        self.enable_deepspeed_integration = check_flag("enable_deepspeed_integration", enable_deepspeed_integration)
        if enable_deepspeed_integration:
            # What deepspeed.utils.set_z3_leaf_modules sets: ZeRO-3 then fetches everything inside at once. Fetching is
            # collective, and a rank without tokens would skip what its peers fetch one by one.
            self._z3_leaf = True
        self.group = group
        self._last_call: tuple[int, bool] | None = None
        self._last_plan: ExchangePlan | None = None
        self._placements = Placements()

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> Any:
        """The process group given, or `None` for the default group."""
        return self._group

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
        """What travels between ranks for one length; see `bs_comm.ExchangePlan`."""
        layout, world = self._known_layout(seq_len, is_causal, num_heads), self._ring()[1]
        places = self._placements.of(self.distributed_config.placement, layout, world)
        return ExchangePlan.build(layout, world, places, kv_heads)

    def rebalance(self, step: int, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None) -> bool:
        """Every `load_balance_interval` steps, looks for a better `"cost_balanced"` placement of the present layout.

        A placement is held while the layout changes (a density schedule, an edited config), because the caller cuts its
        data by it. Call this on every rank between two steps, and cut the data of the next one anew when it says so.

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
        return self._placements.rebalance(self._known_layout(seq_len, is_causal, num_heads), self._ring()[1])

    def update_pattern(
        self, step: int, gate: BlockSparseAdaptive, samples: Iterable[Sequence[Tensor]], is_causal: bool = False
    ) -> bool:
        """Every `pattern_update_interval` steps, replaces the attention inside by what a gate picks now.

        A gate reads whole sequences, which no rank has, so over several ranks its layout is fixed between updates. Call
        this on every rank with the same gate and samples; `rebalance` may follow.

        Args:
            step: Training steps taken.
            gate: Picks the blocks; see `BlockSparseAdaptive.freeze`.
            samples: Tuples of whole sequences that start with q and k; read only when it is time.
            is_causal: Of the samples.

        Returns:
            Whether it was time.
        """
        if check_int("step", step, least=0) % self.distributed_config.pattern_update_interval:
            return False
        self.attention = gate.freeze(samples, is_causal)
        return True

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

    # -- the call ----------------------------------------------------------------------------------------------------

    # Messages between ranks cannot be traced; a compiled model calls this as it is.
    @_disable_dynamo
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Exact softmax attention of this rank's queries over the active blocks of the whole sequence; collective.

        Args:
            q: `[B, S, heads, head_dim]`: this rank's queries, in the order of `positions`.
            k: `[B, T, kv_heads, head_dim]`: this rank's keys. T = S unless queries and keys are different sequences.
            v: `[B, T, kv_heads, value_dim]`.
            is_causal: As for `BlockSparseAttention.forward`, for the whole sequence.
            key_padding_mask: `bool[B, T]`, True = a real token: this rank's.
            segment_ids: `int[B, S]`, or a (query, key) pair: this rank's. Ids mean the same on every rank.
            attn_bias: Bool or float, broadcastable to `[B, heads, S, N]`: this rank's queries over **all** keys in the
                order of the sequence. Its gradient is this rank's share.
            return_lse: Also return the log-sum-exp of the scores, fp32 `[B, heads, S]`.

        Returns:
            This rank's `[B, S, heads, value_dim]`, or a pair with the log-sum-exp.

        Raises:
            RingPeerError: A rank failed; on all others.
            RingMismatchError: Ranks gave different sizes or arguments; on all.
            RuntimeError: `WORLD_SIZE` is more than 1 and there is no process group.
            TypeError: As `BlockSparseAttention.forward`.
            ValueError: As `BlockSparseAttention.forward`, or shards that are not those of the placement.
        """
        if self.world_size > 1:
            check_spreads(self, segment_ids)
        else:
            self._last_call = (q.shape[1], bool(is_causal)) if isinstance(q, Tensor) and q.ndim == 4 else None
            return self.attention(
                q, k, v, is_causal,
                key_padding_mask=key_padding_mask, segment_ids=segment_ids, attn_bias=attn_bias, return_lse=return_lse,
            )  # fmt: skip
        self.attention._check_inputs(q, k, v)
        given = (q, k)
        q, k, v = as_computed(self, q, k, v)
        check_shards(q, k, v)
        segments = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
        check_tokens("key_padding_mask", key_padding_mask, k, (torch.bool,))
        for side, ids, x in zip(("query", "key"), segments, (q, k), strict=True):
            check_tokens(f"segment_ids ({side})", ids, x, (torch.int32, torch.int64))
        call = {"is_causal": bool(is_causal), "dropout": self.dropout if self.training else 0.0}
        operands = Operands(q, k, v, key_padding_mask, segments[0], segments[1], attn_bias, given)
        if isinstance(self.attention, BlockSparseAdaptive):
            scorer = self.attention.scorer
            call["is_new"] = scorer._made_for is None
            scorer.initialize(q.shape[2], k.shape[2], q.shape[3])
        out, lse = (over_ring if self._heads()[1] == 1 else over_heads)(self, operands, **call)
        # Autocast returns what it computes in; mixed precision what it was given.
        out = out.to(given[0].dtype) if self.mixed_precision else out
        return (out, lse) if return_lse else out

    def explain(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **masks: Any) -> Explanation:
        """What the attention inside would do with whole sequences; see `BlockSparseAttention.explain`.

        Never communicates. What travels between ranks is what `exchange_plan` tells.

        Args:
            q: Of a whole sequence, as for `BlockSparseAttention.forward`, like the other arguments.
            k: See there.
            v: See there.
            is_causal: See there.
            **masks: See there.
        """
        return self.attention.explain(q, k, v, is_causal, **masks)

    # -- what the attention inside tells -----------------------------------------------------------------------------

    def layout(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """The layout of the whole sequence; see `BlockSparseAttention.layout`."""
        return self.attention.layout(seq_len, is_causal, num_heads)

    def prepare(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """Builds the layout ahead of the first call; see `BlockSparseAttention.prepare`."""
        return self.attention.prepare(seq_len, is_causal, num_heads)

    def get_pattern_stats(self, seq_len: int | None = None) -> dict[str, Any]:
        """Figures of the layout of the whole sequence.

        Args:
            seq_len: Tokens of the whole sequence; `None` takes the last call's.

        Returns:
            What the attention inside tells, and `world_size`, `placement`, and of the last call over a ring
            `ring_share` (bytes that travel / those of a ring that moves all of K and V), `work_imbalance` (work of
            the busiest rank / mean).
        """
        self.attention._last_call = self._last_call or self.attention._last_call
        stats = self.attention.get_pattern_stats(seq_len)
        placement = self.distributed_config.placement
        more: dict[str, Any] = {
            "world_size": self.world_size,
            "placement": placement.name if isinstance(placement, Placement) else placement,
        }
        if (plan := self._last_plan) is not None:
            more["ring_share"] = float(plan.rows.sum()) / max(plan.dense_rows, 1)
            more["work_imbalance"] = plan.work_imbalance
        return {**stats, **more}

    def clear_caches(self) -> None:
        """Forgets cached layouts, plans and placements; rings stay open, because closing them is for all ranks."""
        self.attention.clear_caches()
        self._placements.forget()

    def sent_bytes(self) -> dict[str, np.ndarray]:
        """Payload bytes this rank has sent in rings of the last call's plan, by receiver: `"kv"` and `"grad"`."""
        world = self.world_size
        totals = {name: np.zeros(world, np.int64) for name in ("kv", "grad")}
        if world > 1 and self._last_plan is not None:
            for session in open_sessions(dist.group.WORLD if self._group is None else self._group):
                for name, sent in session.sent_bytes(self._last_plan).items():
                    totals[name] += sent
        return totals

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def register_comm_hook(self, ddp_model: Any) -> Any:
        """Compresses the gradients of a `DistributedDataParallel` model as the config says; once per model.

        Args:
            ddp_model: The model, wrapped; its process group is the data-parallel one.

        Returns:
            The hook's state with byte counters, a `bs_comm.TopKState`.

        Raises:
            ValueError: `enable_gradient_compression` is off.
        """
        config = self.distributed_config
        if not config.enable_gradient_compression:
            raise ValueError("enable_gradient_compression: expected True to install the hook, got False")
        return compress_gradients(ddp_model, "topk", compression_ratio=config.compression_ratio)

    # -- nn.Module's own business ------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The placement."""
        return f"placement={self.distributed_config.placement!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        for group in (self._group, self._head_group, self._mesh):
            if group is not None:
                memo[id(group)] = group  # a group is a connection, which the copy shares
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError("group: a process group cannot be pickled; set it to None, and again after loading")
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _layout_or_plan(self, q: Tensor, k: Tensor, is_causal: bool) -> Any:
        return self.attention._layout_or_plan(q, k, is_causal)


def _cut(x: Tensor, rank: int, ranks: int, *, dim: int) -> Tensor:
    """One of as many consecutive pieces of equal length, within one."""
    return x.tensor_split(ranks, dim)[rank]
