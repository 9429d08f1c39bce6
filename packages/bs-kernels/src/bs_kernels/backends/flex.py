"""The `flex` backend: torch's FlexAttention under a `BlockMask` that is built from the plan's lists.

No Python mask function is traced over all pairs: the lists of full and partial blocks are the plan's own. A mask
function decides inside partial blocks only (band, padding, segment ids, boolean bias), a score function adds a floating
bias and the bias of each block. On a GPU it is compiled, and trains. On a CPU a compiled FlexAttention returns no LSE,
so the unfused form runs, which makes all scores: for checking. torch refuses to differentiate that one.

The backward recomputes its forward and differentiates it. It is given an LSE and a δ that may belong to a larger
softmax (a ring, sinks), while FlexAttention starts from its own: with ``w = exp(own LSE − LSE)`` per query, dout is
scaled by w, and the gradient of the LSE makes up for what its Σ dout · out is not, ``Σ_d w dout · out − w δ``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._identities import join_sinks
from ..hardware import importable, nvidia_capability
from ..plan import LayoutPlan
from .base import Call, Gradients, Needs, Problem

__all__ = ["FlexBackend"]

#: Block sizes that every configuration of the compiled kernel divides.
_GPU_BLOCK = 128
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GPU_NARROWEST = 16
#: Where torch differentiates FlexAttention.
_WITH_BACKWARD = ("cuda",)
_NEG_INF = float("-inf")


class FlexBackend:
    """FlexAttention."""

    name = "flex"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        if problem.device not in ("cpu", "cuda"):
            return [f"it runs on CPUs and on CUDA and ROCm GPUs, not on {problem.device}"]
        refused = {
            "dropout by position": problem.dropout,
            "paged K/V": problem.paged,
            "gradient of attn_bias": problem.attn_bias_grad,
            "gradient of block_bias": problem.block_bias_grad,
        }
        reasons = [f"it has no {what}" for what, asked in refused.items() if asked]
        if problem.backward and problem.device not in _WITH_BACKWARD:
            reasons.append("torch's FlexAttention has no backward on CPUs")
        if problem.device == "cuda":
            if problem.dtype not in _GPU_DTYPES:
                reasons.append(f"on GPUs it has no {str(problem.dtype).removeprefix('torch.')}")
            if min(problem.head_dim, problem.value_dim) < _GPU_NARROWEST:
                narrow = min(problem.head_dim, problem.value_dim)
                reasons.append(f"on GPUs it has head dims from {_GPU_NARROWEST} on, not {narrow}")
            if any(size % _GPU_BLOCK for size in problem.block_size):
                reasons.append(f"on GPUs it has blocks of multiples of {_GPU_BLOCK} tokens, not {problem.block_size}")
            capability = nvidia_capability()
            if capability is not None and capability < (8, 0):
                reasons.append(f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
            if not importable("triton"):
                reasons.append("on GPUs it is compiled by Triton, which is not installed")
        return reasons

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        if call.q.numel() == 0:
            return call.nothing(out_dtype)
        places = _Places(call.plan)
        mask, active = _block_mask(call, places, backward=False)
        q, k, v = (x.detach().transpose(1, 2) for x in (call.q, call.k, call.v))
        rubbish = None
        if q.device.type == "cpu" and not bool(v.isfinite().all()):
            # The unfused form multiplies every value by its weight: 0 · NaN would reach every query.
            rubbish, v = ~v.isfinite(), torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0)
        out, lse = _run(call, q, k, v, mask, _score_mod(call, places))
        if rubbish is not None:
            out = out.masked_fill(_reached(rubbish, active, places, q.shape[1]), float("nan"))
        out = out.transpose(1, 2)
        if call.sinks is not None:
            out, lse = join_sinks(out, lse, call.sinks)
        return out.to(out_dtype).contiguous(), lse.contiguous()

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        if call.q.numel() == 0:
            return call.no_gradients(grad_dtype)
        places = _Places(call.plan)
        mask, _ = _block_mask(call, places, backward=True)
        with _differentiating():
            q, k, v = leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (call.q, call.k, call.v)]
            out, own = _run(call, q, k, v, mask, _score_mod(call, places))
        share = torch.where(own.detach() == _NEG_INF, 0.0, torch.exp(own.detach() - lse))
        do = (dout.transpose(1, 2).to(share.dtype) * share.unsqueeze(-1)).to(out.dtype)
        dlse = (do.to(share.dtype) * out.detach().to(share.dtype)).sum(-1) - share * delta
        with _differentiating():
            found = torch.autograd.grad((out, own), leaves, (do, dlse))
        return Gradients(*(x.transpose(1, 2).to(grad_dtype).contiguous() for x in found))


@contextmanager
def _differentiating() -> Iterator[None]:
    """Lets autograd record here, although the registered op runs its kernels below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _run(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Any, score_mod: Any) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv], and LSE [B, Hq, Sq] without sinks in the accumulation dtype."""
    with warnings.catch_warnings():  # on CPUs torch warns that this is the unfused form, which is meant
        warnings.simplefilter("ignore")
        out, lse = _attend(q.device.type)(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=call.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    return out, lse.to(call.accumulate_dtype)


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


def _block_mask(call: Call, places: _Places, backward: bool) -> tuple[Any, Tensor]:
    """FlexAttention's mask, for a backward with its transpose, and which blocks are active, bool[L, H, QB, KB]."""
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
        compute_q_blocks=backward,
    )
    return mask, active


