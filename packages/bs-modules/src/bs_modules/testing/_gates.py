"""Gates and inputs small enough to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bs_kernels import BatchedLayout
from bs_patterns import BlockLayout

from .._adaptive_config import AdaptiveConfig
from ..adaptive import BlockSparseAdaptive

#: Of `small_gate`, unless told otherwise.
SMALL_GATE = {"block_size": 4, "base_sparsity": 0.6, "hidden_dim": 8}


def attention_inputs(
    length: int = 40,
    keys: int | None = None,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> list[Tensor]:
    """Draws q `[batch, length, heads, dim]`, and k and v `[batch, keys, kv_heads, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, dim), *[(batch, keys or length, kv_heads, dim)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


def small_gate(
    seed: int = 0, train: bool = False, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8, **more: Any
) -> BlockSparseAdaptive:
    """Makes a gate whose learned correction is awake, as after some training.

    Args:
        seed: Of its parameters.
        train: Whether it is in training mode.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        head_dim: Width of queries and keys.
        more: Fields of `AdaptiveConfig`, and arguments of `BlockSparseAdaptive`.
    """
    config = {**SMALL_GATE, **{name: more.pop(name) for name in list(more) if name in AdaptiveConfig._checks}}
    torch.manual_seed(seed)
    module = BlockSparseAdaptive(
        sparse_config=config, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **more
    )
    with torch.no_grad():
        for parameter in module.scorer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.train(train)


def layout_of_element(batched: BatchedLayout, b: int, heads: int = 4) -> BlockLayout:
    """The layout of one batch element for so many heads."""
    rows = []
    for h in range(batched.shape[1]):
        dense = torch.zeros(batched.shape[2:], dtype=torch.bool)
        for i, count in enumerate(batched.counts[b, h].tolist()):
            dense[i, batched.indices[b, h, i, :count].long()] = True
        rows.append(dense)
    made = torch.stack(rows).expand(heads, -1, -1).numpy()
    return BlockLayout.from_dense(made, block_size=batched.block_size, seq_len=batched.seq_len, causal=batched.causal)
