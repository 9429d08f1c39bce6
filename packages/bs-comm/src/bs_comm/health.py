"""What happens when a peer dies, hangs or disagrees: every survivor raises the same error, none waits for ever.

A rank that meets a failure reports it in the store that the process group was made with, and all others, which look
there while they wait, report what they were waiting for. The trail of waits leads to the peer to name; the first rank
to work that out writes it down for all. A ring that failed stays failed: gloo's pairs are poisoned by a timed-out wait,
so recovery is a new group and a new ring.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ._worker import Worker

#: Seconds between two looks at the store while a rank waits.
POLL_SECONDS = 0.05
#: Longest wait for the reports of ranks that are slow, and not dead, before a failure is blamed on somebody.
PATIENCE = 5.0
#: What failed in a group. Messages posted then may still arrive, and gloo aborts a process that gets a wrong size.
_failed: WeakKeyDictionary[Any, RingPeerError] = WeakKeyDictionary()


class RingPeerError(RuntimeError):
    """A step of the ring failed because of a peer; no result of the call may be used, on any rank.

    Attributes:
        peer: The rank (in the ring's group) that failed, as all survivors agree where they can still talk.
        step: The step at which this was noticed; 0 before or after the steps.
        nbytes: Bytes of the transfer that was being waited for.
        phase: ``"header"``, ``"forward"``, ``"backward"`` or ``"commit"``.
        detail: What happened.
    """

    def __init__(self, peer: int, step: int, nbytes: int, phase: str, detail: str) -> None:
        super().__init__(f"rank {peer} failed in {phase}, step {step}, with {nbytes:,} bytes to come: {detail}")
        self.peer = peer
        self.step = step
        self.nbytes = nbytes
        self.phase = phase
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return RingPeerError, (self.peer, self.step, self.nbytes, self.phase, self.detail)


class RingMismatchError(ValueError):
    """The ranks were about to run different plans, sizes or versions; nothing was sent.

    Attributes:
        fields: What differs, with the ranks that differ from rank 0.
    """

    def __init__(self, fields: dict[str, list[int]]) -> None:
        found = "; ".join(f"{name} differs on rank{'s' * (len(r) > 1)} {r}" for name, r in fields.items())
        super().__init__(f"plan: expected the same plan and sizes on every rank as on rank 0, but {found}")
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return RingMismatchError, (self.fields,)


def note_failure(group: Any, error: RingPeerError) -> None:
    """Remember that a group is not to be used again."""
    _failed.setdefault(group, error)


def has_failed(group: Any) -> bool:
    """Whether a ring or a roll call of this group has failed."""
    return group in _failed


def check_usable(group: Any) -> None:
    """Raise what failed in a group before, if anything did; None (a rank of its own) never fails."""
    if group is not None and group in _failed:
        error = _failed[group]
        detail = f"this group has failed before and cannot be used again (see regroup): {error.detail}"
        raise RingPeerError(error.peer, error.step, error.nbytes, error.phase, detail)


@dataclass(frozen=True)
class Report:
    """What one rank knows of a failure.

    Attributes:
        peer: The rank it was waiting for, or itself if it failed by itself.
        step: As in `RingPeerError`.
        nbytes: As in `RingPeerError`.
        phase: As in `RingPeerError`.
        detail: As in `RingPeerError`.
    """

    peer: int
    step: int
    nbytes: int
    phase: str
    detail: str

    def error(self) -> RingPeerError:
        """The exception that says so."""
        return RingPeerError(self.peer, self.step, self.nbytes, self.phase, self.detail)


@dataclass
class _Answer:
    """A call in progress: its value, or the exception it raised, once done."""

    call: Callable[[], Any]
    done: threading.Event
    value: Any = None


class StoreThread:
    """A daemon thread that talks to the store, so that a store whose host is stopped blocks nobody else."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def submit(self, call: Callable[[], Any]) -> _Answer:
        """Queue a call."""
        if self._worker is None:
            self._worker = Worker("bs-comm store", _answer)
        answer = _Answer(call, threading.Event())
        self._worker.put(answer)
        return answer

    def call(self, call: Callable[[], Any], timeout: float) -> Any:
        """Queue a call and return its value, the exception it raised, or a TimeoutError."""
        answer = self.submit(call)
        return answer.value if answer.done.wait(timeout) else TimeoutError(f"no answer within {timeout:g} s")

    def close(self) -> None:
        """End the thread after the calls already queued."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _answer(job: _Answer) -> None:
    try:
        job.value = job.call()
    except Exception as error:
        job.value = error
    job.done.set()


class Health:
    """Reports and verdicts of one ring, in a store that all its ranks share.

    All store calls are made by a thread of its own: a store whose host is stopped blocks its callers for minutes.

    Args:
        store: A `torch.distributed.Store`, or None (failures are then judged by each rank alone).
        prefix: Keys of this ring, equal on all ranks, never used before.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, store: Any, prefix: str, rank: int, world_size: int) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._world_size = world_size
        self._thread = StoreThread()
        self._look: _Answer | None = None

    def failure_seen(self) -> bool:
        """Whether some rank has reported a failure; answers from the last look, and starts the next one."""
        if self._store is None:
            return False
        if self._look is not None and not self._look.done.is_set():
            return False  # The store does not answer; the deadline of the hop remains.
        seen = self._look is not None and self._look.value is True
        self._look = self._thread.submit(lambda: self._store.check([f"{self._prefix}/failed"]))
        return seen

    def conclude(self, mine: Report, patience: float) -> Report:
        """Report, hear the others for at most ``patience`` seconds (0: blame now), and return what all raise."""
        if self._store is None:
            return mine
        verdict = self._thread.call(lambda: self._agree(mine, patience), patience + 1.0)
        return verdict if isinstance(verdict, Report) else mine

    def report(self, mine: Report) -> None:
        """Report without waiting for anyone: for a rank that fails by itself and raises its own exception."""
        if self._store is not None:
            self._thread.call(lambda: self._write(mine), 1.0)

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    # ------------------------------------------------------------------ on the thread

    def _write(self, mine: Report) -> None:
        self._store.set(f"{self._prefix}/report/{self._rank}", json.dumps(asdict(mine)))
        self._store.set(f"{self._prefix}/failed", "1")

    def _agree(self, mine: Report, patience: float) -> Report:
        self._write(mine)
        deadline = time.monotonic() + patience
        reports: dict[int, Report] = {}
        while len(reports) < self._world_size and time.monotonic() < deadline:
            for rank in range(self._world_size):
                key = f"{self._prefix}/report/{rank}"
                if rank not in reports and self._store.check([key]):
                    reports[rank] = _report_of(self._store.get(key))
            silent = set(range(self._world_size)) - set(reports)
            if silent == {follow(mine, self._rank, reports).peer} or self._store.check([f"{self._prefix}/verdict"]):
                break
            time.sleep(POLL_SECONDS / 5)
        verdict = json.dumps(asdict(follow(mine, self._rank, reports)))
        return _report_of(self._store.compare_set(f"{self._prefix}/verdict", "", verdict))


def follow(mine: Report, rank: int, reports: dict[int, Report]) -> Report:
    """Follow the trail of waits from one report to the rank that started it.

    Args:
        mine: Where the trail starts.
        rank: Who wrote it.
        reports: What ranks reported, by rank; a rank that is dead or stopped has none.

    Returns:
        The last report on the trail: its peer did not report, or reported itself. Where ranks wait for one another in a
        circle, the report closest to the start.
    """
    at, last, seen = rank, mine, set[int]()
    while at not in seen:
        seen.add(at)
        report = mine if at == rank else reports.get(at)
        if report is None:
            return last
        last = report
        if report.peer == at:
            return report
        at = report.peer
    return mine


def _report_of(text: bytes | str) -> Report:
    return Report(**json.loads(text))
