"""Collects finished `bsattn train` runs into docs/benchmarks/training.json and prints the rows of its page.

python tools/record_runs.py default=runs/default long=runs/thirty    # adds these, or replaces those of the name
python tools/record_runs.py                                          # only prints the rows
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import results


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
        f"| {name} | {results['steps']:,} | {results['seconds']:,.0f} | {results['tokens_per_second']:,.0f} "
        f"| {results['attention_share']:.0%} | {results['peak_memory'] / 2**20:,.0f} "
        f"| {results['validation']['bits_per_byte']:.3f} | {by_position} |"
    )
    return [own, *(row for key, control in run.get("controls", {}).items() for row in rows(key, control))]


def run_of(word: str) -> tuple[str, dict[str, Any]]:
    """A run of the command line: the name it gets, and what its folder holds."""
    name, equals, folder = word.rpartition("=")
    if not (equals and name and (Path(folder) / "results.json").exists()):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER of a finished run, got {word!r}")
    return name, read(Path(folder))


def main() -> int:
    """Write the JSON and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=run_of, metavar="NAME=FOLDER", help="finished runs; others stay")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "training.json", metavar="FILE", help="JSON file")
    options = parser.parse_args()
    found = results.load(options.out)
    runs = found.get("runs", {}) | dict(options.runs)
    if options.runs:
        results.save(options.out, {"machine": results.machine(), "runs": runs})
    print("\n".join(row for name, run in runs.items() for row in rows(name, run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
