"""Global tokens and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import _check
from .._levels import Columns, Rows
from .._stages import Space, Stage
from ..density import Ranking
from ..pattern import Pattern
from .local_window import window_stage


@dataclass(frozen=True)
class GlobalLocal(Pattern):
    """The blocks of the first ``global_tokens`` positions as columns, then as rows (unless causal), then a window.

    Args:
        global_tokens: Tokens that all queries see, and (unless causal) that see all keys; ≥ 1.
        window_size: Tokens of the local window, ≥ 1; as in `LocalWindow`.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, global attention.
    """

    global_tokens: int
    window_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_tokens", _check.integer("global_tokens", self.global_tokens))
        object.__setattr__(self, "window_size", _check.integer("window_size", self.window_size))

    def _ranking(self, space: Space, head: int) -> Ranking:
        grid = space.grid
        tokens = min(self.global_tokens, grid.seq_len[1])
        stages: list[Stage] = [Columns(np.arange(-(-tokens // grid.block_size[1]), dtype=np.int64))]
        if not grid.causal:
            first, last = grid.query_spans()
            stages.append(Rows(np.nonzero((last >= 0) & (first < tokens))[0]))
        return Ranking(space, (*stages, window_stage(self.window_size, space)))
