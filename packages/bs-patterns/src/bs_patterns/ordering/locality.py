"""What an order does to a cache of key blocks, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .._csr import stable_argsort
from ..layout import BlockLayout
from .orders import checked_order

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Locality:
    """Loads of key blocks through a cache that evicts the least recently used.

    Args:
        cache_blocks: Key blocks that the cache holds.
        accesses: Key blocks asked for: the layout's active blocks.
        compulsory: Distinct (head, key block) pairs among them; no order and no cache misses fewer.
        misses: Accesses that the cache did not hold.
    """

    cache_blocks: int
    accesses: int
    compulsory: int
    misses: int

    @property
    def hits(self) -> int:
        """Accesses that the cache held."""
        return self.accesses - self.misses

    @property
    def miss_rate(self) -> float:
        """Misses / accesses; 0 where there is no access."""
        return self.misses / self.accesses if self.accesses else 0.0


def locality(layout: BlockLayout, order: NDArray[np.integer], cache_blocks: int) -> Locality:
    """Simulate an LRU cache of key blocks while the active blocks are visited in an order.

    Heads share the cache and not their keys: a block is known by (head, key block). To see what a kernel meets that
    finishes one query row before the next, pass ``group_rows(layout, order)``.

    Args:
        layout: Any layout.
        order: int ``[nnz]``, a permutation of the CSR entries, such as ``hilbert_order(layout)``.
        cache_blocks: Key blocks that the cache holds, at least 1.

    Returns:
        Accesses, misses and the misses that no cache avoids.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `order` is not a permutation of the CSR entries, or `cache_blocks` is below 1.

    Source: `reuse_distances`.
    """
    cache_blocks = _check.integer("cache_blocks", cache_blocks)
    distances = reuse_distances(layout, order)
    first = int((distances < 0).sum())
    return Locality(cache_blocks, len(distances), first, first + int((distances >= cache_blocks).sum()))


def reuse_distances(layout: BlockLayout, order: NDArray[np.integer]) -> Int64:
    """Per visit, how many other key blocks were visited since the last visit to the same one.

    An LRU cache of c blocks misses exactly the visits with a distance ≥ c and the first ones, so one call gives the
    misses of every cache size. O(nnz · log nnz).

    Args:
        layout: Any layout.
        order: int ``[nnz]``, a permutation of the CSR entries.

    Returns:
        int64 ``[nnz]``, in visiting order; -1 for the first visit to a (head, key block).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `order` is not a permutation of the CSR entries.

    Source: R. L. Mattson et al., "Evaluation techniques for storage hierarchies" (1970), for the stack distance.
    Between two visits s < t to one key there are t − s − 1 others; those that repeat a key seen since s are the visits
    before t whose own last visit lies after s, hence inversions of the last-visit sequence.
    """
    order = checked_order(layout, order)
    heads, _, columns = layout.shape
    head = np.repeat(np.arange(heads), np.diff(layout.indptr[:, [0, -1]], axis=1).ravel())
    key = (head * columns + layout.indices)[order]
    by_key = stable_argsort(key, heads * columns)
    again = np.flatnonzero(key[by_key[1:]] == key[by_key[:-1]])
    last = np.full(len(key), -1, np.int64)
    last[by_key[again + 1]] = by_key[again]

    distances = np.full(len(key), -1, np.int64)
    warm = np.flatnonzero(last >= 0)
    rank = np.zeros(len(key), np.int64)
    rank[last[warm]] = 1
    rank = np.cumsum(rank) - rank
    distances[warm] = warm - last[warm] - 1 - _inversions(rank[last[warm]])
    return distances


def _inversions(values: Int64) -> Int64:
    """Per element of a permutation of ``0 … n - 1``, how many earlier elements are greater.

    Two elements differ first in some bit; one pass per bit, from the top, counts the pairs that differ first there.
    Before a pass the elements are grouped by their higher bits, so a group starts at its smallest value, and within a
    group they keep their order.
    """
    count = len(values)
    dtype = np.int32 if count < 2**31 else np.int64
    value, greater = values.astype(dtype), np.zeros(count, dtype)
    where = np.arange(count, dtype=dtype)
    for bit in reversed(range(max(count - 1, 0).bit_length())):
        one = (value >> bit) & 1
        ones_before = np.cumsum(one, dtype=dtype) - one
        start = value >> (bit + 1) << (bit + 1)
        ones_before -= ones_before[start]
        greater += np.where(one, 0, ones_before)
        target = np.where(one, start + (1 << bit) + ones_before, where - ones_before)
        value[target], greater[target] = value.copy(), greater.copy()
    return greater[values].astype(np.int64)
