"""After a failure: the survivors agree on who is left and get a new group, on fresh connections."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ._check import positive
from .health import POLL_SECONDS, RingPeerError, StoreThread

#: Regroupings that started from a group; survivors of one failure count alike.
_attempts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Survivors:
    """The ranks that are left.

    Attributes:
        group: The new process group.
        rank: This rank in it.
        world_size: How many are left.
        old_ranks: Their ranks in the group that failed, ascending; ``old_ranks[rank]`` is who this rank was.
    """

    group: Any
    rank: int
    world_size: int
    old_ranks: tuple[int, ...]


def regroup(
    error: RingPeerError, group: Any = None, *, patience: float = 10.0, timeout: float | None = None
) -> Survivors:
    """Form a new group of the ranks that raised a `RingPeerError`; collective among them.

    K and V that were in flight are lost, and what a rank had computed from them is worthless without the others': fail
    the step, regroup, build a plan for the new world size, shard again from the full tensors or the last checkpoint,
    and redo the step. With one survivor the same plan with ``world_size=1`` runs without any group.

    The store that the failed group was made with must still be there: with ``torchrun`` it lives in the agent; with
    ``init_method="tcp://…"`` it lives in rank 0 and dies with it.

    Args:
        error: What was raised; its peer is not waited for.
        group: The group that failed; default the default group.
        patience: Seconds to wait for the other survivors.
        timeout: Timeout of the new group's collectives, in seconds; default torch's.

    Returns:
        The survivors, the same on each of them.

    Raises:
        RingPeerError: This rank came too late, and the others went on without it; or the store is gone.
    """
    if not isinstance(error, RingPeerError):
        raise TypeError(f"error: expected the RingPeerError that was raised, got {type(error).__name__}")
    patience = positive("patience", patience)
    group = dist.group.WORLD if group is None else group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    attempt = _attempts[group] = _attempts.get(group, 0) + 1
    ranks = _who_is_left(group.get_group_store(), f"bs_comm/regroup/{attempt}", rank, world, error, patience)
    if rank not in ranks:
        raise RingPeerError(rank, 0, 0, "regroup", f"this rank came too late: ranks {ranks} went on without it")
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timedelta(seconds=positive("timeout", timeout))
    # Only members take part: the default group has dead ranks in it.
    new = dist.new_group(
        [dist.get_global_rank(group, r) for r in ranks],
        backend=dist.get_backend(group), use_local_synchronization=True, **options,
    )  # fmt: skip
    return Survivors(new, ranks.index(rank), len(ranks), tuple(ranks))


def _who_is_left(
    store: Any, prefix: str, rank: int, world: int, error: RingPeerError, patience: float
) -> list[int]:  # fmt: skip
    """All ranks that said they are here before the first of them wrote down the list."""

    def agree() -> list[int]:
        store.set(f"{prefix}/here/{rank}", "1")
        deadline = time.monotonic() + patience
        wanted = {r for r in range(world) if r != error.peer}
        while True:
            here = {r for r in range(world) if store.check([f"{prefix}/here/{r}"])}
            if here >= wanted or time.monotonic() > deadline or store.check([f"{prefix}/list"]):
                break
            time.sleep(POLL_SECONDS)
        return json.loads(store.compare_set(f"{prefix}/list", "", json.dumps(sorted(here))))

    thread = StoreThread()
    try:
        answer = thread.call(agree, patience + 5.0)
    finally:
        thread.close()
    if not isinstance(answer, list):
        raise RingPeerError(error.peer, 0, 0, "regroup", f"the store of the process group is gone: {answer}")
    return answer
