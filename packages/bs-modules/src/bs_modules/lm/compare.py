"""The same model under other attention: dense at equal steps, dense at equal seconds, dense with a short context."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from .data import Corpus
from .run import Run
from .settings import Settings
from .team import Team
from .train import Progress, Result, Trainer, steps_within, train

SHORT_CONTEXT = 1024


def finished(run: Run) -> dict[str, Any] | None:
    """The results of a run that ended, else `None`."""
    path = run.path / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def train_once(
    run: Run,
    corpus: Corpus,
    progress: Progress,
    stop: Callable[[], bool],
    windows: list[Any] | None = None,
    visible: int | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Trains a run unless it has ended, and returns (and keeps) its results."""
    found = finished(run)
    if found is None:
        result: Result = train(run, corpus, progress, stop, windows=windows, visible=visible, team=team)
        run.write_json("results.json", result.to_dict())
        found = result.to_dict()
    return found


def compare_dense(
    run: Run,
    seconds: float,
    corpus: Corpus,
    progress: Callable[[str, int], Progress],
    stop: Callable[[], bool],
) -> dict[str, dict[str, Any]]:
    """Trains the three dense controls of a finished run, each in a folder of its own inside the run's.

    Args:
        run: The sparse run.
        seconds: Its training time.
        corpus: Its text.
        progress: Makes the watcher of one control from its name and steps.
        stop: As in `train`.

    Returns:
        Results by name. All are validated on the same windows; the short-context control sees at most its context
        before each byte, never less than half of it.
    """
    base = run.settings
    windows = Trainer(base, corpus).windows()
    dense = base.dense()
    results = {}
    plans: dict[str, tuple[Settings, float | None]] = {"dense, equal seconds": (dense, seconds)}
    if base.context > SHORT_CONTEXT:
        batch = base.batch * max(base.context // SHORT_CONTEXT, 1)
        short = dataclasses.replace(dense, context=SHORT_CONTEXT, batch=batch)
        plans[f"dense, {SHORT_CONTEXT:,}-token context, equal seconds"] = (short, seconds)
    plans["dense, equal steps"] = (dense, None)  # the slowest comes last
    for name, (settings, allowed) in plans.items():
        folder = run.path / name.replace(", ", "-").replace(",", "").replace(" ", "-")
        if (folder / "config.toml").exists():
            arm = Run.open(folder)
        else:
            if allowed is not None:
                settings = dataclasses.replace(settings, steps=steps_within(settings, corpus, allowed))
            folder.mkdir(exist_ok=True)
            arm = Run.create(folder, settings, run.facts)
        assert arm.settings.steps is not None
        visible = arm.settings.context if arm.settings.context < base.context else None
        results[name] = train_once(arm, corpus, progress(name, arm.settings.steps), stop, windows, visible)
    return results
