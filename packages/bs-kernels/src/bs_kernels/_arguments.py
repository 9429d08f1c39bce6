"""Checks and normalises the arguments of `block_sparse_attention`: everything behind it sees a `Call`."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout

from .backends.base import Call
from .batched import BatchedLayout
from .plan import LayoutPlan
from .token_mask import TokenMask

__all__ = [
    "AttentionArguments",
    "check_attn_bias",
    "check_dropout",
    "check_flag",
    "check_operands",
    "check_padding",
    "check_scale",
    "check_segments",
    "make_call",
    "resolve_plan",
]


class AttentionArguments(TypedDict, total=False):
    """The optional arguments of `block_sparse_attention` that say what is computed."""

    causal: bool | None
    window: int | tuple[int | None, int | None] | None
    key_padding_mask: Tensor | None
    segment_ids: Tensor | tuple[Tensor, Tensor] | None
    attn_bias: Tensor | None
    block_bias: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    scale: float | None
    order: str | np.ndarray | Tensor
    deterministic: bool
    page_table: Tensor | None


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (int, float, np.integer, np.floating, torch.SymFloat, torch.SymInt)
_NAMES_BSHD = "[batch, seq, heads, head_dim]"


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} (that of q), got {x.device}")


def autocast(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Cast q, k and v as autocast asks (float64 stays)."""
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return (q, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, *others))


def check_operands(q: Any, k: Any, v: Any, paged: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check q, k and v against each other and apply autocast.

    Raises:
        TypeError: not tensors, or not of one floating dtype.
        ValueError: ranks, sizes or devices that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.ndim != 4:
            shape = "[pages, block, heads, head_dim]" if paged and name != "q" else _NAMES_BSHD
            raise ValueError(f"{name}: expected {shape}, got shape {list(x.shape)}")
        _same_device(name, x, q)
    q, k, v = autocast(q, k, v)
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} (that of q), got {x.dtype}")
    if k.shape[:3] != v.shape[:3]:
        what = "pages, block, heads" if paged else "batch, seq, heads"
        raise ValueError(f"v: expected the {what} of k, {list(k.shape[:3])}, got {list(v.shape[:3])}")
    if not paged and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected batch {q.shape[0]} (that of q), got {k.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head dim {q.shape[3]} (that of q), got {k.shape[3]}")
    if q.shape[3] < 1 or v.shape[3] < 1 or q.shape[2] < 1:
        raise ValueError(f"q, v: expected at least one head and head dim ≥ 1, got {list(q.shape)} and {list(v.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of k's {k.shape[2]}, got {q.shape[2]} query heads"
        )
    return q, k, v


def resolve_plan(layout: Any, causal: Any, window: Any, order: Any, device: torch.device) -> LayoutPlan:
    """The plan of a call.

    Raises:
        TypeError: ``layout`` is none of the three kinds, or causal is not a bool.
        ValueError: causal, window or order contradict the layout or plan.
    """
    if not isinstance(layout, (BlockLayout, BatchedLayout, LayoutPlan)):
        raise TypeError(f"layout: expected a BlockLayout, LayoutPlan or BatchedLayout, got {type(layout).__name__}")
    if causal is not None and not isinstance(causal, bool):
        raise TypeError(f"causal: expected True, False or None, got {causal!r}")
    if isinstance(layout, LayoutPlan):
        _check_plan(layout, causal, window, order)
        return layout
    if causal is False and layout.causal:
        raise ValueError("causal: expected True or None for a causal layout, got False")
    causal = layout.causal if causal is None else causal
    mask = TokenMask(causal, TokenMask.parse_window(window, causal=causal))
    if isinstance(order, Tensor):
        order = order.cpu().numpy()
    if not isinstance(order, (str, np.ndarray, list, tuple)):
        raise TypeError(f"order: expected a name or an int64 array, got {type(order).__name__}")
    return LayoutPlan.build(layout, mask, device, order=order if isinstance(order, str) else np.asarray(order))


def _check_plan(plan: LayoutPlan, causal: bool | None, window: Any, order: Any) -> None:
    mask = plan.token_mask
    if causal is not None and causal != mask.causal:
        raise ValueError(f"causal: expected None or {mask.causal} (the plan's), got {causal}")
    if window is not None:
        wanted = TokenMask(mask.causal, TokenMask.parse_window(window, causal=mask.causal))
        if wanted.band != mask.band:
            raise ValueError(f"window: expected None or {mask.window} (the plan's), got {window!r}")
    if not isinstance(order, str) or order not in ("auto", plan.order):
        raise ValueError(f"order: expected 'auto' or {plan.order!r} (the plan's), got {order!r}")


def _check_sizes(q: Tensor, k: Tensor, plan: LayoutPlan, page_table: Tensor | None) -> None:
    batch, len_q, heads, _ = q.shape
    if plan.seq_len[0] != len_q:
        raise ValueError(f"layout: expected a query length of {len_q} (that of q), got {plan.seq_len[0]}")
    if page_table is None and plan.seq_len[1] != k.shape[1]:
        raise ValueError(f"layout: expected a key length of {k.shape[1]} (that of k), got {plan.seq_len[1]}")
    if plan.heads not in (1, heads):
        raise ValueError(f"layout: expected 1 or {heads} heads (those of q), got {plan.heads}")
    if plan.batch not in (1, batch):
        raise ValueError(f"layout: expected batch 1 or {batch} (that of q), got {plan.batch}")
    if plan.device != q.device:
        raise ValueError(f"layout: expected a plan on {q.device} (where q is), got one on {plan.device}")
    if page_table is not None:
        if k.shape[1] != plan.block_size[1]:
            raise ValueError(f"k: expected pages of {plan.block_size[1]} tokens (the layout's block), got {k.shape[1]}")
        if page_table.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"page_table: expected int32 or int64, got {page_table.dtype}")
        if page_table.shape != (batch, plan.kv_blocks):
            raise ValueError(
                f"page_table: expected [batch, key blocks] = [{batch}, {plan.kv_blocks}], got {list(page_table.shape)}"
            )
        _same_device("page_table", page_table, q)


