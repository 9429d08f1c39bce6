"""Figures that describe a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._grid import Blocks


def layout_stats(blocks: Blocks) -> Mapping[str, Any]:
    """See `BlockLayout.stats`."""
    grid, indptr, indices = blocks
    rows, cols = grid.shape
    per_row = np.diff(indptr, axis=1)
    pairs = _token_pairs(blocks, per_row)
    row_tokens = np.diff(np.minimum(np.arange(rows + 1) * grid.block_size[0], grid.seq_len[0]))
    dense_keys = np.minimum(grid.allowed_per_row() * grid.block_size[1], grid.seq_len[1])
    pairs_dense = blocks.heads * int(row_tokens @ dense_keys)
    return {
        "heads": blocks.heads,
        "q_blocks": rows,
        "kv_blocks": cols,
        "nnz": len(indices),
        "allowed": blocks.allowed,
        "density": blocks.density,
        "sparsity": 1.0 - blocks.density,
        "blocks_per_row_min": int(per_row.min()),
        "blocks_per_row_median": float(np.median(per_row)),
        "blocks_per_row_max": int(per_row.max()),
        "empty_rows": int((per_row == 0).sum()),
        "reach": _reach(blocks, per_row),
        "bytes": indptr.nbytes + indices.nbytes,
        "flops": 4 * pairs,
        "flops_dense": 4 * pairs_dense,
        "flops_ratio": pairs / pairs_dense,
    }


def _token_pairs(blocks: Blocks, per_row: np.ndarray) -> int:
    """Token pairs inside active blocks; only the last block of a row or column is short."""
    grid, indptr, indices = blocks
    rows, cols = grid.shape
    (block_q, block_k), (len_q, len_k) = grid.block_size, grid.seq_len
    row_tokens = np.diff(np.minimum(np.arange(rows + 1) * block_q, len_q))
    missing = cols * block_k - len_k
    last = indptr[:, 1:] - 1
    ends_in_short = np.zeros(per_row.shape, np.bool_)
    filled = per_row > 0
    ends_in_short[filled] = indices[last[filled]] == cols - 1
    return int(((per_row * block_k - ends_in_short * missing) @ row_tokens).sum())


def _reach(blocks: Blocks, per_row: np.ndarray) -> int:
    grid, indptr, indices = blocks
    filled = per_row > 0
    if not filled.any():
        return 0
    q_first, q_last = grid.query_spans()
    k_first, k_last = grid.key_spans()
    row = np.nonzero(filled)[1]
    begin = indices[indptr[:, :-1][filled]]
    end = indices[indptr[:, 1:][filled] - 1]
    back = (q_last[row] - k_first[begin]).max()
    if grid.causal:
        return int(back)
    return int(max(back, (k_last[end] - q_first[row]).max()))
