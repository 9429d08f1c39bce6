"""Giving memory back: from pools and caches to torch, from torch to the system."""

import contextlib
import ctypes
import gc
import sys

import torch

from bs_memory import _lifecycle
from bs_memory._devices import canonical_device
from bs_memory._pressure import MemoryPressure


def free_memory(device: torch.device | str | int | None = None) -> int:
    """Gives back all memory nobody uses: every pool's idle buffers, every cache's entries, what torch keeps unused.

    Entries of a `DeviceCache` that somebody still holds stay alive with their holder. Leased buffers are not touched.

    Args:
        device: only this device; None for all.

    Returns:
        The bytes that pools and caches of this process gave up. What the collector and the allocators free besides is
        not counted.
    """
    where = None if device is None else canonical_device(device)
    freed = sum(member._reclaim(where) for member in _lifecycle.members())
    gc.collect()  # tensors in reference cycles, which exceptions like to make
    if where is None or where.type == "cpu":
        _trim_heap()
    if torch.accelerator.is_available() and (where is None or where.type != "cpu"):
        kinds = {torch.accelerator.current_accelerator(), where and torch.device(where.type)} - {None}
        for kind in kinds:
            empty = getattr(torch.get_device_module(kind), "empty_cache", None)
            if empty is not None:
                empty()
    return freed


def note_failure(device: torch.device) -> None:
    """Tells every gauge that watches `device` that an allocation failed there."""
    for member in _lifecycle.members():
        if isinstance(member, MemoryPressure) and member._watches(device):
            member.note_failure(device)


def _trim_heap() -> None:
    """Makes glibc return free pages: it keeps freed blocks below its (growing, up to 32 MiB) mmap threshold."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
