"""The blocks of layouts from COO triples and from dense masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _csr
from ._csr import Bool, Int64
from ._grid import Blocks, Grid


def from_coo(head: ArrayLike, row: ArrayLike, column: ArrayLike, grid: Grid, heads: int) -> Blocks:
    """See `BlockLayout.from_coo`."""
    rows, cols = grid.shape
    triple = [
        _coordinates(name, value, bound)
        for name, value, bound in (("head", head, heads), ("row", row, rows), ("column", column, cols))
    ]
    lengths = {len(item) for item in triple if item.ndim}
    if len(lengths) > 1:
        raise ValueError(f"head, row, column: expected equal lengths, got {[item.shape for item in triple]}")
    h, i, j = (np.atleast_1d(item) for item in np.broadcast_arrays(*triple))
    if grid.causal:
        keep = j < grid.allowed_per_row()[i]
        h, i, j = h[keep], i[keep], j[keep]
    keys = _csr.unique_keys((h * rows + i) * cols + j)
    return Blocks(grid, *_csr.csr_of(keys, heads, rows, cols))


def from_dense(mask: ArrayLike, grid: Grid) -> Blocks:
    """See `BlockLayout.from_dense`."""
    dense = _bool_mask("mask", mask, "[heads, q_blocks, kv_blocks]")
    if dense.shape[1:] != grid.shape:
        raise ValueError(
            f"mask: expected [heads, {grid.shape[0]}, {grid.shape[1]}] for seq_len={grid.seq_len} and "
            f"block_size={grid.block_size}, got {list(dense.shape)}"
        )
    h, i, j = np.nonzero(dense)
    return from_coo(h, i, j, grid, len(dense))


def from_token_mask(mask: ArrayLike, block_size: tuple[int, int], causal: bool) -> Blocks:
    """See `BlockLayout.from_token_mask`."""
    tokens = _bool_mask("mask", mask, "[heads, Sq, Sk]")
    _, len_q, len_k = tokens.shape
    if not (len_q and len_k):
        raise ValueError(f"mask: expected at least one query and one key, got {list(tokens.shape)}")
    grid = Grid(block_size, (len_q, len_k), causal)
    if causal:
        tokens = tokens & (np.arange(len_k) <= np.arange(len_q)[:, None] + grid.shift)
    blocks = np.logical_or.reduceat(tokens, np.arange(0, len_q, block_size[0]), axis=1)
    return from_dense(np.logical_or.reduceat(blocks, np.arange(0, len_k, block_size[1]), axis=2), grid)


def _bool_mask(name: str, mask: ArrayLike, shape: str) -> Bool:
    array: np.ndarray[Any, Any] = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"{name}: expected a bool array, True = active, got {array.dtype}")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or not len(array):
        raise ValueError(f"{name}: expected {shape}, got shape {list(array.shape)}")
    return array


def _coordinates(name: str, value: ArrayLike, bound: int) -> Int64:
    array = np.asarray(value)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim > 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(array.shape)}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= bound):
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ValueError(f"{name}: expected values in [0, {bound - 1}], got {wrong}")
    return array.astype(np.int64)
