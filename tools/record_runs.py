"""Collect finished `bsattn train` runs into docs/benchmarks/training.json and print their table.

python tools/record_runs.py default=runs/default long=runs/thirty compared=runs/compared
"""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "training.json"


def read(folder: Path) -> dict[str, Any]:
    """One run: its settings, its results, its yardsticks, and the dense controls inside it."""
    run: dict[str, Any] = {"config": tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))}
    for name in ("results", "yardsticks"):
        if (folder / f"{name}.json").exists():
            run[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    controls = {path.parent.name: read(path.parent) for path in sorted(folder.glob("*/config.toml"))}
    return {**run, "controls": controls} if controls else run


def rows(name: str, run: dict[str, Any]) -> list[str]:
    """Markdown rows of a run and its controls."""
    results = run["results"]
    by_position = " | ".join(f"{bits:.3f}" for bits in results["validation"]["by_position"].values())
    own = (
        f"| {name} | {results['steps']:,} | {results['seconds']:.0f} | {results['tokens_per_second']:,.0f} "
        f"| {results['attention_share']:.0%} | {results['peak_memory'] / 2**20:,.0f} "
        f"| {results['validation']['bits_per_byte']:.3f} | {by_position} |"
    )
    return [own, *(row for key, control in run.get("controls", {}).items() for row in rows(key, control))]


def main(arguments: list[str]) -> int:
    """Write the JSON and print the rows."""
    runs = {name: read(Path(folder)) for name, folder in (argument.split("=", 1) for argument in arguments)}
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        machine["processor"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        machine["cpus"] = str(sum(line.startswith("processor") for line in lines))
    TARGET.write_text(
        json.dumps({"machine": machine, "runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print("\n".join(row for name, run in runs.items() for row in rows(name, run)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
