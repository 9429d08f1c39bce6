"""Single flight: the first thread that misses builds, the others wait for what it builds."""

import os
import threading
from typing import Any

_lock = threading.RLock()
_waiting: dict[int, "Flight"] = {}  # thread → the flight it waits for, to see a circle before it closes


class Flight:
    """One build under way."""

    __slots__ = ("_done", "_owner", "entry", "landed")

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._done = threading.Event()
        self.entry: Any = None
        self.landed = False

    def land(self, entry: Any) -> None:
        """The build succeeded."""
        self.entry = entry
        self.landed = True
        self._done.set()

    def fail(self) -> None:
        """The build raised; who waits tries for itself."""
        self._done.set()

    def wait(self, key: object) -> bool:
        """Waits for the build; whether it succeeded.

        Raises:
            RuntimeError: if the wait would never end, because the build waits for this thread.
        """
        me = threading.get_ident()
        with _lock:
            link: Flight | None = self
            while link is not None and not link._done.is_set():
                if link._owner == me:
                    raise RuntimeError(
                        f"build: expected one that does not need its own result, got a circle at {key!r}"
                    )
                link = _waiting.get(link._owner)
            _waiting[me] = self
        try:
            self._done.wait()
        finally:
            with _lock:
                del _waiting[me]
        return self.landed


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
