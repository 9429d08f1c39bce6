"""Orders, for `bench_variants.py`: of tiles in a kernel, and of tokens that lie on a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bs_kernels import LayoutPlan, block_sparse_attention
from bs_patterns import (
    BlockLayout,
    DilatedSparse,
    GlobalLocal,
    LocalWindow,
    group_rows,
    hilbert_order,
    hilbert_tokens,
    locality,
    morton_order,
    row_order,
)

Turns = Callable[[dict[str, Callable[[], Any]], str], dict[str, dict[str, float]]]

CACHE_BLOCKS = 32
BLOCK = 64
ORDERS = ("row", "auto", "morton", "hilbert")
PATTERNS = {
    "local_window": LocalWindow(1024),
    "dilated_sparse": DilatedSparse((1, 4, 16)),
    "global_local": GlobalLocal(256, 1024),
}


def measure(
    tokens: int, turns: Turns, heads: int, dim: int, dtype: torch.dtype, device: str
) -> Iterator[dict[str, Any]]:
    """Both kinds of order: a record of each pattern, then of each grid.

    Args:
        tokens: Length for the 1-D patterns; grids have about as many tokens.
        turns: Times contestants against one of them.
        heads, dim, dtype, device: Of the tensors.
    """
    yield from (_tiles(name, tokens, turns, heads, dim, dtype, device) for name in PATTERNS)
    yield from (_tokens(grid, radius, turns, heads, dim, dtype, device) for grid, radius in _grids(tokens))


def _runners(layout: BlockLayout, order: str, heads: int, dim: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.seq_len[0], heads, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    cotangent = torch.randn(shape, generator=generator).to(device, dtype)
    plan = LayoutPlan.build(layout, None, device, order=order)

    def call() -> torch.Tensor:
        return block_sparse_attention(q, k, v, plan)

    return {"forward": torch.no_grad()(call), "both": lambda: torch.autograd.grad(call(), (q, k, v), cotangent)}


def _tiles(
    name: str, tokens: int, turns: Turns, heads: int, dim: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """One pattern on a line of tokens, its tiles visited in several orders."""
    layout = PATTERNS[name].layout(tokens, block_size=BLOCK, density=0.1)
    visits = {
        "row": row_order(layout),
        "auto": row_order(layout),  # ascending keys; rows by length
        "morton": group_rows(layout, morton_order(layout)),
        "hilbert": group_rows(layout, hilbert_order(layout)),
    }
    runs = {order: _runners(layout, order, heads, dim, dtype, device) for order in ORDERS}
    times = {p: turns({order: run[p] for order, run in runs.items()}, "row") for p in ("forward", "both")}
    print(f"  {name:16} hilbert × {times['both']['hilbert']['ratio']} of row")
    return {
        "pattern": name,
        "tokens": tokens,
        "density": round(layout.density, 5),
        "cache_blocks": CACHE_BLOCKS,
        "misses": {order: int(locality(layout, visits[order], CACHE_BLOCKS).misses) for order in ORDERS},
        **times,
    }


def _grids(tokens: int) -> list[tuple[tuple[int, ...], int]]:
    """A square and a cube of about as many tokens, with the radius of a neighbourhood."""
    side, edge = round(tokens ** (1 / 2)), round(tokens ** (1 / 3))
    return [((side, side), 4), ((edge, edge, edge), 2)]


def _tokens(
    grid: tuple[int, ...], radius: int, turns: Turns, heads: int, dim: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Attention to the neighbours on a grid, its tokens stored in several orders: the blocks that hold a pair."""
    permutations = {
        "row": np.arange(int(np.prod(grid))),
        "morton": _morton_tokens(grid),
        "hilbert": hilbert_tokens(grid)[0],
    }
    layouts = {order: neighbours(grid, radius, permutation) for order, permutation in permutations.items()}
    runs = {order: _runners(layout, "auto", heads, dim, dtype, device) for order, layout in layouts.items()}
    times = {p: turns({order: run[p] for order, run in runs.items()}, "row") for p in ("forward", "both")}
    print(f"  {grid} hilbert × {times['both']['hilbert']['ratio']} of row")
    return {
        "grid": list(grid),
        "radius": radius,
        "density": {order: round(layout.density, 5) for order, layout in layouts.items()},
        "blocks": {order: layout.nnz for order, layout in layouts.items()},
        "misses": {
            order: int(locality(layout, row_order(layout), CACHE_BLOCKS).misses) for order, layout in layouts.items()
        },
        "cache_blocks": CACHE_BLOCKS,
        **times,
    }


def neighbours(grid: tuple[int, ...], radius: int, permutation: np.ndarray) -> BlockLayout:
    """The blocks of every pair of tokens at most ``radius`` apart along each axis.

    Args:
        grid: Tokens along each axis.
        radius: In tokens.
        permutation: ``permutation[n]`` is the token (in row-major order) that is stored n-th.
    """
    places = np.empty(len(permutation), np.int64)
    places[permutation] = np.arange(len(permutation))
    places = places.reshape(grid)
    count = -(-len(permutation) // BLOCK)
    found = np.empty(0, np.int64)
    for offset in np.ndindex(*[2 * radius + 1] * len(grid)):
        shift = [step - radius for step in offset]
        here = places[tuple(slice(max(0, -s), size - max(0, s)) for s, size in zip(shift, grid, strict=True))]
        there = places[tuple(slice(max(0, s), size - max(0, -s)) for s, size in zip(shift, grid, strict=True))]
        pairs = np.unique((here // BLOCK).ravel() * count + (there // BLOCK).ravel())
        found = np.union1d(found, pairs)
    rows, columns = np.divmod(found, count)
    return BlockLayout.from_coo(0, rows, columns, block_size=BLOCK, seq_len=len(permutation))


def _morton_tokens(grid: tuple[int, ...]) -> np.ndarray:
    """Tokens of a grid along a Morton curve: by their interleaved coordinates."""
    coordinates = np.unravel_index(np.arange(int(np.prod(grid))), grid)
    bits = max(grid).bit_length()
    code = np.zeros(len(coordinates[0]), np.int64)
    for bit in reversed(range(bits)):
        for axis in coordinates:
            code = code << 1 | (axis >> bit & 1)
    return np.argsort(code, kind="stable")
