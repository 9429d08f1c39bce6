"""What a gate may choose from: per query block, the blocks it can read, those it must keep, and how many it keeps.

QB query blocks, KB key blocks, H 1 or the number of heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout, LocalWindow


@dataclass(frozen=True, eq=False)
class Room:
    """The choices of one pair of lengths, on a device.

    A causal query block starts at the absolute position p. Key blocks that end before the block of p are *readable*:
    the gate scores them. The block of p and any later one that the query block reaches are *kept* unread: scoring them
    would let the queries at p see keys after p. The blocks of a local window are kept, too.

    Attributes:
        readable: bool[H, QB, KB]; candidates that the gate scores.
        kept: bool[H, QB, KB]; always selected.
        budget: int64[H, QB]; blocks that each row keeps, those that must be kept included.
        least: int64[H, QB]; blocks that must be kept, at least 1 where a row has any.
        most: int64[H, QB]; with a learned density, the most a row keeps; else the budget.
        distance: [QB, KB]; log2(1 + |block of the row's position − key block|).
        slots: The largest of `most`.
        allowed: Allowed blocks per head.
        met: Sum of the budgets over heads and rows / (H · allowed).
        unread: bool[B, H, QB, KB]; of packed documents only: selected before the readable ones, nearest first. The
            room is then that of one batch: all but `distance` have a batch dimension.
        ceiling: Scores are at most this: −inf where there is nothing to read, else inf.
        floor: And at least this: inf where a block is kept, else −inf.
    """

    readable: Tensor
    kept: Tensor
    budget: Tensor
    least: Tensor
    most: Tensor
    distance: Tensor
    slots: int
    allowed: int
    met: float
    unread: Tensor | None = None
    ceiling: Tensor = field(init=False)
    floor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        inf = float("inf")
        object.__setattr__(self, "ceiling", torch.where(self.readable, inf, -inf))
        object.__setattr__(self, "floor", torch.where(self.kept, inf, -inf))


def make_room(
    seq_len: tuple[int, int],
    blocks: tuple[int, int],
    causal: bool,
    density: float,
    max_density: float | None,
    candidates: Callable[[tuple[int, int]], BlockLayout | None],
    device: torch.device,
    window_size: int | None = None,
    row_budget: str = "even",
) -> Room:
    """Solves the budgets on the host and puts the room on a device.

    Per head, `|Σ budget − max(density · allowed, Σ least)| ≤ 1/2`, unless there are fewer candidates than that: then
    all are taken and a warning says what was met. All rows have the same budget, or the same share of their candidates,
    as far as what they must keep and what they have allow. Causal queries that are the last of more keys (decoding with
    a cache) take the budgets that their positions have among as many queries as keys.

    Args:
        seq_len: `(Sq, Sk)` tokens; for causal ones the last query sees the last key.
        blocks: `(query, key)` tokens per block.
        causal: Whether queries see only keys up to their own position.
        density: Share of the allowed blocks to keep.
        max_density: Share that bounds a learned choice; `None` without one.
        candidates: Gives the blocks to choose from for some lengths; `None`: all allowed ones.
        device: Where the room lives.
        window_size: Tokens of the local window that is kept; `None` without one.
        row_budget: `"even"` or `"share"`.
    """
    q_len, k_len = seq_len
    decoding = causal and q_len < k_len
    lengths = (k_len, k_len) if decoding else seq_len
    first, readable, kept, own = _blocks(lengths, blocks, causal, window_size)
    allowed = int((readable | kept).sum())
    layout = candidates(lengths)
    readable = readable[None] if layout is None else readable & layout.to_dense()
    have = (readable | kept).sum(-1)
    least = np.maximum(kept.sum(-1), np.minimum(have, 1))
    budget, most = (
        np.stack([_fill(share * allowed, *row, row_budget == "even") for row in zip(least, have, strict=True)])
        for share in (density, max_density or density)
    )
    if layout is not None and (fewest := int(have.sum(-1).min())) < density * allowed - 0.5:
        warnings.warn(
            f"candidates: only {fewest} of {allowed} allowed blocks are candidates, so the density is "
            f"{fewest / allowed:.6g} and not {density:g}",
            stacklevel=2,
        )
    if decoding:
        whole_kept = kept
        first, last_readable, kept, own = _blocks(seq_len, blocks, causal, window_size)
        rows = first // blocks[0]
        readable = (readable | whole_kept)[:, rows] & last_readable
        have = (readable | kept).sum(-1)
        least = np.maximum(kept.sum(-1), np.minimum(have, 1))
        budget, most = (np.clip(of[:, rows], least, have) for of in (budget, most))
        allowed = int((last_readable | kept).sum())
    kept, least = np.broadcast_to(kept, readable.shape), np.broadcast_to(least, budget.shape)
    tensors = [torch.from_numpy(np.array(x)).to(device) for x in (readable, kept, budget, least, most)]
    distance = np.log2(1.0 + np.abs(own[:, None] - np.arange(readable.shape[-1]))).astype(np.float32)
    return Room(
        *tensors,
        distance=torch.from_numpy(distance).to(device),
        slots=int(most.max(initial=0)),
        allowed=allowed,
        met=float(budget.sum() / max(len(budget) * allowed, 1)),
    )


def _blocks(
    lengths: tuple[int, int], blocks: tuple[int, int], causal: bool, window_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First position of every row, readable and kept blocks `[QB, KB]`, and the block of every row's first position."""
    (q_len, k_len), (q_block, k_block) = lengths, blocks
    column = np.arange(-(-k_len // k_block))
    first = np.arange(0, q_len, q_block, dtype=np.int64) + (k_len - q_len if causal else 0)
    kept = np.zeros((len(first), len(column)), bool)
    if window_size is not None:
        kept |= LocalWindow(window_size).layout(lengths, block_size=blocks, causal=causal).to_dense()[0]
    if not causal:
        return first, ~kept, kept, np.minimum(first // k_block, len(column) - 1)
    last = np.minimum(first + q_block, k_len) - 1
    # Rows before the first key (more queries than keys) have negative positions and reach no block.
    own = np.maximum(first, 0) // k_block
    reached = column <= (last // k_block)[:, None]
    kept |= (column >= own[:, None]) & reached
    return first, reached & ~kept, kept, own


def _fill(target: float, least: np.ndarray, have: np.ndarray, even: bool) -> np.ndarray:
    """Integers between `least` and `have` that add up to `target` as nearly as that allows.

    They are alike if `even`, else in proportion to `have`.
    """
    wanted = np.full_like(have, have.max(initial=0)) if even else have
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        low, high = (low, share) if np.clip(share * wanted, least, have).sum() >= target else (share, high)
    # Rounding the running sum keeps every integer next to its real number, and the total within one half.
    running = np.floor(np.cumsum(np.clip(high * wanted, least, have)) + 0.5).astype(np.int64)
    return np.diff(running, prepend=0)
