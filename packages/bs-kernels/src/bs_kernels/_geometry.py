"""Where the blocks of a plan lie: local token bounds and absolute positions, checked against the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "Positions"]

Int64 = NDArray[np.int64]
Positions = int | Sequence[int] | NDArray[np.integer] | None

_LIMIT = 2**30


@dataclass(frozen=True)
class Geometry:
    """Local bounds and absolute starts of query and key blocks.

    Attributes:
        q_bounds, kv_bounds: int64[blocks + 1]; local token offsets.
        q_start, kv_start: int64[blocks]; absolute position of each block's first token.
    """

    q_bounds: Int64
    kv_bounds: Int64
    q_start: Int64
    kv_start: Int64

    @classmethod
    def of(
        cls,
        block_size: tuple[int, int],
        seq_len: tuple[int, int],
        blocks: tuple[int, int],
        q_start: Positions = None,
        kv_start: Positions = None,
        q_bounds: Positions = None,
        kv_bounds: Positions = None,
    ) -> Geometry:
        """Fill in the defaults and check what was given; see `LayoutPlan.build`."""
        q_offsets = _bounds("q_bounds", q_bounds, block_size[0], seq_len[0], blocks[0])
        kv_offsets = _bounds("kv_bounds", kv_bounds, block_size[1], seq_len[1], blocks[1])
        return cls(
            q_bounds=q_offsets,
            kv_bounds=kv_offsets,
            q_start=_starts("q_start", q_start, q_offsets, seq_len[1] - seq_len[0]),
            kv_start=_starts("kv_start", kv_start, kv_offsets, 0),
        )

    @property
    def q_last(self) -> Int64:
        """int64[QB]; absolute position of each query block's last token."""
        return self.q_start + np.diff(self.q_bounds) - 1

    @property
    def kv_last(self) -> Int64:
        """int64[KB]; likewise for keys."""
        return self.kv_start + np.diff(self.kv_bounds) - 1

    def dense_offset(self, band: tuple[int, int], listed: int, heads: int) -> int | None:
        """The first query's position minus the first key's where a layout leaves out nothing; else None.

        Args:
            band: of the token mask.
            listed: blocks that keep a pair, over all heads.
            heads: of the layout.
        """
        if 0 in (len(self.q_start), len(self.kv_start)):
            return None
        for bounds, start in ((self.q_bounds, self.q_start), (self.kv_bounds, self.kv_start)):
            if (np.diff(bounds) <= 0).any() or (start - bounds[:-1] != start[0]).any():
                return None
        first = np.searchsorted(self.kv_last, self.q_start + band[0], "left")
        stop = np.searchsorted(self.kv_start, self.q_last + band[1], "right")
        return int(self.q_start[0] - self.kv_start[0]) if listed == heads * np.maximum(stop - first, 0).sum() else None

    def tobytes(self) -> bytes:
        """What distinguishes this geometry, for digests."""
        return b"|".join(a.tobytes() for a in (self.q_bounds, self.kv_bounds, self.q_start, self.kv_start))


def _integers(name: str, value: Positions, length: int) -> Int64:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(array.shape)}")
    if array.size and (array.min() < -_LIMIT or array.max() > _LIMIT):
        raise ValueError(f"{name}: expected positions within ±{_LIMIT}, got {array.min()} … {array.max()}")
    return array.astype(np.int64)


def _bounds(name: str, given: Positions, block: int, tokens: int, blocks: int) -> Int64:
    if given is None:
        return np.minimum(np.arange(blocks + 1, dtype=np.int64) * block, tokens)
    bounds = _integers(name, given, blocks + 1)
    steps = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] != tokens or (steps < 0).any() or (steps > block).any():
        raise ValueError(
            f"{name}: expected offsets from 0 to {tokens} in steps of at most {block}, got {bounds.tolist()}"
        )
    return bounds


def _starts(name: str, given: Positions, bounds: Int64, default: int) -> Int64:
    if given is None or isinstance(given, (int, np.integer)):
        first = default if given is None else int(given)
        if abs(first) > _LIMIT:
            raise ValueError(f"{name}: expected a position within ±{_LIMIT}, got {first}")
        return bounds[:-1] + first
    return _integers(name, given, len(bounds) - 1)