def check_padding(mask: Any, q: Tensor, len_k: int) -> Tensor | None:
    """Check ``key_padding_mask``."""
    if mask is None:
        return None
    mask = _tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected bool (True = a real token), got {mask.dtype}")
    if mask.shape != (q.shape[0], len_k):
        raise ValueError(f"key_padding_mask: expected [batch, Sk] = [{q.shape[0]}, {len_k}], got {list(mask.shape)}")
    _same_device("key_padding_mask", mask, q)
    return mask


def check_segments(ids: Any, q: Tensor, lengths: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Check ``segment_ids`` and return those of queries and of keys, int32."""
    if ids is None:
        return None, None
    if isinstance(ids, Tensor):
        if lengths[0] != lengths[1]:
            raise ValueError(f"segment_ids: expected a (query, key) pair for lengths {lengths}, got one tensor")
        ids = (ids, ids)
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(f"segment_ids: expected int[batch, S] or a (query, key) pair, got {type(ids).__name__}")
    checked = []
    for name, x, length in zip(("query", "key"), ids, lengths, strict=True):
        x = _tensor(f"segment_ids ({name})", x)
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
            raise TypeError(f"segment_ids ({name}): expected an integer dtype, got {x.dtype}")
        if x.shape != (q.shape[0], length):
            raise ValueError(f"segment_ids ({name}): expected [{q.shape[0]}, {length}], got {list(x.shape)}")
        _same_device(f"segment_ids ({name})", x, q)
        if x.dtype == torch.int64 and x.numel() and x.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = x.min().item(), x.max().item()
            if low < -(2**31) or high >= 2**31:
                raise ValueError(f"segment_ids ({name}): expected ids that fit int32, got {low} … {high}")
        checked.append(x.to(torch.int32))
    return checked[0], checked[1]


def check_attn_bias(bias: Any, q: Tensor, lengths: tuple[int, int]) -> Tensor | None:
    """Check ``attn_bias`` and give it four dimensions."""
    if bias is None:
        return None
    bias = _tensor("attn_bias", bias)
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise TypeError(f"attn_bias: expected bool (True = attend) or a floating dtype, got {bias.dtype}")
    full = (q.shape[0], q.shape[2], *lengths)
    fits = bias.ndim <= 4 and all(have in (1, want) for have, want in zip(bias.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(f"attn_bias: expected a shape that broadcasts to {list(full)}, got {list(bias.shape)}")
    _same_device("attn_bias", bias, q)
    return bias[(None,) * (4 - bias.ndim)]


def _block_bias(bias: Any, q: Tensor, layout: Any, plan: LayoutPlan) -> Tensor | None:
    if bias is None:
        return None
    bias = _tensor("block_bias", bias)
    if not bias.is_floating_point():
        raise TypeError(f"block_bias: expected a floating dtype, got {bias.dtype}")
    _same_device("block_bias", bias, q)
    batch, heads, nnz = q.shape[0], q.shape[2], plan.layout_nnz
    if plan.digest is None and bias.ndim == 4:  # a BatchedLayout: shaped like its indices
        wanted = (plan.batch, plan.heads, plan.q_blocks)
        if bias.shape[:3] != wanted or bias.numel() != nnz:
            raise ValueError(f"block_bias: expected the indices' shape ({nnz} slots), got {list(bias.shape)}")
        return bias.reshape(1, 1, nnz)
    fits = 1 <= bias.ndim <= 3 and all(
        have in (1, want) for have, want in zip(bias.shape[-2::-1], (heads, batch), strict=False)
    )
    if not fits or bias.shape[-1] != nnz:
        raise ValueError(
            f"block_bias: expected [nnz], [Hq, nnz] or [B, Hq, nnz] with B={batch}, Hq={heads}, nnz={nnz}, "
            f"got {list(bias.shape)}"
        )
    return bias[(None,) * (3 - bias.ndim)]


def _sinks(sinks: Any, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    sinks = _tensor("sinks", sinks)
    if not sinks.is_floating_point():
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks: expected one logit per query head, [{q.shape[2]}], got {list(sinks.shape)}")
    _same_device("sinks", sinks, q)
    return sinks


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_scale(scale: Any, q: Tensor) -> float:
    """The factor of q · k; None for 1/√D."""
    if scale is None:
        return 1 / math.sqrt(q.shape[3])
    scale = _number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_dropout(p: Any, seed: Any, device: torch.device) -> tuple[float, Tensor | None]:
    """Check ``dropout_p`` and ``dropout_seed``; without a seed, one is drawn from torch's generator."""
    p = _number("dropout_p", p)
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {p}")
    if p == 0:
        if seed is not None:
            raise ValueError(f"dropout_seed: expected None without dropout, got {seed!r}")
        return 0.0, None
    if seed is None:
        return p, torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"dropout_seed: expected an int or an int64 scalar tensor, got {seed.dtype}{list(seed.shape)}"
            )
        return p, seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"dropout_seed: expected an int or an int64 scalar tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"dropout_seed: expected 64 bits, got {seed}")
    signed = int(seed) - 2**64 if seed >= 2**63 else int(seed)
    return p, torch.full((), signed, dtype=torch.int64, device=device)


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Any,
    *,
    causal: Any = None,
    window: Any = None,
    key_padding_mask: Any = None,
    segment_ids: Any = None,
    attn_bias: Any = None,
    block_bias: Any = None,
    sinks: Any = None,
    dropout_p: Any = 0.0,
    dropout_seed: Any = None,
    scale: Any = None,
    order: Any = "auto",
    deterministic: Any = True,
    page_table: Any = None,
) -> Call:
    """Check everything and return the call; see `block_sparse_attention`."""
    q, k, v = check_operands(q, k, v, paged=page_table is not None)
    if page_table is not None:
        page_table = _tensor("page_table", page_table)
    plan = resolve_plan(layout, causal, window, order, q.device)
    _check_sizes(q, k, plan, page_table)
    scale = check_scale(scale, q)
    check_flag("deterministic", deterministic)
    p, seed = check_dropout(dropout_p, dropout_seed, q.device)
    q_segments, kv_segments = check_segments(segment_ids, q, plan.seq_len)
    return Call(
        q=q,
        k=k,
        v=v,
        plan=plan,
        scale=scale,
        key_padding_mask=check_padding(key_padding_mask, q, plan.seq_len[1]),
        q_segments=q_segments,
        kv_segments=kv_segments,
        attn_bias=check_attn_bias(attn_bias, q, plan.seq_len),
        block_bias=_block_bias(block_bias, q, layout, plan),
        sinks=_sinks(sinks, q),
        page_table=page_table,
        dropout_p=p,
        dropout_seed=seed,
        deterministic=deterministic,
    )
