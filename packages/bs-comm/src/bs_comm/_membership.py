"""Which rank of which group this process is."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def membership(group: Any, world: int | None = None) -> tuple[int, int, Any]:
    """Look a group up.

    Args:
        group: A process group; None is the default group, or nobody else where there is none.
        world: How many ranks are expected; None for any number.

    Returns:
        (rank, world size, group); the group is None where there is one rank, which needs none.

    Raises:
        ValueError: There is no group, it has another size, or this process is not in it.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        if world is not None and world > 1:
            raise ValueError(f"group: expected one of {world} ranks, but torch.distributed is not initialized")
        return 0, 1, None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    if world is not None and size != world:
        raise ValueError(f"group: expected {world} ranks as in the plan, got a group of {size}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected one that this process is a member of, got another")
    return (0, 1, None) if size == 1 else (rank, size, group)
