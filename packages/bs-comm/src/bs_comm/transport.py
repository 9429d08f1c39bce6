"""Bytes between ranks: posted in one order everywhere, tagged, counted, and waited for with a deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ._worker import Worker
from .health import PATIENCE, POLL_SECONDS, Health, Report

#: Kinds of traffic; each has its own tags and counters.
KV, GRAD, CONTROL = 0, 1, 2
_KINDS = 3
#: Steps that fit into a tag.
STEPS = 1 << 12
#: Rings of one group that can be told apart (tags are 32-bit).
CHANNELS = (1 << 31) // (_KINDS * STEPS)


@dataclass
class Hop:
    """One posted message.

    Attributes:
        kind: `KV`, `GRAD` or `CONTROL`.
        is_receive: Whether it comes in.
        peer: The rank at the other end.
        step: The step it belongs to.
        nbytes: Its size.
        work: What to wait for.
    """

    kind: int
    is_receive: bool
    peer: int
    step: int
    nbytes: int
    work: Any

    def report(self, phase: str, detail: str) -> Report:
        """What to tell the others when this hop fails."""
        return Report(self.peer, self.step, self.nbytes, phase, detail)


class HopFailed(Exception):
    """A hop did not complete; carries the report to conclude from.

    ``is_broken``: the connection itself is gone, so its peer is to blame, whatever others are waiting for.
    """

    def __init__(self, report: Report, *, is_broken: bool = False) -> None:
        super().__init__(report.detail)
        self.report = report
        self.is_broken = is_broken


class Transport:
    """Point-to-point messages of one ring over a process group.

    Attributes:
        sent_bytes: ``int64[3, world]``: bytes that were sent by kind (`KV`, `GRAD`, `CONTROL`) and receiver.
        received_bytes: ``int64[3, world]``: bytes that arrived, by kind and sender.
        wait_seconds: Time this rank was blocked in waits.
        in_flight: Messages posted and not yet seen to be done.

    Args:
        group: A process group; None only where there is one rank.
        rank: This rank in the group.
        world_size: Ranks in the group.
        channel: Sets tags apart; rings that run at the same time need different ones.
        timeout: Seconds a hop may take.
        health: Where failures of others are seen.
    """

    def __init__(
        self, group: Any, rank: int, world_size: int, channel: int, timeout: float, health: Health
    ) -> None:  # fmt: skip
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._channel = channel
        self._timeout = timeout
        self._health = health
        self._global = [dist.get_global_rank(group, r) for r in range(world_size)] if group is not None else [0]
        self._blocks_host = group is not None and dist.get_backend(group) != "nccl"
        self._waiter: _Waiter | None = None
        self._stuck_with: int | None = None  # the peer of a hop that was given up while a thread waits in it
        self.sent_bytes = np.zeros((_KINDS, world_size), np.int64)
        self.received_bytes = np.zeros((_KINDS, world_size), np.int64)
        self.wait_seconds = 0.0
        self.in_flight = 0

    def post(
        self, kind: int, step: int, receive: tuple[int, Tensor] | None, send: tuple[int, Tensor] | None, phase: str
    ) -> tuple[Hop | None, Hop | None]:
        """Start a step's messages, the receive first.

        Args:
            kind: `KV`, `GRAD` or `CONTROL`.
            step: Part of the tag.
            receive: (sender, uint8 buffer) or None.
            send: (receiver, uint8 buffer) or None.
            phase: For errors.

        Returns:
            The two hops, to be waited for; None where there is none.

        Raises:
            HopFailed: The connection to one of the two is gone.
        """
        tag = self._tag(kind, step)
        got = None if receive is None else Hop(kind, True, receive[0], step, receive[1].numel(), None)
        put = None if send is None else Hop(kind, False, send[0], step, send[1].numel(), None)
        ops = [
            (hop, dist.P2POp(op, end[1], self._global[end[0]], self._group, tag))
            for hop, op, end in ((got, dist.irecv, receive), (put, dist.isend, send))
            if hop is not None and end is not None
        ]
        self.in_flight += len(ops)
        if self._blocks_host:
            for hop, op in ops:  # One by one, to know whose connection is gone.
                try:
                    (hop.work,) = dist.batch_isend_irecv([op])
                except RuntimeError as error:
                    raise HopFailed(hop.report(phase, _one_line(error)), is_broken=True) from error
        elif ops:
            works = dist.batch_isend_irecv([op for _, op in ops])  # NCCL makes one work of a batch.
            for (hop, _), work in zip(ops, (works[0], works[-1]), strict=False):
                hop.work = work
        return got, put

    def wait(self, hop: Hop | None, phase: str) -> None:
        """Block until a hop is done.

        Raises:
            HopFailed: It broke, took longer than the timeout, or another rank reported a failure meanwhile.
        """
        if hop is None:
            return
        if self._blocks_host:
            self._block(hop, phase)
        else:
            hop.work.wait()  # Orders the stream; the group's watchdog is the deadline.
        self.in_flight -= 1
        counters = self.received_bytes if hop.is_receive else self.sent_bytes
        counters[hop.kind, hop.peer] += hop.nbytes

    def _block(self, hop: Hop, phase: str) -> None:
        started = time.monotonic()
        if self._waiter is None:
            self._waiter = _Waiter()
        # A wait that times out closes the connection, and a closed connection looks like a dead peer: not before
        # everybody knows better.
        self._waiter.start(hop.work, self._timeout + 2 * PATIENCE)
        try:
            while not self._waiter.done.wait(POLL_SECONDS):
                waited = time.monotonic() - started
                if waited > self._timeout:
                    raise HopFailed(hop.report(phase, f"nothing came within the hop timeout of {self._timeout:g} s"))
                if self._health.failure_seen():
                    raise HopFailed(hop.report(phase, "another rank reported a failure while this one was waiting"))
            if self._waiter.error is not None:
                raise HopFailed(hop.report(phase, _one_line(self._waiter.error)), is_broken=True)
        except BaseException:
            if not self._waiter.done.is_set():
                self._stuck_with = hop.peer
            self.close()
            raise
        finally:
            self.wait_seconds += time.monotonic() - started

    def gather(self, words: Tensor, phase: str) -> Tensor:
        """Every rank's words, on every rank, in ⌈log₂ world⌉ rounds.

        Point to point with tags of its own, so that rings in several threads do not meet in a collective.

        Args:
            words: ``int64[n]`` on the group's device, n equal on all ranks.
            phase: For errors.

        Returns:
            ``int64[world, n]``.

        Source: Bruck et al., "Efficient algorithms for all-to-all communications", 1997 (concatenation).
        """
        world, width = self._world_size, len(words)
        known = torch.empty(world, width, dtype=torch.int64, device=words.device)
        known[0] = words
        have, round_ = 1, 0
        while have < world:
            count = min(have, world - have)
            outgoing = known[:count].clone().view(-1).view(torch.uint8)
            incoming = torch.empty_like(outgoing)
            source, target = (self._rank + have) % world, (self._rank - have) % world
            got, put = self.post(CONTROL, round_, (source, incoming), (target, outgoing), phase)
            self.wait(got, phase)
            self.wait(put, phase)
            known[have : have + count] = incoming.view(torch.int64).view(count, width)
            have, round_ = have + count, round_ + 1
        return known.roll(self._rank, 0)

    def give_up(self) -> None:
        """Close the group's connections if a thread is stuck in one, and end it; only once a failure has its verdict.

        A thread that came back from a connection while the interpreter ends would abort the process.
        """
        if self._stuck_with is not None:
            # What gloo does on a wait that times out, here one for a message that nobody sends.
            nothing, peer = torch.empty(1, dtype=torch.uint8), self._global[self._stuck_with]
            with contextlib.suppress(RuntimeError):
                (work,) = dist.batch_isend_irecv(
                    [dist.P2POp(dist.irecv, nothing, peer, self._group, self._tag(CONTROL, STEPS - 1))]
                )
                work.wait(timedelta(milliseconds=1))
            self._stuck_with = None
        self.close()

    def _tag(self, kind: int, step: int) -> int:
        return (self._channel * _KINDS + kind) * STEPS + step % STEPS

    def close(self) -> None:
        """End the waiting thread."""
        if self._waiter is not None:
            self._waiter.stop()
            self._waiter = None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class _Waiter:
    """A thread that blocks in ``work.wait``, so that its owner can look around meanwhile."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._worker = Worker("bs-comm wait", self._wait)

    def start(self, work: Any, timeout: float) -> None:
        self.done.clear()
        self.error = None
        self._worker.put((work, timeout))

    def stop(self) -> None:
        self._worker.close()

    def _wait(self, job: tuple[Any, float]) -> None:
        work, timeout = job
        try:
            work.wait(timedelta(seconds=timeout))
        except Exception as error:
            self.error = error
        self.done.set()
