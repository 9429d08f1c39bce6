"""What a distributed module refuses before it talks to anybody.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import BlockSparseAttention

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_attention(attention: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses an attention that cannot be spread, and arguments that would have no effect beside it."""
    if not isinstance(attention, BlockSparseAttention):
        raise TypeError(f"attention: expected a BlockSparseAttention, got {type(attention).__name__}")
    if hasattr(attention, "distributed_config"):
        raise ValueError("attention: expected one that does not communicate itself, got a distributed one")
    for name, value in given.items():
        if value != defaults.get(name):
            raise ValueError(f"{name}: has no effect beside attention=; give it to that module")


def check_shards(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses operands that do not fit each other; each has four dimensions."""
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} (that of q), got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} (that of q), got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected batch {q.shape[0]} (that of q), got {x.shape[0]}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected the batch, seq, heads of k, {list(k.shape[:3])}, got {list(v.shape[:3])}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head dim {q.shape[3]} (that of q), got {k.shape[3]}")
    if min(q.shape[2], k.shape[2], q.shape[3], v.shape[3]) < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of k's {k.shape[2]}, got shape {list(q.shape)}"
        )


def check_tokens(name: str, x: Any, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuses a mask or ids that are not ``[B, S]`` of the tokens at hand."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.shape != like.shape[:2]:
        raise ValueError(f"{name}: expected this rank's {list(like.shape[:2])}, got {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of q), got {x.device}")


def four_dims(bias: Any, q: Tensor, keys: int | None) -> Tensor | None:
    """``attn_bias`` with four dimensions.

    Args:
        bias: Bool or float, broadcastable to ``[B, H, S, N]``, or None.
        q: ``[B, S, H, D]``.
        keys: N; None where it is not known yet.
    """
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias: expected a tensor, got {type(bias).__name__}")
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise TypeError(f"attn_bias: expected bool (True = attend) or a floating dtype, got {bias.dtype}")
    full = (q.shape[0], q.shape[2], q.shape[1], keys)
    sizes = zip(bias.shape[::-1], full[::-1], strict=False)
    if bias.ndim > 4 or any(want is not None and have not in (1, want) for have, want in sizes):
        raise ValueError(
            f"attn_bias: expected a shape that broadcasts to {[*full[:3], keys or 'N']} (own queries, all keys), got "
            f"{list(bias.shape)}"
        )
    return bias[(None,) * (4 - bias.ndim)]


def nothing(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) where there are no sequences, no queries or no keys at all; connected to the inputs' gradients."""
    q, _, v = tensors
    none = sum(x.flatten()[:0].sum() for x in tensors)
    assert isinstance(none, Tensor)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
    return q.new_zeros((*q.shape[:3], v.shape[3])) + none, lse
