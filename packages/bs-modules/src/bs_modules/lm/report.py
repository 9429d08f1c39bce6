"""What a run shows in the terminal: a progress bar while it trains, one table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .settings import Settings


class TerminalProgress:
    """A bar with loss, tokens per second and time left; plain lines, ten a run, where there is no terminal."""

    def __init__(self, bar: Bar, title: str, steps: int) -> None:
        self._bar, self._title = bar, title
        self._task = bar.add_task(title, total=steps, loss="", speed="")
        self._loss: float | None = None
        self._told = -1

    def step(self, step: int, steps: int, bits_per_byte: float, tokens_per_second: float) -> None:
        """Shows one step."""
        self._loss = bits_per_byte if self._loss is None else 0.9 * self._loss + 0.1 * bits_per_byte
        speed = f"{tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, loss=f"{self._loss:.3f} bits/byte", speed=speed)
        tenth = 10 * step // steps
        if not self._bar.console.is_terminal and tenth > self._told:
            self._told = tenth
            self._bar.console.print(f"{self._title}: step {step:,} of {steps:,}, {self._loss:.3f} bits/byte, {speed}")


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Bar]:
    """The live display that holds the bars of a run."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


def result_table(settings: Settings, result: Mapping[str, Any], yardsticks: Mapping[str, float]) -> Table:
    """The final table of one run."""
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("validation bits per byte", f"{result['validation']['bits_per_byte']:.4f}")
    for place, bits in result["validation"]["by_position"].items():
        table.add_row(f"  at positions {place} of the context", f"{bits:.4f}")
    for name, bits in yardsticks.items():
        table.add_row(f"  yardstick: {name}", f"{bits:.4f}")
    table.add_row("steps", f"{result['steps']:,}")
    table.add_row("tokens trained on", f"{result['tokens']:,}")
    table.add_row("training time", f"{result['seconds']:.1f} s")
    table.add_row("tokens/s", f"{result['tokens_per_second']:,.0f}")
    table.add_row("peak memory", f"{result['peak_memory'] / 2**20:,.0f} MiB")
    requested = result["density_requested"]
    table.add_row("density requested", "by geometry" if requested is None else f"{requested:.4f}")
    table.add_row("density met", f"{result['density_met']:.4f}")
    table.add_row("attention's share of the step", f"{result['attention_share']:.1%}")
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("context, dtype, device", f"{settings.context:,}, {settings.dtype}, {settings.device}")
    return table


def compare_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per run: bits per byte over all and by position, with what it took."""
    places = list(dict.fromkeys(p for r in results.values() for p in r["validation"]["by_position"]))
    table = Table(title="Bits per byte on the same validation bytes, by position in the window", title_justify="left")
    for heading in ("attention", "all", *places, "steps", "seconds", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for name, result in results.items():
        by_position = result["validation"]["by_position"]
        table.add_row(
            name,
            f"{result['validation']['bits_per_byte']:.4f}",
            *(f"{by_position[place]:.4f}" if place in by_position else "" for place in places),
            f"{result['steps']:,}",
            f"{result['seconds']:.0f}",
            f"{result['tokens_per_second']:,.0f}",
        )
    return table


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the comparison says, in words, good or bad. The first result is the sparse run."""
    (_, sparse), *others = results.items()
    own = sparse["validation"]["bits_per_byte"]
    lines = []
    for name, result in others:
        gap = result["validation"]["bits_per_byte"] - own
        word = "better than" if gap > 0 else "worse than"
        lines.append(f"Block-sparse attention is {abs(gap):.4f} bits per byte {word} {name}.")
    lines.append(context_verdict(sparse["validation"]["by_position"], [r for n, r in others if "context" in n]))
    return [line for line in lines if line]


def context_verdict(by_position: Mapping[str, float], short: list[Mapping[str, Any]]) -> str:
    """Whether the long context helped: far positions against the short-context control on the same bytes."""
    far = [place for place in by_position if not place.startswith("0–")]
    if not far or not short:
        return ""
    control = short[0]["validation"]["by_position"]
    gains = {place: control[place] - by_position[place] for place in far if place in control}
    told = ", ".join(f"{gain:+.4f} at {place}" for place, gain in gains.items())
    if gains and all(gain > 0 for gain in gains.values()):
        return f"Long context helps: bits per byte saved over the short-context control: {told}."
    return f"Long context does not help here: bits per byte saved over the short-context control: {told}."
