"""The plan of a dilated call: its pieces, each with the plan of its rows. Made from lengths alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from bs_patterns import BlockLayout

from ._arguments import check_flag
from ._dilated_pairs import count_pairs, listed_pairs
from ._dilated_pieces import Branch, Piece, branches_for_union, pieces_of, runs_left_out
from .plan import LayoutPlan
from .token_mask import TokenMask

__all__ = ["COMBINE", "DilatedPlan", "PlannedPiece", "Question", "SegmentLayout", "ask"]

COMBINE = ("softmax", "longnet", "union")

SegmentLayout = Callable[[int], BlockLayout]

#: Rows per block of a dense segment, at most.
_BLOCK = 128
_LIMIT = 2**30


class Question(NamedTuple):
    """What a plan depends on.

    Attributes:
        branches: segment lengths and rates, as given.
        q_range, kv_range: absolute positions ``[start, stop)``.
        heads: query heads.
        causal: whether keys after the query are masked.
        union: whether pairs of earlier branches are left out.
        layout: the layout inside segments, or None.
        device: where the plan lives.
    """

    branches: tuple[Branch, ...]
    q_range: tuple[int, int]
    kv_range: tuple[int, int]
    heads: int
    causal: bool
    union: bool
    layout: SegmentLayout | None
    device: torch.device


@dataclass(frozen=True, eq=False)
class PlannedPiece:
    """A piece, the plan of its rows, and the branches whose pairs it leaves out."""

    piece: Piece
    plan: LayoutPlan
    earlier: tuple[Branch, ...]

    @property
    def pairwise(self) -> bool:
        """Whether pairs are left out one by one, by a mask, rather than by blocks of the plan."""
        return bool(self.earlier) and runs_left_out(self.piece, self.earlier) is None


@dataclass(frozen=True, eq=False)
class DilatedPlan:
    """What `dilated_attention` does for one combination of lengths, on one device.

    A call makes its plan itself, from cached parts. Inside ``torch.compile(fullgraph=True)`` it cannot, and takes one
    that was made before.

    Attributes:
        question: what the plan was made for.
        branches: the pieces of every branch that is computed.
    """

    question: Question
    branches: tuple[tuple[PlannedPiece, ...], ...]

    @classmethod
    def build(
        cls,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        seq_len: int | tuple[int, int],
        heads: int,
        *,
        causal: bool = False,
        combine: str = "softmax",
        segment_layout: SegmentLayout | None = None,
        q_start: int | None = None,
        kv_start: int = 0,
        device: torch.device | str = "cpu",
    ) -> DilatedPlan:
        """Make the plan of a call.

        Args:
            segment_lengths, dilation_rates, causal, combine, segment_layout, q_start, kv_start: those of the call.
            seq_len: tokens, or ``(Sq, Sk)``.
            heads: query heads.
            device: where q is.

        Raises:
            TypeError, ValueError: as `dilated_attention`.
        """
        lengths = (seq_len, seq_len) if isinstance(seq_len, int) else tuple(seq_len)
        asked = ask(
            segment_lengths,
            dilation_rates,
            (lengths[0], lengths[1]),
            heads,
            causal=causal,
            combine=combine,
            segment_layout=segment_layout,
            q_start=q_start,
            kv_start=kv_start,
            device=torch.empty(0, device=device).device,  # "cuda" with its index, as tensors say it
        )
        return cls.answer(asked)

    @classmethod
    def answer(cls, asked: Question) -> DilatedPlan:
        """Make the plan that a question asks for."""
        branches = list(asked.branches)
        if asked.union:
            ends = (asked.q_range[1], asked.kv_range[1])
            negative = min(asked.q_range[0], asked.kv_range[0]) < 0
            branches = branches_for_union(branches, _LIMIT if negative else max(ends))
        planned = []
        for at, branch in enumerate(branches):
            earlier = tuple(branches[:at]) if asked.union else ()
            found = pieces_of(branch, asked.q_range, asked.kv_range, asked.heads)
            planned.append(tuple(PlannedPiece(piece, _plan_of(piece, earlier, asked), earlier) for piece in found))
        return cls(asked, tuple(planned))

    def pairs(self) -> list[int]:
        """How many (query, key) pairs each computed branch has, over all heads.

        Under "union", which leaves out branches that add nothing, a pair counts once; else once per branch.
        """
        dense = self.question.layout is None
        return [sum(count_pairs(p.piece, p.plan, p.earlier, dense) for p in branch) for branch in self.branches]

    def layout(self) -> BlockLayout:
        """The pairs of all branches, each once, as a layout of single tokens: for looking at short sequences."""
        asked, found = self.question, [np.empty((3, 0), np.int64)]
        for planned in (planned for branch in self.branches for planned in branch):
            for head, q, k in listed_pairs(planned.piece, planned.plan, planned.earlier):
                found.append(torch.stack((head, q - asked.q_range[0], k - asked.kv_range[0])).numpy())
        heads, rows, columns = np.concatenate(found, 1)
        lengths = (asked.q_range[1] - asked.q_range[0], asked.kv_range[1] - asked.kv_range[0])
        aligned = asked.causal and asked.q_range[1] == asked.kv_range[1]
        return BlockLayout.from_coo(
            heads, rows, columns, block_size=1, seq_len=lengths, heads=asked.heads, causal=aligned
        )

    def __repr__(self) -> str:
        asked = self.question
        return (
            f"DilatedPlan(branches={[tuple(branch) for branch in asked.branches]}, queries={asked.q_range}, "
            f"keys={asked.kv_range}, heads={asked.heads}, causal={asked.causal}, union={asked.union}, "
            f"device={str(asked.device)!r})"
        )


def _plan_of(piece: Piece, earlier: Sequence[Branch], asked: Question) -> LayoutPlan:
    """The plan of a piece's rows. Both sides are at the same place of their cells, so rows compare as tokens do."""
    rows = (piece.q.rows, piece.kv.rows)
    if asked.layout is not None:
        made = _made_by(asked.layout, piece, asked.causal)
    else:
        made = _dense(rows, (piece.q.first, piece.kv.first), runs_left_out(piece, earlier) or ())
    mask = TokenMask(asked.causal)
    return LayoutPlan.build(made, mask, asked.device, q_start=piece.q.first, kv_start=piece.kv.first)


