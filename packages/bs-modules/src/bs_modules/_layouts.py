"""What goes into a module's layout, checked, and what comes out, made small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bs_patterns import BlockLayout

from ._checks import check_int, check_int_list


def check_segments(
    lengths: Sequence[int] | None, rates: Sequence[int] | None
) -> tuple[list[int] | None, list[int] | None]:
    """Checks LongNet's segment lengths and rates: both or neither, one rate per length."""
    if lengths is None and rates is None:
        return None, None
    if lengths is None:
        raise ValueError(
            f"dilation_rates: expected segment_lengths with it, got {rates!r} alone; "
            "the rates of the pattern itself go into sparse_config"
        )
    checked = check_int_list("segment_lengths", lengths)
    if rates is None:
        raise ValueError(f"segment_lengths: expected dilation_rates with it, got {lengths!r} alone")
    checked_rates = check_int_list("dilation_rates", rates)
    if len(checked) != len(checked_rates):
        raise ValueError(
            f"dilation_rates: expected one rate per segment length, got {len(checked_rates)} rates for "
            f"{len(checked)} lengths"
        )
    return checked, checked_rates


def check_lengths(seq_len: Any) -> tuple[int, int]:
    """Checks tokens, or a (query, key) pair of them; the pair."""
    if not isinstance(seq_len, tuple | list):
        length = check_int("seq_len", seq_len)
        return length, length
    if len(seq_len) != 2:
        raise ValueError(f"seq_len: expected an integer or a (query, key) pair, got {seq_len!r}")
    return check_int("seq_len[0]", seq_len[0]), check_int("seq_len[1]", seq_len[1])


def check_pairs(pairs: Any, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Validates what an override of `_get_sparse_block_indices` returned."""
    where = "_get_sparse_block_indices"
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise TypeError(f"{where}: expected a pair (rows, columns), got {type(pairs).__name__}")
    arrays = []
    for name, value in zip(("rows", "columns"), pairs, strict=True):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"{where}: expected {name} as int[n], got {array.dtype} of shape {list(array.shape)}")
        array = array.astype(np.int64)
        if array.size and not (array.min() >= 0 and array.max() < blocks):
            worst = array.min() if array.min() < 0 else array.max()
            raise ValueError(f"{where}: expected {name} in [0, {blocks}), got {worst}")
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(f"{where}: expected equally many rows and columns, got {len(arrays[0])} and {len(arrays[1])}")
    return arrays[0], arrays[1]


def share_equal_heads(layout: BlockLayout) -> BlockLayout:
    """One shared head where all heads are equal: a smaller plan for the same function."""
    heads = layout.heads
    if heads == 1:
        return layout
    starts = layout.indptr - layout.indptr[:, :1]
    per_head = layout.nnz // heads
    if per_head * heads != layout.nnz or (starts != starts[0]).any():
        return layout
    indices = layout.indices.reshape(heads, per_head)
    if (indices != indices[0]).any():
        return layout
    return BlockLayout(layout.block_size, layout.seq_len, starts[:1], indices[0], layout.causal)
