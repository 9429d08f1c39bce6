"""Cases from a seed and a few sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ..batched import BatchedLayout
from .case import Case

__all__ = ["make_batched_layout", "make_case", "make_layout", "make_pages"]


def make_layout(
    generator: np.random.Generator,
    *,
    seq_len: tuple[int, int],
    block_size: tuple[int, int],
    heads: int = 1,
    density: float = 0.5,
    causal: bool = False,
) -> BlockLayout:
    """A layout whose blocks are active independently with probability ``density``; rows may be empty."""
    blocks = [-(-length // block) for length, block in zip(seq_len, block_size, strict=True)]
    mask = generator.random((heads, *blocks)) < density
    return BlockLayout.from_dense(mask, block_size=block_size, seq_len=seq_len, causal=causal)


def make_batched_layout(
    generator: np.random.Generator,
    *,
    batch: int,
    seq_len: tuple[int, int],
    block_size: tuple[int, int],
    heads: int = 1,
    density: float = 0.5,
    causal: bool = False,
) -> BatchedLayout:
    """A `BatchedLayout` with random counts and random, unordered indices; unused slots hold rubbish."""
    q_blocks, kv_blocks = (-(-length // block) for length, block in zip(seq_len, block_size, strict=True))
    slots = max(1, min(kv_blocks, round(2 * density * kv_blocks)))
    keys = generator.random((batch, heads, q_blocks, kv_blocks)).argsort(-1)[..., :slots]
    counts = generator.integers(0, slots + 1, (batch, heads, q_blocks))
    keys[np.arange(slots) >= counts[..., None]] = -7
    return BatchedLayout(torch.from_numpy(keys.copy()), torch.from_numpy(counts), block_size, seq_len, causal)


def make_case(
    layout: BlockLayout | BatchedLayout,
    *,
    seed: int = 0,
    batch: int = 1,
    q_heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    **arguments: Any,
) -> Case:
    """Random operands for a layout.

    Args:
        layout: the layout.
        seed: of everything random here.
        batch, q_heads, kv_heads, head_dim, value_dim: sizes; ``value_dim`` defaults to ``head_dim``.
        dtype: of q, k and v.
        spread: standard deviation of q and k; large values make extreme logits.
        arguments: of `block_sparse_attention`. "attn_bias", "block_bias", "sinks", "key_padding_mask" and "segment_ids"
            may be given as True, and are then drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    value_dim = head_dim if value_dim is None else value_dim
    len_q, len_kv = layout.seq_len

    def normal(*shape: int, deviation: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * deviation).to(of)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    nnz = layout.indices.numel() if isinstance(layout, BatchedLayout) else layout.nnz
    draw = {
        "attn_bias": lambda: normal(batch, q_heads, len_q, len_kv, of=wide),
        "block_bias": lambda: normal(*layout.indices.shape if isinstance(layout, BatchedLayout) else (nnz,), of=wide),
        "sinks": lambda: normal(q_heads, of=wide),
        "key_padding_mask": lambda: torch.rand(batch, len_kv, generator=generator) < 0.7,
        "segment_ids": lambda: tuple(
            torch.randint(0, 3, (batch, length), generator=generator).sort(-1).values for length in (len_q, len_kv)
        ),
    }
    arguments = {name: draw[name]() if x is True and name in draw else x for name, x in arguments.items()}
    return Case(
        q=normal(batch, len_q, q_heads, head_dim, deviation=spread),
        k=normal(batch, len_kv, kv_heads, head_dim, deviation=spread),
        v=normal(batch, len_kv, kv_heads, value_dim),
        layout=layout,
        dout=normal(batch, len_q, q_heads, value_dim),
        dlse=normal(batch, q_heads, len_q, of=wide),
        arguments=arguments,
    )


def make_pages(case: Case, *, seed: int = 0, spare: int = 2) -> Case:
    """The same case with K and V in shuffled pages; some pages hold rubbish that nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    block, len_kv = case.layout.block_size[1], case.layout.seq_len[1]
    batch, blocks = case.q.shape[0], -(-len_kv // block)
    where = torch.randperm(batch * blocks + spare, generator=generator)[: batch * blocks]
    pools = []
    for x in (case.k, case.v):
        padded = torch.full((batch, blocks * block, *x.shape[2:]), 3.0, dtype=x.dtype)
        padded[:, :len_kv] = x
        pool = torch.full((batch * blocks + spare, block, *x.shape[2:]), float("nan"), dtype=x.dtype)
        pool[where] = padded.view(batch * blocks, block, *x.shape[2:])
        pools.append(pool)
    table = where.view(batch, blocks).to(torch.int32)
    return Case(case.q, pools[0], pools[1], case.layout, case.dout, case.dlse, case.arguments | {"page_table": table})