@lru_cache(maxsize=256)
def _dense(rows: tuple[int, int], first: tuple[int, int], runs: tuple[int, ...]) -> BlockLayout:
    """All blocks, but for those whose query and key rows lie in one run of one of the given lengths."""
    if runs:
        size = math.gcd(*runs, *first)
        block = next(b for b in range(min(size, _BLOCK), 0, -1) if size % b == 0)
    else:
        block = min(_BLOCK, -(-max(rows) // 16) * 16)
    at = [f + np.arange(0, n, block) for f, n in zip(first, rows, strict=True)]
    active = np.ones((len(at[0]), len(at[1])), np.bool_)
    for run in runs:
        active &= (at[0] // run)[:, None] != at[1] // run
    return BlockLayout.from_dense(active[None], block_size=block, seq_len=rows)


def _made_by(layout: SegmentLayout, piece: Piece, causal: bool) -> BlockLayout:
    """The user's layout for the rows of a segment, cut to the piece's queries."""
    if piece.kv.first:
        raise ValueError(
            "segment_layout: expected keys from the start of their segment on, got keys from index "
            f"{piece.kv.start} of a segment of {piece.branch.length}"
        )
    rows = piece.kv.rows
    made = layout(rows)
    if not isinstance(made, BlockLayout):
        raise TypeError(f"segment_layout: expected it to return a BlockLayout, got {type(made).__name__}")
    if made.seq_len != (rows, rows):
        raise ValueError(f"segment_layout: expected a layout of ({rows}, {rows}) rows, got {made.seq_len}")
    if made.shape[0] != 1:
        raise ValueError(f"segment_layout: expected one layout for all heads, got {made.shape[0]} heads")
    first, last = piece.q.first, piece.q.first + piece.q.rows
    if made.causal and not causal:
        raise ValueError("segment_layout: expected layouts that are not causal without causal=True, got a causal one")
    if first == 0 and last == rows:
        return made
    if last > rows:
        raise ValueError(
            f"segment_layout: expected queries among the {rows} rows of the segment's keys, got rows {first} to {last}"
        )
    # The plan masks by position; a causal layout would drop keys with the rows that are cut away.
    plain = BlockLayout(made.block_size, made.seq_len, made.indptr, made.indices, False)
    return plain.rows_at(first, last)


# -- what a call asks for ----------------------------------------------------------------------------------------------


def ask(
    segment_lengths: Any,
    dilation_rates: Any,
    seq_len: tuple[int, int],
    heads: int,
    *,
    causal: Any,
    combine: Any,
    segment_layout: Any,
    q_start: Any,
    kv_start: Any,
    device: torch.device,
) -> Question:
    """Check the arguments that a plan depends on; see `dilated_attention`."""
    branches = tuple(_branches(segment_lengths, dilation_rates))
    check_flag("causal", causal)
    if not isinstance(combine, str):
        raise TypeError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
    if combine not in COMBINE:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
    if not (segment_layout is None or callable(segment_layout)):
        raise TypeError(f"segment_layout: expected a function of the number of rows, got {segment_layout!r}")
    if segment_layout is not None and combine == "union":
        raise ValueError("combine: expected 'softmax' or 'longnet' with segment_layout, got 'union'")
    kv_start = _position("kv_start", kv_start)
    q_start = kv_start + seq_len[1] - seq_len[0] if q_start is None else _position("q_start", q_start)
    return Question(
        branches,
        (q_start, q_start + seq_len[0]),
        (kv_start, kv_start + seq_len[1]),
        heads,
        causal,
        combine == "union",
        cast("SegmentLayout | None", segment_layout),
        device,
    )


def _branches(lengths: Any, rates: Any) -> list[Branch]:
    checked = [_integers(name, value) for name, value in (("segment_lengths", lengths), ("dilation_rates", rates))]
    if len(checked[0]) != len(checked[1]):
        raise ValueError(
            f"dilation_rates: expected one rate per segment length, got {len(checked[1])} rates for "
            f"{len(checked[0])} lengths"
        )
    return [Branch(length, rate) for length, rate in zip(*checked, strict=True)]


def _integers(name: str, values: Any) -> list[int]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"{name}: expected a sequence of integers ≥ 1, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one integer, got an empty sequence")
    for at, value in enumerate(values):
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}[{at}]: expected an integer ≥ 1, got {value!r}")
        if not 1 <= value <= _LIMIT:
            raise ValueError(f"{name}[{at}]: expected an integer from 1 to {_LIMIT}, got {value}")
    return [int(value) for value in values]


def _position(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer position, got {value!r}")
    if abs(value) > _LIMIT:
        raise ValueError(f"{name}: expected a position within ±{_LIMIT}, got {value}")
    return int(value)
