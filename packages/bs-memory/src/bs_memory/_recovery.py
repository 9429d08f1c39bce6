"""oom_recovery: free, retry, split, and only then (and only if allowed) approximate."""

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bs_memory import _check
from bs_memory._devices import canonical_device
from bs_memory._errors import RecoveryError
from bs_memory._oom import is_oom_error
from bs_memory._readings import read_memory
from bs_memory._reclaim import free_memory, note_failure
from bs_memory._report import RecoveryReport, RecoveryStep, human, requested_bytes, what_would_fit
from bs_memory._streams import streams_of

T = TypeVar("T")
_log = logging.getLogger("bs_memory")


@dataclass(frozen=True, slots=True)
class Approximation:
    """Other work that gives a different result in less memory, to be used by permission only.

    Attributes:
        name: what it changes, for the log and the report ("smaller blocks", "lower density").
        work: as `oom_recovery`'s `work`; split like it.
        size: as `oom_recovery`'s `size`.
        combine: as `oom_recovery`'s `combine`.
        granularity: as `oom_recovery`'s `granularity`.
    """

    name: str
    work: Callable[..., Any]
    size: int | None = None
    combine: Callable[[list[Any]], Any] | None = None
    granularity: int = 1


def oom_recovery(
    work: Callable[..., T],
    *,
    size: int | None = None,
    combine: Callable[[list[T]], T] | None = None,
    granularity: int = 1,
    piece_size: int | None = None,
    device: torch.device | str | int | None = None,
    free: Sequence[Callable[[], object]] = (),
    approximations: Sequence[Approximation] = (),
    allow_approximation: bool = False,
    name: str = "work",
    unit: str = "units",
) -> tuple[T, RecoveryReport]:
    """Runs `work`, and gets through running out of memory where that is possible.

    In this order, each step only if the one before still ran out: the whole work; free what pools, caches and
    allocators hold unused and run it again; run it in pieces, each half of the one that failed, in multiples of
    `granularity`; with permission, each approximation in the same way; a `RecoveryError` that says what would fit.

    Work is repeated after a failure, so it must be idempotent: the same arguments, the same result, whatever an
    earlier attempt left half written. It draws no random numbers from a shared generator and runs no collective that
    other ranks would not repeat. Splitting gives the same bits exactly if the work computes its units independently.

    Args:
        work: `work()` without `size`; with it `work(start, stop)`, the units `start ≤ i < stop`, either returning
            their result or writing it in place and returning None.
        size: number of units, ≥ 0; None for work that cannot be split.
        combine: puts the results of consecutive pieces together; called only if there are several. None for work
            that returns None. It needs memory for its result next to the pieces; writing in place does not.
        granularity: pieces are multiples of this many units, but for the last.
        piece_size: units per piece to begin with, such as an earlier report's `piece_size`; None begins with the whole.
        device: where memory may run out; None to go by the error (the current accelerator for
            `torch.OutOfMemoryError`, else the CPU).
        free: further functions that give memory up.
        approximations: what may be tried last, best first.
        allow_approximation: permits them. Without it they are only mentioned in the error.
        name: what the work is called, in log and error.
        unit: what its units are called, in the plural.

    Returns:
        The result and the report of how it came about. An approximate result has `report.exact == False`.

    Raises:
        RecoveryError: if everything permitted ran out of memory. It is a `MemoryError`.
        TypeError: if an argument has the wrong type, or `work` returns something under `size` and there is no
            `combine`, so that it could not be split.
        ValueError: if a number is out of range, an argument needs `size` and there is none, or
            `allow_approximation` has nothing to allow.

    Any other exception of `work` passes through untouched, as does running out of memory while a CUDA graph is being
    captured, where nothing may be freed.
    """
    _check_splitting(work, size, combine, granularity)
    _check.bound("piece_size", piece_size)
    if size is None and piece_size is not None:
        raise ValueError("piece_size: expected none without a size, got one")
    for index, give in enumerate(free):
        _check.function(f"free[{index}]", give)
    for index, approximation in enumerate(approximations):
        if not isinstance(approximation, Approximation):
            raise TypeError(f"approximations[{index}]: expected an Approximation, got {type(approximation).__name__}")
        _check_splitting(approximation.work, approximation.size, approximation.combine, approximation.granularity)
    _check.boolean("allow_approximation", allow_approximation)
    if allow_approximation and not approximations:
        raise ValueError("allow_approximation: expected False without approximations, got True")
    where = None if device is None else canonical_device(device)
    failure = None
    if piece_size is None or size is None or piece_size >= size:
        try:
            return _run(work, combine, size), RecoveryReport(piece_size=size)
        except Exception as error:
            where = where or _device_of(error)
            if not _can_recover(error, where):
                raise
            failure = _released(error)
    where = where or _device_of(None)
    # Outside the handler: while it runs, the exception keeps the failed attempt's frames and their tensors alive.
    attempt = _Attempt(work, size, combine, granularity, where, free, name, unit)
    value, failure = attempt.recover(failure, piece_size)
    if failure is None:
        return value, attempt.report(None)
    steps, tried = attempt.steps, [attempt.failed_in_words()]
    for approximation in approximations if allow_approximation else ():
        _log.warning("%s: out of memory on %s; approximating: %s", name, where, approximation.name)
        steps.append(RecoveryStep("approximate", approximation.name))
        other = approximation.work, approximation.size, approximation.combine, approximation.granularity
        attempt = _Attempt(*other, where, free, f"{name} ({approximation.name})", unit, steps)
        value, failure = attempt.recover(failure, None)
        if failure is None:
            return value, attempt.report(approximation.name)
        tried.append(attempt.failed_in_words())
    untried = [approximation.name for approximation in approximations] if not allow_approximation else []
    raise RecoveryError(_message(attempt, failure, tried, untried), attempt.report(None)) from failure


