"""Array algebra on CSR structures of several heads.

An entry (head h, row i, column j) has the key ``(h * rows + i) * columns + j``. CSR order is ascending key order, so
set algebra is a merge of two ascending runs, which numpy's stable sort does in linear time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

#: Keys carry one more bit while two sets are subtracted.
KEY_LIMIT = 2**62


def flat_indptr(indptr: Int64) -> Int64:
    """Join ``indptr[heads, rows + 1]`` into one pointer of ``heads * rows + 1`` rows."""
    if len(indptr) == 1:
        return indptr[0]
    return np.append(indptr[:, :-1].ravel(), indptr[-1, -1])


def split_indptr(flat: Int64, heads: int) -> Int64:
    """Undo `flat_indptr`."""
    rows = (len(flat) - 1) // heads
    out = np.empty((heads, rows + 1), np.int64)
    out[:, :-1] = flat[:-1].reshape(heads, rows)
    out[:, -1] = flat[rows::rows]
    return out


def indptr_of_counts(counts: Int64, heads: int) -> Int64:
    """Row pointer of ``counts[heads * rows]`` entries per row."""
    flat = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=flat[1:])
    return split_indptr(flat, heads)


def concatenated_ranges(starts: Int64, counts: Int64) -> Int64:
    """``[s, s + 1, …, s + c − 1]`` for every (s, c), joined."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    return np.arange(total, dtype=np.int64) + np.repeat(starts - ends + counts, counts)


def keys_of(indptr: Int64, indices: Int32, columns: int) -> Int64:
    """Ascending int64 keys of all entries."""
    flat = flat_indptr(indptr)
    keys = np.repeat(np.arange(len(flat) - 1, dtype=np.int64) * columns, np.diff(flat))
    keys += indices
    return keys


def csr_of(keys: Int64, heads: int, rows: int, columns: int) -> tuple[Int64, Int32]:
    """CSR arrays of ascending unique keys."""
    row_starts = np.arange(heads * rows + 1, dtype=np.int64) * columns
    flat = np.searchsorted(keys, row_starts).astype(np.int64, copy=False)
    indices = (keys - np.repeat(row_starts[:-1], np.diff(flat))).astype(np.int32)
    return split_indptr(flat, heads), indices


def unique_keys(keys: Int64) -> Int64:
    """Sort and drop duplicates."""
    keys = np.sort(keys)
    return _drop_repeats(keys)


def union(a: Int64, b: Int64) -> Int64:
    """Keys in either of two ascending runs."""
    return _drop_repeats(np.sort(np.concatenate((a, b)), kind="stable"))


def intersection(a: Int64, b: Int64) -> Int64:
    """Keys in both of two ascending unique runs."""
    merged = np.sort(np.concatenate((a, b)), kind="stable")
    return merged[1:][merged[1:] == merged[:-1]]


def difference(a: Int64, b: Int64) -> Int64:
    """Keys of the ascending unique run ``a`` that ``b`` lacks."""
    merged = np.sort(np.concatenate((a * 2, b * 2 + 1)), kind="stable")
    keep = (merged & 1) == 0
    keep[:-1] &= merged[1:] != merged[:-1] + 1
    return merged[keep] >> 1


def _drop_repeats(ascending: Int64) -> Int64:
    if len(ascending) < 2:
        return ascending
    keep = np.empty(len(ascending), np.bool_)
    keep[0] = True
    np.not_equal(ascending[1:], ascending[:-1], out=keep[1:])
    return ascending if keep.all() else ascending[keep]


def stable_argsort(values: NDArray[np.integer], bound: int) -> Int64:
    """Stable argsort of integers in ``[0, bound)``, 16 bits at a time: numpy sorts those by radix, in linear time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while (bound - 1) >> shift > 0:
        digit = ((values >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
        shift += 16
    return order


def transpose(indptr: Int64, indices: Int32, columns: int) -> tuple[Int64, Int32]:
    """CSR arrays of every head's transpose."""
    heads, rows = indptr.shape[0], indptr.shape[1] - 1
    out = np.empty(len(indices), np.int32)
    counts = np.empty((heads, columns), np.int64)
    for head in range(heads):
        begin, end = int(indptr[head, 0]), int(indptr[head, -1])
        cols = indices[begin:end]
        counts[head] = np.bincount(cols, minlength=columns)
        row_of = np.repeat(np.arange(rows, dtype=np.int32), np.diff(indptr[head]))
        out[begin:end] = row_of[stable_argsort(cols, columns)]
    return indptr_of_counts(counts.ravel(), heads), out


def gather_rows(indptr: Int64, indices: Int32, rows: Int64) -> tuple[Int64, Int32]:
    """CSR arrays of ``rows`` (repeats allowed) of every head."""
    counts = np.diff(indptr, axis=1)[:, rows].ravel()
    starts = indptr[:, :-1][:, rows].ravel()
    return indptr_of_counts(counts, len(indptr)), indices[concatenated_ranges(starts, counts)]


def keep_entries(indptr: Int64, indices: Int32, keep: Bool) -> tuple[Int64, Int32]:
    """CSR arrays of the entries where ``keep[nnz]`` holds."""
    kept_before = np.zeros(len(indices) + 1, np.int64)
    np.cumsum(keep, out=kept_before[1:])
    return kept_before[indptr], indices[keep]
