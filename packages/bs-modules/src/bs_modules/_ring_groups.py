"""Which process groups a module's ranks share, and which rank this is."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bs_comm import RingPeerError, Survivors, regroup

from ._ring_session import open_sessions


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


def regroup_mesh(error: RingPeerError, mesh: Any, patience: float) -> Survivors:
    """New groups of the ranks of a mesh that are left, wherever in it they were.

    Args:
        error: What was raised, in a group of the mesh.
        mesh: Of two dimensions.
        patience: Seconds to wait for ranks that another failure may have cost.

    Returns:
        The survivors, by their ranks in the default group. Their `group` is a mesh of as many columns as before where
        they fill one with several rows or one, else a process group, whose ranks share tokens only.
    """
    blamed = -1
    for dim in range(2):
        group = mesh.get_group(dim)
        if any(session.failure is error for session in open_sessions(group)):
            blamed = dist.get_global_rank(group, error.peer)
    # Who blames a rank that lives, because that one has given up, waits for those who know better.
    left = regroup(RingPeerError(blamed, error.step, error.nbytes, error.phase, error.detail), patience=patience)
    columns = mesh.size(1)
    if left.world_size % columns:
        return left
    ranks = torch.tensor(left.old_ranks).view(-1, columns)
    row, column = divmod(left.rank, columns)
    groups: list[Any] = [
        dist.new_group(members.tolist(), backend=dist.get_backend(left.group), use_local_synchronization=True)
        for members in (ranks[:, column], ranks[row])
    ]
    made = DeviceMesh.from_group(groups, mesh.device_type, ranks, mesh_dim_names=("ring", "heads"))
    return replace(left, group=made)
