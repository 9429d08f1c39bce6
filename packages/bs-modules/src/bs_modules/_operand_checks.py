"""What a module that reads its operands before the op does refuses by itself.

B batch, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
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
    """Refuses a mask or ids that are not ``[B, S]`` of the tokens of `like`."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.shape != like.shape[:2]:
        raise ValueError(f"{name}: expected {list(like.shape[:2])}, its batch and tokens, got {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of q), got {x.device}")
