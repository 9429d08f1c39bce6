"""The packed messages of one rank: two leased buffers per direction and kind, used by even and odd steps in turn.

Shape legend: B batch, T tokens of an arrival, H kv heads, D and E head dims of K and V, R rows of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bs_memory import BufferPool

from .plan import FLOAT8_ROW_BYTES
from .wire import FLOAT8, RowSet, StepWire

#: Buffers of failed rings: a peer that wakes up may still write into them, so they are never used again.
_QUARANTINE: list[Any] = []


def scale_bytes(wire_dtype: torch.dtype) -> int:
    """Bytes that a row of K and of V takes beside its elements: a float32 scale for each on a float8 wire."""
    return FLOAT8_ROW_BYTES if wire_dtype == FLOAT8 else 0


class PackedBuffers:
    """Packs ``[K | V]`` messages, and gradient messages on the way home; unpacks what came in.

    Args:
        pool: Where buffers are leased, each as large as its largest step needs.
        wires: Of the rank, step 0 first.
        batch: B.
        heads: H.
        dims: (D, E).
        dtype: Of K and V.
        wire_dtype: Of K and V on the wire.
        grad_dtype: Of gradients.
        device: Of all of them.
    """

    def __init__(
        self,
        pool: BufferPool,
        wires: Sequence[StepWire],
        *,
        batch: int,
        heads: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        wire_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._wires = wires
        self._batch, self._heads, self._dims = batch, heads, dims
        self._dtype, self._wire_dtype, self._grad_dtype = dtype, wire_dtype, grad_dtype
        sizes: dict[str, int] = {}
        for wire in wires[1:]:
            for rows, out, home in ((wire.send, "send", "grad_receive"), (wire.receive, "receive", "grad_send")):
                if rows is not None:
                    for name in (out, home):
                        key = f"{name}{wire.step % 2}"
                        sizes[key] = max(sizes.get(key, 0), self._nbytes(name, rows))
            if wire.receive is not None and not self._is_tensor(wire.receive):
                needed = batch * wire.tokens * heads * sum(dims) * dtype.itemsize
                sizes["arrival"] = max(sizes.get("arrival", 0), needed)
        self._leases = {name: pool.lease((n,), torch.uint8, device) for name, n in sizes.items()}
        self._tensors = {name: lease.tensor for name, lease in self._leases.items()}

    # ------------------------------------------------------------------ the way out

    def pack(self, step: int, k: Tensor, v: Tensor) -> Tensor:
        """The message of a step that sends, filled with its rows of the own ``[B, S, H, ·]``."""
        rows = self._sent(step)
        message = self._message("send", step, rows)
        parts, scales = self._kv_parts(message, rows)
        for i, source in enumerate((k, v)):
            if scales is None:
                rows.take(source, parts[i])
            else:
                rows.take_scaled(source, parts[i], scales[i])
        return message

    def inbox(self, step: int) -> Tensor:
        """Where the message of a step that receives will be."""
        return self._message("receive", step, self._received(step))

    def unpack(self, step: int) -> tuple[Tensor, Tensor]:
        """What is in the inbox of a step, as ``[B, T, H, D]`` and ``[B, T, H, E]``; rows that did not travel are 0."""
        rows = self._received(step)
        parts, scales = self._kv_parts(self.inbox(step), rows)
        if scales is not None:
            parts = tuple(part.float() * scale[..., None] for part, scale in zip(parts, scales, strict=True))
        if self._is_tensor(rows):
            k, v = parts
        else:
            k, v = self._parts(self._tensors["arrival"], self._wires[step].tokens * self._heads, self._dtype)
        k, v = (x.view(self._batch, -1, self._heads, dim) for x, dim in zip((k, v), self._dims, strict=True))
        if not self._is_tensor(rows):
            rows.put(parts[0], k)
            rows.put(parts[1], v)
        return k, v

    # ------------------------------------------------------------------ the way home

    def pack_home(self, step: int, shares: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient message of a step that received, filled with its rows of ``[B, T, H, ·]``."""
        rows = self._received(step)
        message = self._message("grad_send", step, rows)
        for part, share in zip(self._parts(message, rows.count, self._grad_dtype), shares, strict=True):
            rows.take(share, part)
        return message

    def inbox_home(self, step: int) -> Tensor:
        """Where the gradients of a step that sent will be."""
        return self._message("grad_receive", step, self._sent(step))

    def add_home(self, step: int, totals: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of a step that sent to the own ``[B, S, H, ·]``."""
        rows = self._sent(step)
        for part, total in zip(self._parts(self.inbox_home(step), rows.count, self._grad_dtype), totals, strict=True):
            rows.add(part, total)

    # ------------------------------------------------------------------ life

    def release(self) -> None:
        """Give all buffers back."""
        for lease in self._leases.values():
            lease.release()
        self._leases, self._tensors = {}, {}

    def quarantine(self) -> None:
        """Leave all buffers to nobody, for good."""
        _QUARANTINE.append(self._leases)
        self._leases, self._tensors = {}, {}

    # ------------------------------------------------------------------ layout of a message

    def _sent(self, step: int) -> RowSet:
        rows = self._wires[step].send
        assert rows is not None
        return rows

    def _received(self, step: int) -> RowSet:
        rows = self._wires[step].receive
        assert rows is not None
        return rows

    def _is_tensor(self, rows: RowSet) -> bool:
        """Whether the parts of a message are the arrival as it stands."""
        return rows.index is None and self._wire_dtype == self._dtype

    def _message(self, name: str, step: int, rows: RowSet) -> Tensor:
        """The bytes of a step's message within the buffer of its parity."""
        return self._tensors[f"{name}{step % 2}"][: self._nbytes(name, rows)]

    def _nbytes(self, name: str, rows: RowSet) -> int:
        if name.startswith("grad"):
            row = sum(self._dims) * self._grad_dtype.itemsize
        else:
            row = sum(self._dims) * self._wire_dtype.itemsize + scale_bytes(self._wire_dtype)
        return self._batch * rows.count * row

    def _kv_parts(self, message: Tensor, rows: RowSet) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """K and V of a message, and before them, on a float8 wire, their scales ``float32[2, B, R]``."""
        head = self._batch * rows.count * scale_bytes(self._wire_dtype)
        scales = message[:head].view(torch.float32).view(2, self._batch, rows.count) if head else None
        return self._parts(message[head:], rows.count, self._wire_dtype), scales

    def _parts(self, message: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[B, count, D]`` and ``[B, count, E]``, one after the other."""
        cut, end = (self._batch * count * width for width in (self._dims[0], sum(self._dims)))
        elements = message[: end * dtype.itemsize].view(dtype)
        shape = (self._batch, count)
        return elements[:cut].view(*shape, self._dims[0]), elements[cut:].view(*shape, self._dims[1])
