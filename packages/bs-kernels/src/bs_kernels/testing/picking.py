"""The definition of `bs_kernels.best_blocks`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["dense_best_blocks"]


def dense_best_blocks(scores: Tensor, counts: Tensor, slots: int) -> Tensor:
    """What `best_blocks` gives, row by row.

    Args:
        scores, counts, slots: those of `best_blocks`.

    Returns:
        int64 [B, H, QB, K].
    """
    columns = scores.shape[-1]
    picked = torch.full((*counts.shape, slots), columns - 1)
    for at in np.ndindex(*counts.shape):
        values = [math.inf if math.isnan(x) else x for x in scores[at].tolist()]
        nan = scores[at].isnan().tolist()
        falling = sorted(range(columns), key=lambda j, of=values, odd=nan: (not odd[j], -of[j], j))
        best = sorted(falling[: max(0, min(int(counts[at]), slots))])
        picked[at][: len(best)] = torch.tensor(best, dtype=torch.int64)
    return picked
