"""Differentiable top-k: from scores to a layout per batch element, and the gate that training follows.

B batch, H heads of the layout, QB query blocks, KB key blocks, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bs_kernels import BatchedLayout, best_blocks

from ._gate_noise import uniform
from ._gate_room import Room

_UNREAD = 1e30  # what blocks that are picked by distance start from: far above any logit, and finite
_TAKEN_FIRST = 1e20  # between the two


@dataclass(frozen=True, eq=False)
class Selection:
    """What a gate chose for one batch.

    Attributes:
        layout: The blocks of every batch element and head.
        bias: `[B, H, QB, K]`, the `block_bias` of the attention: log gates with `gate="soft"`; with
            `"straight_through"` zeros whose gradient is that of the log gates, or `None` where no gradient is wanted.
        density: Active / allowed blocks, a scalar tensor.
        expected_density: The same with every gate at its probability, a differentiable scalar tensor; with a learned
            density only, else `None`.
    """

    layout: BatchedLayout
    bias: Tensor | None
    density: Tensor
    expected_density: Tensor | None = None


def logits_of(scores: Tensor, room: Room, temperature: Tensor, threshold: Tensor | None) -> Tensor:
    """What is compared: scores / temperature; with a learned density, how far a row's standardised score passes the
    head's threshold, / temperature. −inf where the gate may not read.

    Args:
        scores: `[B, H, QB, KB]`.
        room: Of the same lengths.
        temperature: A scalar.
        threshold: `[H]`, or `None` with a fixed density.
    """
    # A score that is not a number comes from input that is not: such a block is taken last, and poisons no row.
    scores = scores.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
    if threshold is not None:
        count = room.readable.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(room.readable, scores, 0).sum(-1, keepdim=True) / count
        centred = torch.where(room.readable, scores - mean, 0)
        deviation = (centred.square().sum(-1, keepdim=True) / count + 1e-6).sqrt()
        scores = centred / deviation - threshold.to(scores.dtype)[:, None, None]
    return torch.minimum(scores / temperature.to(scores.dtype), room.ceiling.to(scores.dtype))


def noisy(
    logits: Tensor, learn_density: bool, seed: Tensor | int, rows: Tensor | None = None, of: int | None = None
) -> Tensor:
    """Adds Gumbel noise, or with a learned density the logistic noise of a choice between keeping and dropping.

    Args:
        logits: `[..., QB, KB]`, or the `rows` of it.
        learn_density: Which of the two.
        seed: From `draw_seed`; noise is keyed by it and by the position of the pair.
        rows: int64 `[R]`, which query blocks the logits are of; `None`: all.
        of: QB, where there are `rows`.
    """
    sample = uniform(logits.shape, seed, logits.device, rows, of)
    sample = sample.logit() if learn_density else -(-sample.log()).log()
    return logits + sample.to(logits.dtype)


def select_blocks(
    logits: Tensor,
    room: Room,
    blocks: tuple[int, int],
    seq_len: tuple[int, int],
    causal: bool,
    *,
    soft: bool,
    learn_density: bool,
    dead: Tensor | None,
) -> Selection:
    """Takes every row's best blocks.

    The gate of a block is σ(u − t), where u is its logit and t lies halfway between the last block that the row takes
    and the first that it leaves (0 with a learned density). Blocks that must be kept, and rows that leave nothing, have
    gate 1.

    Args:
        logits: `[B, H, QB, KB]`, noise included.
        room: Of the same lengths.
        blocks: `(query, key)` tokens per block.
        seq_len: `(Sq, Sk)` tokens.
        causal: The layout's flag.
        soft: Whether the log gates are added in value too.
        learn_density: Whether a row takes what passes 0 instead of its budget.
        dead: bool `[B, KB]`, key blocks without a real token, which are taken last; or `None`.
    """
    if dead is not None:
        lowest = torch.finfo(logits.dtype).min
        logits = torch.where(dead[:, None, None, :] & room.readable, lowest, logits)
    ranked = torch.maximum(logits, room.floor.to(logits.dtype))
    if room.unread is not None:
        ranked = torch.where(room.unread, _UNREAD / (1 + room.distance.to(logits.dtype)), ranked)
    allowed, expected = max(room.allowed, 1), None
    if learn_density:
        forced = room.kept if room.unread is None else room.kept | room.unread
        counts = (((logits > 0) & room.readable) | forced).sum(-1)
        counts = torch.minimum(torch.maximum(counts, room.least), room.most)
        soft_count = torch.where(room.readable, logits.sigmoid(), 0).sum((2, 3)) + forced.sum((-2, -1))
        expected = soft_count.mean() / allowed
    else:
        counts = room.budget.expand(ranked.shape[:-1])
    indices = best_blocks(ranked, counts, room.slots)
    layout = BatchedLayout(indices, counts.contiguous(), blocks, seq_len, causal)
    density = counts.sum((0, 2)).to(logits.dtype).mean() / (allowed * logits.shape[0])
    bias = None
    if soft or (torch.is_grad_enabled() and logits.requires_grad):
        bias = _log_gates(ranked, indices, counts, learn_density)
        if not soft:
            bias = bias - bias.detach()
    return Selection(layout, bias, density, expected)


def _log_gates(ranked: Tensor, indices: Tensor, counts: Tensor, learn_density: bool) -> Tensor:
    """`[B, H, QB, K]` log σ(u − t) of the used slots; 0 elsewhere and for blocks that were not the gate's choice."""
    slots = indices.shape[-1]
    used, values = torch.arange(slots, device=ranked.device) < counts[..., None], ranked.gather(-1, indices)
    gated = used & torch.isfinite(values) & (values < _TAKEN_FIRST)
    middle = torch.zeros((), dtype=values.dtype, device=values.device)
    if not learn_density and slots:
        taken = torch.zeros(ranked.shape, dtype=torch.int8, device=ranked.device)
        taken = taken.scatter_add(-1, indices, used.to(torch.int8)) > 0  # unused slots may repeat an index
        first_left = ranked.masked_fill(taken, float("-inf")).amax(-1, keepdim=True)
        last_taken = values.masked_fill(~used, float("inf")).amin(-1, keepdim=True)
        both = torch.isfinite(first_left) & torch.isfinite(last_taken)
        gated = gated & both
        middle = torch.where(both, first_left + last_taken, 0) / 2
    return F.logsigmoid(torch.where(gated, values - middle, 0)).masked_fill(~gated, 0)
