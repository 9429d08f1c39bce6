"""Biases, masks and dropout of one chunk of score tiles, read only where blocks are active.

Scores of a chunk are viewed as ``[E, R, g, bq, n, bk]``: expansions, layout rows, query heads of the unit, query
tokens, key blocks of the row, key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..philox import keep_mask
from ..token_mask import UNBOUNDED
from ._chunks import Chunk, Schedule
from ._packing import pack_tokens
from .base import Call

__all__ = ["ChunkScores", "Frame"]

_NEG_INF = float("-inf")


class Frame:
    """What all chunks of one call share.

    Args:
        call: the inputs.
        schedule: the chunks of the call's plan.
        head_units: HU, the number of head units.
        group: query heads per unit.
    """

    def __init__(self, call: Call, schedule: Schedule, head_units: int, group: int) -> None:
        self.call, self.schedule, self.plan = call, schedule, call.plan
        self.head_units, self.group = head_units, group
        self.batch, self.kv_heads = call.q.shape[0], call.k.shape[2]
        plan = call.plan
        self.unit_heads = head_units if plan.heads == 1 else 1
        device = plan.device
        self.q_token = torch.arange(plan.block_size[0], device=device)
        self.k_token = torch.arange(plan.block_size[1], device=device)
        used = schedule.used
        self.k_begin, self.k_first = plan.kv_bounds[used].to(torch.int64), plan.kv_start[used].to(torch.int64)
        self.k_length = plan.kv_bounds.diff()[used].to(torch.int64)
        self.q_begin, self.q_first = plan.q_bounds.to(torch.int64), plan.q_start.to(torch.int64)

    @cached_property
    def masked_keys(self) -> Tensor | None:
        """bool[B, U, bk]: keys that padding masks, or None where it masks nothing."""
        mask = self.call.key_padding_mask
        if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
            return None
        return ~pack_tokens(mask, self.plan.kv_bounds, self.schedule.used, self.plan.block_size[1])

    @cached_property
    def q_segments(self) -> Tensor:
        """[B, QB, bq] segment ids of query tokens."""
        assert self.call.q_segments is not None
        every = torch.arange(self.plan.q_blocks, device=self.plan.device)
        return pack_tokens(self.call.q_segments, self.plan.q_bounds, every, self.plan.block_size[0])

    @cached_property
    def kv_segments(self) -> Tensor:
        """[B, U, bk] segment ids of key tokens."""
        assert self.call.kv_segments is not None
        return pack_tokens(self.call.kv_segments, self.plan.kv_bounds, self.schedule.used, self.plan.block_size[1])


@dataclass(frozen=True, eq=False)
class ChunkScores:
    """One chunk of one call: where its units lie, and what is done to its scores."""

    frame: Frame
    chunk: Chunk

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """``[E, R, g, bq, n, bk]``."""
        rows, n = self.chunk.blocks.shape
        block_q, block_k = self.frame.plan.block_size
        return self.chunk.expand[1] - self.chunk.expand[0], rows, self.frame.group, block_q, n, block_k

    # -- where the units lie: [E, R] each ------------------------------------------------------------------------------

    @cached_property
    def _expansion(self) -> Tensor:
        return torch.arange(*self.chunk.expand, device=self.frame.plan.device)[:, None]

    @cached_property
    def batch(self) -> Tensor:
        """Batch element of each unit."""
        plan = self.frame.plan
        if plan.batch > 1:
            return (self.chunk.rows // (plan.heads * plan.q_blocks)).expand(self.shape[:2])
        return (self._expansion // self.frame.unit_heads).expand(self.shape[:2])

    @cached_property
    def head_unit(self) -> Tensor:
        """Head unit of each unit."""
        plan = self.frame.plan
        if plan.heads > 1:
            return ((self.chunk.rows // plan.q_blocks) % plan.heads).expand(self.shape[:2])
        return (self._expansion % self.frame.unit_heads).expand(self.shape[:2])

    @cached_property
    def q_block(self) -> Tensor:
        """int64[R]; query block of each row."""
        return self.chunk.rows % self.frame.plan.q_blocks

    @cached_property
    def q_index(self) -> Tensor:
        """int64[E · R]; units in packed query tensors."""
        plan, units = self.frame.plan, self.frame.head_units
        return ((self.batch * units + self.head_unit) * plan.q_blocks + self.q_block).flatten()

    @cached_property
    def kv_index(self) -> Tensor:
        """int64[E · R · n]; blocks in packed key tensors."""
        per_kv_head = self.frame.head_units // self.frame.kv_heads
        head = self.batch * self.frame.kv_heads + self.head_unit // per_kv_head
        return (head[..., None] * self.frame.schedule.used.numel() + self.chunk.blocks).flatten()

    @cached_property
    def q_head(self) -> Tensor:
        """int64[E, R, g]; query heads of each unit."""
        group = self.frame.group
        return self.head_unit[..., None] * group + torch.arange(group, device=self.head_unit.device)

    # -- what is done to the scores
    # --------------------------------------------------------------------------------------

    @property
    def may_empty(self) -> bool:
        """Whether a query of this chunk can end up without keys."""
        call = self.frame.call
        return (
            self.chunk.cut > 0
            or self.frame.masked_keys is not None
            or call.q_segments is not None
            or call.attn_bias is not None
            or call.block_bias is not None
        )

    def apply_(self, scores: Tensor) -> None:
        """Add biases to scaled scores [units, g · bq, n · bk] and set masked ones to −inf, in place."""
        frame, call, chunk = self.frame, self.frame.call, self.chunk
        s = scores.view(self.shape)
        if call.block_bias is not None:
            s += self.block_bias_values(s.dtype)
        if call.attn_bias is not None:
            if call.attn_bias.dtype == torch.bool:
                s.masked_fill_(~call.attn_bias[self._attn_bias_index], _NEG_INF)
            else:
                s += self.attn_bias_values(s.dtype)
        if chunk.cut:
            s[..., chunk.blocks.shape[1] - chunk.cut :, :].masked_fill_(self._outside_band[None, :, None], _NEG_INF)
        if chunk.max_padding:
            repeats = torch.arange(chunk.max_padding, device=s.device) < chunk.padding[:, None]
            s[..., : chunk.max_padding, :].masked_fill_(repeats[None, :, None, None, :, None], _NEG_INF)
        if frame.masked_keys is not None:
            s.masked_fill_(frame.masked_keys[self.batch[..., None], chunk.blocks][:, :, None, None], _NEG_INF)
        if call.q_segments is not None:
            of_query = frame.q_segments[self.batch, self.q_block][:, :, None, :, None, None]
            of_key = frame.kv_segments[self.batch[..., None], chunk.blocks][:, :, None, None]
            s.masked_fill_(of_query != of_key, _NEG_INF)

    @property
    def _outside_band(self) -> Tensor:
        """bool[R, bq, cut, bk]; pairs of the trailing blocks that the positional mask drops or that do not exist."""
        frame = self.frame
        blocks = self.chunk.blocks[:, self.chunk.blocks.shape[1] - self.chunk.cut :]
        outside = (frame.k_token >= frame.k_length[blocks][..., None])[:, None]
        lo, hi = frame.plan.token_mask.band
        if (lo, hi) == (-UNBOUNDED, UNBOUNDED):
            return outside
        apart = (frame.k_first[blocks] - frame.q_first[self.q_block][:, None])[:, None, :, None]
        distance = apart.to(torch.int32) + (frame.k_token - frame.q_token[:, None]).to(torch.int32)[:, None, :]
        if hi < UNBOUNDED:
            outside = outside | (distance > hi)
        if lo > -UNBOUNDED:
            outside = outside | (distance < lo)
        return outside

    def keep(self) -> Tensor:
        """bool ``[E, R, g, bq, n, bk]``; which probabilities dropout keeps."""
        frame, call = self.frame, self.frame.call
        assert call.dropout_seed is not None
        query = frame.q_first[self.q_block][:, None] + frame.q_token
        key = frame.k_first[self.chunk.blocks][..., None] + frame.k_token
        return keep_mask(
            call.first_batch + self.batch[:, :, None, None, None, None],
            call.first_head + self.q_head[:, :, :, None, None, None],
            query[:, None, :, None, None],
            key[:, None, None],
            call.dropout_seed,
            call.dropout_p,
        )

    # -- biases and their gradients ------------------------------------------------------------------------------------

    def block_bias_values(self, dtype: torch.dtype) -> Tensor:
        """``block_bias`` of this chunk, broadcastable to ``[E, R, g, bq, n, bk]``."""
        assert self.frame.call.block_bias is not None
        return self.frame.call.block_bias[self._block_bias_index].to(dtype)[:, :, :, None, :, None]

    def attn_bias_values(self, dtype: torch.dtype) -> Tensor:
        """A floating ``attn_bias`` of this chunk, broadcastable to ``[E, R, g, bq, n, bk]``."""
        assert self.frame.call.attn_bias is not None
        return self.frame.call.attn_bias[self._attn_bias_index].to(dtype)

    def block_bias_gradient(self, dscores: Tensor) -> tuple[Tensor, Tensor]:
        """This chunk's part of the gradient of ``block_bias``: flat positions (may repeat) and values, 1-D."""
        assert self.frame.call.block_bias is not None
        return _flat(self._block_bias_index, self.frame.call.block_bias.shape, dscores.view(self.shape).sum((3, 5)))

    def attn_bias_gradient(self, dscores: Tensor) -> tuple[Tensor, Tensor]:
        """This chunk's part of the gradient of a floating ``attn_bias``, likewise."""
        assert self.frame.call.attn_bias is not None
        return _flat(self._attn_bias_index, self.frame.call.attn_bias.shape, dscores.view(self.shape))

    @cached_property
    def _block_bias_index(self) -> tuple[Tensor, ...]:
        """Indices into ``block_bias`` that broadcast to ``[E, R, g, n]``."""
        assert self.frame.call.block_bias is not None
        index = (self.batch[:, :, None, None], self.q_head[..., None], self.chunk.entries[:, None])
        return _collapse(index, self.frame.call.block_bias.shape)

    @cached_property
    def _attn_bias_index(self) -> tuple[Tensor, ...]:
        """Indices into ``attn_bias`` that broadcast to ``[E, R, g, bq, n, bk]``; missing tokens are clamped."""
        frame = self.frame
        assert frame.call.attn_bias is not None
        query = frame.q_begin[self.q_block][:, None] + frame.q_token
        key = frame.k_begin[self.chunk.blocks][..., None] + frame.k_token
        length_q, length_k = frame.plan.seq_len
        index = (
            self.batch[:, :, None, None, None, None],
            self.q_head[:, :, :, None, None, None],
            query.clamp(max=length_q - 1)[:, None, :, None, None],
            key.clamp(max=length_k - 1)[:, None, None],
        )
        return _collapse(index, frame.call.attn_bias.shape)


def _collapse(index: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
    """Point every index of a broadcast dimension (size 1) at 0, so that gathers stay as small as what they read."""
    rank = max(i.ndim for i in index)
    zero = torch.zeros((1,) * rank, dtype=torch.int64, device=index[0].device)
    return tuple(zero if size == 1 else i for i, size in zip(index, shape, strict=True))


def _flat(index: tuple[Tensor, ...], shape: torch.Size, values: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions in a tensor of ``shape`` and, 1-D, ``values`` summed over what ``index`` broadcasts."""
    flat: Tensor = index[0]
    for i, size in zip(index[1:], shape[1:], strict=True):
        flat = flat * size + i
    return flat.flatten(), values.sum_to_size(flat.shape).flatten()
