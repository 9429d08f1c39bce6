"""Large results on a CPU in memory that earlier results have used.

torch hands large CPU tensors back to the system when they die, so that every call touches its results for the first
time: the kernel zeroes each page and, on a virtual machine that gave it back, fetches it from the host. At low density
that takes as long as the attention itself.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from bs_memory import BufferPool, Lease, PoolBudgetError

__all__ = ["empty_result"]

_LEAST = 1 << 22  # bytes of a result; smaller ones come from memory that malloc keeps
_CPU = torch.device("cpu")

#: At most this much is in results or waits for the next; beyond it torch allocates. Idle memory goes under pressure.
_pool = BufferPool(max_bytes=1 << 30)
#: Leases whose tensors are gone; they count as held until the next large result takes them back. A destructor may run
#: anywhere, also inside the pool, so it does no more than append.
_returned: deque[Lease] = deque()


def empty_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """`torch.empty`; on a CPU, a large tensor's memory is used again when the last tensor that shares it dies."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not _LEAST <= nbytes <= (_pool.max_bytes or 0):
        return torch.empty(shape, dtype=dtype, device=device)
    take_back()
    try:
        lease = _pool.lease((nbytes,), torch.uint8, _CPU)
    except PoolBudgetError:
        return torch.empty(shape, dtype=dtype, device=_CPU)
    memory = lease.tensor.numpy()  # held by the storage, and by nothing else
    weakref.finalize(memory, _returned.append, lease).atexit = False
    return torch.empty(0, dtype=dtype, device=_CPU).set_(torch.from_numpy(memory).untyped_storage(), 0, shape)


def take_back() -> None:
    """Gives the memory of dead results to the pool."""
    while _returned:
        try:
            lease = _returned.popleft()
        except IndexError:  # another thread was faster
            return
        lease.release()
