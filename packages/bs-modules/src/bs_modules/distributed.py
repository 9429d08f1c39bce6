"""Any block-sparse attention over a ring of ranks, each of which holds a shard of one sequence.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads, D head dim.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from bs_comm import ExchangePlan, Placement, RingPeerError, Survivors, compress_gradients
from bs_comm import regroup as _regroup
from bs_patterns import BlockLayout

from ._checks import check_flag
from ._ring_attention import RingAttention, RingCall
from ._ring_checks import check_attention, check_shards, check_tokens, four_dims, nothing
from ._ring_session import RingSession, open_sessions, session_of
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention, _half_dtype
from .config import SparsePatternConfig
from .distributed_config import DistributedSparseConfig
from .explain import Explanation
from .hierarchical import BlockSparseHierarchical, HierarchicalConfig

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: What every rank tells the others before a call; all but the lengths and the seed must be alike.
_DIFFERENT = ("query tokens", "key tokens", "dropout seed")
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
        attention: The attention to spread, instead of the one that the arguments around this one describe.
        group: A process group or a one-dimensional `DeviceMesh`; `None`: the default group. Assign to `group` to move
            to another.
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
        self._balanced_kept: dict[tuple[Any, ...], Placement] = {}

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> Any:
        """The process group given, or `None` for the default group."""
        return self._group

    @group.setter
    def group(self, group: Any) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if not hasattr(group, "get_group"):
                raise TypeError(f"group: expected a process group or a DeviceMesh, got {type(group).__name__}")
            if group.ndim != 1:
                raise ValueError(
                    f"group: expected a one-dimensional DeviceMesh (index a larger one by name), got {group}"
                )
            group = group.get_group()
        self._group = group

    @property
    def world_size(self) -> int:
        """Ranks that a sequence is spread over: 1 without a process group.

        Raises:
            RuntimeError: `WORLD_SIZE` in the environment is more than 1 and there is no process group.
        """
        return self._rank_of_world()[1]

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self._rank_of_world()[0]

    def _rank_of_world(self) -> tuple[int, int]:
        if self._group is None and not (dist.is_available() and dist.is_initialized()):
            expected = os.environ.get("WORLD_SIZE", "1")
            if expected.isdecimal() and int(expected) > 1:
                raise RuntimeError(
                    f"group: expected a process group, because WORLD_SIZE is {expected}, but torch.distributed is not "
                    "initialized; call torch.distributed.init_process_group before the first call"
                )
            return 0, 1
        rank = dist.get_rank(self._group)
        if rank < 0:
            raise ValueError("group: expected one that this process is a member of, got another")
        return rank, dist.get_world_size(self._group)

    def regroup(self, error: RingPeerError, *, patience: float = 10.0) -> Survivors:
        """After a failed call: go on with the ranks that are left; collective among them.

        The module's `group` becomes the new one. Shard again from the full tensors or the last checkpoint, and redo the
        step: it is the step of a fresh run at the new world size. Other modules are to be given the new group too.

        Args:
            error: What was raised.
            patience: Seconds to wait for the other survivors.

        Returns:
            The survivors; see `bs_comm.regroup`.
        """
        left = _regroup(error, self._group, patience=patience)
        self.group = left.group
        return left

    # -- where tokens live -------------------------------------------------------------------------------------------

    def placement(
        self, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None, kv_heads: int | None = None
    ) -> Placement:
        """Which rank holds which tokens of a sequence, by the placement of the config.

        Args:
            seq_len: Tokens of the whole sequence.
            is_causal: As in `forward`; matters for `"cost_balanced"`, like the arguments below.
            num_heads: Query heads; `None` takes the module's, or 1.
            kv_heads: Key/value heads; `None`: the layout's heads.
        """
        layout = self.layout(seq_len, is_causal, num_heads)
        return self._placements(layout, self.world_size, kv_heads)[0]

    def positions(self, seq_len: int, is_causal: bool = False) -> Tensor:
        """`int64[S]`: positions in the sequence of this rank's tokens, for rotary embeddings."""
        return torch.from_numpy(self.placement(seq_len, is_causal).positions(self.rank))

    def shard(self, x: Tensor, is_causal: bool = False, *, dim: int = 1) -> Tensor:
        """Cuts this rank's tokens out of a tensor of the whole sequence."""
        return self.placement(x.shape[dim], is_causal).shard(x, self.rank, dim=dim)

    def exchange_plan(
        self, seq_len: int, is_causal: bool = False, *, num_heads: int | None = None, kv_heads: int | None = None
    ) -> ExchangePlan:
        """What travels between ranks for one length; see `bs_comm.ExchangePlan`."""
        layout = self.layout(seq_len, is_causal, num_heads)
        world = self.world_size
        return ExchangePlan.build(layout, world, self._placements(layout, world, kv_heads), kv_heads)

    def _placements(
        self, layout: BlockLayout, world: int, kv_heads: int | None, lengths: np.ndarray | None = None
    ) -> tuple[Placement, Placement]:
        """(query, key) placements by the config; with `lengths` `[2, world]`, those of the shards that came.

        Raises:
            ValueError: The shards are not those of the placement.
        """
        made = []
        for i, (name, block) in enumerate((("q", layout.block_size[0]), ("k", layout.block_size[1]))):
            if layout.seq_len[0] == layout.seq_len[1]:
                block = math.lcm(*layout.block_size)
            tokens, rule = layout.seq_len[i], self.distributed_config.placement
            if isinstance(rule, Placement):
                place = rule
                if place.world_size != world or place.seq_len != tokens:
                    raise ValueError(
                        f"placement: expected one of {tokens} {name} tokens over {world} ranks, got {place!r}"
                    )
            elif rule == "cost_balanced":
                place = self._balanced(layout, world, kv_heads)
            else:
                place = getattr(Placement, rule)(tokens, world, block_size=block)
            if lengths is not None and (place.lengths != lengths[i]).any():
                if rule != "contiguous":
                    raise ValueError(
                        f"{name}: expected shards of {place.lengths.tolist()} tokens ({place.name} placement of "
                        f"{tokens} tokens), got {lengths[i].tolist()}"
                    )
                try:
                    place = Placement.from_lengths(lengths[i].tolist(), block_size=block)
                except ValueError as error:
                    raise ValueError(
                        f"{name}: expected shards cut at multiples of {block} tokens, for instance "
                        f"{place.lengths.tolist()} (see shard()), got {lengths[i].tolist()}"
                    ) from error
            made.append(place)
        return (made[0], made[0]) if made[0] == made[1] else (made[0], made[1])

    def _balanced(self, layout: BlockLayout, world: int, kv_heads: int | None) -> Placement:
        key = (layout.digest, world, kv_heads)
        if key not in self._balanced_kept:
            if len(self._balanced_kept) >= 8:
                self._balanced_kept.clear()
            self._balanced_kept[key] = Placement.cost_balanced(layout, world, kv_heads=kv_heads)
        return self._balanced_kept[key]

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
        if self._rank_of_world()[1] == 1:
            self._last_call = (q.shape[1], bool(is_causal)) if isinstance(q, Tensor) and q.ndim == 4 else None
            return self.attention(
                q, k, v, is_causal,
                key_padding_mask=key_padding_mask, segment_ids=segment_ids, attn_bias=attn_bias, return_lse=return_lse,
            )  # fmt: skip
        self.attention._check_inputs(q, k, v)
        given_dtype = q.dtype
        q, k, v = self._as_computed(q, k, v)
        result_dtype = given_dtype if self.mixed_precision else q.dtype  # autocast returns what it computes in
        check_shards(q, k, v)
        segments = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
        check_tokens("key_padding_mask", key_padding_mask, k, (torch.bool,))
        for side, ids, x in zip(("query", "key"), segments, (q, k), strict=True):
            check_tokens(f"segment_ids ({side})", ids, x, (torch.int32, torch.int64))
        config = self.distributed_config
        session = session_of(self._own_group(), config.hop_timeout, q.device)
        dropout = self.dropout if self.training else 0.0
        found = session.agree(*self._words(q, k, v, bool(is_causal), key_padding_mask, segments, attn_bias, dropout))
        lengths = np.stack((found["query tokens"], found["key tokens"]))
        if q.shape[0] == 0 or lengths.sum(1).min() == 0:
            out, lse = nothing(q, k, v)
            return (out.to(result_dtype), lse) if return_lse else out.to(result_dtype)
        totals = int(lengths[0].sum()), int(lengths[1].sum())
        self._last_call = (totals[0], bool(is_causal))
        layout = self._layout_of_call(session, q, k, totals, bool(is_causal))
        places = self._placements(layout, session.world_size, k.shape[2], lengths)
        plan = self._last_plan = session.plan(layout, places, k.shape[2])
        call = RingCall(
            session=session,
            open_ring=session.ring(
                plan, q.shape[0], (k.shape[3], v.shape[3]), k.dtype, k.device, config.wire_dtype, self.use_memory_pool
            ),
            key_padding=None if key_padding_mask is None else session.whole(key_padding_mask, places[1]),
            q_segments=segments[0],
            kv_segments=None if segments[1] is None else session.whole(segments[1], places[1]),
            scale=self.scale,
            dropout_p=dropout,
            dropout_seed=int(found["dropout seed"][0]) if dropout else None,
            order=self.order,
            deterministic=self.deterministic,
            backend=self.backend,
            keep_kv=config.keep_kv,
        )
        out, lse = RingAttention.apply(q, k, v, four_dims(attn_bias, q, totals[1]), call)  # pyright: ignore[reportGeneralTypeIssues]
        return (out.to(result_dtype), lse) if return_lse else out.to(result_dtype)

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

    def _layout_of_call(
        self, session: RingSession, q: Tensor, k: Tensor, seq_len: tuple[int, int], is_causal: bool
    ) -> BlockLayout:
        """The layout of one call, the same on every rank: where an attention that looks at its input chooses."""
        return self.layout(seq_len, is_causal, q.shape[2])

    def _own_group(self) -> Any:
        return dist.group.WORLD if self._group is None else self._group

    def _as_computed(self, *tensors: Tensor) -> list[Tensor]:
        """In the dtype of the arithmetic: autocast's, or half under `mixed_precision`."""
        kind = tensors[0].device.type
        dtype = None
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if self.mixed_precision:
            dtype = _half_dtype(tensors[0].device)
        if dtype is None or tensors[0].dtype == torch.float64:
            return list(tensors)
        return [x.to(dtype) for x in tensors]

    def _words(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        padding: Tensor | None,
        segments: Sequence[Tensor | None],
        bias: Tensor | None,
        dropout: float,
    ) -> tuple[dict[str, int], list[str]]:
        """What this rank tells the others of its call, and which of it must be alike."""
        words = {
            "query tokens": q.shape[1],
            "key tokens": k.shape[1],
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": k.shape[3],
            "value_dim": v.shape[3],
            "dtype": _DTYPES.index(q.dtype),
            "is_causal": int(is_causal),
            "key_padding_mask": int(padding is not None),
            "segment_ids": 0 if segments[1] is None else segments[1].element_size(),
            "gradients": int(torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))),
            "dropout": struct.unpack("<q", struct.pack("<d", dropout))[0],
            "dropout seed": int(torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)) if dropout else 0,
        }
        return words, [name for name in words if name not in _DIFFERENT]

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
        self._balanced_kept.clear()

    def sent_bytes(self) -> dict[str, np.ndarray]:
        """Payload bytes this rank has sent in rings of the last call's plan, by receiver: `"kv"` and `"grad"`."""
        world = self.world_size
        totals = {name: np.zeros(world, np.int64) for name in ("kv", "grad")}
        if world > 1 and self._last_plan is not None:
            for session in open_sessions(self._own_group()):
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

        if self._group is not None:
            memo[id(self._group)] = self._group  # a group is a connection, which the copy shares
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

    def _make_layout(self, seq_len: tuple[int, int], is_causal: bool, num_heads: int) -> BlockLayout:
        return self.attention._make_layout(seq_len, is_causal, num_heads)

    def _fingerprint(self) -> tuple[Any, ...]:
        return self.attention._fingerprint()
