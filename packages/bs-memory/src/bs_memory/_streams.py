"""What the pool and the cache need to know of an accelerator's streams, and nothing more.

The protocol exists so that the reuse rules can be tested without a GPU: `bs_memory.testing.FakeStreams` implements it
with a clock that the test turns.
"""

from collections import deque
from typing import Any, Protocol

import torch


class StreamBackend(Protocol):
    """Streams and events of one device. No method but `synchronize` may block the host."""

    def current(self) -> Any:
        """The stream that work issued now by this thread goes to; hashable and comparable."""
        ...

    def record(self, stream: Any) -> Any:
        """An event that is done once everything issued to `stream` so far is done."""
        ...

    def done(self, event: Any) -> bool:
        """Whether the event has happened, without waiting for it."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Makes `stream`, not the host, wait for `event`."""
        ...

    def synchronize(self, event: Any) -> None:
        """Blocks the host until `event` has happened."""
        ...

    def recycle(self, event: Any) -> None:
        """Takes back an event nobody will ask about again."""
        ...

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph, where events must not be queried."""
        ...

    def keep_alive(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keeps torch's allocator from reusing `tensor`'s memory before the work now queued on `stream` is done."""
        ...


class TorchStreams:
    """Streams of a real accelerator (`torch.cuda`, and `torch.xpu` which has the same shape)."""

    _KEEP_EVENTS = 256

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        # Creating an event costs a driver call; recording one again, on its own device, does not. Atomic steps only.
        self._spare: dict[Any, deque[Any]] = {}

    def current(self) -> Any:
        return self._module.current_stream(self._device)

    def record(self, stream: Any) -> Any:
        try:
            event = self._spare[stream.device].pop()
        except (KeyError, IndexError):
            event = self._module.Event()
        event.record(stream)
        return event

    def done(self, event: Any) -> bool:
        return event.query()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def recycle(self, event: Any) -> None:
        device = getattr(event, "device", None)  # without one, the event is not used again
        self._spare.setdefault(device, deque(maxlen=self._KEEP_EVENTS)).append(event)

    def capturing(self) -> bool:
        probe = getattr(self._module, "is_current_stream_capturing", None)
        return bool(probe and probe())

    def keep_alive(self, tensor: torch.Tensor, stream: Any) -> None:
        # record_stream defers the reuse until the work that is queued on `stream` *when the tensor is freed* is done;
        # it does not order anything by itself, which is why reuse inside the pool goes by events instead.
        tensor.record_stream(stream)


def streams_of(device: torch.device, *, pinned: bool = False) -> StreamBackend | None:
    """The streams that may touch memory of `device` after a call has returned.

    Args:
        device: where the memory is.
        pinned: whether it is pinned host memory, which the current accelerator copies from and to.

    Returns:
        None where work is done when the call returns (CPU, meta) or there is only one queue.
    """
    if pinned:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return None
        device = torch.device(accelerator.type)  # no index: `current` follows the current device
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    if hasattr(module, "current_stream") and hasattr(module, "Event"):
        return TorchStreams(device)
    return None
