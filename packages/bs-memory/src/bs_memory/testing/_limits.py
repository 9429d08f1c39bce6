"""Hard memory limits, to see what really happens when memory runs out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal


@contextlib.contextmanager
def limited_memory(headroom: int, *, limit: Literal["address_space", "data"] = "address_space") -> Iterator[int]:
    """Lets this process allocate about `headroom` more bytes and no more (Linux). Best used in a child process.

    Args:
        headroom: bytes above what the process uses now.
        limit: what to bound: `address_space` (`RLIMIT_AS`) or private `data` (`RLIMIT_DATA`).

    Yields:
        The limit in bytes. The old one is back afterwards.

    Raises:
        ValueError: if `headroom` is negative, or `limit` is neither.
        OSError: where there is no /proc/self/status.
    """
    import resource

    if headroom < 0:
        raise ValueError(f"headroom: expected a number of bytes ≥ 0, got {headroom}")
    kinds = {"address_space": (resource.RLIMIT_AS, "VmSize"), "data": (resource.RLIMIT_DATA, "VmData")}
    if limit not in kinds:
        raise ValueError(f"limit: expected 'address_space' or 'data', got {limit!r}")
    kind, field = kinds[limit]
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (used + headroom, hard))
    try:
        yield used + headroom
    finally:
        resource.setrlimit(kind, (soft, hard))
