"""`HierarchicalPlan`: across nodes every row once per node, then on to its readers inside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ._check import integer
from ._entries import block_tokens
from ._matching import schedule
from ._needs import Needs, starts_of
from .plan import ExchangePlan

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HierarchicalPlan:
    """An exchange in two stages, for links that are slower between nodes than inside them.

    First every (kv head, key block) that a node reads from outside crosses once, from its owner to one of its readers
    there; then the readers inside a node get what they still lack from the owner or from the rank that fetched it.
    Backward is the same the other way round (``within.T``, then ``across.T``): gradients of a node are added up before
    they cross. Which reader fetches goes round, so that ranks of a node fetch about alike.

    `HierarchicalRing` carries it out; `PackedRing` runs direct plans only and refuses the stages.

    Attributes:
        direct: The plan it was made of.
        ranks_per_node: Consecutive ranks that share a node.
        across: The first stage; `ExchangePlan.rows`, `matching`, `transfer`, `traffic`, `T` as in any plan.
        within: The second stage; senders pass on rows that are not theirs, too.
    """

    direct: ExchangePlan
    ranks_per_node: int
    across: ExchangePlan
    within: ExchangePlan

    @classmethod
    def build(cls, plan: ExchangePlan, ranks_per_node: int) -> HierarchicalPlan:
        """Divide a direct exchange into two stages.

        Args:
            plan: A forward plan.
            ranks_per_node: Consecutive ranks that share a node; the last node may have fewer.

        Raises:
            TypeError: Not an `ExchangePlan`, or not an integer.
            ValueError: A transposed plan or a stage of another one, or ``ranks_per_node`` below 1.
        """
        if not isinstance(plan, ExchangePlan):
            raise TypeError(f"plan: expected an ExchangePlan, got {type(plan).__name__}")
        if plan.is_transposed or plan.is_stage:
            raise ValueError(f"plan: expected a direct forward plan, got {plan!r}")
        world, size = plan.world_size, integer("ranks_per_node", ranks_per_node)
        needs = plan._needs
        sender, receiver = np.divmod(np.repeat(np.arange(world**2), np.diff(needs.pair_start)), world)
        crosses = sender // size != receiver // size
        # By (node, item, reader): readers of one item in one node stand together.
        node, item = receiver[crosses] // size, needs.items[crosses]
        order = np.lexsort((receiver[crosses], item, node))
        node, item, reader, owner = (x[order] for x in (node, item, receiver[crosses], sender[crosses]))
        is_first = np.ones(len(item), np.bool_)
        is_first[1:] = (np.diff(node) != 0) | (np.diff(item) != 0)
        start = np.flatnonzero(is_first)
        count = np.diff(start, append=len(item))
        # The readers of an item take turns in fetching.
        fetches = start + np.arange(len(start)) % count
        fetcher = np.repeat(reader[fetches], count)
        others = fetcher != reader
        inside = ~crosses
        return cls(
            plan,
            size,
            _stage(plan, owner[fetches], reader[fetches], item[fetches]),
            _stage(
                plan,
                np.concatenate((sender[inside], fetcher[others])),
                np.concatenate((receiver[inside], reader[others])),
                np.concatenate((needs.items[inside], item[others])),
            ),
        )

    @property
    def num_steps(self) -> int:
        """Steps of both stages."""
        return self.across.num_steps + self.within.num_steps


def _stage(plan: ExchangePlan, sender: Int64, receiver: Int64, item: Int64) -> ExchangePlan:
    """A plan that moves these items; its work stays with the direct plan."""
    world = plan.world_size
    pair = sender * world + receiver
    order = np.lexsort((item, pair))
    counts = np.bincount(pair, minlength=world * world)
    tokens = block_tokens(plan.seq_len[1], plan.block_size[1])
    needed = np.zeros(world, np.int64)
    np.add.at(needed, receiver, tokens[item % len(tokens)])
    needs = Needs(starts_of(counts), item[order], np.zeros((world, world), np.int64), needed)
    return replace(
        plan, step=schedule(counts.reshape(world, world)), work=needs.work, is_stage=True, _needs=needs
    )  # fmt: skip
