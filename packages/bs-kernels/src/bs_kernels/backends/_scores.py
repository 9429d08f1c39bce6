"""Biases, masks and dropout of one chunk of score tiles, read only where blocks are active.

Scores are viewed as ``[E, R, g, bq, n, bk]``; see `ChunkPlace`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..philox import keep_mask
from ._packing import pack_tokens
from ._places import ChunkPlace
from .base import Call

__all__ = ["ChunkScores", "Frame"]

_NEG_INF = float("-inf")


class Frame:
    """What all chunks of one call share.

    Args:
        call: the inputs.
        used: int64[U]; the key blocks that the schedule of the call's plan reads.
    """

    def __init__(self, call: Call, used: Tensor) -> None:
        self.call, self.plan, self.used = call, call.plan, used

    @cached_property
    def masked_keys(self) -> Tensor | None:
        """bool[B, U, bk]: keys that padding masks, or None where it masks nothing."""
        mask = self.call.key_padding_mask
        if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
            return None
        return ~pack_tokens(mask, self.plan.kv_bounds, self.used, self.plan.block_size[1])

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
        return pack_tokens(self.call.kv_segments, self.plan.kv_bounds, self.used, self.plan.block_size[1])


class ChunkScores:
    """What is done to the scores of one chunk of one call.

    Args:
        frame: what all chunks share.
        place: where the chunk's units lie.
    """

    def __init__(self, frame: Frame, place: ChunkPlace) -> None:
        self.frame, self.place = frame, place
        self.chunk, self.shape = place.chunk, place.shape

    def apply_(self, scores: Tensor, unit: float = 1.0) -> None:
        """Add biases to scaled scores [units, g · bq, n · bk] and set masked ones to −inf, in place.

        Args:
            scores: the scores, multiplied by ``unit``.
            unit: what biases are multiplied by, too.
        """
        frame, call, chunk, place = self.frame, self.frame.call, self.chunk, self.place
        s = scores.view(self.shape)
        if call.block_bias is not None:
            s.add_(self.block_bias_values(s.dtype), alpha=unit)
        if call.attn_bias is not None:
            if call.attn_bias.dtype == torch.bool:
                s.masked_fill_(~call.attn_bias[self._attn_bias_index], _NEG_INF)
            else:
                s.add_(self.attn_bias_values(s.dtype), alpha=unit)
        if chunk.cut:
            self._drop_outside_band_(s[..., self.shape[4] - chunk.cut :, :])
        if chunk.max_padding:
            s[..., : chunk.max_padding, :].masked_fill_(place.repeats, _NEG_INF)
        if frame.masked_keys is not None:
            s.masked_fill_(frame.masked_keys[place.batch[..., None], chunk.blocks][:, :, None, None], _NEG_INF)
        if call.q_segments is not None:
            of_query = frame.q_segments[place.batch, place.q_block][:, :, None, :, None, None]
            of_key = frame.kv_segments[place.batch[..., None], chunk.blocks][:, :, None, None]
            s.masked_fill_(of_query != of_key, _NEG_INF)

    def _drop_outside_band_(self, scores: Tensor) -> None:
        bits = self.place.band_bits if scores.dtype == torch.float32 else None
        if bits is None:
            scores.masked_fill_(self.place.outside_band, _NEG_INF)
        else:  # what masked_fill_ does one by one, many at once
            scores.view(torch.int32).bitwise_and_(bits[0]).bitwise_or_(bits[1])

    def keep(self) -> Tensor:
        """bool ``[E, R, g, bq, n, bk]``; which probabilities dropout keeps."""
        call, place = self.frame.call, self.place
        assert call.dropout_seed is not None
        return keep_mask(
            call.first_batch + place.batch[:, :, None, None, None, None],
            call.first_head + place.q_head[:, :, :, None, None, None],
            place.q_positions[:, None, :, None, None],
            place.k_positions[:, None, None],
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
        place = self.place
        index = (place.batch[:, :, None, None], place.q_head[..., None], self.chunk.entries[:, None])
        return _collapse(index, self.frame.call.block_bias.shape)

    @cached_property
    def _attn_bias_index(self) -> tuple[Tensor, ...]:
        """Indices into ``attn_bias`` that broadcast to ``[E, R, g, bq, n, bk]``; missing tokens are clamped."""
        assert self.frame.call.attn_bias is not None
        place, (length_q, length_k) = self.place, self.frame.plan.seq_len
        index = (
            place.batch[:, :, None, None, None, None],
            place.q_head[:, :, :, None, None, None],
            place.q_tokens.clamp(max=length_q - 1)[:, None, :, None, None],
            place.k_tokens.clamp(max=length_k - 1)[:, None, None],
        )
        return _collapse(index, self.frame.call.attn_bias.shape)


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
