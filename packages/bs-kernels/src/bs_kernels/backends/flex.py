"""The `flex` backend: torch's FlexAttention under a `BlockMask` that is built from the plan's lists.

No Python mask function is traced over all pairs: the lists of full and partial blocks are the plan's own. A mask
function decides inside partial blocks only (band, padding, segment ids, boolean bias), a score function adds a floating
bias. On a GPU it is compiled. On a CPU a compiled FlexAttention returns no LSE, so the unfused form runs, which makes
all scores: for checking.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..plan import LayoutPlan
from .base import Call, Gradients, Needs, Problem

__all__ = ["FlexBackend"]

#: Block sizes that every configuration of the compiled kernel divides.
_GPU_BLOCK = 128
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NEG_INF = float("-inf")


class FlexBackend:
    """FlexAttention, forward only."""

    name = "flex"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        reasons = []
        if problem.device not in ("cpu", "cuda"):
            reasons.append(f"it runs on CPUs and on CUDA and ROCm GPUs, not on {problem.device}")
        if problem.backward and problem.device == "cpu":
            reasons.append("FlexAttention has no backward on CPUs")
        elif problem.backward:
            reasons.append("FlexAttention has no backward that starts from a saved LSE")
        refused = {
            "dropout by position": problem.dropout,
            "paged K/V": problem.paged,
            "block_bias": problem.block_bias,
        }
        reasons += [f"it has no {what}" for what, asked in refused.items() if asked]
        if problem.device == "cuda":
            if problem.dtype not in _GPU_DTYPES:
                reasons.append(f"on GPUs it has no {str(problem.dtype).removeprefix('torch.')}")
            if any(size % _GPU_BLOCK for size in problem.block_size):
                reasons.append(f"on GPUs it has blocks of multiples of {_GPU_BLOCK} tokens, not {problem.block_size}")
        return reasons

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        batch, len_q, heads, _ = call.q.shape
        if call.q.numel() == 0:
            out = call.q.new_zeros((batch, len_q, heads, call.v.shape[3]), dtype=out_dtype)
            return out, call.q.new_full((batch, heads, len_q), _NEG_INF, dtype=call.accumulate_dtype)
        places = _Places(call.plan)
        q, k, v = (x.detach().transpose(1, 2) for x in (call.q, call.k, call.v))
        mask, active = _block_mask(call, places)
        rubbish = None
        if q.device.type == "cpu" and not bool(v.isfinite().all()):
            # The unfused form multiplies every value by its weight: 0 · NaN would reach every query.
            rubbish, v = ~v.isfinite(), torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0)
        with warnings.catch_warnings():  # on CPUs torch warns that this is the unfused form, which is meant
            warnings.simplefilter("ignore")
            out, lse = _attend(call.q.device.type)(
                q,
                k,
                v,
                score_mod=_score_mod(call),
                block_mask=mask,
                scale=call.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        if rubbish is not None:
            out = out.masked_fill(_reached(rubbish, active, places, q.shape[1]), float("nan"))
        out, lse = out.transpose(1, 2), lse.to(call.accumulate_dtype)
        if call.sinks is not None:
            with_sinks = torch.logaddexp(lse, call.sinks.to(lse.dtype)[:, None])
            share = torch.where(lse == _NEG_INF, 0.0, torch.exp(lse - with_sinks))
            out, lse = out.to(lse.dtype) * share.transpose(1, 2).unsqueeze(-1), with_sinks
        return out.to(out_dtype).contiguous(), lse.contiguous()

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """Refused by `not_supported_reasons`."""
        raise NotImplementedError("flex: it has no backward")


@functools.cache
def _attend(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention with the LSE; imported, and compiled on GPUs, when first needed."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
        assert aux.lse is not None
        return out, aux.lse

    return attend if device == "cpu" else torch.compile(attend)


class _Places:
    """Block and absolute position of every token of a plan."""

    def __init__(self, plan: LayoutPlan) -> None:
        sides = []
        for bounds, start in ((plan.q_bounds, plan.q_start), (plan.kv_bounds, plan.kv_start)):
            block = torch.repeat_interleave(torch.arange(start.numel(), device=start.device), bounds.diff())
            token = torch.arange(block.numel(), device=start.device)
            sides.append((block, token - bounds[block] + start[block]))
        (self.q_block, self.q_at), (self.k_block, self.k_at) = sides

    def regular(self, plan: LayoutPlan) -> bool:
        """Whether blocks are where FlexAttention has them."""
        sides = zip((self.q_block, self.k_block), plan.block_size, strict=True)
        return all(
            torch.equal(block, torch.arange(block.numel(), device=block.device) // size) for block, size in sides
        )


def _reached(rubbish: Tensor, active: Tensor, places: _Places, heads: int) -> Tensor:
    """bool[B, Hq, Sq, Dv]; which outputs have an active block with rubbish [B, Hkv, Sk, Dv] in it."""
    seen = active[:, :, places.q_block][..., places.k_block].to(torch.float32)
    return seen @ rubbish.repeat_interleave(heads // rubbish.shape[1], 1).to(torch.float32) > 0


def _block_mask(call: Call, places: _Places) -> tuple[Any, Tensor]:
    """FlexAttention's mask, and which blocks are active, bool[L, H, QB, KB]."""
    from torch.nn.attention.flex_attention import BlockMask

    plan = call.plan
    kept_by_call = call.key_padding_mask is not None or call.q_segments is not None
    kept_by_call |= call.attn_bias is not None and call.attn_bias.dtype == torch.bool
    partial = torch.ones_like(plan.partial, dtype=torch.bool) if kept_by_call else plan.partial.bool()
    lists, (full_counts, full_indices), active = _lists(plan, partial)
    unfused = call.q.device.type == "cpu"
    if not unfused and not places.regular(plan):
        raise ValueError("backend: 'flex' needs blocks of one size, got a plan with bounds of its own")
    mask = BlockMask.from_kv_blocks(
        *lists,
        full_counts,
        full_indices,
        BLOCK_SIZE=plan.block_size,
        # The unfused form asks the mask function about every pair, so there it knows the blocks too.
        mask_mod=_mask_mod(call, places, active if unfused else None),
        seq_lengths=plan.seq_len,
        compute_q_blocks=False,
    )
    return mask, active


