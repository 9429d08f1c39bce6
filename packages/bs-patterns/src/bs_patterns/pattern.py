"""What a pattern is: a rule that makes a layout for any length."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import numpy as np

from . import _check, _csr
from ._csr import Int64
from ._grid import Grid
from ._stages import Space
from .density import Ranking
from .layout import BlockLayout
from .segments import LongNetSegments


class Pattern(ABC):
    """A ranking of all allowed blocks, for any length. Subclasses are small frozen value objects."""

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        block_size: int | tuple[int, int] = 64,
        heads: int = 1,
        causal: bool = False,
        density: float | None = None,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """Make the layout of this pattern for one length.

        With ``density`` the layout is the prefix of the pattern's ranking with
        ``max(round(density · allowed), rows that have a block)`` blocks per head, so layouts nest as density grows;
        sizes in the geometry then only order. Without it the geometry alone decides.

        Args:
            seq_len: Tokens of the (query, key) sequence; an integer stands for both.
            block_size: Tokens per (query, key) block; an integer stands for both.
            heads: 1 for one layout shared by all heads; more for one layout per head, which differ if the pattern
                says so and are equal otherwise.
            causal: Whether to allow only blocks that hold a key ≤ query pair.
            density: Active / allowed blocks, in (0, 1].
            candidates: Pick only blocks that LongNet's segments admit. Density stays relative to all allowed blocks; if
                there are fewer candidates than asked, all are taken and a warning says what was met.

        Returns:
            The layout, in time and memory proportional to its size.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range, or the pattern cannot provide what is asked.
        """
        return self._make(seq_len, block_size, heads, causal, density, candidates)

    @abstractmethod
    def _ranking(self, space: Space, head: int) -> Ranking:
        """The ranking of one head's blocks."""

    def _differs_by_head(self) -> bool:
        """Whether `_ranking` depends on the head."""
        return False

    def _ranking_of(self, space: Space, head: int) -> Ranking:
        """`_ranking`, that of head 0 where heads do not differ."""
        return self._ranking(space, head if self._differs_by_head() else 0)

    def _make(
        self,
        seq_len: int | tuple[int, int],
        block_size: int | tuple[int, int],
        heads: int,
        causal: bool,
        density: float | None,
        candidates: LongNetSegments | None,
    ) -> BlockLayout:
        grid = Grid(
            _check.pair("block_size", block_size), _check.pair("seq_len", seq_len), _check.boolean("causal", causal)
        )
        heads = _check.integer("heads", heads)
        if density is not None:
            density = _check.density("density", density)
        if candidates is not None and not isinstance(candidates, LongNetSegments):
            raise TypeError(f"candidates: expected LongNetSegments or None, got {candidates!r}")
        space = Space(grid, candidates)
        rankings = [self._ranking(space, head) for head in range(heads if self._differs_by_head() else 1)]
        keys = _keys(rankings, density)
        repeats = heads // len(keys)
        parts = [_csr.csr_of(item, 1, *grid.shape) for item in keys] * repeats
        starts = np.cumsum([0] + [len(indices) for _, indices in parts[:-1]])
        indptr = np.concatenate([item + start for (item, _), start in zip(parts, starts, strict=True)])
        indices = parts[0][1] if len(parts) == 1 else np.concatenate([item for _, item in parts])
        return BlockLayout._trusted(grid, indptr, indices)


def _keys(rankings: list[Ranking], density: float | None) -> list[Int64]:
    """Per ranking, the ascending keys of its geometry, or of its prefix of the density."""
    if density is None:
        return [ranking.geometry() for ranking in rankings]
    targets = [ranking.target(density) for ranking in rankings]
    keys = [ranking.prefix(target) for ranking, target in zip(rankings, targets, strict=True)]
    short = [head for head, (item, target) in enumerate(zip(keys, targets, strict=True)) if len(item) < target]
    if short:
        ranking, met, target = rankings[short[0]], len(keys[short[0]]), targets[short[0]]
        allowed = int(ranking.space.grid.allowed.sum())
        if ranking.space.candidates is None:
            raise ValueError(
                f"density: expected at most {met / allowed:.6g}, the density of all {met} blocks that this pattern "
                f"yields, got {density} ({target} of {allowed} allowed blocks)"
            )
        warnings.warn(
            f"candidates: only {met} of {allowed} allowed blocks are candidates, so the layout has density "
            f"{met / allowed:.6g} and not {density}",
            stacklevel=4,
        )
    return keys
