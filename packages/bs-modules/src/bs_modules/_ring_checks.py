"""What a distributed module refuses before it talks to anybody.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import BlockSparseAttention


def check_attention(attention: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses an attention that cannot be spread, and arguments that would have no effect beside it."""
    if not isinstance(attention, BlockSparseAttention):
        raise TypeError(f"attention: expected a BlockSparseAttention, got {type(attention).__name__}")
    if hasattr(attention, "distributed_config"):
        raise ValueError("attention: expected one that does not communicate itself, got a distributed one")
    for name, value in given.items():
        if value != defaults.get(name):
            raise ValueError(f"{name}: has no effect beside attention=; give it to that module")


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
