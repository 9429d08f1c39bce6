"""`loss.png` and `layout.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_patterns import BlockLayout
from bs_patterns.render import save_image

from .._extras import require
from .durable import write_atomically


def draw_loss(path: Path, records: Sequence[Mapping[str, Any]], yardsticks: Mapping[str, float], final: float) -> None:
    """Bits per byte over steps: every step, its running mean, validation, and the yardsticks as lines."""
    figure_module = require("matplotlib.figure")
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    losses = [record["bits_per_byte"] for record in records]
    axes.plot(steps, losses, color="0.8", linewidth=0.7)
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="training")
    checks = [(r["step"], r["validation"]) for r in records if "validation" in r]
    checks.append((steps[-1] if steps else 0, final))
    axes.plot(*zip(*checks, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    for i, (name, value) in enumerate(yardsticks.items()):
        axes.axhline(value, color="0.3", linewidth=0.8, linestyle=("--", ":", "-.", (0, (1, 4)))[i % 4], label=name)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, min(8.5, max([*losses, final, 4.0]) * 1.02)))
    axes.legend(fontsize="small")
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=110))


def draw_layout(path: Path, layout: BlockLayout) -> None:
    """The layout that was trained on."""
    save_image(path, layout)  # itself atomic


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential, over about a fiftieth of the run, unbiased at the start."""
    decay = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        means.append(total / weight)
    return means
