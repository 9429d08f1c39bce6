"""The obvious model of an exchange plan: sets of tuples, one token pair at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from bs_patterns import BlockLayout

from ..placement import Placement
from ..plan import ExchangePlan


def _owners(place: Placement, block_size: int) -> list[int]:
    """Owner of each block of ``block_size`` tokens, read off its first token."""
    return [int(place.owner[start // place.block_size]) for start in range(0, place.seq_len, block_size)]


def _active(layout: BlockLayout) -> Iterable[tuple[int, int, int]]:
    return [(int(h), int(i), int(j)) for h, i, j in np.argwhere(layout.to_dense())]


def model_needs(
    layout: BlockLayout, placement: Placement, kv_placement: Placement, kv_heads: int
) -> set[tuple[int, int, int, int]]:
    """Every (sender, receiver, kv head, key block) that the layout requires, and nothing else."""
    heads = layout.shape[0]
    query_owner = _owners(placement, layout.block_size[0])
    key_owner = _owners(kv_placement, layout.block_size[1])
    needs = set()
    for head, i, j in _active(layout):
        kv = range(kv_heads) if heads == 1 else [head // (heads // kv_heads)]
        if query_owner[i] != key_owner[j]:
            needs |= {(key_owner[j], query_owner[i], k, j) for k in kv}
    return needs


def model_work(layout: BlockLayout, placement: Placement, kv_placement: Placement) -> np.ndarray:
    """``int64[world, world]``: query tokens × key tokens of active blocks by (key owner, query owner)."""
    (block_q, block_k), (len_q, len_k) = layout.block_size, layout.seq_len
    query_owner, key_owner = _owners(placement, block_q), _owners(kv_placement, block_k)
    work = np.zeros((placement.world_size,) * 2, np.int64)
    for _, i, j in _active(layout):
        queries = min(block_q, len_q - i * block_q)
        keys = min(block_k, len_k - j * block_k)
        work[key_owner[j], query_owner[i]] += queries * keys
    return work


def model_matchings_hold(plan: ExchangePlan) -> bool:
    """Whether every non-empty pair is in exactly one step and no rank sends or receives twice in one."""
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(1, plan.num_steps + 1):
        pairs = [(int(s), int(r)) for s, r in plan.matching(step)]
        if len({s for s, _ in pairs}) != len(pairs) or len({r for _, r in pairs}) != len(pairs) or not pairs:
            return False
        seen.update(pairs)
    wanted = {(s, r) for s in range(plan.world_size) for r in range(plan.world_size) if len(plan.transfer(s, r)[0])}
    return set(seen) == wanted and all(n == 1 for n in seen.values())


def all_transfers(plan: ExchangePlan) -> list[tuple[int, int, int, int]]:
    """All (sender, receiver, kv head, key block) of a plan, as a list: repeats show."""
    world = range(plan.world_size)
    return [(s, r, int(h), int(b)) for s in world for r in world for h, b in zip(*plan.transfer(s, r), strict=True)]
