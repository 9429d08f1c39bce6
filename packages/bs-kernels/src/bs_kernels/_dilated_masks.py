"""What a call says about single pairs, brought to the rows of a piece: ``attn_bias`` and dropout.

Shape legend: N segments of the piece, H query heads, n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dilated_pieces import Piece, positions_of
from .philox import keep_mask

__all__ = ["bias_of_rows", "dropout_mask"]

#: Pairs whose random words are computed at once: each takes some 64 bytes meanwhile.
_PAIRS_AT_ONCE = 1 << 22


def bias_of_rows(piece: Piece, bias: Tensor, q_start: int, kv_start: int) -> Tensor:
    """The piece's part of an ``attn_bias``.

    Args:
        piece: the piece.
        bias: [1, 1 or H, 1 or Sq, 1 or Sk].
        q_start, kv_start: absolute positions of the first tokens.

    Returns:
        [N, H, n, n] in the bias's dtype; differentiable.
    """
    heads = torch.arange(piece.q.heads, device=bias.device)[:, None, None]
    sides = []
    for rows, start, size in ((piece.q, q_start, bias.shape[2]), (piece.kv, kv_start, bias.shape[3])):
        at = positions_of(piece, rows, bias.device) - start
        sides.append(at.clamp(0, size - 1))  # rows without a token read anything; a broadcast dimension has index 0
    return bias[0][heads if bias.shape[1] > 1 else 0, sides[0][..., :, None], sides[1][..., None, :]]


def dropout_mask(piece: Piece, batch: int, seed: Tensor, dropout_p: float) -> Tensor:
    """Which pairs of the piece dropout keeps: bool[N, H, n, n], keyed by absolute positions as everywhere.

    Args:
        piece: the piece.
        batch: index of the batch element.
        seed: int64 scalar.
        dropout_p: probability of dropping.
    """
    q, k = (positions_of(piece, rows, seed.device) for rows in (piece.q, piece.kv))
    heads = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2]).flatten()
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    kept = torch.empty((*q.shape, k.shape[1]), dtype=torch.bool, device=q.device)
    step = max(1, _PAIRS_AT_ONCE // max(1, k.shape[1]))
    element = torch.full((), batch, device=q.device)
    for at in range(len(q)):
        for row in range(0, q.shape[1], step):
            queries = q[at, row : row + step, None]
            kept[at, row : row + step] = keep_mask(element, heads[at], queries, k[at], seed, dropout_p)
    return kept.unflatten(0, (piece.segments, piece.q.heads))
