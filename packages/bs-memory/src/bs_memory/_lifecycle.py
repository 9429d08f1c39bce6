"""Every live pool, cache and pressure gauge of the process: who can free memory, and who must forget after a fork."""

import os
import threading
import weakref
from typing import Any, Protocol

import torch


class Member(Protocol):
    """What the registry calls on the objects it knows."""

    def _reclaim(self, device: torch.device | None) -> int:
        """Frees what can be freed on `device` (None: everywhere); returns the bytes given up."""
        ...

    def _after_fork(self) -> None:
        """Runs in a forked child, the only thread there: locks may be held by threads that no longer exist."""
        ...


# Every lock of this package may be entered again by its own thread, because the collector may run a finaliser in the
# middle of any of these functions, and the finaliser may release a lease or ask a cache. What is done under a lock is
# written so that such a visitor finds, and leaves, something whole.
_lock = threading.RLock()
_members: "weakref.WeakSet[Any]" = weakref.WeakSet()
# Device memory and pinned pages of the parent are useless in a forked child, and giving them back would call into a
# driver that does not survive a fork. They are kept here, unused, until the child exits.
_graveyard: list[Any] = []


def register(member: Member) -> None:
    """Adds a pool, cache or gauge for as long as it lives."""
    with _lock:
        _members.add(member)


def members() -> list[Any]:
    """The registered objects that are still alive."""
    with _lock:
        return list(_members)


def bury(thing: Any) -> None:
    """Keeps `thing` until the process exits."""
    _graveyard.append(thing)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    for member in list(_members):
        member._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
