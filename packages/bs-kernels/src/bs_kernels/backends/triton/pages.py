"""From gradients per token of a sequence to those of the pages that hold the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._packing import add_rows_
from ..base import Call

__all__ = ["sum_pages"]


def sum_pages(call: Call, gradient: Tensor, pool: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of tokens in pages, which several batch elements may share; always in the same order.

    Tensor operations of static shape only, so nothing waits for the host.

    Args:
        call: the call, with a page table.
        gradient: float32 [B, Sk, Hkv, X]; zero where a token's block is not active.
        pool: [pages, block, Hkv, X].
        dtype: of the result.

    Returns:
        Shaped like ``pool``; zero where no active block is.
    """
    table, plan = call.page_table, call.plan
    assert table is not None
    pages, size = pool.shape[:2]
    summed = torch.zeros(pool.shape, dtype=gradient.dtype, device=pool.device)
    if summed.numel() == 0 or gradient.numel() == 0:
        return summed.to(dtype)
    token = torch.arange(gradient.shape[1], device=pool.device)
    block = torch.searchsorted(plan.kv_bounds[1:].to(torch.int64), token, right=True)
    page = table.to(torch.int64)[:, block].clamp(0, pages - 1)  # of blocks that are not active: adds zeros somewhere
    place = page * size + (token - plan.kv_bounds[block])
    add_rows_(summed.view(pages * size, -1), place.flatten(), gradient.flatten(0, 1).flatten(1))
    return summed.to(dtype)