class _Attempt:
    """One piece of work on its way through free, retry and split."""

    def __init__(
        self,
        work: Callable[..., Any],
        size: int | None,
        combine: Callable[[list[Any]], Any] | None,
        granularity: int,
        device: torch.device,
        free: Sequence[Callable[[], object]],
        name: str,
        unit: str,
        steps: list[RecoveryStep] | None = None,
    ) -> None:
        self._work = work
        self._size = size
        self._combine = combine
        self._granularity = granularity
        self.device = device
        self._free = free
        self.name = name
        self.unit = unit
        self.steps = [] if steps is None else steps
        self.tried: list[int] = []  # piece sizes that ran out, the whole aside
        self.smallest = size  # units in the smallest attempt that ran out
        self._pieces = 1
        self._piece_size = size

    def report(self, approximation: str | None) -> RecoveryReport:
        return RecoveryReport(tuple(self.steps), self._pieces, self._piece_size, approximation)

    def recover(self, failure: BaseException | None, piece_size: int | None) -> tuple[Any, BaseException | None]:
        """Returns (value, None), or (None, the last failure).

        Args:
            failure: what ran out before; None to begin with pieces at once.
            piece_size: units per piece to begin with; None to halve the whole.
        """
        if failure is not None:
            self._give_back()
            self.steps.append(RecoveryStep("retry", "the whole work"))
            value, failure = self._guarded(lambda: _run(self._work, self._combine, self._size))
            if failure is None:
                return value, None
        if self._size is None or self._size <= self._granularity:
            return None, failure
        return self._in_pieces(self._half(self._size) if piece_size is None else piece_size)

    def _guarded(self, run: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            return run(), None
        except Exception as error:
            if not _can_recover(error, self.device):
                raise
            return None, _released(error)

    def _in_pieces(self, piece_size: int) -> tuple[Any, BaseException | None]:
        assert self._size is not None
        results: list[Any] = []
        start = 0
        self._piece_size = self._rounded(piece_size)
        if self.steps:  # else nothing ran out so far: the caller asked for pieces
            self._note_split()
        while start < self._size:
            begin, stop = start, min(start + self._piece_size, self._size)
            value, failure = self._guarded(lambda begin=begin, stop=stop: _run(self._work, self._combine, stop, begin))
            if failure is None:
                results.append(value)
                start = stop
                continue
            units = stop - start
            self.tried.append(units)
            self.smallest = units
            if units <= self._granularity:
                self._pieces = len(results) + 1
                return None, failure
            self._give_back()
            self._piece_size = self._half(units)
            self._note_split()
        self._pieces = len(results)
        if self._combine is None or len(results) == 1:
            return results[0], None
        combine = self._combine
        value, failure = self._guarded(lambda: combine(results))
        if failure is not None:
            failure.add_note("combine ran out of memory; work that writes in place needs none for it")
        return value, failure

    def _half(self, units: int) -> int:
        return self._rounded((units + 1) // 2)

    def _rounded(self, units: int) -> int:
        return max(1, -(-units // self._granularity)) * self._granularity

    def _note_split(self) -> None:
        detail = f"in pieces of {self._piece_size} of {self._size} {self.unit}"
        _log.warning("%s: out of memory on %s; going on %s", self.name, self.device, detail)
        self.steps.append(RecoveryStep("split", detail, self._piece_size))

    def _give_back(self) -> None:
        note_failure(self.device)
        for give in self._free:
            give()
        freed = free_memory(self.device)
        _log.info("%s: out of memory on %s; pools and caches gave back %d bytes", self.name, self.device, freed)
        self.steps.append(RecoveryStep("free", f"pools and caches gave back {human(freed)}"))

    def failed_in_words(self) -> str:
        text = self.name
        if self._size is not None:
            text += f", whole ({self._size} {self.unit})"
        if self.tried:
            text += f", in pieces of {', '.join(map(str, dict.fromkeys(self.tried)))}"
        return text


def _run(work: Callable[..., Any], combine: object, stop: int | None, start: int = 0) -> Any:
    if stop is None:
        return work()
    value = work(start, stop)
    if value is not None and combine is None:
        raise TypeError(
            f"work: expected None without a combine, since its size may be split; got {type(value).__name__}"
        )
    return value


def _device_of(error: BaseException | None) -> torch.device:
    """Where memory ran out, as far as the error says."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError) and torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            assert kind is not None
            return torch.device(kind.type, torch.accelerator.current_device_index())
        error = error.__cause__ or error.__context__
    return torch.device("cpu")


def _can_recover(error: BaseException, device: torch.device) -> bool:
    if not is_oom_error(error):
        return False
    streams = streams_of(device)
    return streams is None or not streams.capturing()


def _message(attempt: _Attempt, failure: BaseException | None, tried: list[str], untried: list[str]) -> str:
    need = requested_bytes(failure)
    lines = [f"{attempt.name}: out of memory on {attempt.device} after everything unused was freed."]
    lines.append(f"Tried: {'; '.join(tried)}.")
    sentence = what_would_fit(read_memory(attempt.device), need, attempt.smallest, attempt.unit)
    lines.append(sentence[0].upper() + sentence[1:])
    lines += getattr(failure, "__notes__", [])
    if untried:
        lines.append(f"Not tried without allow_approximation=True: {', '.join(untried)}.")
    return " ".join(lines)


def _released(error: BaseException) -> BaseException:
    """Makes an exception let go of the frames it came through, and of the tensors in them."""
    _log.debug("out of memory", exc_info=error)
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None
        queue += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            queue += current.exceptions
    return error


def _check_splitting(work: object, size: int | None, combine: object, granularity: int) -> None:
    _check.function("work", work)
    if size is not None:
        _check.integer("size", size, 0)
    if combine is not None:
        _check.function("combine", combine)
    _check.integer("granularity", granularity, 1)
    if size is None:
        for argument, given in (("combine", combine is not None), ("granularity", granularity != 1)):
            if given:
                raise ValueError(f"{argument}: expected none without a size, got one")
