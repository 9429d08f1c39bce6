"""Who needs which key blocks of whom, and how much work each pair of ranks makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._entries import block_tokens, first_alike, readers

if TYPE_CHECKING:
    from bs_patterns import BlockLayout

Ranks = NDArray[np.integer]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Needs:
    """Transfers grouped by pair, pair ``sender · world + receiver``.

    Attributes:
        pair_start: ``int64[world² + 1]``: where each pair's items start.
        items: ``int64[n]``: ``head group · kv_blocks + key block``, ascending within a pair.
        work: ``int64[world, world]``: query tokens × key tokens in active blocks by (key owner, query owner).
        needed: ``int64[world]``: distinct remote (head group, key token) rows that a rank reads; counted per reader,
            not from the pairs.
    """

    pair_start: Int64
    items: Int64
    work: Int64
    needed: Int64


def needs_of_layout(layout: BlockLayout, groups: int, q_owner: Ranks, kv_owner: Ranks, world: int) -> Needs:
    """Scan a layout once per head group."""
    columns = layout.shape[2]
    tokens = block_tokens(layout.seq_len[1], layout.block_size[1])
    by_owner = np.argsort(kv_owner, kind="stable")
    owners, first = np.unique(kv_owner[by_owner], return_index=True)
    work = np.zeros((world, world), np.int64)
    needed = np.zeros(world, np.int64)
    pairs, items = [], []
    scanned: dict[int, tuple[Int64, Int64, Int64, Int64]] = {}

    def scan(group: int) -> tuple[Int64, Int64, Int64, Int64]:
        """Work by (present owner, reader), rows needed, and (pair, block) of every need."""
        count = readers(layout, group, groups, q_owner, world)
        area = count[:, by_owner] * (tokens[by_owner] * layout.block_size[0])
        remote = count > 0
        remote[kv_owner, np.arange(columns)] = False
        receiver, place = np.nonzero(remote[:, by_owner])
        block = by_owner[place]
        pair = kv_owner[block].astype(np.int64) * world + receiver
        return np.add.reduceat(area, first, axis=1).T, remote @ tokens, pair, block

    for group, alike in enumerate(first_alike(layout, groups)):
        if alike not in scanned:
            scanned = {group: scan(group)}
        group_work, group_needed, pair, block = scanned[alike]
        work[owners] += group_work
        needed += group_needed
        pairs.append(pair)
        items.append(block + group * columns)
    _shorten_last_row(layout, work, q_owner, kv_owner, tokens)
    pair = np.concatenate(pairs)
    # Blocks ascend within (group, pair) and groups follow one another: after a stable sort items ascend per pair.
    order = np.argsort(pair.astype(np.uint16) if world <= 256 else pair, kind="stable")
    return Needs(starts_of(np.bincount(pair, minlength=world * world)), np.concatenate(items)[order], work, needed)


def _shorten_last_row(layout: BlockLayout, work: Int64, q_owner: Ranks, kv_owner: Ranks, tokens: Int64) -> None:
    """Take back, in place, what `needs_of_layout` counted too much for a short last query block."""
    missing = layout.shape[1] * layout.block_size[0] - layout.seq_len[0]
    if missing:
        for indptr in layout.indptr:
            row = layout.indices[indptr[-2] : indptr[-1]]
            np.subtract.at(work[:, q_owner[-1]], kv_owner[row], tokens[row] * missing)


def needs_of_dense(
    seq_len: tuple[int, int], block_size: tuple[int, int], causal: bool, q_owner: Ranks, kv_owner: Ranks, world: int
) -> Needs:
    """Every rank reads every key block, or with ``causal`` those that start no later than its last query."""
    q_tokens, kv_tokens = block_tokens(seq_len[0], block_size[0]), block_tokens(seq_len[1], block_size[1])
    last_query = np.cumsum(q_tokens) - 1 + seq_len[1] - seq_len[0]
    reach = np.full(len(q_tokens), seq_len[1] - 1)
    if causal:
        reach = last_query
    furthest = np.full(world, -1, np.int64)
    np.maximum.at(furthest, q_owner, reach)
    starts = np.arange(len(kv_tokens)) * block_size[1]
    counts = np.zeros((world, world), np.int64)
    work = np.zeros((world, world), np.int64)
    needed = np.zeros(world, np.int64)
    items = []
    for sender in range(world):
        mine = np.flatnonzero(kv_owner == sender)
        seen = np.concatenate(([0], np.cumsum(kv_tokens[mine])))
        # Query blocks ascend, so do their reaches: the searches are local.
        keys = seen[np.searchsorted(starts[mine], reach, side="right")]
        work[sender] = np.bincount(q_owner, q_tokens * keys, world).astype(np.int64)
        count = np.searchsorted(starts[mine], furthest, side="right")
        count[sender] = 0
        needed += seen[count]
        counts[sender] = count
        items.extend(mine[:n] for n in count.tolist())
    return Needs(starts_of(counts.ravel()), np.concatenate(items), work, needed)


def starts_of(counts: Int64) -> Int64:
    """Where each of consecutive groups starts, and the end: ``int64[n + 1]``."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
