"""Which runs of queries attend to which runs of keys: what a dense kernel with variable lengths can be told.

A call is *dense per segment* where its tokens fall into runs of queries, each with one run of keys, such that a query
attends to exactly those keys of its run that the positional band keeps. Runs come from segment ids and key padding, or
from a layout that is block-diagonal; that the layout leaves out no block of a segment is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._derived import derived
from ..plan import LayoutPlan
from ..token_mask import UNBOUNDED
from .base import Call

__all__ = ["Segments", "Variable", "find_segments"]

Int64 = NDArray[np.int64]

_PADDING = -(2**40)  # a segment id that no call has
_LEAVES_OUT = "it computes layouts that are dense per segment, and this one leaves blocks of a segment out"
_SCATTERED = "it has segments that are runs of consecutive tokens, and here one id has several runs"


class Variable(NamedTuple):
    """Segments on a device, in the form that kernels for variable lengths take.

    Attributes:
        q_index, k_index: int64[T]; rows of the flattened [B · S, heads, dim] operands in the order of segments. None
            where that is all of them as they are.
        cu_q, cu_k: int32[N + 1]; where segments begin and end in that order.
        max_q, max_k: tokens of the longest one.
    """

    q_index: Tensor | None
    k_index: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of queries and the runs of keys that they attend to, in the order of the queries; none is empty.

    Attributes:
        batch: int64[N]; batch element of each segment.
        q_begin, q_end, k_begin, k_end: int64[N]; local tokens.
        sizes: ``(B, Sq, Sk)``.
        left, right: with queries and keys of a segment aligned at their last tokens, a key is kept from ``left`` tokens
            before the query to ``right`` after it; None for no bound.
    """

    batch: Int64
    q_begin: Int64
    q_end: Int64
    k_begin: Int64
    k_end: Int64
    sizes: tuple[int, int, int]
    left: int | None = None
    right: int | None = None

    @property
    def banded(self) -> bool:
        """Whether positions mask anything."""
        return self.left is not None or self.right is not None

    @cached_property
    def whole(self) -> bool:
        """Whether every batch element is one segment."""
        batch, len_q, len_k = self.sizes
        ends = np.stack((self.q_begin, self.k_begin, self.q_end, self.k_end))
        return len(self.batch) == batch and bool((ends == np.array([[0], [0], [len_q], [len_k]])).all())

    @cached_property
    def square(self) -> bool:
        """Whether every segment has as many queries as keys."""
        return bool((self.q_end - self.q_begin == self.k_end - self.k_begin).all())

    @cached_property
    def key_ranges(self) -> tuple[Tensor, Tensor]:
        """int64 first and one past the last key of every query, in the order of segments, counted in that order.

        Where every batch element is one segment: for the queries of one of them.
        """
        return self._ranges(self.q_end - self.q_begin, self.k_end - self.k_begin, self.left, self.right)

    @cached_property
    def query_ranges(self) -> tuple[Tensor, Tensor]:
        """The same for the queries of every key."""
        return self._ranges(self.k_end - self.k_begin, self.q_end - self.q_begin, self.right, self.left)

    def _ranges(self, rows: Int64, columns: Int64, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
        if self.whole:
            rows, columns = rows[:1], columns[:1]
        base = np.repeat(np.cumsum(columns) - columns, rows)
        aligned, columns = _expand(columns - rows, rows), np.repeat(columns, rows)  # the column that a row stands at
        first = np.zeros_like(columns) if left is None else np.clip(aligned - left, 0, columns)
        stop = columns if right is None else np.clip(aligned + right + 1, first, columns)
        return torch.from_numpy(base + first), torch.from_numpy(base + stop)

    @cached_property
    def without_keys(self) -> Tensor | None:
        """bool[B, Sq]; queries that attend to nothing. None where there are none."""
        batch, len_q, _ = self.sizes
        first, stop = self.key_ranges
        if self.whole:
            empty = (first == stop).expand(batch, -1)
        else:
            empty = torch.ones(batch * len_q, dtype=torch.bool)
            rows = _expand(self.batch * len_q + self.q_begin, self.q_end - self.q_begin)
            empty[torch.from_numpy(rows)] = first == stop
        return empty.reshape(batch, len_q) if bool(empty.any()) else None

    def on(self, device: torch.device) -> Variable:
        """The segments on a device."""
        sides = []
        for begin, end, size in (
            (self.q_begin, self.q_end, self.sizes[1]),
            (self.k_begin, self.k_end, self.sizes[2]),
        ):
            lengths = end - begin
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            index = _expand(self.batch * size + begin, lengths)
            whole = index.size == self.sizes[0] * size and bool((index == np.arange(index.size)).all())
            sides.append(
                (
                    None if whole else torch.from_numpy(index).to(device),
                    torch.from_numpy(offsets.astype(np.int32)).to(device),
                    int(lengths.max(initial=0)),
                )
            )
        (q_index, cu_q, max_q), (k_index, cu_k, max_k) = sides
        return Variable(q_index, k_index, cu_q, cu_k, max_q, max_k)


def _expand(begin: Int64, lengths: Int64) -> Int64:
    """``begin[n], begin[n] + 1, …``, ``lengths[n]`` numbers for every n."""
    ends = np.cumsum(lengths)
    return np.repeat(begin - (ends - lengths), lengths) + np.arange(ends[-1] if ends.size else 0)


def find_segments(call: Call) -> Segments | str:
    """The segments of a call, or why it is not dense per segment. On a GPU this waits for the device.

    Args:
        call: the inputs; its biases, sinks, dropout and pages play no part.
    """
    ids, padding = call.q_segments is not None, call.key_padding_mask is not None
    if not ids and not padding:
        # Whatever depends on the plan alone is worked out once for it.
        key = ("flash segments", call.q.shape[0], call.plan.token_mask.band)
        return derived(call.plan, key, lambda: _from_layout(call))
    batch, len_q = call.q.shape[:2]
    len_k = call.plan.seq_len[1]
    q_ids = call.q_segments if ids else torch.zeros(batch, len_q, dtype=torch.int32, device=call.q.device)
    k_ids = call.kv_segments if ids else torch.zeros(batch, len_k, dtype=torch.int32, device=call.q.device)
    assert q_ids is not None
    assert k_ids is not None
    k_ids = k_ids.to(torch.int64)
    if call.key_padding_mask is not None:
        k_ids = k_ids.masked_fill(~call.key_padding_mask, _PADDING)
    queries, keys = _runs(q_ids.to(torch.int64)), _runs(k_ids)
    keys = keys[:, keys[3] != _PADDING]
    labels = [runs[0] * 2**33 + runs[3] for runs in (queries, keys)]
    _, of_q, of_k = np.intersect1d(*map(np.unique, labels), assume_unique=True, return_indices=True)
    if any(np.isin(label, labels[1 - at]).sum() != len(of_q) for at, label in enumerate(labels)):
        return _SCATTERED
    first = [np.unique(label, return_index=True)[1] for label in labels]
    of_q, of_k = first[0][of_q], first[1][of_k]
    order = np.argsort(of_q)
    queries, keys = queries[:, of_q[order]], keys[:, of_k[order]]
    return _checked(call, Segments(queries[0], *queries[1:3], *keys[1:3], sizes=(batch, len_q, len_k)))


def _runs(ids: Tensor) -> Int64:
    """Runs of equal ids [B, S]: int64[4, runs], batch element, first token, one past the last, and id of each."""
    batch, length = ids.shape
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at = starts.flatten().nonzero().squeeze(1)
    begin, of = at.cpu().numpy(), ids.flatten()[at].cpu().numpy()
    end = np.append(begin[1:], batch * length)
    element = begin // max(length, 1)
    return np.stack((element, begin - element * length, end - element * length, of))


def _from_layout(call: Call) -> Segments | str:
    """Segments of a layout by itself: one per batch element, or those that its blocks fall into."""
    plan, batch = call.plan, call.q.shape[0]
    len_q, len_k = plan.seq_len
    if plan.dense_offset is None:
        return _checked(call, _diagonal(plan, batch))
    element, zero = np.arange(batch), np.zeros(batch, np.int64)
    return _checked(call, Segments(element, zero, zero + len_q, zero, zero + len_k, sizes=(batch, len_q, len_k)))


class _Cells(NamedTuple):
    """A plan's lists on the host.

    Attributes:
        listed: sorted int64[N]; ``flat row · KB + key block`` of every slot.
        q_bounds, k_bounds: int64; local token bounds of blocks.
        apart: the first key's position minus the first query's; None where positions have gaps.
    """

    listed: Int64
    q_bounds: Int64
    k_bounds: Int64
    apart: int | None

    @classmethod
    def of(cls, plan: LayoutPlan) -> _Cells:
        begin, end, indices, q_bounds, k_bounds, q_start, k_start = (
            x.cpu().numpy().astype(np.int64).ravel()
            for x in (
                plan.row_begin,
                plan.row_end,
                plan.indices,
                plan.q_bounds,
                plan.kv_bounds,
                plan.q_start,
                plan.kv_start,
            )
        )
        counts = end - begin
        rows = np.repeat(np.arange(counts.size), counts)
        listed = np.sort(rows * plan.kv_blocks + indices[_expand(begin, counts)])
        shifts = np.unique(q_start - q_bounds[:-1]), np.unique(k_start - k_bounds[:-1])
        apart = int(shifts[1][0] - shifts[0][0]) if all(len(shift) == 1 for shift in shifts) else None
        return cls(listed, q_bounds, k_bounds, apart)


def _cells(plan: LayoutPlan) -> _Cells:
    return derived(plan, ("flash cells",), lambda: _Cells.of(plan))


def _diagonal(plan: LayoutPlan, batch: int) -> Segments:
    """Cut the rows of a layout where no later row lists a key block that an earlier one reaches."""
    cells, key_blocks = _cells(plan), plan.kv_blocks
    shape = (plan.batch, plan.heads, plan.q_blocks)
    rows = np.arange(np.prod(shape, dtype=np.int64))
    first, stop = (np.searchsorted(cells.listed, (rows + more) * key_blocks) for more in (0, 1))
    padded = np.append(cells.listed, 0)
    lowest = np.where(first < stop, padded[first] - rows * key_blocks, key_blocks).reshape(shape).min(1)
    highest = np.where(first < stop, padded[stop - 1] - rows * key_blocks, -1).reshape(shape).max(1)
    found = []
    for at in range(plan.batch):
        reached = np.maximum.accumulate(highest[at])
        ahead = np.minimum.accumulate(lowest[at][::-1])[::-1]
        cut = np.flatnonzero(reached[:-1] < ahead[1:]) + 1
        begin, end = np.append(0, cut), np.append(cut, plan.q_blocks)
        keys = np.minimum.reduceat(lowest[at], begin), np.maximum.reduceat(highest[at], begin) + 1
        some = keys[0] < keys[1]
        found.append(np.stack((begin[some], end[some], keys[0][some], keys[1][some])))
    if plan.batch == 1:
        found = found * batch
    element = np.repeat(np.arange(len(found)), [runs.shape[1] for runs in found])
    q_begin, q_end, k_begin, k_end = np.concatenate(found, 1) if found else np.zeros((4, 0), np.int64)
    q, k = cells.q_bounds, cells.k_bounds
    return Segments(element, q[q_begin], q[q_end], k[k_begin], k[k_end], sizes=(batch, *plan.seq_len))


def _checked(call: Call, found: Segments) -> Segments | str:
    """The segments with their band, or why the layout or the band does not fit them."""
    plan, (lo, hi) = call.plan, call.plan.token_mask.band
    some = (found.q_begin < found.q_end) & (found.k_begin < found.k_end)
    parts = [x[some] for x in (found.batch, found.q_begin, found.q_end, found.k_begin, found.k_end)]
    _, _, q_end, _, k_end = parts
    banded = not plan.token_mask.is_trivial
    if plan.dense_offset is not None:
        apart = -plan.dense_offset
    else:
        apart = _cells(plan).apart
        if apart is None and banded:
            return "it has masks by position only where positions have no gaps"
        if not _covered(plan, parts, 0 if apart is None else apart):
            return _LEAVES_OUT
    if not banded or apart is None or not q_end.size:
        return Segments(*parts, sizes=found.sizes)
    ahead = np.unique(apart + k_end - q_end)
    if ahead.size > 1:
        return "it has masks by position only where every segment's last query and key are equally far apart"
    left = None if lo <= -UNBOUNDED else int(ahead[0]) - lo
    right = None if hi >= UNBOUNDED else hi - int(ahead[0])
    if min(left or 0, right or 0) < 0:
        return "it has masks by position only where they keep the key at the query's place, counted from the last ones"
    return Segments(*parts, sizes=found.sizes, left=left, right=right)


def _covered(plan: LayoutPlan, parts: list[Int64], apart: int) -> bool:
    """Whether every block that holds a pair of a segment which the band keeps is listed."""
    cells, (lo, hi) = _cells(plan), plan.token_mask.band
    batch, q_begin, q_end, k_begin, k_end = parts
    first = np.searchsorted(cells.q_bounds, q_begin, "right") - 1
    stop = np.searchsorted(cells.q_bounds, q_end - 1, "right")
    row = _expand(first, stop - first)  # every row of blocks of every segment
    of = np.repeat(np.arange(len(batch)), stop - first)
    queries = np.maximum(q_begin[of], cells.q_bounds[row]), np.minimum(q_end[of], cells.q_bounds[row + 1])
    keys = np.maximum(k_begin[of], queries[0] - apart + lo), np.minimum(k_end[of], queries[1] - apart + hi)
    some = (queries[0] < queries[1]) & (keys[0] < keys[1])
    row, of, keys = row[some], of[some], (keys[0][some], keys[1][some])
    low, high = (np.searchsorted(cells.k_bounds, x, "right") - 1 for x in (keys[0], keys[1] - 1))
    layout = batch[of] if plan.batch > 1 else np.zeros_like(of)
    flat = ((layout * plan.heads)[:, None] + np.arange(plan.heads)) * plan.q_blocks + row[:, None]
    begin = np.searchsorted(cells.listed, flat * plan.kv_blocks + low[:, None], "left")
    end = np.searchsorted(cells.listed, flat * plan.kv_blocks + high[:, None], "right")
    return bool((end - begin == (high - low + 1)[:, None]).all())
