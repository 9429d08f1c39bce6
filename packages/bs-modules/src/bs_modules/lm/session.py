"""One call of `bsattn train` or `bsattn generate`, from arguments to the last line printed."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .build import picked_layout, starting_weights, trained_layout, trained_model
from .compare import compare_dense, train_once
from .data import Corpus, load_corpus
from .errors import InputError, Interruption
from .generate import generate, stream_text
from .measure import validated_text, validation_windows
from .pictures import draw_layout, draw_loss
from .report import TerminalProgress, compare_table, progress_bar, result_table, verdicts
from .run import Run, locked, new_folder
from .settings import DEFAULT_MINUTES, Settings, settings_from
from .signals import StopSignals
from .team import Team, assemble
from .train import Interrupted, Trainer, keep_freed_memory, resolve, steps_within
from .yardsticks import yardsticks

# Windows of text over which the picture of a gate's picks is drawn.
_PICTURED = 4


def train_session(folder: Path, given: dict[str, Any], *, resume: bool, compare: bool, begun: float) -> None:
    """Starts or continues a run, trains, and reports.

    Args:
        folder: Of the run.
        given: Settings named by the user.
        resume: Whether the run must exist (and be continued) or must not.
        compare: Whether to train the dense controls too.
        begun: `time.perf_counter()` when the process began.

    Raises:
        InputError, RunError, Interruption: See `errors`.
    """
    console = Console(highlight=False)
    keep_freed_memory()
    with StopSignals() as stop:
        if resume:
            run = Run.open(folder)
            corpus = load_corpus(run.settings.data, run.settings.context)
            run.check_same(given, {"text": corpus.digest})
            resolve(run.settings)
            if run.facts.get("torch") != torch.__version__:
                console.print(
                    f"this run was begun with torch {run.facts.get('torch')}; with torch {torch.__version__} the bits "
                    "may differ from those of an uninterrupted run",
                    soft_wrap=True,
                )
            _check_comparable(run.settings, compare)
            with locked(folder), assemble(run.settings, Trainer) as team:
                _train_and_report(run, corpus, console, stop, compare, team)
            return
        settings = settings_from(given, "settings")
        _check_comparable(settings, compare)
        corpus = load_corpus(settings.data, settings.context)
        settings = resolve(settings)
        if settings.start_from is not None:
            starting_weights(settings)  # refused before anything is written
        new_folder(folder)
        with locked(folder), assemble(settings, Trainer) as team:
            settings = _with_steps(settings, corpus, begun, team)
            _stop_early(stop)
            facts = {"text": corpus.digest, "source": corpus.description, "torch": torch.__version__}
            _train_and_report(Run.create(folder, settings, facts), corpus, console, stop, compare, team)


def generate_session(
    folder: Path, prompt: bytes, tokens: int, *, temperature: float, top_k: int | None, seed: int, device: str
) -> Iterator[str]:
    """Yields the prompt and what follows it, as text.

    Raises:
        InputError: No run, no checkpoint, or a corrupt one.
    """
    run = Run.open(folder)
    if not run.started:
        raise InputError(f"run: {folder} has no checkpoint yet")
    settings = resolve(dataclasses.replace(run.settings, device=device))
    model, layout = trained_model(run, settings), trained_layout(settings) or settings.context
    made = generate(model, layout, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
    yield prompt.decode("utf-8", errors="replace")
    yield from stream_text(made)


def _train_and_report(
    run: Run, corpus: Corpus, console: Console, stop: StopSignals, compare: bool, team: Team | None
) -> None:
    settings = run.settings
    console.print(f"[bold]{run.path}[/bold]: {corpus.description}", soft_wrap=True)
    console.print(
        f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} to validate on; {settings.steps:,} "
        f"steps of {settings.batch} × {settings.context:,} tokens in {settings.dtype} on {settings.device}"
        + (f", every sequence shared by {settings.nproc} processes" if team is not None else ""),
        soft_wrap=True,
    )
    try:
        with progress_bar(console) as bar:

            def watch(name: str, steps: int) -> TerminalProgress:
                return TerminalProgress(bar, name, steps)

            assert settings.steps is not None
            result = train_once(run, corpus, watch("training", settings.steps), stop, team=team)
        windows = validation_windows(corpus.validation, settings.context, settings.validation_bytes)
        marks = yardsticks(corpus.train, validated_text(windows))
        run.write_json("yardsticks.json", marks)
        draw_loss(run.path / "loss.png", run.metrics(), marks, result["validation"]["bits_per_byte"])
        layout = trained_layout(settings) or picked_layout(trained_model(run, settings), windows[:_PICTURED])
        draw_layout(run.path / "layout.png", layout)
        console.print(result_table(settings, result, marks))
        if compare:
            with progress_bar(console) as bar:
                controls = compare_dense(run, result["seconds"], corpus, watch, stop)
            results = {"block-sparse": result, **controls}
            run.write_json("compare.json", results)
            console.print(compare_table(results))
            for line in verdicts(results):
                console.print(line, soft_wrap=True)
    except Interrupted as error:
        raise _stopped(run.path, error.step, stop.received, compare) from None
    console.print(f"continue a prompt with: bsattn generate {run.path} --prompt 'def '", soft_wrap=True)


def _with_steps(settings: Settings, corpus: Corpus, begun: float, team: Team | None) -> Settings:
    """Turns minutes into steps where steps were not given."""
    if settings.steps is not None:
        return settings
    minutes = settings.minutes or DEFAULT_MINUTES
    seconds = minutes * 60 - (time.perf_counter() - begun)
    steps = steps_within(settings, corpus, seconds, validation=True, team=team)
    return dataclasses.replace(settings, minutes=minutes, steps=steps)


def _check_comparable(settings: Settings, compare: bool) -> None:
    if compare and settings.attention == "dense":
        raise InputError("compare: the run is dense itself; there is nothing to compare it with")
    if compare and settings.nproc > 1:
        raise InputError(f"compare: the dense controls run in one process, so they need nproc=1, got {settings.nproc}")


def _stop_early(stop: StopSignals) -> None:
    if stop():
        raise Interruption("stopped before the first step; nothing to save", 128 + (stop.received or 0))


def _stopped(folder: Path, step: int, number: int | None, compare: bool) -> Interruption:
    how = f"bsattn train --runs {folder.parent} --name {folder.name} --resume" + " --compare dense" * compare
    return Interruption(f"stopped at step {step:,}; saved; continue with: {how}", 128 + (number or signal.SIGINT))
