"""The grid of blocks that a layout lives on: sizes, token positions and which blocks are allowed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ._check import INT32_MAX
from ._csr import Int32, Int64


@dataclass(frozen=True)
class Grid:
    """Query and key blocks of two token sequences, aligned at their last tokens.

    Query token t stands at absolute position ``t + seq_len[1] − seq_len[0]``, key token s at ``s``.
    """

    block_size: tuple[int, int]
    seq_len: tuple[int, int]
    causal: bool

    def __post_init__(self) -> None:
        if max(self.shape) > INT32_MAX:
            raise ValueError(
                f"seq_len, block_size: expected at most {INT32_MAX} blocks per side (indices are int32), "
                f"got {max(self.shape)} from seq_len={self.seq_len}, block_size={self.block_size}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(query blocks, key blocks); the last block of each may be short."""
        return -(-self.seq_len[0] // self.block_size[0]), -(-self.seq_len[1] // self.block_size[1])

    @property
    def shift(self) -> int:
        """Absolute position of query token 0."""
        return self.seq_len[1] - self.seq_len[0]

    def query_spans(self) -> tuple[Int64, Int64]:
        """Absolute positions of the first and last token of each query block."""
        first = np.arange(self.shape[0], dtype=np.int64) * self.block_size[0]
        last = np.minimum(first + self.block_size[0], self.seq_len[0]) - 1
        return first + self.shift, last + self.shift

    def key_spans(self) -> tuple[Int64, Int64]:
        """Absolute positions of the first and last token of each key block."""
        first = np.arange(self.shape[1], dtype=np.int64) * self.block_size[1]
        return first, np.minimum(first + self.block_size[1], self.seq_len[1]) - 1

    def allowed_per_row(self) -> Int64:
        """How many key blocks, counted from the first, each query block may attend to."""
        if not self.causal:
            return np.full(self.shape[0], self.shape[1], np.int64)
        return np.clip(self.query_spans()[1] // self.block_size[1] + 1, 0, self.shape[1])

    @cached_property
    def allowed(self) -> Int64:
        """`allowed_per_row`, kept."""
        return self.allowed_per_row()

    @cached_property
    def diagonal(self) -> Int64:
        """Per query block, the key block that holds its first position (the first one for positions before all keys).

        With equal block sizes and lengths this is the row's own index. No key block is nearer to the row, and in a
        causal layout every query of the row sees a key in it.
        """
        return np.maximum(self.query_spans()[0], 0) // self.block_size[1]

    def row_spans(self) -> tuple[Int64, Int64]:
        """The first and last key block at each query block's positions (negative before all keys)."""
        first, last = self.query_spans()
        return first // self.block_size[1], last // self.block_size[1]

    def within(self, distance: int) -> tuple[Int64, Int64]:
        """Per row, the range ``[low, high)`` of allowed key blocks at most ``distance`` tokens away.

        The distance of two blocks is that of their nearest token pair; overlapping blocks are 0 tokens apart.
        """
        first, last = self.query_spans()
        low = np.maximum(first - distance, 0) // self.block_size[1]
        high = np.clip((last + distance) // self.block_size[1] + 1, 0, self.allowed)
        return np.minimum(low, high), high

    def distance(self, rows: Int64, cols: Int64) -> Int64:
        """Distance in tokens of the blocks (row, column)."""
        (q_first, q_last), (k_first, k_last) = self.query_spans(), self.key_spans()
        out = q_first[rows]
        out -= k_last[cols]
        np.maximum(out, k_first[cols] - q_last[rows], out=out)
        return np.maximum(out, 0, out=out)


class Blocks(NamedTuple):
    """What a layout is made of: active blocks on a grid, as the CSR of `BlockLayout`."""

    grid: Grid
    indptr: Int64
    indices: Int32

    @property
    def heads(self) -> int:
        """Number of heads; 1 stands for all."""
        return len(self.indptr)

    @property
    def allowed(self) -> int:
        """Number of allowed blocks over all heads."""
        return self.heads * int(self.grid.allowed_per_row().sum())

    @property
    def density(self) -> float:
        """Active / allowed blocks."""
        return len(self.indices) / self.allowed
