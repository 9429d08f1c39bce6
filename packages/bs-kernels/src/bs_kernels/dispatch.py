"""Which backend computes a problem, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .backends.base import Backend, Call, Detailed, Problem
from .backends.flash import FlashBackend
from .backends.flex import FlexBackend
from .backends.native import NativeBackend
from .backends.reference import ReferenceBackend
from .backends.torch_blocks import TorchBackend
from .backends.triton import TritonBackend
from .hardware import Facts, Ranked, find_facts, rank_backends

__all__ = ["BACKENDS", "BackendReport", "BackendTable", "choose", "explain", "get_backend", "select"]

#: Every backend, in the order in which ``backend="auto"`` tries them. To add one: implement `Backend`, list it here.
#: Which of them, and in which order on other devices, `hardware.rank_backends` says.
BACKENDS: tuple[Backend, ...] = (
    NativeBackend(),
    FlashBackend(),
    TorchBackend(),
    FlexBackend(),
    TritonBackend(),
    ReferenceBackend(),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}


@dataclass(frozen=True)
class BackendReport:
    """One backend's answer to a problem.

    Attributes:
        name: the backend.
        reasons: why it cannot compute the problem; empty if it can.
        selected: whether ``backend="auto"`` takes it.
        why: why the backend has this place in the order on this device.
        detail: how it would run, where it has variants: the native core names its instruction set.
    """

    name: str
    reasons: tuple[str, ...]
    selected: bool
    why: str = ""
    detail: str = ""

    @property
    def supported(self) -> bool:
        """Whether the backend can compute the problem."""
        return not self.reasons


class BackendTable(tuple[BackendReport, ...]):
    """The answers of all backends, in the order in which they are tried; prints as a table.

    Attributes:
        facts: about the device.
    """

    facts: Facts | None = None

    def __str__(self) -> str:
        width = max(len(report.name) for report in self)
        lines = [] if self.facts is None else [f"on {self.facts}"]
        for report in self:
            verdict = "selected" if report.selected else "can run" if report.supported else "cannot: "
            remarks = "; ".join(text for text in (report.why, report.detail) if text) if report.supported else ""
            remarks = f"  ({remarks})" if remarks else ""
            lines.append(f"{report.name:<{width}}  {verdict}{'; '.join(report.reasons)}{remarks}")
        return "\n".join(lines)

    @property
    def selected(self) -> str:
        """The backend that ``backend="auto"`` takes."""
        return next(report.name for report in self if report.selected)


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        TypeError: not a string.
        ValueError: no such backend.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend: expected a string, got {type(name).__name__}")
    if name in _BY_NAME:
        return _BY_NAME[name]
    known = ", ".join(["auto", *_BY_NAME])
    raise ValueError(f"backend: expected one of {known}, got {name!r}")


@lru_cache(maxsize=1024)
def select(name: str, problem: Problem) -> Backend:
    """Who would compute a problem: the named backend or, for "auto", the first that can.

    Raises:
        ValueError: the named backend cannot compute the problem; the message lists its reasons.
    """
    if name == "auto":
        return next(_automatic(problem))
    backend = get_backend(name)
    _refuse_if(name, backend.not_supported_reasons(problem))
    return backend


def choose(name: str, problem: Problem, call: Call) -> Backend:
    """The backend to run: what `select` says unless that one, with the tensors at hand, declines.

    Raises:
        ValueError: the named backend cannot compute the call; the message lists its reasons.
    """
    backend = select(name, problem)
    reasons = _refusals(backend, problem, call)
    if not reasons:
        return backend
    if name != "auto":
        _refuse_if(name, reasons)
    return next(other for other in _automatic(problem) if not _refusals(other, problem, call))


def _automatic(problem: Problem) -> Iterator[Backend]:
    """The backends that ``backend="auto"`` may take and that say nothing against the problem, in their order."""
    ranked = (backend for backend, place in _ordered(Facts(problem.device)) if place.automatic)
    return (backend for backend in ranked if not backend.not_supported_reasons(problem))


def _refusals(backend: Backend, problem: Problem, call: Call) -> list[str]:
    # By attribute: asking a protocol takes longer than anything else here.
    inspect = getattr(backend, "refusals", None)
    return [] if inspect is None else inspect(call, problem.backward)


def _refuse_if(name: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"backend: {name!r} cannot compute this: {'; '.join(reasons)}")


def _ordered(facts: Facts) -> list[tuple[Backend, Ranked]]:
    """The backends in the order of a device; those that it does not rank come first."""
    ranked = {place.name: (at, place) for at, place in enumerate(rank_backends(facts))}
    places = [(*ranked.get(backend.name, (-1, Ranked(backend.name, ""))), backend) for backend in BACKENDS]
    return [(backend, place) for _, place, backend in sorted(places, key=lambda found: found[0])]


def explain(problem: Problem, call: Call, device: torch.device) -> BackendTable:
    """Ask every backend.

    Args:
        problem: what is to be computed.
        call: its tensors.
        device: where.
    """
    chosen, facts = choose("auto", problem, call).name, find_facts(device)
    reports: list[BackendReport] = []
    for backend, place in _ordered(facts):
        reasons = tuple(backend.not_supported_reasons(problem) or _refusals(backend, problem, call))
        detail = backend.detail(problem) if isinstance(backend, Detailed) and not reasons else ""
        reports.append(BackendReport(backend.name, reasons, backend.name == chosen, place.why, detail))
    table = BackendTable(reports)
    table.facts = facts
    return table
