"""Patterns made of patterns, and of a user's function.

Blocks and heads are those that `layout` is asked for; what a member alone would take as defaults does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .. import _check, _csr
from .._csr import Int64
from .._levels import Listed
from .._stages import Space, Stage, add_best, best_of_each, is_member
from ..density import Ranking
from ..layout import BlockLayout
from ..pattern import Pattern
from ..segments import LongNetSegments
from ._yielded import blocks_of

BlockFunction: TypeAlias = Callable[[int, int, int], Iterable[Any]]


@dataclass(frozen=True)
class PerHead(Pattern):
    """One pattern per head.

    Args:
        patterns: As many as there are heads.
    """

    patterns: Sequence[Pattern]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _patterns("patterns", self.patterns))

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        block_size: int | tuple[int, int] = 64,
        heads: int | None = None,
        causal: bool = False,
        density: float | None = None,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """As `Pattern.layout`; ``heads``, if given, is the number of patterns."""
        if heads is not None and _check.integer("heads", heads) != len(self.patterns):
            raise ValueError(f"heads: expected {len(self.patterns)}, the number of patterns, got {heads}")
        return self._make(seq_len, block_size, len(self.patterns), causal, density, candidates)

    def _differs_by_head(self) -> bool:
        return True

    def _ranking(self, space: Space, head: int) -> Ranking:
        return self.patterns[head]._ranking_of(space, head)


@dataclass(frozen=True)
class _Combination(Pattern):
    """Several patterns on one head."""

    patterns: Sequence[Pattern]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _patterns("patterns", self.patterns))
        for n, pattern in enumerate(self.patterns):
            if isinstance(pattern, PerHead):
                raise TypeError(f"patterns[{n}]: expected a pattern of one head, got {pattern!r}; put PerHead outside")

    def _differs_by_head(self) -> bool:
        return any(pattern._differs_by_head() for pattern in self.patterns)


@dataclass(frozen=True)
class Union(_Combination):
    """The blocks of any of the patterns, their ranks interleaved: everybody's first, everybody's second, …

    Args:
        patterns: At least one; the first wins ties.
    """

    def _ranking(self, space: Space, head: int) -> Ranking:
        members = tuple(pattern._ranking_of(space, head) for pattern in self.patterns)
        unbounded = next((member.unbounded for member in members if member.unbounded), None)
        closed = all(member.closed for member in members)
        return Ranking(space, (_Interleaved(members),), closed, unbounded)


@dataclass(frozen=True)
class Intersection(_Combination):
    """The blocks that are in the geometry of every pattern, ranked as in the first.

    There are no others: asking for a higher density raises.

    Args:
        patterns: At least one.
    """

    def _ranking(self, space: Space, head: int) -> Ranking:
        first, *others = (pattern._ranking_of(space, head) for pattern in self.patterns)
        keys = first.geometry_in_order()
        for other in others:
            keys = keys[np.isin(keys, other.geometry(), assume_unique=True)]
        return _listed(space, keys)


@dataclass(frozen=True)
class Difference(_Combination):
    """The blocks in the geometry of the first pattern and of no other, ranked as in the first.

    There are no others: asking for a higher density raises.

    Args:
        patterns: At least one.
    """

    def _ranking(self, space: Space, head: int) -> Ranking:
        first, *others = (pattern._ranking_of(space, head) for pattern in self.patterns)
        keys = first.geometry_in_order()
        for other in others:
            keys = keys[np.isin(keys, other.geometry(), assume_unique=True, invert=True)]
        return _listed(space, keys)


@dataclass(frozen=True)
class Custom(Pattern):
    """The blocks that a function yields, in priority order.

    There are no others: asking for a higher density raises. With a density, each row's yielded block nearest the
    diagonal comes first, as in every pattern.

    Args:
        fn: Called as ``fn(q_blocks, kv_blocks, head)``; yields any mix of

            - an integer: the whole diagonal that many key blocks from the main one (negative: earlier keys);
            - ``(row, columns)``: key blocks of one query block;
            - ``(rows, columns)``: pairs, as integers or integer arrays that broadcast.

            Repeats count once, at their first place; blocks that are not allowed (above the diagonal of a causal
            layout) and diagonals past the edge are left out; query or key blocks out of range are an error.
        per_head: Call the function once for each head of a layout with several heads; otherwise once, with head 0.

    Raises:
        TypeError: ``fn`` is not callable, or (from `layout`) yields something else.
        ValueError: (from `layout`) It yields blocks out of range, or fewer than the density asks for.
    """

    fn: BlockFunction
    per_head: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn: expected a function (q_blocks, kv_blocks, head) -> blocks, got {self.fn!r}")
        _check.boolean("per_head", self.per_head)

    def _differs_by_head(self) -> bool:
        return self.per_head

    def _ranking(self, space: Space, head: int) -> Ranking:
        return _listed(space, blocks_of(self.fn, space.grid, head))


def _patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a sequence of patterns, got {value!r}")
    patterns = tuple(value)
    for n, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"{name}[{n}]: expected a pattern, got {pattern!r}")
    if not patterns:
        raise ValueError(f"{name}: expected at least one pattern, got an empty sequence")
    return patterns


def _listed(space: Space, keys: Int64) -> Ranking:
    """The ranking of a list of blocks, best first."""
    return Ranking(space, (Listed(keys, np.arange(len(keys), dtype=np.int64)),), closed=True)


@dataclass(frozen=True)
class _Interleaved(Stage):
    """The geometries of several rankings, first of each, second of each, …"""

    members: tuple[Ranking, ...]

    def extend(self, space: Space, picked: Int64, count: int | None, trace: list[Int64] | None) -> Int64:
        if count is None and trace is None:
            for member in self.members:
                picked = _csr.union(picked, member.geometry())
            return picked
        keys, rank = [], []
        for n, member in enumerate(self.members):
            ordered = member.geometry_in_order(count)
            keys.append(ordered)
            rank.append(np.arange(len(ordered), dtype=np.int64) * len(self.members) + n)
        best, best_rank = best_of_each(np.concatenate(keys), np.concatenate(rank))
        new = ~is_member(best, picked)
        return add_best(picked, best[new], best_rank[new], count, trace)