def _lists(plan: LayoutPlan, partial: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Counts [L, H, QB] and padded key blocks [L, H, QB, KB] of partial and of full blocks, and which are active."""
    begin, counts = plan.row_begin.flatten(), (plan.row_end - plan.row_begin).flatten().to(torch.int64)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    slot = begin[row] + torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys, cut = plan.indices[slot].to(torch.int64), partial[slot]
    shape = (plan.batch, plan.heads, plan.q_blocks)
    active = torch.zeros(counts.numel(), plan.kv_blocks, dtype=torch.bool, device=row.device)
    active[row, keys] = True
    found = []
    for chosen in (cut, ~cut):
        rows, columns = row[chosen], keys[chosen]
        number = torch.bincount(rows, minlength=counts.numel())
        place = torch.arange(rows.numel(), device=rows.device) - (number.cumsum(0) - number)[rows]
        indices = torch.zeros(counts.numel(), plan.kv_blocks, dtype=torch.int32, device=rows.device)
        indices[rows, place] = columns.to(torch.int32)
        found.append((number.to(torch.int32).view(shape), indices.view(*shape, plan.kv_blocks)))
    return found[0], found[1], active.view(*shape, plan.kv_blocks)


def _mask_mod(call: Call, places: _Places, active: Tensor | None) -> Callable[..., Tensor]:
    low, high = call.plan.token_mask.band
    q_at, k_at, q_block, k_block = places.q_at, places.k_at, places.q_block, places.k_block
    padding, q_ids, kv_ids = call.key_padding_mask, call.q_segments, call.kv_segments
    bias = call.attn_bias if call.attn_bias is not None and call.attn_bias.dtype == torch.bool else None

    def keeps(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = k_at[j] - q_at[i]
        kept = (distance >= low) & (distance <= high)
        if active is not None:
            kept = kept & active[_at(active, 0, b), _at(active, 1, h), q_block[i], k_block[j]]
        if padding is not None:
            kept = kept & padding[b, j]
        if q_ids is not None and kv_ids is not None:
            kept = kept & (q_ids[b, i] == kv_ids[b, j])
        if bias is not None:
            kept = kept & bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, i), _at(bias, 3, j)]
        return kept

    return keeps


def _score_mod(call: Call) -> Callable[..., Tensor] | None:
    bias = call.attn_bias
    if bias is None or bias.dtype == torch.bool:
        return None

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, i), _at(bias, 3, j)]

    return biased


def _at(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """An index into a dimension that may be broadcast."""
    return index if x.shape[dim] > 1 else torch.zeros_like(index)
