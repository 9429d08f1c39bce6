"""Figures that describe a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .layout import BlockLayout


def layout_stats(layout: BlockLayout) -> Mapping[str, Any]:
    """See `BlockLayout.stats`."""
    grid = layout._grid
    heads, rows, cols = layout.shape
    per_row = np.diff(layout.indptr, axis=1)
    dense_rows = grid.allowed_per_row()
    pairs = _token_pairs(layout, per_row)
    row_tokens = np.diff(np.minimum(np.arange(rows + 1) * layout.block_size[0], layout.seq_len[0]))
    dense_keys = np.minimum(dense_rows * layout.block_size[1], layout.seq_len[1])
    pairs_dense = heads * int(row_tokens @ dense_keys)
    return {
        "heads": heads,
        "q_blocks": rows,
        "kv_blocks": cols,
        "nnz": layout.nnz,
        "allowed": layout.allowed,
        "density": layout.density,
        "sparsity": 1.0 - layout.density,
        "blocks_per_row_min": int(per_row.min()),
        "blocks_per_row_median": float(np.median(per_row)),
        "blocks_per_row_max": int(per_row.max()),
        "empty_rows": int((per_row == 0).sum()),
        "reach": _reach(layout, per_row),
        "bytes": layout.indptr.nbytes + layout.indices.nbytes,
        "flops": 4 * pairs,
        "flops_dense": 4 * pairs_dense,
        "flops_ratio": pairs / pairs_dense,
    }


def _token_pairs(layout: BlockLayout, per_row: np.ndarray) -> int:
    """Token pairs inside active blocks; only the last block of a row or column is short."""
    _, rows, cols = layout.shape
    (block_q, block_k), (len_q, len_k) = layout.block_size, layout.seq_len
    row_tokens = np.diff(np.minimum(np.arange(rows + 1) * block_q, len_q))
    missing = cols * block_k - len_k
    last = layout.indptr[:, 1:] - 1
    ends_in_short = np.zeros(per_row.shape, np.bool_)
    filled = per_row > 0
    ends_in_short[filled] = layout.indices[last[filled]] == cols - 1
    return int(((per_row * block_k - ends_in_short * missing) @ row_tokens).sum())


def _reach(layout: BlockLayout, per_row: np.ndarray) -> int:
    filled = per_row > 0
    if not filled.any():
        return 0
    q_first, q_last = layout._grid.query_spans()
    k_first, k_last = layout._grid.key_spans()
    row = np.nonzero(filled)[1]
    begin = layout.indices[layout.indptr[:, :-1][filled]]
    end = layout.indices[layout.indptr[:, 1:][filled] - 1]
    back = (q_last[row] - k_first[begin]).max()
    if layout.causal:
        return int(back)
    return int(max(back, (k_last[end] - q_first[row]).max()))
