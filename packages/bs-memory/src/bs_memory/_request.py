"""A request for a buffer, checked and resolved."""

import operator
from collections.abc import Sequence

from bs_memory._storage import Bucket


class Request:
    """A resolved (shape, dtype, device, pinned): what the hot path needs, computed once."""

    __slots__ = ("bucket", "nbytes", "numel", "shape")

    def __init__(self, bucket: Bucket, shape: tuple[int, ...], numel: int, nbytes: int) -> None:
        self.bucket = bucket
        self.shape = shape
        self.numel = numel
        self.nbytes = nbytes


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of plain ints.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if a dimension is negative.
    """
    if isinstance(shape, str | bytes) or not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of ints, got {type(shape).__name__}")
    sizes = []
    for size in shape:
        try:
            sizes.append(operator.index(size))  # numpy's integers are welcome, as in torch
        except TypeError:
            raise TypeError(f"shape: expected ints, got {size!r} ({type(size).__name__})") from None
        if sizes[-1] < 0:
            raise ValueError(f"shape: expected dimensions ≥ 0, got {tuple(shape)}")
    return tuple(sizes)
