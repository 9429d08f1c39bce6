"""Which tokens each head keeps at a dilation rate, and how they move between token order and attention operands.

Shape legend: B batch, N segments, T tokens of a range, H query heads, F heads of a tensor (H, or H divided by a group),
n kept rows, X features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KeptRows"]


class _Run(NamedTuple):
    """Tokens ``[offset, offset + tokens)`` of a range: whole cells of ``rate`` tokens, or a part of one cell."""

    offset: int
    tokens: int
    whole: bool


@dataclass(frozen=True)
class KeptRows:
    """The tokens of a range that each query head keeps: one out of every cell of ``rate``.

    Row t of head h is the token at index ``t · rate + h mod rate`` of the segment. Rows run from the cell of the first
    token to the cell of the last one, for every head; where the range cuts a cell, a head whose token lies outside has
    a row without a token (`missing`).

    Attributes:
        start, stop: the range, as indices in the segment.
        rate: tokens per cell.
        heads: H.
    """

    start: int
    stop: int
    rate: int
    heads: int

    @property
    def first(self) -> int:
        """The first row, counted from the start of the segment."""
        return self.start // self.rate

    @property
    def rows(self) -> int:
        """n."""
        return -(-self.stop // self.rate) - self.first

    def runs(self) -> list[_Run]:
        """The range as at most three runs; each cut cell is one row, whole cells are one row each."""
        low, high = -(-self.start // self.rate), self.stop // self.rate
        if low > high:
            return [_Run(0, self.stop - self.start, False)]
        edges = (self.start, low * self.rate, high * self.rate, self.stop)
        runs = [_Run(a - self.start, b - a, n == 1) for n, (a, b) in enumerate(pairwise(edges))]
        return [run for run in runs if run.tokens]

    def missing(self, device: torch.device) -> Tensor | None:
        """bool[H, n], True for a row that has no token; None where every row has one."""
        if all(run.whole for run in self.runs()):
            return None
        index = self.indices(device)
        return (index < self.start) | (index >= self.stop)

    def indices(self, device: torch.device) -> Tensor:
        """int64[H, n]; each row's index in the segment, also where it lies outside the range."""
        rows = torch.arange(self.first, self.first + self.rows, device=device) * self.rate
        return rows + (torch.arange(self.heads, device=device) % self.rate)[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """The kept rows of [B, N, T, F, X] as [B · N · H, n, 1, X]; query head h reads head ``h // (H / F)``.

        At rate 1 nothing is gathered and heads stay: [B · N, T, F, X].
        """
        if self.rate == 1:
            return x.flatten(0, 1)
        parts = [self._gather_run(x[:, :, run.offset : run.offset + run.tokens], run) for run in self.runs()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 3)).flatten(0, 2).unsqueeze(2)

    def _gather_run(self, x: Tensor, run: _Run) -> Tensor:
        group = self.heads // x.shape[3]
        cell = self.rate if run.whole else run.tokens
        cells = x.unflatten(2, (run.tokens // cell, cell)).flatten(3, 4).transpose(2, 3)  # [B, N, cell · F, cells, X]
        index = self._places(run, x.device) * x.shape[3] + torch.arange(self.heads, device=x.device) // group
        if group == 1 or not x.is_floating_point():
            return cells.index_select(2, index)
        # One selection per member of a group: no index twice, so that the gradient is a sum in a fixed order.
        members = [cells.index_select(2, index[member::group]) for member in range(group)]
        return torch.stack(members, 3).flatten(2, 3)

    def _places(self, run: _Run, device: torch.device) -> Tensor:
        """int64[H]; where in its cell each head's token is, clamped into a cut cell."""
        place = torch.arange(self.heads, device=device) % self.rate
        if run.whole:
            return place
        return (place - (self.start + run.offset) % self.rate).clamp(0, run.tokens - 1)

    def _inside(self, run: _Run) -> list[int]:
        """The heads whose token is in a run."""
        begin = (self.start + run.offset) % self.rate
        return [h for h in range(self.heads) if run.whole or begin <= h % self.rate < begin + run.tokens]

    def scatter(self, x: Tensor, folded: tuple[int, int], fill: float) -> Tensor:
        """The inverse of `gather` for F = H: [B, N, T, H, X], ``fill`` where a head keeps nothing.

        Args:
            x: shaped like a result of `gather`.
            folded: ``(B, N)``.
            fill: value of the tokens that are not kept.
        """
        if self.rate == 1:
            return x.unflatten(0, folded)
        kept = x.squeeze(2).unflatten(0, (*folded, self.heads))
        parts, row = [], 0
        for run in self.runs():
            rows = run.tokens // self.rate if run.whole else 1
            parts.append(self._scatter_run(kept[:, :, :, row : row + rows], run, fill))
            row += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _scatter_run(self, kept: Tensor, run: _Run, fill: float) -> Tensor:
        batch, segments, heads, rows, features = kept.shape
        inside = self._inside(run)
        index = self._places(run, kept.device) * heads + torch.arange(heads, device=kept.device)
        if len(inside) < heads:
            chosen = torch.tensor(inside, dtype=torch.int64, device=kept.device)
            index, kept = index[chosen], kept.index_select(2, chosen)
        tokens = kept.new_full((batch, segments, rows, run.tokens // rows * heads, features), fill)
        tokens = tokens.index_copy(3, index, kept.transpose(2, 3))
        return tokens.view(batch, segments, run.tokens, heads, features)
