"""A pseudorandom permutation per row, evaluated where it is needed and never stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._csr import Int64

UInt64 = NDArray[np.uint64]

_ROUNDS = 6
_CHUNK = 2**16  # keeps the work arrays in the cache


def permuted(seed: int, head: int, rows: Int64, positions: Int64, sizes: Int64) -> Int64:
    """Where row ``rows[n]``'s permutation of ``range(sizes[n])`` sends ``positions[n]``.

    A Feistel network permutes the smallest even-bit power of two ≥ size; values that fall outside the range are sent
    through again until they fall inside (cycle walking), which takes fewer than four steps on average.

    Args:
        seed: Non-negative integer; distinct seeds give unrelated permutations.
        head: Non-negative integer; so do distinct heads.
        rows: int64 ``[n]``; so do distinct rows.
        positions: int64 ``[n]``, in ``[0, sizes[n])``.
        sizes: int64 ``[n]``, ≥ 1.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002; mixing by splitmix64's finaliser.
    """
    head_key = _mix(np.array([head], np.uint64) + _mix(np.array([seed % 2**64], np.uint64)))
    out = np.empty(len(rows), np.int64)
    for begin in range(0, len(rows), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        out[part] = _walk(head_key, rows[part], positions[part], sizes[part])
    return out


def _walk(head_key: UInt64, rows: Int64, positions: Int64, sizes: Int64) -> Int64:
    """`permuted`, all at once."""
    half = np.maximum((np.frexp((sizes - 1).astype(np.float64))[1] + 1) // 2, 1).astype(np.uint64)
    key = _mix(rows.astype(np.uint64) + head_key)
    out = positions.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], key[todo], half[todo])
        todo = todo[out[todo] >= sizes[todo].astype(np.uint64)]
    return out.astype(np.int64)


def _feistel(values: UInt64, key: UInt64, half: UInt64) -> UInt64:
    """One pass over ``2 · half`` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_number in range(_ROUNDS):
        left, right = right, left ^ (_mix(key + (right << np.uint64(8)) + np.uint64(round_number)) & mask)
    return (left << half) | right


def _mix(x: UInt64) -> UInt64:
    """splitmix64's finaliser, on arrays (which wrap silently)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
