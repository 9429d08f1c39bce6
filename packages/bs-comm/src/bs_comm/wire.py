"""What one rank packs, sends, receives and unpacks in each step: index lists, worked out once per plan.

A message is ``[K | V]``: all key rows, then all value rows, ``[batch, rows, head dim]`` each. A row is one (kv head,
token). Rows are ordered by token, then head, on both ends, so a message whose items are whole blocks of all heads *is*
the tensor ``[batch, tokens, heads, dim]`` and needs no unpacking.

Shape legend: B batch, S own key tokens, T tokens of an arrival, H kv heads, D head dim, R rows of a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_patterns import BlockLayout

from ._entries import block_tokens
from .plan import ExchangePlan

Int64 = NDArray[np.int64]


#: Narrow enough to need a scale for each row, which travels with it.
FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class RowSet:
    """The rows of one message within a ``[B, tokens, H, ·]`` tensor at one end.

    Attributes:
        peer: The rank at the other end.
        count: R, rows.
        index: ``int64[R]`` into ``tokens · H``, ascending and unique; None where the message holds all of them.
    """

    peer: int
    count: int
    index: Tensor | None

    def take(self, source: Tensor, out: Tensor) -> None:
        """Copy rows out of ``source[B, tokens, H, D]`` (contiguous) into ``out[B, R, D]``, casting if need be."""
        flat = source.flatten(1, 2)
        if self.index is None:
            out.copy_(flat)
        elif source.dtype == out.dtype:
            torch.index_select(flat, 1, self.index, out=out)
        else:
            out.copy_(flat.index_select(1, self.index))

    def take_scaled(self, source: Tensor, out: Tensor, scales: Tensor) -> None:
        """Like `take`, into float8 ``out[B, R, D]`` and ``scales[B, R]``: each row's largest element becomes 448."""
        flat = source.flatten(1, 2)
        picked = (flat if self.index is None else flat.index_select(1, self.index)).float()
        top = picked.abs().amax(-1)
        scales.copy_(torch.where(top > 0, top / _FLOAT8_MAX, 1.0))
        out.copy_(picked / scales[..., None])

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Write ``rows[B, R, D]`` to their places in ``into[B, tokens, H, D]``; other places become 0."""
        flat = into.flatten(1, 2)
        if self.index is None:
            flat.copy_(rows)
        else:
            flat.zero_().index_copy_(1, self.index, rows.to(into.dtype))

    def add(self, rows: Tensor, into: Tensor) -> None:
        """Add ``rows[B, R, D]`` to their places in ``into[B, tokens, H, D]``; no place twice, so the order is fixed."""
        flat = into.flatten(1, 2)
        if self.index is None:
            flat.add_(rows)
        else:
            flat.index_add_(1, self.index, rows.to(into.dtype))


@dataclass(frozen=True)
class StepWire:
    """One rank's part in one step of the way out; the way home runs it backwards.

    Attributes:
        step: From 1; 0 stands for the rank's own blocks, which do not travel.
        send: Rows of the own ``[B, S, H, ·]`` that go out, or None.
        receive: Rows of the arrival ``[B, T, H, ·]`` that come in, or None.
        blocks: ``int64[U]``, the key blocks of the arrival, ascending; a block that any head needs has a place.
        tokens: T.
        layout: Own query blocks × ``blocks``, not causal (positions decide that); None for a dense ring, or if empty.
    """

    step: int
    send: RowSet | None
    receive: RowSet | None
    blocks: Int64
    tokens: int
    layout: BlockLayout | None


def wires_of(plan: ExchangePlan, rank: int, device: torch.device) -> list[StepWire]:
    """Everything a rank does under a plan: step 0 first.

    Args:
        plan: A forward plan.
        rank: Whose view.
        device: Where index tensors live.
    """
    own = plan.kv_placement.blocks(rank, block_size=plan.block_size[1])
    layouts = _layouts_by_owner(plan, rank)
    tokens = block_tokens(plan.seq_len[1], plan.block_size[1])
    wires = [StepWire(0, None, None, own, int(tokens[own].sum()), layouts.get(rank, (None, own))[0])]
    for step in range(1, plan.num_steps + 1):
        pairs = plan.matching(step)
        to = pairs[pairs[:, 0] == rank, 1]
        source = pairs[pairs[:, 1] == rank, 0]
        send = receive = layout = None
        blocks = np.zeros(0, np.int64)
        if len(to):
            send = _rows(plan, plan.transfer(rank, int(to[0])), own, int(to[0]), device)
        if len(source):
            items = plan.transfer(int(source[0]), rank)
            layout, blocks = layouts.get(int(source[0]), (None, np.unique(items[1])))
            receive = _rows(plan, items, blocks, int(source[0]), device)
        wires.append(StepWire(step, send, receive, blocks, int(tokens[blocks].sum()), layout))
    return wires


def _rows(
    plan: ExchangePlan, items: tuple[Int64, Int64], blocks: Int64, peer: int, device: torch.device
) -> RowSet:  # fmt: skip
    """Places of (head, block) items in a tensor that holds ``blocks`` one after another."""
    heads, wanted = items
    size, heads_in_all = plan.block_size[1], plan.kv_heads
    # Every block but the last of the sequence is full, and that one is the last of any ascending list.
    offset = np.arange(size)
    token = (np.searchsorted(blocks, wanted) * size)[:, None] + offset
    real = wanted[:, None] * size + offset < plan.seq_len[1]
    flat = np.sort((token * heads_in_all + heads[:, None])[real])
    tokens = int(block_tokens(plan.seq_len[1], size)[blocks].sum())
    if len(flat) == tokens * heads_in_all:
        return RowSet(peer, len(flat), None)
    return RowSet(peer, len(flat), torch.from_numpy(flat).to(device))


def _layouts_by_owner(plan: ExchangePlan, rank: int) -> dict[int, tuple[BlockLayout | None, Int64]]:
    """The rank's rows of the layout, cut by who owns the key block: (layout over the blocks it reads, those blocks).

    For its own keys, the blocks are all it owns.
    """
    layout = plan.layout
    mine = plan.placement.blocks(rank, block_size=plan.block_size[0])
    if layout is None or not len(mine):
        return {}
    heads = layout.shape[0]
    counts = np.diff(layout.indptr, axis=1)[:, mine]
    starts = layout.indptr[:, :-1][:, mine]
    ends = np.cumsum(counts)
    entry = np.arange(int(counts.sum())) + np.repeat(starts.ravel() - ends + counts.ravel(), counts.ravel())
    column = layout.indices[entry]
    row = np.repeat(np.arange(heads * len(mine)), counts.ravel())
    key_owner = plan.kv_placement.owner_of_blocks(plan.block_size[1])
    owner = key_owner[column]
    queries = int(plan.placement.lengths[rank])
    tokens = block_tokens(plan.seq_len[1], plan.block_size[1])
    found: dict[int, tuple[BlockLayout | None, Int64]] = {}
    for peer in np.unique(owner).tolist():
        chosen = owner == peer
        blocks = np.flatnonzero(key_owner == rank) if peer == rank else np.unique(column[chosen]).astype(np.int64)
        per_row = np.bincount(row[chosen], minlength=heads * len(mine)).reshape(heads, len(mine))
        total = np.concatenate(([0], np.cumsum(per_row)))
        indptr = np.empty((heads, len(mine) + 1), np.int64)
        indptr[:, :-1] = total[:-1].reshape(heads, -1)
        indptr[:, -1] = total[len(mine) :: len(mine)]
        part = BlockLayout(
            plan.block_size,
            (queries, int(tokens[blocks].sum())),
            indptr,
            np.searchsorted(blocks, column[chosen]).astype(np.int32),
        )
        found[peer] = (part, blocks)
    return found