def _lists(plan: LayoutPlan, partial: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Counts [L, H, QB] and padded key blocks [L, H, QB, KB] of partial and of full blocks, and which are active."""
    slot, row = _slots(plan)
    keys, cut = plan.indices[slot].to(torch.int64), partial[slot]
    shape, flat_rows = (plan.batch, plan.heads, plan.q_blocks), plan.row_begin.numel()
    active = torch.zeros(flat_rows, plan.kv_blocks, dtype=torch.bool, device=row.device)
    active[row, keys] = True
    found = []
    for chosen in (cut, ~cut):
        rows, columns = row[chosen], keys[chosen]
        number = torch.bincount(rows, minlength=flat_rows)
        place = torch.arange(rows.numel(), device=rows.device) - (number.cumsum(0) - number)[rows]
        indices = torch.zeros(flat_rows, plan.kv_blocks, dtype=torch.int32, device=rows.device)
        indices[rows, place] = columns.to(torch.int32)
        found.append((number.to(torch.int32).view(shape), indices.view(*shape, plan.kv_blocks)))
    return found[0], found[1], active.view(*shape, plan.kv_blocks)


def _slots(plan: LayoutPlan) -> tuple[Tensor, Tensor]:
    """int64[N] each: the slots of a plan in the order of rows, and the flat row of each."""
    begin, counts = plan.row_begin.flatten(), (plan.row_end - plan.row_begin).flatten().to(torch.int64)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return begin[row] + torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row], row


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


def _score_mod(call: Call, places: _Places) -> Callable[..., Tensor] | None:
    bias, by_block = call.attn_bias, call.block_bias
    if bias is not None and bias.dtype == torch.bool:
        bias = None
    if by_block is not None and not by_block.shape[-1]:
        by_block = None
    if bias is None and by_block is None:
        return None
    entries = None if by_block is None else _entries(call.plan)
    q_block, k_block = places.q_block, places.k_block

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, i), _at(bias, 3, j)]
        if by_block is not None and entries is not None:
            entry = entries[_at(entries, 0, b), _at(entries, 1, h), q_block[i], k_block[j]]
            score = score + by_block[_at(by_block, 0, b), _at(by_block, 1, h), entry]
        return score

    return biased


def _entries(plan: LayoutPlan) -> Tensor:
    """int64[L, H, QB, KB]; where ``block_bias`` has each active block, 0 elsewhere."""
    slot, row = _slots(plan)
    found = torch.zeros(plan.row_begin.numel(), plan.kv_blocks, dtype=torch.int64, device=row.device)
    found[row, plan.indices[slot].to(torch.int64)] = plan.entries[slot].to(torch.int64)
    return found.view(plan.batch, plan.heads, plan.q_blocks, plan.kv_blocks)


def _at(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """An index into a dimension that may be broadcast."""
    return index if x.shape[dim] > 1 else torch.zeros_like(index)
