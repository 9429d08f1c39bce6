"""A clock, a memory and streams that do what the test says."""

from typing import Any

import torch

from bs_memory._readings import MemoryReading


class FakeClock:
    """A monotonic clock that the test turns: `MemoryPressure(clock=FakeClock())`."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds


class FakeMemory:
    """A memory with as much room as the test says: `MemoryPressure(reader=FakeMemory(total=1000))`.

    Attributes:
        free, total: what the next reading says.
        reads: how often it was read.
    """

    def __init__(self, total: int, free: int | None = None) -> None:
        self.total = total
        self.free = total if free is None else free
        self.reads = 0

    def __call__(self, device: torch.device) -> MemoryReading:
        self.reads += 1
        return MemoryReading(self.free, self.total, "fake")


class FakeStreams:
    """The streams of an accelerator on CPU tensors: `BufferPool(streams=FakeStreams())`.

    Streams are named by strings. Work is issued with `issue` and done when `finish` says so; events know how far their
    stream had got. It serves every device, as if one accelerator could touch all memory.

    Attributes:
        current_stream: where work goes now.
        is_capturing: whether that stream is being captured.
        waits: (stream, event) pairs of streams made to wait.
        host_waits: events that the host waited for.
        kept: (data pointer, stream) pairs that the allocator was told about.
    """

    def __init__(self) -> None:
        self.current_stream = "main"
        self.is_capturing = False
        self.waits: list[tuple[str, tuple[str, int]]] = []
        self.host_waits: list[tuple[str, int]] = []
        self.kept: list[tuple[int, str]] = []
        self._issued: dict[str, int] = {}
        self._finished: dict[str, int] = {}

    def __call__(self, device: torch.device, *, pinned: bool = False) -> "FakeStreams":
        return self

    def issue(self, stream: str | None = None) -> tuple[str, int]:
        """Queues a piece of work; returns what `happened` and `ordered` ask about."""
        stream = self.current_stream if stream is None else stream
        self._issued[stream] = self._issued.get(stream, 0) + 1
        return stream, self._issued[stream]

    def finish(self, stream: str, count: int | None = None) -> None:
        """Completes the next `count` pieces of work on a stream; None completes all."""
        issued = self._issued.get(stream, 0)
        done = issued if count is None else min(issued, self._finished.get(stream, 0) + count)
        self._finished[stream] = done

    def happened(self, work: tuple[str, int]) -> bool:
        """Whether a piece of work is done."""
        return self._finished.get(work[0], 0) >= work[1]

    def ordered(self, work: tuple[str, int], stream: str) -> bool:
        """Whether `stream`'s next work comes after `work`: done, on the same stream, or waited for."""
        if work[0] == stream or self.happened(work):
            return True
        return any(waiter == stream and event[0] == work[0] and event[1] >= work[1] for waiter, event in self.waits)

    def current(self) -> str:
        return self.current_stream

    def record(self, stream: str) -> tuple[str, int]:
        assert not self.is_capturing, "an event recorded during capture can never be queried"
        return stream, self._issued.get(stream, 0)

    def done(self, event: tuple[str, int]) -> bool:
        assert not self.is_capturing, "querying an event during capture is an error"
        return self.happened(event)

    def wait(self, stream: str, event: tuple[str, int]) -> None:
        self.waits.append((stream, event))

    def synchronize(self, event: tuple[str, int]) -> None:
        self.host_waits.append(event)
        self._finished[event[0]] = max(self._finished.get(event[0], 0), event[1])

    def recycle(self, event: Any) -> None:
        pass

    def capturing(self) -> bool:
        return self.is_capturing

    def keep_alive(self, tensor: torch.Tensor, stream: str) -> None:
        self.kept.append((tensor.data_ptr(), stream))
