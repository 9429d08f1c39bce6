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

from bs_comm import ExchangePlan, Placement, compress_gradients
from bs_patterns import BlockLayout

from ._checks import check_flag, check_int
from ._operand_checks import check_operands, check_tokens
from ._ring_checks import check_attention
from ._ring_forward import as_computed, check_spreads, over_heads, over_ring
from ._ring_operands import Operands
from ._ring_placement import Placements
from ._ring_session import open_sessions
from ._ring_spread import SpreadAttention
from .adaptive import BlockSparseAdaptive
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
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


class BlockSparseRingDistributedDilatedAttention(SpreadAttention):
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
            `BlockSparseAdaptive` picks its blocks anew in every call, from pooled keys that all ranks tell one another;
            see `update_pattern` for one whose blocks stay between updates.
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

    # -- upkeep of the blocks ------------------------------------------------------------------------------------------

    def update_pattern(
        self, step: int, gate: BlockSparseAdaptive, samples: Iterable[Sequence[Tensor]], is_causal: bool = False
    ) -> bool:
        """Every `pattern_update_interval` steps, replaces the attention inside by what a gate picks now.

        For a layout, and so an exchange, that stays between updates; a live gate needs no such call. Call this on every
        rank with the same gate and samples; `rebalance` may follow.

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
        check_operands(q, k, v)
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
