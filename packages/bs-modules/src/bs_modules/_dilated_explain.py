"""One call of `DilatedAttention` explained, branch by branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bs_kernels import BackendTable, DilatedPlan, explain_backends


@dataclass(frozen=True)
class BranchExplanation:
    """What one branch of a call would do.

    Args:
        segment_length: w, in tokens.
        dilation_rate: r.
        pairs: Query–key pairs that it computes, over all heads of one batch element.
        rows: Tokens that a head keeps in a segment, per group of segments of one size.
        backends: Every backend's answer, per group.
    """

    segment_length: int
    dilation_rate: int
    pairs: int
    rows: tuple[int, ...]
    backends: tuple[BackendTable, ...]


@dataclass(frozen=True)
class DilatedExplanation:
    """What one call would do; `print` shows it.

    Args:
        module: The module as it prints itself.
        chosen_because: Why the factory took this variant, if it made the module.
        density: Pairs computed / pairs allowed.
        branches: The branches that are computed ("union" leaves out those that add nothing).
        backend: The backend asked for.
    """

    module: str
    chosen_because: str | None
    density: float
    branches: tuple[BranchExplanation, ...]
    backend: str

    def __str__(self) -> str:
        lines = [
            self.module,
            f"chosen      {self.chosen_because or 'by its constructor'}",
            f"density     {self.density:.6g} (pairs computed / pairs allowed)",
        ]
        for branch in self.branches:
            lines += ["", f"branch      w={branch.segment_length}, r={branch.dilation_rate}: {branch.pairs:,} pairs"]
            for rows, table in zip(branch.rows, branch.backends, strict=True):
                chosen = table.selected if self.backend == "auto" else self.backend
                lines += [f"segments    of {rows:,} rows on {chosen!r}", str(table)]
        return "\n".join(lines)


def explain_dilated(
    module: Any, plan: DilatedPlan, tensors: tuple[Tensor, Tensor, Tensor], given: dict[str, Any]
) -> DilatedExplanation:
    """Puts an explanation together.

    Args:
        module: A `DilatedAttention`.
        plan: The plan of the call.
        tensors: q, k and v as the attention gets them.
        given: `key_padding_mask`, `segment_ids`, `attn_bias` (each or `None`), `dropout_p`.
    """
    branches, counts = [], plan.pairs()
    for pairs, planned in zip(counts, plan.branches, strict=True):
        if planned:
            tables = tuple(_ask(module, one, tensors, given) for one in planned)
            branch, rows = planned[0].piece.branch, tuple(one.piece.kv.rows for one in planned)
            branches.append(BranchExplanation(branch.length, branch.rate, pairs, rows, tables))
    queries, keys = (stop - start for start, stop in (plan.question.q_range, plan.question.kv_range))
    allowed = queries * (2 * keys - queries + 1) // 2 if plan.question.causal else queries * keys
    density = sum(counts) / (plan.question.heads * allowed)
    return DilatedExplanation(repr(module), module.chosen_because, density, tuple(branches), module.backend)


def _ask(module: Any, planned: Any, tensors: tuple[Tensor, Tensor, Tensor], given: dict[str, Any]) -> BackendTable:
    """The backends' answers for one piece, asked with tensors of its shapes that hold nothing."""
    piece = planned.piece
    batch, heads = tensors[0].shape[0] * piece.segments, tensors[0].shape[2]
    folded = piece.q.rate > 1  # heads are batch elements there
    operands = []
    for x, rows in zip(tensors, (piece.q, piece.kv, piece.kv), strict=True):
        like = x.new_empty(1).requires_grad_(x.requires_grad and torch.is_grad_enabled())
        shape = (batch * heads, rows.rows, 1) if folded else (batch, rows.rows, x.shape[2])
        operands.append(like.expand(*shape, x.shape[3]))
    q, k, v = operands
    missing = piece.kv.missing(q.device) if folded else None
    padded = given["key_padding_mask"] is not None or missing is not None
    bias = given["attn_bias"]
    if bias is None and (planned.pairwise or given["dropout_p"]):
        bias = torch.ones(1, dtype=torch.bool, device=q.device)
    ids = None
    if given["segment_ids"] is not None:
        zero = torch.zeros(1, dtype=torch.int32, device=q.device)
        ids = (zero.expand(q.shape[:2]), zero.expand(k.shape[:2]))
    if bias is not None:
        like = bias.new_empty(1)
        bias = like.requires_grad_(bias.requires_grad and torch.is_grad_enabled()).expand(1, 1, 1, 1)
    return explain_backends(
        q,
        k,
        v,
        planned.plan,
        key_padding_mask=torch.ones(1, dtype=torch.bool, device=q.device).expand(k.shape[:2]) if padded else None,
        segment_ids=ids,
        attn_bias=bias,
        scale=module.scale,
        deterministic=module.deterministic,
    )
