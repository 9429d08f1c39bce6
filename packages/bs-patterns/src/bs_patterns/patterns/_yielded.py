"""Reading the blocks that a user's function yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .._csr import Int64
from .._grid import Grid
from .._stages import best_of_each

_EXPECTED = "an integer offset or a pair (rows, columns) of integers or integer arrays"


def blocks_of(fn: Callable[[int, int, int], Iterable[Any]], grid: Grid, head: int) -> Int64:
    """Keys of the allowed blocks that ``fn`` yields, best first, each once."""
    rows, cols = grid.shape
    items = fn(rows, cols, head)
    if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
        raise TypeError(f"fn: expected a result that yields blocks, got {items!r}")
    if isinstance(items, tuple) and len(items) == 2 and all(isinstance(item, np.ndarray) for item in items):
        items = [items]
    keys = [np.empty(0, np.int64)]
    most = 2 * (rows * cols + rows + cols) + 2**16  # repeats are fine, a generator without end is not
    for n, item in enumerate(items):
        if n >= most:
            raise ValueError(f"fn: expected a result that ends, got more than {most} items for {rows} × {cols} blocks")
        keys.append(_keys_of(item, n, grid))
    merged = np.concatenate(keys)
    unique, place = best_of_each(merged, np.arange(len(merged), dtype=np.int64))
    return unique[np.argsort(place)]


def _keys_of(item: Any, n: int, grid: Grid) -> Int64:
    if hasattr(item, "__index__") and not isinstance(item, bool) and np.ndim(item) == 0:
        reach = sum(grid.shape)
        col = grid.diagonal + min(max(int(item), -reach), reach)
        row = np.nonzero((col >= 0) & (col < grid.allowed))[0]
        return row * grid.shape[1] + col[row]
    if not isinstance(item, tuple | list | np.ndarray) or len(item) != 2:
        raise TypeError(f"fn: expected {_EXPECTED}, got {item!r} as item {n}")
    row = _indices(item[0], "row", n, grid.shape[0])
    col = _indices(item[1], "column", n, grid.shape[1])
    try:
        row, col = (np.ravel(part) for part in np.broadcast_arrays(row, col))
    except ValueError:
        raise ValueError(
            f"fn: expected rows and columns that broadcast, got shapes {row.shape} and {col.shape} in item {n}"
        ) from None
    keep = col < grid.allowed[row]
    return row[keep] * grid.shape[1] + col[keep]


def _indices(part: Any, name: str, n: int, limit: int) -> Int64:
    try:
        array = np.asarray(part)
    except ValueError:
        raise TypeError(f"fn: expected {_EXPECTED}, got {part!r} in item {n}") from None
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise TypeError(f"fn: expected {_EXPECTED}, got {part!r} in item {n}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ValueError(f"fn: expected {name}s in [0, {limit - 1}], got {wrong} in item {n}")
    return array.astype(np.int64)
