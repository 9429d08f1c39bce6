"""Search for a placement with equal tokens, near-equal work and little traffic.

Consecutive blocks are joined into chunks, the chunks are dealt out heaviest first to the least loaded rank, and pairs
of chunks are swapped while that brings queries closer to their keys. This is done for several chunk sizes: small chunks
balance better, large ones move less. The counts are integers, so every machine finds the same placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._check import positive
from ._entries import block_tokens, first_alike, readers, resolve_kv_heads

if TYPE_CHECKING:
    from bs_patterns import BlockLayout

Int64 = NDArray[np.int64]

#: Chunks per rank that are tried, as long as there are at most `CHUNK_LIMIT` chunks.
CHUNKS_PER_RANK = (1, 2, 4, 8, 16)
CHUNK_LIMIT = 1024
#: Rounds of rank-disjoint swaps.
SWAP_ROUNDS = 100


def balanced_owner(
    layout: BlockLayout,
    world_size: int,
    unit: int,
    rules: Sequence[NDArray[np.integer]],
    *,
    kv_heads: int | None = None,
    tolerance: float = 0.05,
) -> NDArray[np.integer]:
    """Owner of every ``unit`` tokens; see `Placement.cost_balanced`.

    Args:
        layout: Queries and keys of one length.
        world_size: Number of ranks.
        unit: Tokens per unit, a common multiple of the layout's block sizes.
        rules: Owners that simple rules give: candidates too.
        kv_heads: As in `resolve_kv_heads`.
        tolerance: Accepted relative excess of the busiest rank.
    """
    tolerance = positive("tolerance", tolerance, zero=True)
    _, groups = resolve_kv_heads(layout, kv_heads)
    kinds = Counter(first_alike(layout, groups))
    work = _unit_work(layout, unit)
    limit = int((1 + tolerance) * work.sum() / world_size)
    candidates = list(rules)
    for per_rank in CHUNKS_PER_RANK:
        chunks = per_rank * world_size
        if per_rank > 1 and chunks > min(len(work), CHUNK_LIMIT):
            break
        candidates.append(_deal(layout, groups, kinds, work, world_size, unit, chunks, limit))
        if _busiest(candidates[-1], work, world_size) <= limit:
            break  # Finer chunks of neighbours move more.
    if len(work) <= CHUNK_LIMIT:  # Where keys are far from their queries, single units may find them.
        candidates.append(_deal(layout, groups, kinds, work, world_size, unit, len(work), limit))
    busiest = [max(limit, _busiest(owner, work, world_size)) for owner in candidates]
    best = [owner for owner, most in zip(candidates, busiest, strict=True) if most == min(busiest)]
    if len(best) == 1:
        return best[0]
    return min(best, key=lambda owner: _moved(layout, groups, kinds, owner, world_size, unit))


def _busiest(owner: NDArray[np.integer], work: Int64, world_size: int) -> int:
    return int(np.bincount(owner, work, world_size).max())


def _unit_work(layout: BlockLayout, unit: int) -> Int64:
    """Query tokens times active key blocks, per unit of the sequence."""
    per_row = np.diff(layout.indptr, axis=1).sum(0) * block_tokens(layout.seq_len[0], layout.block_size[0])
    return np.add.reduceat(per_row, np.arange(0, len(per_row), unit // layout.block_size[0]))


def _moved(
    layout: BlockLayout, groups: int, kinds: Counter[int], owner: NDArray[np.integer], world_size: int, unit: int
) -> int:
    """(head group, key block) pairs that some rank reads and does not own, counted once per reading rank."""
    row_owner = np.repeat(owner, unit // layout.block_size[0])[: layout.shape[1]]
    column_owner = np.repeat(owner, unit // layout.block_size[1])[: layout.shape[2]]
    moved = 0
    for group, times in kinds.items():
        read = readers(layout, group, groups, row_owner, world_size) > 0
        moved += times * (int(read.sum()) - int(read[column_owner, np.arange(len(column_owner))].sum()))
    return moved


def _deal(
    layout: BlockLayout,
    groups: int,
    kinds: Counter[int],
    work: Int64,
    world_size: int,
    unit: int,
    chunks: int,
    limit: int,
) -> NDArray[np.integer]:
    """Deal ``chunks`` consecutive chunks out by work, then swap for affinity; the same number of units for all ± 1."""
    chunks = min(chunks, len(work))
    sizes = len(work) // chunks + (np.arange(chunks) < len(work) % chunks)
    starts = np.cumsum(sizes) - sizes
    load = np.add.reduceat(work, starts)
    owner = np.empty(chunks, np.int64)
    taken = np.zeros(world_size, np.int64)
    share = np.zeros(world_size, np.int64)
    quota = chunks // world_size + (np.arange(world_size) < chunks % world_size)
    for size in np.unique(sizes)[::-1]:
        todo = np.flatnonzero(sizes == size)
        todo = todo[np.argsort(-load[todo], kind="stable")]
        while len(todo):
            # Ranks furthest from their quota take part, the least loaded one gets the heaviest chunk.
            slots = quota - share
            ranks = np.flatnonzero(slots == slots.max())
            ranks = ranks[np.argsort(taken[ranks], kind="stable")][: len(todo)]
            owner[todo[: len(ranks)]] = ranks
            taken[ranks] += load[todo[: len(ranks)]]
            share[ranks] += 1
            todo = todo[len(ranks) :]
    if world_size > 1 and chunks <= CHUNK_LIMIT:
        affinity = _affinity(layout, groups, kinds, sizes, unit)
        _swap(owner, sizes, load, affinity, world_size, max(limit, int(taken.max())))
    return np.repeat(owner, sizes)


def _affinity(layout: BlockLayout, groups: int, kinds: Counter[int], sizes: Int64, unit: int) -> Int64:
    """``int64[chunks, chunks]``: (head group, key block) pairs that two chunks read in each other."""
    chunks = len(sizes)
    row_chunk = np.repeat(np.arange(chunks), sizes * (unit // layout.block_size[0]))[: layout.shape[1]]
    columns = sizes * (unit // layout.block_size[1])
    starts = np.cumsum(columns) - columns
    reads = np.zeros((chunks, chunks), np.int64)
    for group, times in kinds.items():
        read = readers(layout, group, groups, row_chunk, chunks) > 0
        reads += times * np.add.reduceat(read, starts, axis=1, dtype=np.int64)
    return reads + reads.T


def _swap(owner: Int64, sizes: Int64, load: Int64, affinity: Int64, world_size: int, limit: int) -> None:
    """Swap equally long chunks of two ranks, in place, while that gains affinity and no rank exceeds ``limit``.

    Per round at most one swap touches a rank, so the gains computed at its start hold for all of them.
    """
    chunks = len(owner)
    for _ in range(SWAP_ROUNDS):
        order = np.argsort(owner, kind="stable")
        ranks, first = np.unique(owner[order], return_index=True)
        towards = np.add.reduceat(affinity[:, order], first, axis=1)
        column = np.empty(world_size, np.int64)
        column[ranks] = np.arange(len(ranks))
        here = towards[np.arange(chunks), column[owner]] - np.diagonal(affinity)
        to_other = towards[:, column[owner]]
        gain = to_other + to_other.T - here[:, None] - here[None, :] - 2 * affinity
        taken = np.bincount(owner, load, world_size).astype(np.int64)
        fits = taken[owner][:, None] + load[None, :] - load[:, None] <= limit
        allowed = (owner[:, None] != owner) & (sizes[:, None] == sizes) & fits & fits.T
        gain = np.where(allowed, gain, 0)
        best = gain.max(axis=1)
        used = np.zeros(world_size, np.bool_)
        swaps = 0
        for i in np.argsort(-best, kind="stable"):
            if best[i] <= 0:
                break
            j = int(gain[i].argmax())
            r, s = owner[i], owner[j]
            if not used[r] and not used[s]:
                owner[i], owner[j] = s, r
                used[[r, s]] = True
                swaps += 1
        if not swaps:
            return
