"""Sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _check
from .._stages import Near, Space
from ..density import Ranking
from ..pattern import Pattern


@dataclass(frozen=True)
class LocalWindow(Pattern):
    """Every block that holds a token pair at distance ≤ window_size / 2; nearest first.

    In a causal layout the window is the last ``window_size`` keys, the query's own included.

    Args:
        window_size: Tokens, ≥ 1.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, sliding window attention.
    """

    window_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "window_size", _check.integer("window_size", self.window_size))

    def _ranking(self, space: Space, head: int) -> Ranking:
        return Ranking(space, (window_stage(self.window_size, space),))


def window_stage(window_size: int, space: Space) -> Near:
    """The blocks that a token window of this size touches."""
    return Near(window_size - 1 if space.grid.causal else window_size // 2)
