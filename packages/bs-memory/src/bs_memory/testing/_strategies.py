"""Hypothesis strategies for what a pool is asked for. Hypothesis is needed to call them, not to import this."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def dtypes() -> "SearchStrategy[torch.dtype]":
    """The dtypes attention code keeps buffers in, of every item size from 1 to 8 bytes."""
    from hypothesis import strategies as st

    return st.sampled_from(_DTYPES)


def shapes(max_dims: int = 4, max_size: int = 9) -> "SearchStrategy[tuple[int, ...]]":
    """Shapes, scalars and empty tensors included."""
    from hypothesis import strategies as st

    return st.lists(st.integers(0, max_size), max_size=max_dims).map(tuple)
