"""`RollCall`: a few numbers of every rank on every rank, with a deadline, before anything depends on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._check import positive
from ._membership import membership
from .health import PATIENCE, Health, Report, RingPeerError, check_usable, note_failure
from .transport import CHANNELS, KV, HopFailed, Transport

Int64 = NDArray[np.int64]

#: Roll calls made per group.
_serials: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class RollCall:
    """Gathers small tensors from all ranks of a group, and fails like a ring: in time, by name, on every survivor.

    What each rank brings to a collective call (how long its shard is, which arguments it was given) is not known to the
    others. A mismatch that goes unnoticed ends in a message of the wrong size, which gloo answers by aborting. A roll
    call beforehand lets every rank see the same numbers and raise the same error.

    Making one is not collective, but every rank of a group must make them in the same order.

    Args:
        group: Process group; default the default group. Not needed for one rank.
        hop_timeout: Seconds to wait for one message before the call is given up.
        device: Where messages must live: the CPU for gloo, a GPU for NCCL.

    Attributes:
        rank: This rank.
        world_size: Ranks in the group.

    Raises:
        RingPeerError: A ring or roll call of this group has failed before: `regroup`, or a new group.
        TypeError: An argument has the wrong type.
        ValueError: This process is not in the group, or `hop_timeout` is out of range.
    """

    def __init__(
        self, group: Any = None, *, hop_timeout: float = 60.0, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.rank, self.world_size, self._group = membership(group)
        check_usable(self._group)
        timeout = positive("hop_timeout", hop_timeout)
        self._patience = min(PATIENCE, timeout)
        self._device = torch.device(device)
        self._failure: RingPeerError | None = None
        self._closed = False
        store, serial = None, 0
        if self._group is not None:
            _serials[self._group] = serial = _serials.get(self._group, 0) + 1
            store = self._group.get_group_store()
        self._health = Health(store, f"bs_comm/roll/{serial}", self.rank, self.world_size)
        self._transport = Transport(self._group, self.rank, self.world_size, CHANNELS - 1, timeout, self._health)

    def words(self, words: Sequence[int]) -> Int64:
        """Every rank's numbers.

        Args:
            words: As many on every rank, each within 64 bits.

        Returns:
            ``int64[world, n]``.

        Raises:
            RingPeerError: A peer failed; on every survivor.
        """
        return self._gather(torch.tensor(list(words), dtype=torch.int64)).cpu().numpy()

    def tensors(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's tensor, of lengths that may differ.

        Args:
            x: ``[lengths[rank], ...]``; dtype and trailing dimensions are the same on every rank.
            lengths: First dimension by rank, the same list everywhere.

        Returns:
            One tensor per rank, on the device of ``x``.

        Raises:
            RingPeerError: As in `words`.
        """
        if x.shape[0] != lengths[self.rank]:
            raise ValueError(f"x: expected {lengths[self.rank]} rows, as lengths says, got shape {tuple(x.shape)}")
        row = math.prod(x.shape[1:]) * x.element_size()
        padded = torch.zeros(-(-max(lengths) * row // 8) * 8, dtype=torch.uint8, device=x.device)
        padded[: x.numel() * x.element_size()] = _as_bytes(x)
        everyone = self._gather(padded.view(torch.int64)).to(x.device)
        return [
            everyone[r].view(torch.uint8)[: length * row].clone().view(x.dtype).view(length, *x.shape[1:])
            for r, length in enumerate(lengths)
        ]

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send every rank a tensor of its own, and get one from each (an all-to-all).

        Args:
            parts: What goes to each rank; all of one dtype. The one for this rank comes back as it is.
            shapes: Of what comes from each rank; every rank must know what the others send it.

        Returns:
            One tensor per rank.

        Raises:
            RingPeerError: As in `words`.
        """
        self._check_open("swap")
        got = [parts[self.rank]] * self.world_size
        with self._watched():
            for step in range(1, self.world_size):
                to, source = (self.rank + step) % self.world_size, (self.rank - step) % self.world_size
                got[source] = parts[to].new_empty(shapes[source])
                receive = (source, _as_bytes(got[source])) if got[source].numel() else None
                send = (to, _as_bytes(parts[to])) if parts[to].numel() else None
                hops = self._transport.post(KV, step, receive, send, "swap")
                for hop in hops:
                    self._transport.wait(hop, "swap")
        return got

    @property
    def sent_bytes(self) -> Int64:
        """``int64[world]``: bytes that `swap` has sent, by receiver."""
        return self._transport.sent_bytes[KV].copy()

    def report(self, error: RingPeerError) -> None:
        """Tell the others of a failure met elsewhere, in a ring of the same group; this roll call fails with it."""
        if self._failure is None:
            self._failure = error
            if self._group is not None:
                note_failure(self._group, error)
            self._health.report(Report(error.peer, error.step, error.nbytes, error.phase, error.detail))

    def close(self) -> None:
        """End the threads; calls after it raise."""
        self._closed = True
        self._transport.close()
        self._health.close()

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise RuntimeError(f"{call}: expected an open roll call, got a closed one")
        if self._failure is not None:
            raise self._failure

    def _gather(self, words: Tensor) -> Tensor:
        self._check_open("words, tensors")
        if self.world_size == 1:
            return words[None]
        with self._watched():
            return self._transport.gather(words.to(self._device), "header")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except HopFailed as failed:
            patience = 0.0 if failed.is_broken else self._patience
            self._failure = self._health.conclude(failed.report, patience).error()
            note_failure(self._group, self._failure)
            self._transport.give_up()
            raise self._failure from None


def _as_bytes(x: Tensor) -> Tensor:
    """The elements in order, as ``uint8[bytes]``: a view where they lie so."""
    # What has one element counts as contiguous whatever its strides are, which view(dtype) does not forgive.
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)
