"""Which pairs a piece computes: counted, and listed for looking at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ._dilated_pieces import Branch, Piece, overlap_mask, positions_of
from ._dilated_rows import KeptRows
from .plan import LayoutPlan

__all__ = ["count_pairs", "listed_pairs"]

_CPU = torch.device("cpu")


def count_pairs(piece: Piece, plan: LayoutPlan, earlier: tuple[Branch, ...], dense: bool) -> int:
    """Pairs of a piece over all heads.

    Args:
        piece, plan, earlier: of a `PlannedPiece`.
        dense: whether the segment has no layout of its own.
    """
    if not dense or earlier:
        return sum(int(mask.sum()) for _, _, mask in _masks(piece, plan, earlier))
    total = 0
    here, there = (_present(rows) for rows in (piece.q, piece.kv))
    q, k = (rows.indices(_CPU) for rows in (piece.q, piece.kv))
    for of_query, of_key, has_query, has_key in zip(q, k, here, there, strict=True):
        of_query, of_key = of_query[has_query], of_key[has_key]
        if plan.token_mask.causal:
            total += int(torch.searchsorted(of_key, of_query, right=True).sum())
        else:
            total += of_query.numel() * of_key.numel()
    return total * piece.segments


def listed_pairs(
    piece: Piece, plan: LayoutPlan, earlier: tuple[Branch, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Head, query position and key position of every pair, int64[n] each, segment by segment."""
    for q, k, mask in _masks(piece, plan, earlier):
        head, row, column = mask.nonzero(as_tuple=True)
        yield head, q[head, row], k[head, column]


def _masks(piece: Piece, plan: LayoutPlan, earlier: tuple[Branch, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per segment: positions of its query rows and key rows [H, n], and which pairs it has, bool[H, n, n]."""
    rows = torch.repeat_interleave(torch.arange(plan.q_blocks), (plan.row_end - plan.row_begin).cpu().flatten())
    blocks = torch.zeros(plan.q_blocks, plan.kv_blocks, dtype=torch.bool)
    blocks[rows, plan.indices.cpu().to(torch.int64)] = True
    mask = blocks.repeat_interleave(plan.q_bounds.cpu().diff(), 0).repeat_interleave(plan.kv_bounds.cpu().diff(), 1)
    for segment in range(piece.segment, piece.segment + piece.segments):
        one = replace(piece, segment=segment, segments=1)
        q, k = (positions_of(one, rows, _CPU)[0] for rows in (one.q, one.kv))
        pairs = mask & _present(one.q)[:, :, None] & _present(one.kv)[:, None, :]
        if plan.token_mask.causal:
            pairs = pairs & (k[:, None, :] <= q[:, :, None])
        keep = overlap_mask(one, earlier, _CPU)
        yield q, k, pairs if keep is None else pairs & keep[0]


def _present(rows: KeptRows) -> Tensor:
    """bool[H, n], True for rows that have a token."""
    missing = rows.missing(_CPU)
    return torch.ones(rows.heads, rows.rows, dtype=torch.bool) if missing is None else ~missing
