"""Which backend computes a problem, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .backends.base import Backend, Problem
from .backends.native import NativeBackend
from .backends.reference import ReferenceBackend
from .backends.torch_blocks import TorchBackend
from .backends.triton import TritonBackend

__all__ = ["BACKENDS", "PLANNED", "BackendReport", "BackendTable", "explain", "get_backend", "select"]

#: Every backend, in the order in which ``backend="auto"`` tries them. To add one: implement `Backend`, list it here.
BACKENDS: tuple[Backend, ...] = (NativeBackend(), TritonBackend(), TorchBackend(), ReferenceBackend())

#: Backends that users may know of and that this version does not have.
PLANNED = ("flex", "flash")

_BY_NAME = {backend.name: backend for backend in BACKENDS}


@dataclass(frozen=True)
class BackendReport:
    """One backend's answer to a problem.

    Attributes:
        name: the backend.
        reasons: why it cannot compute the problem; empty if it can.
        selected: whether ``backend="auto"`` takes it.
    """

    name: str
    reasons: tuple[str, ...]
    selected: bool

    @property
    def supported(self) -> bool:
        """Whether the backend can compute the problem."""
        return not self.reasons


class BackendTable(tuple[BackendReport, ...]):
    """The answers of all backends, in the order in which they are tried; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max(len(report.name) for report in self)
        lines = []
        for report in self:
            verdict = "selected" if report.selected else "can run" if report.supported else "cannot: "
            lines.append(f"{report.name:<{width}}  {verdict}{'; '.join(report.reasons)}")
        return "\n".join(lines)

    @property
    def selected(self) -> str:
        """The backend that ``backend="auto"`` takes."""
        return next(report.name for report in self if report.selected)


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        TypeError: not a string.
        ValueError: no such backend, or one that is not part of this version.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend: expected a string, got {type(name).__name__}")
    if name in _BY_NAME:
        return _BY_NAME[name]
    known = ", ".join(["auto", *_BY_NAME])
    if name in PLANNED:
        raise ValueError(f"backend: {name!r} is not part of this version of bs-kernels; expected one of {known}")
    raise ValueError(f"backend: expected one of {known}, got {name!r}")


@lru_cache(maxsize=1024)
def select(name: str, problem: Problem) -> Backend:
    """The backend to run: the named one or, for "auto", the first that can.

    Raises:
        ValueError: the named backend cannot compute the problem; the message lists its reasons.
    """
    if name == "auto":
        return next(
            backend
            for backend in BACKENDS
            if not backend.not_supported_reasons(problem) and not _is_for_checking(backend, problem)
        )
    backend = get_backend(name)
    if reasons := backend.not_supported_reasons(problem):
        raise ValueError(f"backend: {name!r} cannot compute this: {'; '.join(reasons)}")
    return backend


def _is_for_checking(backend: Backend, problem: Problem) -> bool:
    """Whether a backend runs here only when it is named: Triton on a CPU is an interpreter."""
    return backend.name == "triton" and problem.device == "cpu"


def explain(problem: Problem) -> BackendTable:
    """Ask every backend, including those that are not part of this version."""
    chosen = select("auto", problem).name
    reports: list[BackendReport] = []
    for backend in BACKENDS:
        reasons: Sequence[str] = backend.not_supported_reasons(problem)
        reports.append(BackendReport(backend.name, tuple(reasons), backend.name == chosen))
    missing = (name for name in PLANNED if name not in _BY_NAME)
    reports.extend(BackendReport(name, ("not part of this version",), False) for name in missing)
    return BackendTable(reports)
