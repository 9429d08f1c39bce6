"""The figures that the command line prints beside a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import _check
from ._csr import Int64
from .layout import BlockLayout
from .ordering import group_rows, hilbert_order, locality, longest_first_order, morton_order, row_order

ORDERS: dict[str, Callable[[BlockLayout], Int64]] = {
    "row": row_order,
    "hilbert": hilbert_order,
    "morton": morton_order,
    "longest_first": longest_first_order,
}
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Side:
    """A layout with its name and the density that was asked for."""

    name: str
    layout: BlockLayout
    requested: float | None


def figures(sides: Sequence[Side], *, head_dim: int, dtype: str) -> str:
    """A table of figures, one column per layout."""
    head_dim = _check.integer("head_dim", head_dim)
    columns = [_figures(side, head_dim, ITEM_SIZES[dtype]) for side in sides]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    rows = [row for row in rows if any(row[1:])]
    if len(sides) > 1:
        rows.insert(0, ["", *(side.name for side in sides)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    note = f"K/V bytes for head dim {head_dim} in {dtype}; FLOPs of the forward pass, per batch element."
    return "\n".join([*lines, note])


def _figures(side: Side, head_dim: int, item_size: int) -> dict[str, str]:
    layout = side.layout
    stats = layout.stats()
    middle = f"{stats['blocks_per_row_median']:,.1f}".removesuffix(".0")
    kv_bytes = 2 * head_dim * item_size
    dense = layout.heads * layout.seq_len[1]
    flops, flops_dense = stats["flops"] * head_dim, stats["flops_dense"] * head_dim
    return {
        "density": f"{stats['density']:.6g}",
        "requested": "" if side.requested is None else f"{side.requested:g}",
        "active blocks": f"{stats['nnz']:,} of {stats['allowed']:,} allowed",
        "blocks per row": f"{stats['blocks_per_row_min']:,} min, {middle} median, {stats['blocks_per_row_max']:,} max",
        "empty rows": f"{stats['empty_rows']:,}" if stats["empty_rows"] else "",
        "reach": f"{stats['reach']:,} tokens",
        "index": _bytes(stats["bytes"]),
        "K/V touched": f"{_bytes(_key_tokens(layout) * kv_bytes)} of {_bytes(dense * kv_bytes)}",
        "FLOPs": f"{_count(flops)} of {_count(flops_dense)} dense ({stats['flops_ratio']:.4g})",
    }


def _key_tokens(layout: BlockLayout) -> int:
    """Tokens in the distinct (head, key block) pairs that some query attends to."""
    heads, _, columns = layout.shape
    block, length = layout.block_size[1], layout.seq_len[1]
    tokens = 0
    for head in range(heads):
        touched = np.unique(layout.indices[layout.indptr[head, 0] : layout.indptr[head, -1]])
        tokens += len(touched) * block
        if len(touched) and touched[-1] == columns - 1:
            tokens -= columns * block - length
    return tokens


def misses(side: Side, order: str, cache_blocks: int) -> str:
    """One line about an LRU cache of key blocks: an order as it is, regrouped by rows, and row order."""
    layout = side.layout
    own = ORDERS[order](layout)
    found = locality(layout, own, cache_blocks)
    counts = {order: found.misses}
    if order != "row":
        counts[f"{order} row by row"] = locality(layout, group_rows(layout, own), cache_blocks).misses
        counts["row"] = locality(layout, row_order(layout), cache_blocks).misses
    counts["unavoidable"] = found.compulsory
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{side.name}: misses of {found.accesses:,} loads, LRU cache of {cache_blocks:,} key blocks: {listed}"


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{number:,} B" if unit == "B" else f"{value:,.1f} {unit}"


def _count(number: int) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return str(number)
