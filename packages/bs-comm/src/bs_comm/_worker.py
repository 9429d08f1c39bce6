"""Threads for calls that block outside Python, which end before the interpreter does."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

#: Seconds that the end of the process waits for calls in progress; those of a hung peer may take longer.
EXIT_PATIENCE = 2.0

_running: dict[threading.Thread, queue.SimpleQueue[Any]] = {}


class Worker:
    """A daemon thread that handles jobs one after another.

    Args:
        name: Of the thread.
        handle: Called with every job; must not raise.
    """

    def __init__(self, name: str, handle: Callable[[Any], None]) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._jobs, handle), name=name, daemon=True)
        _running[thread] = self._jobs
        thread.start()

    def put(self, job: Any) -> None:
        """Queue a job, anything but None."""
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the jobs already queued."""
        self._jobs.put(None)


def _serve(jobs: queue.SimpleQueue[Any], handle: Callable[[Any], None]) -> None:
    while (job := jobs.get()) is not None:
        handle(job)
    _running.pop(threading.current_thread(), None)


@atexit.register
def _end_all() -> None:
    """A thread that comes back from C++ while the interpreter ends would abort the process: let none be out there."""
    for jobs in list(_running.values()):
        jobs.put(None)
    deadline = time.monotonic() + EXIT_PATIENCE
    for thread in list(_running):
        thread.join(max(0.0, deadline - time.monotonic()))
