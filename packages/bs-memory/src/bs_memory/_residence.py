"""Where a cached value's tensors live, and which streams may already read them."""

from collections.abc import Callable
from typing import Any

import torch

from bs_memory._streams import StreamBackend


class Residence:
    """The tensors of one value on one accelerator.

    The value was written by work on the stream of the thread that built it. Another stream must wait for that work
    before it reads, and torch's allocator must hear of that stream, or it would hand the memory of a dropped value to
    the building stream while the other still reads.
    """

    __slots__ = ("_ready", "_seen", "_streams", "_tensors")

    def __init__(self, streams: StreamBackend, tensors: list[torch.Tensor]) -> None:
        self._streams = streams
        self._tensors = tensors
        home = streams.current()
        self._ready = None if streams.capturing() else streams.record(home)
        self._seen: set[Any] = {home}

    def enter(self) -> None:
        """Makes the value safe to read on the current stream; once per stream, without blocking the host."""
        stream = self._streams.current()
        if stream in self._seen:
            return
        if self._streams.capturing():
            return  # a graph must be warmed up before it is captured; an event from outside may not enter it
        if self._ready is not None:
            self._streams.wait(stream, self._ready)
        for tensor in self._tensors:
            self._streams.keep_alive(tensor, stream)
        self._seen.add(stream)


def residences(tensors: list[torch.Tensor], streams_of: Callable[..., StreamBackend | None]) -> tuple[Residence, ...]:
    """Groups a value's accelerator tensors by device."""
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    found = []
    for device, group in groups.items():
        streams = streams_of(device)
        if streams is not None:
            found.append(Residence(streams, group))
    return tuple(found)
