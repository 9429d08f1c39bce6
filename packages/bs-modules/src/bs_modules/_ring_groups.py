"""Which process groups a module's ranks share, and which rank this is."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def groups_of(group: Any) -> tuple[Any, Any]:
    """(ring group, group that shares heads or None) of a process group, a `DeviceMesh`, or None.

    Raises:
        TypeError: It is none of them.
        ValueError: A mesh of more than two dimensions.
    """
    if group is None or isinstance(group, dist.ProcessGroup):
        return group, None
    if not hasattr(group, "get_group"):
        raise TypeError(f"group: expected a process group or a DeviceMesh, got {type(group).__name__}")
    if group.ndim > 2:
        raise ValueError(f"group: expected a DeviceMesh of one or two dimensions, got {group}")
    return (group.get_group(), None) if group.ndim == 1 else (group.get_group(0), group.get_group(1))


def rank_of(group: Any) -> tuple[int, int]:
    """(rank, ranks) in a group, None being the default group; (0, 1) without any.

    Raises:
        RuntimeError: There is none, and the environment says that there are several ranks.
        ValueError: This process is not in it.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        expected = os.environ.get("WORLD_SIZE", "1")
        if expected.isdecimal() and int(expected) > 1:
            raise RuntimeError(
                f"group: expected a process group, because WORLD_SIZE is {expected}, but torch.distributed is not "
                "initialized; call torch.distributed.init_process_group before the first call"
            )
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected one that this process is a member of, got another")
    return rank, dist.get_world_size(group)
