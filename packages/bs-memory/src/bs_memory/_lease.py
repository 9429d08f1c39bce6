"""A lease: the exclusive right to one buffer."""

from types import TracebackType
from typing import Any, NoReturn

import torch

from bs_memory._errors import LeaseError
from bs_memory._storage import Block, drop


class Lease:
    """The exclusive right to one buffer, from `BufferPool.lease` until `release`.

    As a context manager it yields the tensor and releases on the way out, whatever the way out is. It may be released
    by another thread than the one that took it. A lease that is garbage-collected without a release is *abandoned*:
    somebody may still hold its tensor, so that the pool gives the buffer up instead of reusing it, and counts it.
    """

    __slots__ = ("__weakref__", "_block", "_pool", "_tensor")

    _block: Block | None
    _tensor: torch.Tensor | None

    def __init__(self, pool: object, block: Block, tensor: torch.Tensor) -> None:
        self._pool = pool  # lives as long as its leases
        self._block = block
        self._tensor = tensor

    @property
    def tensor(self) -> torch.Tensor:
        """The buffer, contiguous, uninitialised, in the shape and dtype asked for.

        Raises:
            LeaseError: after the release.
        """
        tensor = self._tensor
        if tensor is None or self._block is None:
            raise LeaseError("lease: expected one that is held, got one already released")
        return tensor

    @property
    def released(self) -> bool:
        """Whether `release` has happened."""
        return self._block is None

    def release(self) -> None:
        """Gives the buffer back. Its tensor, and every view of it, must not be used from here on.

        On an accelerator nothing waits: the pool notes the streams this lease was taken on, is released on and was
        `record_stream`-ed on, and reuses the buffer only when the work queued there is done.

        Raises:
            LeaseError: if it was released before.
        """
        block = self._block
        if block is None:
            raise LeaseError("lease: expected one that is held, got one already released")
        bucket = block.bucket
        with bucket.lock:
            if self._block is None:  # another thread was faster
                raise LeaseError("lease: expected one that is held, got one already released")
            self._block = None
            kept = bucket.take_back(block)
        self._tensor = None  # outside the lock: a graph that hangs on it may run destructors
        if not kept:
            drop(block)

    def record_stream(self, stream: Any) -> None:
        """Tells the pool that `stream` uses the buffer too, besides those current at lease and release.

        Args:
            stream: a stream of the buffer's device; for a pinned host buffer, of any device that copies from or to it.

        Raises:
            LeaseError: after the release.
            ValueError: if the buffer is ordinary host memory, which no stream touches after a call returns.
        """
        block = self._block
        if block is None:
            raise LeaseError("lease: expected one that is held, got one already released")
        if block.bucket.streams is None:
            raise ValueError(f"stream: expected none for a buffer on {block.bucket.device}, got {stream!r}")
        block.extra = (*block.extra, stream)

    def __enter__(self) -> torch.Tensor:
        return self.tensor

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An exception on its way out is worth more than the complaint about a second release.
        if exc_type is None or self._block is not None:
            self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError("lease: expected to stay where it is, since it cannot be copied or pickled")

    def __repr__(self) -> str:
        tensor = self._tensor
        if tensor is None:
            return "Lease(released)"
        return f"Lease({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"
