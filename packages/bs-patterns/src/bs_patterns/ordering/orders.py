"""Orders in which to visit the active blocks of a layout.

An order is int64 ``[nnz]``: a permutation of the layout's CSR entries (positions in `layout.indices`), head after head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._csr import concatenated_ranges, stable_argsort
from ..layout import BlockLayout
from .hilbert import places_in_grid

Int64 = NDArray[np.int64]


def row_order(layout: BlockLayout) -> Int64:
    """Row after row, keys ascending: the order in which a layout is stored.

    Args:
        layout: Any layout.

    Returns:
        int64 ``[nnz]``, ``0 … nnz - 1``.
    """
    _layout(layout)
    return np.arange(layout.nnz, dtype=np.int64)


def hilbert_order(layout: BlockLayout) -> Int64:
    """Along the Hilbert curve of the (query blocks × key blocks) rectangle, for any rectangle.

    The curve starts at block (0, 0); see `hilbert_index`. Blocks close together in the order share query rows and key
    columns, so both stay in a cache.

    Args:
        layout: Any layout.

    Returns:
        int64 ``[nnz]``, a permutation of the CSR entries, head after head.

    Source: Hilbert (1891), Červený's gilbert (2018); see `hilbert_index`.
    """
    _layout(layout)
    return _by_place(layout, places_in_grid)


def morton_order(layout: BlockLayout) -> Int64:
    """By Morton code (Z-order): the bits of row and column interleaved, the row's above the column's.

    Args:
        layout: Any layout.

    Returns:
        int64 ``[nnz]``, a permutation of the CSR entries, head after head.

    Source: G. M. Morton (1966).
    """
    _layout(layout)
    return _by_place(layout, _morton_code)


def longest_first_order(layout: BlockLayout) -> Int64:
    """Rows with most active blocks first (equals in row order), keys ascending within a row.

    Starting the longest rows first keeps parallel workers from waiting for one that came last.

    Args:
        layout: Any layout.

    Returns:
        int64 ``[nnz]``, a permutation of the CSR entries, head after head.

    Source: R. L. Graham's longest-processing-time rule (1969).
    """
    _layout(layout)
    counts = np.diff(layout.indptr, axis=1)
    ranked = np.argsort(-counts, axis=1, kind="stable")
    starts = np.take_along_axis(layout.indptr[:, :-1], ranked, axis=1)
    return concatenated_ranges(starts.ravel(), np.take_along_axis(counts, ranked, axis=1).ravel())


def group_rows(layout: BlockLayout, order: NDArray[np.integer]) -> Int64:
    """The order that a kernel follows when it must finish a query row before the next: an order, regrouped by rows.

    Rows come in the order of their first visit, and within a row the keys stay in the order of their visits.

    Args:
        layout: Any layout.
        order: int ``[nnz]``, a permutation of the CSR entries.

    Returns:
        int64 ``[nnz]``, a permutation of the CSR entries in which each row's are consecutive.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `order` is not a permutation of the CSR entries.
    """
    order = checked_order(layout, order)
    rows = layout.heads * layout.shape[1]
    row = np.repeat(np.arange(rows), np.diff(layout.indptr, axis=1).ravel())[order]
    first_visit = np.zeros(rows, np.int64)
    first_visit[row[::-1]] = np.arange(len(row) - 1, -1, -1)  # of repeated indices the last one written stays
    return order[stable_argsort(first_visit[row], max(len(row), 1))]


def checked_order(layout: BlockLayout, order: Any) -> Int64:
    """Return `order` as int64 if it is a permutation of the layout's CSR entries; raise if it is not."""
    _layout(layout)
    array = np.asarray(order)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"order: expected integers, got {array.dtype}")
    if array.shape != (layout.nnz,):
        raise ValueError(f"order: expected one position per active block, [{layout.nnz}], got {list(array.shape)}")
    array = array.astype(np.int64, copy=False)
    if layout.nnz == 0:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= layout.nnz:
        raise ValueError(f"order: expected positions in [0, {layout.nnz - 1}], got {low if low < 0 else high}")
    seen = np.zeros(layout.nnz, np.bool_)
    seen[array] = True
    if not seen.all():
        missing = int(np.argmin(seen))
        raise ValueError(f"order: expected every position in [0, {layout.nnz - 1}] once, got none at {missing}")
    return array


def _by_place(layout: BlockLayout, place: Any) -> Int64:
    """Sort each head's entries by ``place(row, column, rows, columns)``, which is unique within a head."""
    heads, rows, columns = layout.shape
    out = np.empty(layout.nnz, np.int64)
    for head in range(heads):
        begin, end = int(layout.indptr[head, 0]), int(layout.indptr[head, -1])
        row = np.repeat(np.arange(rows), np.diff(layout.indptr[head]))
        out[begin:end] = np.argsort(place(row, layout.indices[begin:end], rows, columns))
        out[begin:end] += begin
    return out


def _morton_code(row: NDArray[np.integer], column: NDArray[np.integer], rows: int, columns: int) -> NDArray[np.uint64]:
    del rows, columns  # the code of a block does not depend on the rectangle
    return (_spread(row) << np.uint64(1)) | _spread(column)


def _spread(values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Move bit k of each value (below 2**32) to bit 2k."""
    out = values.astype(np.uint64)
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        out = (out | (out << np.uint64(shift))) & np.uint64(mask)
    return out


def _layout(layout: Any) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {layout!r} ({type(layout).__name__})")
