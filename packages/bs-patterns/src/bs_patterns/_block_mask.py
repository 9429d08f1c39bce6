"""FlexAttention's `BlockMask`; torch is imported when a mask is converted and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ._csr import Bool, Int64
from ._grid import Grid
from .layout import BlockLayout

if TYPE_CHECKING:
    from torch import Tensor, device
    from torch.nn.attention.flex_attention import BlockMask

#: Token pairs for which a mask_mod is evaluated at a time.
_CHUNK = 2**22


def build(layout: BlockLayout, where: device | str) -> BlockMask:
    """See `bs_patterns.to_block_mask`."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    active = layout.to_dense()
    head, row, column = layout.to_coo()
    full = np.zeros_like(active)
    whole = _whole(layout._grid, row, column)
    full[head[whole], row[whole], column[whole]] = True
    partial_count, partial_index = _ordered(active & ~full, where)
    full_count, full_index = _ordered(full, where)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=layout.block_size,
        mask_mod=_mask_mod(layout, torch.from_numpy(active).to(where)),
        seq_lengths=layout.seq_len,
    )


def _whole(grid: Grid, row: Int64, column: Int64) -> Bool:
    """Whether the token mask leaves a block whole: no end of a sequence and no later key inside."""
    (block_q, block_k), (len_q, len_k) = grid.block_size, grid.seq_len
    whole = ((row + 1) * block_q <= len_q) & ((column + 1) * block_k <= len_k)
    if grid.causal:
        whole &= (column + 1) * block_k - 1 <= row * block_q + grid.shift
    return whole


def _ordered(mask: Bool, where: device | str) -> tuple[Tensor, Tensor]:
    """int32 ``[1, heads, q_blocks]`` counts and ``[1, heads, q_blocks, kv_blocks]`` columns, the active ones first."""
    import torch

    columns = np.argsort(~mask, axis=-1, kind="stable").astype(np.int32)
    counts = mask.sum(axis=-1, dtype=np.int32)
    return torch.from_numpy(counts)[None].to(where), torch.from_numpy(columns)[None].to(where)


def _mask_mod(layout: BlockLayout, active: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    block_q, block_k = layout.block_size
    from torch import zeros_like

    shift, causal, shared = layout._grid.shift, layout.causal, layout.heads == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        del b
        head = zeros_like(h) if shared else h
        allowed = active[head, q_idx // block_q, kv_idx // block_k]
        return allowed & (q_idx + shift >= kv_idx) if causal else allowed

    return mask_mod


def read(block_mask: BlockMask, causal: bool | None, ignore_mask_mod: bool) -> BlockLayout:
    """See `bs_patterns.from_block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: expected a BlockMask, got {block_mask!r} ({type(block_mask).__name__})")
    if block_mask.kv_indices.dim() != 4:
        raise ValueError(f"block_mask: expected batch and head dimensions, got shape {list(block_mask.shape)}")
    partial = _entries(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = partial[:, :0]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _entries(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    block_size, seq_len = tuple(map(int, block_mask.BLOCK_SIZE)), tuple(map(int, block_mask.seq_lengths))
    if causal is None or not ignore_mask_mod:
        causal = _rule(block_mask, partial, full, causal)
    head, row, column = np.concatenate((partial, full), axis=1)
    return BlockLayout.from_coo(
        head, row, column,
        block_size=(block_size[0], block_size[1]), seq_len=(seq_len[0], seq_len[1]),
        heads=block_mask.kv_num_blocks.shape[1], causal=causal,
    )  # fmt: skip


def _entries(counts: Tensor, columns: Tensor) -> Int64:
    """int64 ``[3, n]``: (head, query block, key block) of the listed blocks, the same for every batch element."""
    count, column = counts.cpu().numpy(), columns.cpu().numpy()
    listed = np.arange(column.shape[-1]) < count[..., None]
    same = np.where(listed, column, -1)
    if (np.sort(same, axis=-1) != np.sort(same[:1], axis=-1)).any():
        raise ValueError(f"block_mask: expected equal batch elements, got {len(count)} that differ; convert each alone")
    head, row, place = np.nonzero(listed[0])
    return np.stack((head, row, column[0][head, row, place])).astype(np.int64)


def _rule(block_mask: BlockMask, partial: Int64, full: Int64, causal: bool | None) -> bool:
    """Whether `mask_mod` is the causal rule (True) or hides nothing (False) in the active blocks; an error if neither.

    Where both fit, because no active block reaches past its queries, the answer is False.
    """
    import torch

    (block_q, block_k), (len_q, len_k) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    shift = len_k - len_q
    open_, causal_ = causal is not True, causal is not False
    last_key = np.minimum((full[2] + 1) * block_k, len_k) - 1
    causal_ &= bool((last_key <= full[1] * block_q + shift).all())
    where = block_mask.kv_num_blocks.device
    entries = torch.from_numpy(partial).to(where)
    lines = max(1, _CHUNK // block_k)
    for begin in range(0, partial.shape[1] * block_q, lines):
        line = torch.arange(begin, min(begin + lines, partial.shape[1] * block_q), device=where)
        head, row, column = entries[:, line // block_q]
        query = row * block_q + line % block_q
        query, key = query[:, None].expand(-1, block_k), column[:, None] * block_k + torch.arange(block_k, device=where)
        inside = (query < len_q) & (key < len_k)
        head, query, key = head[:, None].expand(-1, block_k)[inside], query[inside], key[inside]
        for batch in range(block_mask.kv_num_blocks.shape[0]):
            seen = block_mask.mask_mod(torch.full_like(head, batch), head, query, key).expand_as(key)
            open_, causal_ = open_ and bool(seen.all()), causal_ and bool(torch.equal(seen, key <= query + shift))
        if not (open_ or causal_):
            break
    if open_:
        return False
    if causal_:
        return True
    expected = {None: "causal or without effect", True: "causal", False: "without effect"}[causal]
    raise ValueError(
        f"block_mask: expected a mask_mod that is {expected} in the active blocks, got another, which a layout cannot "
        "hold; ignore_mask_mod=True takes the blocks alone"
    )
