"""Where the tokens of a sequence live, by the config and by the shards that came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bs_comm import ExchangePlan, Placement
from bs_patterns import BlockLayout

_HELD = 8


class Placements:
    """The placements of one module.

    A cost-balanced one is searched once per length and then held, although the layout may change: a caller that cut its
    data by it would otherwise feed tokens into other places. `rebalance` is what changes it.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Placement] = {}

    def of(
        self, rule: str | Placement, layout: BlockLayout, world: int, lengths: np.ndarray | None = None
    ) -> tuple[Placement, Placement]:
        """(query, key) placements; one object where both are the same.

        Args:
            rule: Of the config.
            layout: Of the whole sequence.
            world: Ranks.
            lengths: ``int[2, world]``: tokens of the (query, key) shards that came, or None.

        Raises:
            ValueError: The shards are not those of the placement, or cut inside a block.
        """
        made = []
        for side, name in enumerate("qk"):
            block = layout.block_size[side]
            if layout.seq_len[0] == layout.seq_len[1]:
                block = math.lcm(*layout.block_size)
            place = self._planned(rule, layout, world, side, block)
            if lengths is not None and (place.lengths != lengths[side]).any():
                place = _as_they_came(place, rule, lengths[side].tolist(), name, block)
            made.append(place)
        return (made[0], made[0]) if made[0] == made[1] else (made[0], made[1])

    def rebalance(self, layout: BlockLayout, world: int) -> bool:
        """Search anew for a layout that has changed; say whether a better placement was found, which is held then.

        Better: a busiest rank with less work, or with as much (within 1 %) and fewer rows on the way.
        """
        key = _key(layout, world)
        found = Placement.cost_balanced(layout, world)
        before = self._held.get(key)
        if before is None or before.block_size != found.block_size:
            self._held[key] = found
            return True
        old, new = (ExchangePlan.build(layout, world, place) for place in (before, found))
        gain = old.work_imbalance - new.work_imbalance
        if gain > 0.01 or (gain > -0.01 and new.rows.sum() < old.rows.sum()):
            self._held[key] = found
            return True
        return False

    def holds(self, layout: BlockLayout, world: int) -> bool:
        """Whether the cost-balanced placement of such a length is decided."""
        return _key(layout, world) in self._held

    def forget(self) -> None:
        """Drop what is held."""
        self._held.clear()

    def _planned(self, rule: str | Placement, layout: BlockLayout, world: int, side: int, block: int) -> Placement:
        tokens = layout.seq_len[side]
        if isinstance(rule, Placement):
            if rule.world_size != world or rule.seq_len != tokens:
                raise ValueError(
                    f"placement: expected one of {tokens} {('query', 'key')[side]} tokens over {world} ranks, got "
                    f"{rule!r}"
                )
            return rule
        if rule != "cost_balanced":
            make: Callable[..., Placement] = getattr(Placement, rule)
            return make(tokens, world, block_size=block)
        if layout.seq_len[0] != layout.seq_len[1]:
            raise ValueError(
                f"placement: expected another than 'cost_balanced' for {layout.seq_len[0]} queries over "
                f"{layout.seq_len[1]} keys, which it places together"
            )
        key = _key(layout, world)
        held = self._held.get(key)
        if held is None or held.block_size != block:
            if len(self._held) >= _HELD:
                self._held.clear()
            held = self._held[key] = Placement.cost_balanced(layout, world)
        return held


def _key(layout: BlockLayout, world: int) -> tuple[Any, ...]:
    return layout.seq_len, layout.causal, world


def _as_they_came(place: Placement, rule: Any, came: list[int], name: str, block: int) -> Placement:
    if rule != "contiguous":
        raise ValueError(
            f"{name}: expected shards of {place.lengths.tolist()} tokens ({place.name} placement of {place.seq_len} "
            f"tokens), got {came}"
        )
    try:
        return Placement.from_lengths(came, block_size=block)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected shards cut at multiples of {block} tokens, for instance {place.lengths.tolist()} (see "
            f"shard()), got {came}"
        ) from error
