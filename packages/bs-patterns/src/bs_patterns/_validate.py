"""The full check of a layout's entries."""

from __future__ import annotations

import numpy as np

from ._grid import Blocks


def validate_entries(blocks: Blocks) -> None:
    """Raise ValueError naming the first entry that breaks a rule of `BlockLayout`. O(nnz)."""
    grid, indptr, indices = blocks
    rows, cols = grid.shape
    counts = np.diff(indptr, axis=1).ravel()
    if (counts < 0).any():
        at = int(np.argmax(counts < 0))
        raise ValueError(f"indptr: expected non-decreasing row pointers, got a decrease at {_row(at, rows)}")
    if not len(indices):
        return
    row_ids = np.repeat(np.arange(len(counts)), counts)
    bad = (indices < 0) | (indices >= cols)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"indices: expected key blocks in [0, {cols - 1}], got {indices[at]} in {_row(row_ids[at], rows)}"
        )
    bad = (row_ids[1:] == row_ids[:-1]) & (indices[1:] <= indices[:-1])
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            "indices: expected ascending and unique key blocks within a row, "
            f"got {indices[at]} followed by {indices[at + 1]} in {_row(row_ids[at], rows)}"
        )
    if grid.causal:
        bad = indices >= grid.allowed_per_row()[row_ids % rows]
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                "indices: expected blocks that hold a key ≤ query pair in a causal layout, "
                f"got key block {indices[at]} in {_row(row_ids[at], rows)} (use as_causal() to drop such blocks)"
            )


def _row(row_id: int, rows: int) -> str:
    return f"head {row_id // rows}, query block {row_id % rows}"
