"""One forward of a distributed module: agree, plan, run the ring; where heads are shared, trade tokens for heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ._head_exchange import AmongAll, ToHeads, ToTokens, bias_of_heads
from ._ring_attention import RingAttention, RingCall, passed_on, reported
from ._ring_checks import four_dims, nothing
from ._ring_dilated import DilatedCall, DilatedRing, common_block, segment_blocks
from ._ring_gate import GatedCall, pick_or_cached, share_parameters
from ._ring_operands import Operands, share_of_heads
from ._ring_session import RingSession, session_of
from .adaptive import BlockSparseAdaptive
from .attention import _half_dtype
from .dilated import DilatedAttention


def check_spreads(module: Any, segment_ids: Any) -> None:
    """Refuses an attention that is more than one softmax over a layout of blocks, and what that attention refuses."""
    gate = module.attention if isinstance(module.attention, BlockSparseAdaptive) else None
    if gate is not None and gate.cache and not gate.training and segment_ids is not None:
        raise ValueError("segment_ids: expected None with cache=True, which would reuse the picks of other documents")
    if isinstance(module.attention, DilatedAttention):
        if module.distributed_config.placement != "contiguous":
            raise ValueError(
                f"placement: expected 'contiguous' for a DilatedAttention, got {module.distributed_config.placement!r}"
            )
        if module.sparse_config is not None:
            raise ValueError(
                "sparse_config: expected None for a DilatedAttention over several ranks, whose shards cut segments; "
                "sparse segments are segment_lengths and dilation_rates of the base attention"
            )
        if module._heads()[1] > 1:
            raise ValueError("group: expected one dimension for a DilatedAttention, whose heads differ by number")


@dataclass(frozen=True)
class Told:
    """What ranks that share heads have agreed on before the ring.

    Attributes:
        heads: Which of how many equal shares of heads this rank has.
        session: Of the group that shares heads.
        seeds: (of the gate's noise, of dropout).
    """

    heads: tuple[int, int]
    session: RingSession
    seeds: tuple[int, int]


def over_ring(
    module: Any, x: Operands, is_causal: bool, dropout: float, *, is_new: bool = False, told: Told | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this ring rank's tokens, for all heads or the share that it was told of."""
    config = module.distributed_config
    heads = (0, 1) if told is None else told.heads
    gate = module.attention if isinstance(module.attention, BlockSparseAdaptive) else None
    session = session_of(dist.group.WORLD if module._group is None else module._group, config.hop_timeout, x.q.device)
    found = session.agree(*x.words(is_causal, dropout, gate, None if told is None else told.seeds, is_new))
    if gate is not None and is_new:
        share_parameters(gate, session)
    lengths = np.stack((found["query tokens"], found["key tokens"]))
    if x.q.shape[0] == 0 or lengths.sum(1).min() == 0:
        return nothing(x.q, x.k, x.v)
    totals = int(lengths[0].sum()), int(lengths[1].sum())
    module._last_call = (totals[0], is_causal)
    dilated = module.attention if isinstance(module.attention, DilatedAttention) else None
    if gate is not None:
        layout = module._room_layout(totals, is_causal, x.q.shape[2] * heads[1])
    elif dilated is None:
        layout = share_of_heads(module.layout(totals, is_causal, x.q.shape[2] * heads[1]), *heads)
    elif (lengths[0] != lengths[1]).any():
        raise ValueError(f"k: expected the tokens of q for a DilatedAttention, got shards of {lengths.tolist()}")
    else:
        block = common_block(lengths[0].tolist())
        layout = segment_blocks(totals[0], dilated.segment_lengths or (), is_causal, block)
    places = module._placements.of(config.placement, layout, session.world_size, lengths)
    bias = four_dims(x.bias, x.q, totals[1])
    pick = None
    kv_segments = None if x.kv_segments is None else session.whole(x.kv_segments, places[1])
    if gate is None:
        plan = session.plan(layout, places, x.k.shape[2])
    else:
        with reported(session):
            share_heads = None if told is None else told.session
            seed = int(found["gate seed"][0])
            documents = None
            if x.q_segments is not None and kv_segments is not None:
                documents = session.whole(x.q_segments, places[0]), kv_segments
            pick, plan = pick_or_cached(gate, session, x, places, is_causal, seed, heads, share_heads, documents)
    module._last_plan = plan
    common: dict[str, Any] = {
        "session": session,
        "open_ring": session.ring(
            plan, x.q.shape[0] if gate is None else 1, (x.k.shape[3], x.v.shape[3]), x.k.dtype, x.k.device,
            config.wire_dtype, module.use_memory_pool,
        ),
        "key_padding": None if x.key_padding is None else session.whole(x.key_padding, places[1]),
        "q_segments": x.q_segments,
        "kv_segments": kv_segments,
        "scale": module.scale,
        "dropout_p": dropout,
        "dropout_seed": int(found["dropout seed"][0]) if dropout else None,
        "order": module.order,
        "deterministic": module.deterministic,
        "backend": module.backend,
        "keep_kv": config.keep_kv,
        "among": AmongAll(*heads, x.q.shape[2]) if dropout and heads[1] > 1 else None,
    }  # fmt: skip
    if pick is not None:
        call = GatedCall(**common, pick=pick, batch=x.q.shape[0], tokens=x.q.shape[1])
        return RingAttention.apply(x.q, x.k, x.v, bias, pick.bias, call)  # pyright: ignore[reportReturnType]
    call = RingCall(**common)
    if dilated is None:
        return RingAttention.apply(x.q, x.k, x.v, bias, None, call)  # pyright: ignore[reportReturnType]
    start = int(lengths[0][: session.rank].sum())
    dilated_call = DilatedCall(call, dilated, is_causal, start)
    return DilatedRing.apply(x.q, x.k, x.v, bias, dilated_call)  # pyright: ignore[reportReturnType]


def over_heads(
    module: Any, x: Operands, is_causal: bool, dropout: float, *, is_new: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where ranks share heads: tokens for heads, the ring, and back."""
    ranks, timeout = module._heads()[1], module.distributed_config.hop_timeout
    if x.bias is not None:
        x = replace(x, bias=four_dims(x.bias, x.q, None))
    for name, heads in (("q", x.q.shape[2]), ("k", x.k.shape[2])):
        if heads % ranks:
            raise ValueError(f"{name}: expected a multiple of {ranks} heads, shared by {ranks} ranks, got {heads}")
    session, ring = (session_of(group, timeout, x.q.device) for group in (module._head_group, module._group))
    with passed_on(session, ring):
        return _over_heads(module, session, x, is_causal, dropout, is_new)


def _over_heads(
    module: Any, session: RingSession, x: Operands, is_causal: bool, dropout: float, is_new: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gate = module.attention if isinstance(module.attention, BlockSparseAdaptive) else None
    words, alike = x.words(is_causal, dropout, gate, None, is_new)
    words |= {"attn_bias": x.bias_word(), "attn_bias by query": int(_by_query(x))}
    found = session.agree(words, [*alike, "attn_bias"])
    by_query = bool(found["attn_bias by query"].any())
    if x.bias is not None and by_query:
        x = replace(x, bias=x.bias.expand(-1, -1, x.q.shape[1], -1))
    queries, keys = found["query tokens"].tolist(), found["key tokens"].tolist()
    if gate is not None and is_new:
        share_parameters(gate, session)
    if x.q.shape[0] == 0:
        return nothing(x.q, x.k, x.v)
    roll_call = session.roll_call

    def together(tokens: Tensor | None, lengths: list[int]) -> Tensor | None:
        if tokens is None:
            return None
        return torch.cat(roll_call.tensors(tokens.transpose(0, 1), lengths)).transpose(0, 1)

    q, k, v = (ToHeads.apply(y, roll_call, n) for y, n in zip((x.q, x.k, x.v), (queries, keys, keys), strict=True))
    seen = (q, k)
    if gate is not None and x.given[0] is not x.q:
        seen = tuple(ToHeads.apply(y, roll_call, n) for y, n in zip(x.given, (queries, keys), strict=True))
    gathered = Operands(
        q, k, v, together(x.key_padding, keys), together(x.q_segments, queries), together(x.kv_segments, keys),
        bias_of_heads(x.bias, roll_call, queries, by_query), seen,
    )  # fmt: skip
    told = Told(module._heads(), session, (int(found["gate seed"][0]), int(found["dropout seed"][0])))
    out, lse = over_ring(module, gathered, is_causal, dropout, is_new=is_new, told=told)
    out = ToTokens.apply(out, roll_call, queries)
    lse = ToTokens.apply(lse.transpose(1, 2)[..., None], roll_call, queries)
    return out, lse[..., 0].transpose(1, 2)  # pyright: ignore[reportReturnType, reportIndexIssue, reportOptionalSubscript]


def _by_query(x: Operands) -> bool:
    """Whether the bias has a row for each own query; of one query there is no telling, and no difference."""
    return x.bias is not None and (x.bias.shape[2] != 1 or x.q.shape[1] == 1)


def as_computed(module: Any, *tensors: Tensor) -> list[Tensor]:
    """In the dtype of the arithmetic: autocast's, or half under `mixed_precision`."""
    kind = tensors[0].device.type
    dtype = None
    wide = tensors[0].dtype == torch.float64  # autocast leaves it as it is
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and not wide:
        dtype = torch.get_autocast_dtype(kind)
    if module.mixed_precision:
        dtype = _half_dtype(tensors[0].device)
    return list(tensors) if dtype is None else [x.to(dtype) for x in tensors]
