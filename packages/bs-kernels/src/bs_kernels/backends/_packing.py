"""Head-major copies of Q, K and V in whole, zero-filled blocks, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..plan import LayoutPlan
from ._results import empty_result

__all__ = ["KeyBlocks", "QueryBlocks", "add_rows_", "pack_tokens"]


#: Makes uninitialised memory of a shape and dtype.
Allocator = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _allocate(empty: Allocator | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device) if empty is None else empty(shape, dtype)


def _is_regular(bounds: Tensor, block: int, tokens: int) -> bool:
    """Whether blocks lie at multiples of the block size (host read; small)."""
    blocks = bounds.numel() - 1
    regular = torch.arange(blocks + 1, dtype=bounds.dtype, device=bounds.device).mul_(block).clamp_(max=tokens)
    return bool(torch.equal(bounds, regular))


def _token_index(bounds: Tensor, blocks: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Token of every slot of ``blocks`` (clamped) and whether it exists: int64[n · block], bool[n · block]."""
    bounds = bounds.to(torch.int64)
    begin, end = bounds[blocks], bounds[blocks + 1]
    token = begin[:, None] + torch.arange(block, device=bounds.device)
    exists = token < end[:, None]
    return token.clamp(max=max(int(bounds[-1]) - 1, 0)).flatten(), exists.flatten()


def _copy_blocks(blocked: Tensor, tokens: Tensor, block: int, *, into_tokens: bool) -> None:
    """Copy between ``blocked`` [B, n, block, …] and ``tokens`` [B, S, …] (either may be strided and of any dtype)."""
    length = tokens.shape[1]
    whole = length // block
    rest = length - whole * block
    if whole:
        _copy(blocked[:, :whole], tokens[:, : whole * block].unflatten(1, (whole, block)), into_tokens)
    if rest:
        _copy(blocked[:, whole, :rest], tokens[:, whole * block :], into_tokens)


def _copy(blocked: Tensor, tokens: Tensor, into_tokens: bool) -> None:
    if into_tokens:
        tokens.copy_(blocked)
    else:
        blocked.copy_(tokens)


