"""Where a `Monitor` writes: the log, TensorBoard, Prometheus."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ._checks import check_int
from .monitor import ModuleMetrics

Sample = tuple[Mapping[str, str], float]


class LoggingSink:
    """Writes one line per module that did anything.

    Args:
        logger: A logger, or the name of one.
        level: Of the lines.

    Raises:
        TypeError: An argument has the wrong type.
    """

    def __init__(self, logger: logging.Logger | str = "bs_modules.monitor", level: int = logging.INFO) -> None:
        self.logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        if not callable(getattr(self.logger, "log", None)):
            raise TypeError(f"logger: expected a logger or the name of one, got {logger!r}")
        self.level = check_int("level", level, least=0)

    def write(self, metrics: Mapping[str, ModuleMetrics], step: int | None = None) -> None:
        """Logs the metrics."""
        where = "" if step is None else f"step {step}: "
        for name, found in metrics.items():
            if found.phases:
                self.logger.log(self.level, "%s%s: %s", where, name, describe(found))


def describe(metrics: ModuleMetrics) -> str:
    """The metrics of one module in one line."""
    parts = [f"{metrics.calls:,} calls"]
    if metrics.density is not None:
        asked = "" if metrics.requested_density is None else f" (asked for {metrics.requested_density:g})"
        parts.append(f"density {metrics.density:.4g}{asked}")
    for name, hits, misses in (
        ("layouts", metrics.layout_hits, metrics.layout_misses),
        ("plans", metrics.plan_hits, metrics.plan_misses),
    ):
        if hits + misses:
            parts.append(f"{hits:,} of {hits + misses:,} {name} cached")
    parts += [f"{backend} {phase} × {runs:,}" for (backend, phase), runs in sorted(metrics.backend_runs.items())]
    parts += [f"{phase} {1e3 * time.seconds / time.count:.3g} ms" for phase, time in metrics.phases.items()]
    if metrics.recoveries or metrics.failures:
        parts.append(f"{metrics.recoveries:,} recoveries from want of memory, {metrics.failures:,} failures")
    return ", ".join(parts)


class TensorBoardSink:
    """Writes scalars: density, cache hit rates, milliseconds per phase, runs per backend.

    Args:
        writer: A folder for event files (needs `pip install tensorboard`), or anything with
            `add_scalar(tag, value, global_step)`.
        prefix: Put before every tag.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: `writer` is neither.
    """

    def __init__(self, writer: Any, *, prefix: str = "attention") -> None:
        if isinstance(writer, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard is not installed; install it: pip install tensorboard") from error
            writer = SummaryWriter(os.fspath(writer))
        elif not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected a folder or an object with add_scalar, got {writer!r}")
        self.writer, self.prefix = writer, prefix

    def write(self, metrics: Mapping[str, ModuleMetrics], step: int | None = None) -> None:
        """Adds the scalars of one step."""
        for name, found in metrics.items():
            for tag, value in _scalars(found):
                self.writer.add_scalar(f"{self.prefix}/{name}/{tag}", value, step)


def _scalars(metrics: ModuleMetrics) -> Iterator[tuple[str, float]]:
    for tag, value in (("density", metrics.density), ("requested_density", metrics.requested_density)):
        if value is not None:
            yield tag, value
    for tag, hits, misses in (
        ("layout_hit_rate", metrics.layout_hits, metrics.layout_misses),
        ("plan_hit_rate", metrics.plan_hits, metrics.plan_misses),
    ):
        if hits + misses:
            yield tag, hits / (hits + misses)
    for phase, time in metrics.phases.items():
        yield f"milliseconds/{phase}", 1e3 * time.seconds / time.count
    for (backend, phase), runs in sorted(metrics.backend_runs.items()):
        yield f"runs/{backend}_{phase}", runs
    if metrics.phases:
        yield "recoveries", metrics.recoveries
        yield "failures", metrics.failures


class PrometheusSink:
    """Keeps the last metrics as Prometheus text, and writes them to a file if one is given.

    A file is replaced in one move, so that a collector (node_exporter's textfile collector) never reads half of it. To
    serve it over HTTP, return `sink.text` with the content type `text/plain; version=0.0.4`.

    Args:
        path: A file, by convention `*.prom`; `None` writes none.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.text = ""

    def write(self, metrics: Mapping[str, ModuleMetrics], step: int | None = None) -> None:
        """Renders the metrics. Prometheus stamps times itself, so `step` becomes a metric of its own."""
        self.text = prometheus_text(metrics, step)
        if self.path is not None:
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            part.write_text(self.text, encoding="utf-8")
            part.replace(self.path)


def prometheus_text(metrics: Mapping[str, ModuleMetrics], step: int | None = None) -> str:
    """The metrics in Prometheus' text exposition format 0.0.4.

    Args:
        metrics: By module, as `Monitor.metrics` returns them.
        step: Of the training.
    """
    lines = []
    for name, kind, note, samples_of in _FAMILIES:
        samples = [
            ({"module": module, **labels}, value)
            for module, found in metrics.items()
            for labels, value in samples_of(found)
        ]
        if samples:
            lines += [f"# HELP {name} {note}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{{{_labels(labels)}}} {_number(value)}" for labels, value in samples]
    if step is not None:
        note = "The training step of these figures."
        lines += [f"# HELP bsattn_step {note}", "# TYPE bsattn_step gauge", f"bsattn_step {step}"]
    return "\n".join([*lines, ""])


def _optional(value: float | None) -> list[Sample]:
    return [] if value is None else [({}, value)]


def _lookups(hits: int, misses: int) -> list[Sample]:
    return [({"result": "hit"}, hits), ({"result": "miss"}, misses)] if hits + misses else []


_FAMILIES: tuple[tuple[str, str, str, Callable[[ModuleMetrics], list[Sample]]], ...] = (
    ("bsattn_density", "gauge", "Active / allowed blocks of the last call.", lambda m: _optional(m.density)),
    ("bsattn_requested_density", "gauge", "The density asked for.", lambda m: _optional(m.requested_density)),
    (
        "bsattn_layout_lookups_total",
        "counter",
        "Layouts asked of the module's cache.",
        lambda m: _lookups(m.layout_hits, m.layout_misses),
    ),
    (
        "bsattn_plan_lookups_total",
        "counter",
        "Plans asked of the process's cache.",
        lambda m: _lookups(m.plan_hits, m.plan_misses),
    ),
    (
        "bsattn_backend_runs_total",
        "counter",
        "Runs of each backend.",
        lambda m: [({"backend": b, "phase": p}, runs) for (b, p), runs in sorted(m.backend_runs.items())],
    ),
    (
        "bsattn_phase_runs_total",
        "counter",
        "Runs of each phase.",
        lambda m: [({"phase": phase}, time.count) for phase, time in m.phases.items()],
    ),
    (
        "bsattn_phase_seconds_total",
        "counter",
        "Seconds in each phase.",
        lambda m: [({"phase": phase}, time.seconds) for phase, time in m.phases.items()],
    ),
    (
        "bsattn_memory_recoveries_total",
        "counter",
        "Calls that ran out of memory, by how that ended.",
        lambda m: [({"result": "recovered"}, m.recoveries), ({"result": "failed"}, m.failures)] if m.phases else [],
    ),
)


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
