"""What `bench_cpu.py` measures: layouts, operands, and the contestants on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cpu_turns import watched
from torch.nn.functional import scaled_dot_product_attention

from bs_kernels import LayoutPlan, block_sparse_attention
from bs_patterns import BlockLayout

__all__ = ["DTYPES", "contestants_of", "flex_forward", "layout_of", "operands", "runners", "share_of_dense"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layout_of(kind: str, tokens: int, block: int, heads: int, density: float, causal: bool) -> BlockLayout:
    """A layout at about this density: "random" (per head, diagonal always active) or "window" (shared)."""
    n = -(-tokens // block)
    if kind == "window":
        reach = max(0, round(density * n) - 1) if causal else max(0, round((density * n - 1) / 2))
        i = np.arange(n)
        mask = (np.abs(i[:, None] - i) <= reach)[None]
    else:
        generator = np.random.default_rng(0)
        mask = (
            generator.random((heads, n, n)) < (density * n - 1) / max(n - 1, 1)
            if n > 1
            else np.ones((heads, 1, 1), bool)
        )
        mask |= np.eye(n, dtype=bool)
    return BlockLayout.from_dense(np.tril(mask) if causal else mask, block_size=block, seq_len=tokens, causal=causal)


def share_of_dense(layout: BlockLayout) -> float:
    """Active pairs / pairs of the dense kernel, both after the causal mask (blocks on the diagonal count half)."""
    block, tokens = layout.block_size[0], layout.seq_len[0]
    if not layout.causal:
        return layout.density
    _, row, column = layout.to_coo()
    diagonal = int((row == column).sum())
    pairs = (layout.nnz - diagonal) * block**2 + diagonal * block * (block + 1) / 2
    return pairs / layout.heads / (tokens * (tokens + 1) / 2)


def operands(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, h, dim).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    return [q, k, v], torch.randn(1, tokens, heads, dim).to(dtype)


def contestants_of(
    tensors: list[torch.Tensor], cotangent: torch.Tensor, plan: LayoutPlan, backends: list[str], causal: bool
) -> dict[str, Callable[[], Any]]:
    """Forward and forward+backward of dense attention and of every backend."""
    grouped = tensors[0].shape[2] != tensors[1].shape[2]
    # Dense attention gets its own layout, head-major and contiguous: what is fastest for it.
    dense_tensors = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    dense_cotangent = cotangent.transpose(1, 2).contiguous()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(*dense_tensors, is_causal=causal, enable_gqa=grouped)  # pyright: ignore[reportArgumentType]

    def no_grad(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    found = {
        "dense forward": no_grad(dense),
        "dense both": lambda: torch.autograd.grad(dense(), dense_tensors, dense_cotangent),
    }
    for name in backends:
        forward, both = runners(name, tensors, cotangent, plan)
        found[f"{name} forward"], found[f"{name} both"] = watched(name, forward), watched(name, both)
    return found


def runners(
    name: str, tensors: list[torch.Tensor], cotangent: torch.Tensor, plan: LayoutPlan, **arguments: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward without gradients, and forward+backward, of one backend."""

    def sparse() -> torch.Tensor:
        return block_sparse_attention(*tensors, plan, backend=name, **arguments)  # pyright: ignore[reportCallIssue]

    return torch.no_grad()(sparse), lambda: torch.autograd.grad(sparse(), tensors, cotangent)


def flex_forward(tensors: list[torch.Tensor], layout: BlockLayout) -> Callable[[], Any] | None:
    """Compiled FlexAttention on the same blocks (forward only: it has no backward on CPU), or None if it cannot."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block, dense = layout.block_size[0], torch.from_numpy(layout.to_dense().copy())
    heads = tensors[0].shape[2]

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        active = dense[h if layout.heads > 1 else 0, q // block, k // block]
        return active & (q >= k) if layout.causal else active

    try:
        mask = create_block_mask(rule, 1, heads, *layout.seq_len, device="cpu", BLOCK_SIZE=block)
        torch._dynamo.reset()  # a second mask would compile with dynamic shapes, which its C++ template cannot
        run = torch.compile(flex_attention, dynamic=False)
        q, k, v = (x.detach().transpose(1, 2) for x in tensors)
        grouped = q.shape[1] != k.shape[1]

        @torch.no_grad()
        def forward() -> Any:
            return run(q, k, v, block_mask=mask, enable_gqa=grouped)

        forward()
    except Exception as error:
        print(f"  FlexAttention: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None
    return forward