def gather_blocks(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy blocks out of a tensor of any strides, without a copy of all of it.

    Args:
        x: [n0, n1, n2, *block].
        index: int64[N] into its leading three dimensions, flattened.
        out: [N, *block].
    """
    steps = [torch.arange(n, device=x.device) * step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    begin = (steps[0][:, None, None] + steps[1][:, None] + steps[2]).flatten()
    last = sum((n - 1) * step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    # The blocks that begin at any element: index_select then reads those that begin at these.
    everywhere = x.as_strided((last + 1, *x.shape[3:]), (1, *x.stride()[3:]))
    torch.index_select(everywhere, 0, begin[index], out=out)


@dataclass(frozen=True)
class QueryBlocks:
    """Packs query-shaped tensors: [B, Sq, Hq, X] ↔ [B · HU · QB, group · block, X].

    Attributes:
        batch, head_units, group, blocks, block, tokens: sizes; ``Hq = head_units · group``.
        bounds: the plan's ``q_bounds`` if blocks are irregular, else None.
        order: int64[B · HU · QB]; the units in the order that they are packed in, or None for their own.
        device: of all tensors.
    """

    batch: int
    head_units: int
    group: int
    blocks: int
    block: int
    tokens: int
    bounds: Tensor | None
    order: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, plan: LayoutPlan, batch: int, head_units: int, group: int, order: Tensor | None = None) -> QueryBlocks:
        """The packing of a plan's queries."""
        block, tokens = plan.block_size[0], plan.seq_len[0]
        bounds = None if _is_regular(plan.q_bounds, block, tokens) else plan.q_bounds
        return cls(batch, head_units, group, plan.q_blocks, block, tokens, bounds, order, plan.device)

    def pack(self, x: Tensor, dtype: torch.dtype, empty: Allocator | None = None) -> Tensor:
        """[B, Sq, Hq, X] → [units, group · block, X], zeros where a block is short; without an order, differentiable.

        Args:
            x: the tensor.
            dtype: of the result.
            empty: makes the result's memory; None for fresh memory.
        """
        shape = (self.batch * self.head_units * self.blocks, self.group * self.block, x.shape[-1])
        if math.prod(shape) == 0:
            return _allocate(empty, shape, dtype, x.device)
        blocked = self._filled(x).unflatten(1, (self.blocks, self.block)).unflatten(3, (self.head_units, self.group))
        blocked = blocked.permute(0, 3, 1, 4, 2, 5)
        if self.order is None:
            return blocked.reshape(shape).to(dtype)
        packed = _allocate(empty, shape, x.dtype, x.device)
        gather_blocks(blocked, self.order, packed.view(-1, *blocked.shape[3:]))
        return packed if dtype == x.dtype else _allocate(empty, shape, dtype, x.device).copy_(packed)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back; contiguous."""
        shape = (self.batch, self.tokens, self.head_units * self.group, packed.shape[-1])
        if math.prod(shape) == 0:
            return packed.new_empty(shape, dtype=dtype)
        out = None if packed.requires_grad else empty_result(shape, packed.dtype, packed.device).flatten(0, 2)
        return torch.index_select(packed.flatten(0, 1), 0, self._row_of_token, out=out).view(shape).to(dtype)

    def pack_rows(self, x: Tensor, empty: Allocator | None = None) -> Tensor:
        """[B, Hq, Sq] → [units, group · block, 1] (LSE, delta)."""
        return self.pack(x.transpose(1, 2).unsqueeze(-1), x.dtype, empty)

    def unpack_rows(self, packed: Tensor) -> Tensor:
        """[units, group · block] → [B, Hq, Sq]."""
        return self.unpack(packed.unsqueeze(-1), packed.dtype).squeeze(-1).transpose(1, 2).contiguous()

    def _filled(self, x: Tensor) -> Tensor:
        """``x`` with as many tokens in every block: [B, QB · block, Hq, X]."""
        if self.bounds is None:
            missing = self.blocks * self.block - self.tokens
            return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        token, exists = self._tokens()
        return x.index_select(1, token).masked_fill(~exists[:, None, None], 0)

    @cached_property
    def _row_of_token(self) -> Tensor:
        """int64[B · Sq · Hq]; where the vectors of tokens are packed."""
        units = torch.arange(self.batch * self.head_units * self.blocks, device=self.device)
        place = units if self.order is None else torch.empty_like(units).index_copy_(0, self.order, units)
        first = place.view(self.batch, self.head_units, self.blocks).transpose(1, 2) * (self.group * self.block)
        row = torch.arange(self.group * self.block, device=self.device).view(self.group, self.block).T
        row = (first[:, :, None, :, None] + row[:, None]).flatten(1, 2)  # [B, QB · block, HU, group]
        row = row[:, : self.tokens] if self.bounds is None else row[:, self._tokens()[1]]
        return row.flatten()

    def _tokens(self) -> tuple[Tensor, Tensor]:
        assert self.bounds is not None
        return _token_index(self.bounds, torch.arange(self.blocks, device=self.device), self.block)


@dataclass(frozen=True)
class KeyBlocks:
    """Packs key-shaped tensors, used blocks only: [B, Sk, Hkv, X] or pages ↔ [B · Hkv · U, block, X].

    Attributes:
        plan: the plan.
        used: int64[U]; the key blocks to pack.
        batch, heads: B and Hkv.
        whole: whether all blocks are used and lie at multiples of the block size.
        page_table: int64[B, U] pages of the used blocks, or None.
        exists: bool[U, block]; which tokens of the used blocks exist.
    """

    plan: LayoutPlan
    used: Tensor
    batch: int
    heads: int
    whole: bool
    page_table: Tensor | None
    exists: Tensor

    @classmethod
    def of(cls, plan: LayoutPlan, used: Tensor, k: Tensor, batch: int, page_table: Tensor | None) -> KeyBlocks:
        """The packing of a plan's keys."""
        block, heads = plan.block_size[1], k.shape[2]
        whole = page_table is None and used.numel() == plan.kv_blocks
        whole = whole and _is_regular(plan.kv_bounds, block, plan.seq_len[1])
        lengths = plan.kv_bounds.diff()[used]
        exists = torch.arange(block, device=plan.device) < lengths[:, None]
        if page_table is not None:
            page_table = page_table[:, used].to(torch.int64)
            # A block that only another batch element uses may have no page here; active ones were checked.
            page_table = page_table.clamp(0, max(k.shape[0] - 1, 0))
        return cls(plan, used, batch, heads, whole, page_table, exists)

    def _views(self, packed: Tensor) -> Tensor:
        """``packed`` as [B, U, block, Hkv, X]."""
        shape = (self.batch, self.heads, self.used.numel(), self.plan.block_size[1], packed.shape[-1])
        return packed.view(shape).permute(0, 2, 3, 1, 4)

    def pack(self, x: Tensor, dtype: torch.dtype, empty: Allocator | None = None) -> Tensor:
        """[B, Sk, Hkv, X] or [pages, block, Hkv, X] → [B · Hkv · U, block, X], zeros where a block is short."""
        block, blocks = self.plan.block_size[1], self.used.numel()
        packed = _allocate(empty, (self.batch * self.heads * blocks, block, x.shape[-1]), dtype, x.device)
        if packed.numel() == 0:
            return packed
        if self.whole and self.plan.seq_len[1] % block:
            packed.zero_()
        view = self._views(packed)
        if self.whole:
            _copy_blocks(view, x, block, into_tokens=False)
            return packed
        if self.page_table is not None:
            view.copy_(x.index_select(0, self.page_table.flatten()).unflatten(0, (self.batch, blocks)))
        else:
            token, _ = _token_index(self.plan.kv_bounds, self.used, block)
            view.copy_(x.index_select(1, token).unflatten(1, (blocks, block)))
        packed.view(-1, blocks, block, x.shape[-1]).masked_fill_(~self.exists[..., None], 0)
        return packed

    def unpack(self, packed: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back, for gradients: shaped like ``like``, zero where nothing was packed, pages summed."""
        if self.whole:
            out = empty_result(like.shape, dtype, packed.device)
            if out.numel():
                _copy_blocks(self._views(packed), out, self.plan.block_size[1], into_tokens=True)
            return out
        out = torch.zeros(like.shape, dtype=packed.dtype, device=packed.device)
        if packed.numel() == 0:
            return out.to(dtype)
        view = self._views(packed)
        if self.page_table is not None:
            view = view.masked_fill(~self.exists[..., None, None], 0)
            add_rows_(out, self.page_table.flatten(), view.flatten(0, 1))
        else:
            token, exists = _token_index(self.plan.kv_bounds, self.used, self.plan.block_size[1])
            out.index_copy_(1, token[exists], view.flatten(1, 2)[:, exists])
        return out.to(dtype)


def add_rows_(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """``into[index[n]] += rows[n]`` with repeats, the same bits every time on any device."""
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)  # one index after the other
    else:
        into.index_put_((index,), rows, accumulate=True)  # sorts the indices first, where index_add_ uses atomics


def pack_tokens(x: Tensor, bounds: Tensor, blocks: Tensor, block: int) -> Tensor:
    """[B, S] → [B, n, block]: per-token values of some blocks; of tokens that do not exist, a neighbour's."""
    token, _ = _token_index(bounds, blocks, block)
    return x.index_select(1, token).unflatten(1, (blocks.numel(), block))
