"""What `oom_recovery` did, and the words for what would have fit."""

import re
from dataclasses import dataclass
from typing import Literal

from bs_memory._readings import MemoryReading

_UNITS = {"byte": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_REQUEST = re.compile(r"(?:allocate|buffer of)\s+([\d.]+)\s*([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RecoveryStep:
    """One thing `oom_recovery` did after memory ran out.

    Attributes:
        action: "free" (pools and caches gave up memory), "retry" (the whole work once more), "split" (went on in pieces
            of `piece_size`) or "approximate" (changed the computation).
        detail: the same in words.
        piece_size: units per piece from here on; None where nothing is split.
    """

    action: Literal["free", "retry", "split", "approximate"]
    detail: str
    piece_size: int | None = None


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a result of `oom_recovery` cost.

    Attributes:
        steps: what was done, in order; empty if memory never ran out.
        pieces: how many pieces the result was put together from; 1 for the whole.
        piece_size: units per piece in the end (the smallest that was needed), to start with next time; None for work
            without a size.
        approximation: the name of the approximation whose result this is; None for the work that was asked for.
    """

    steps: tuple[RecoveryStep, ...] = ()
    pieces: int = 1
    piece_size: int | None = None
    approximation: str | None = None

    @property
    def recovered(self) -> bool:
        """Whether memory ran out on the way."""
        return bool(self.steps)

    @property
    def exact(self) -> bool:
        """Whether this is the result of the work that was asked for, and not of an approximation."""
        return self.approximation is None


def requested_bytes(error: BaseException | None) -> int | None:
    """The bytes of the allocation that failed, as its message has them; None if it does not say."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = _REQUEST.search(str(error))
        if found is not None and found[2].lower() in _UNITS:
            return int(float(found[1]) * _UNITS[found[2].lower()])
        error = error.__cause__ or error.__context__
    return None


def human(nbytes: float) -> str:
    """Bytes in the unit that fits: 1536 → "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def what_would_fit(reading: MemoryReading, need: float | None, smallest: int | None, unit: str) -> str:
    """The sentence that tells the user what to change.

    Args:
        reading: free memory after everything was freed.
        need: bytes that the smallest piece tried (or the whole work) asked for at once, if known.
        smallest: units in that piece; None if the work cannot be split.
        unit: what a unit is called, in the plural.
    """
    if reading.total == 0:
        free = "how much is free cannot be read here"
    else:
        free = f"{human(reading.free)} of {human(reading.total)} are free ({reading.source})"
    if need is None:
        return f"{free}."
    asked = f"the last attempt asked for {human(need)}; {free}"
    if reading.total == 0 or reading.free <= 0:
        return f"{asked}."
    if smallest is None:
        if need <= reading.free:
            return f"{asked}, but not in one piece or next to what the work holds by then."
        return f"{asked}. What would fit: about {reading.free / need:.0%} of this work, or a machine with more memory."
    fits = int(smallest * reading.free / need)
    if fits >= smallest:
        return f"{asked}, but not in one piece or next to what the work holds by then."
    if fits >= 1:
        return f"{asked}. What would fit: about {fits} {unit} at a time."
    share = smallest * reading.free / need
    return f"{asked}. What would fit: about {share:.0%} of one of the {unit}, so make each of them smaller."
