"""What the benchmarks share: a command line, facts about the machine, turns, and results that a kill does not lose.

A file of results holds sections, each with the machine it was measured on and its records. While a section is being
measured, its records so far lie under `"unfinished"`; what the file had of it before stays until the last one is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "FOLDER",
    "described",
    "keep",
    "load",
    "machine",
    "parser",
    "ratio",
    "save",
    "shown",
    "shown_ratio",
    "table",
    "take_turns",
    "write",
]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and every default."""


def parser(doc: str | None, out: str, sections: Collection[str] = ()) -> argparse.ArgumentParser:
    """A command line with what all benchmarks have: `--out`, `--page` and, where there are several, `--only`.

    Args:
        doc: the docstring of the tool, shown as its help.
        out: name of the JSON file in docs/benchmarks.
        sections: what can be measured on its own, in order.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    if sections:
        made.add_argument(
            "--only",
            nargs="+",
            choices=sections,
            default=list(sections),
            metavar="SECTION",
            help=f"measure these, of: {', '.join(sections)}; the others keep what the file has",
        )
    made.add_argument("--out", type=Path, default=FOLDER / out, metavar="FILE", help="JSON file; its page lies beside")
    made.add_argument("--page", action="store_true", help="measure nothing: write the page again from the JSON file")
    return made


# -- the machine -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What figures depend on, and how busy it is now; versions of torch and numpy where they are imported."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")}
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    facts: dict[str, Any] = {
        "cpu": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
        "cpus": os.cpu_count(),
        "device": "cpu",
        "system": " ".join([platform.system(), *platform.libc_ver()]).strip(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None:
        facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
    if numpy is not None:
        facts["numpy"] = numpy.__version__
    return facts


def described(facts: dict[str, Any] | str) -> str:
    """The facts as a line of a page; older files hold some of them only, or the line itself."""
    if isinstance(facts, str):
        return facts
    cpu = facts.get("cpu", "")
    if facts.get("instructions"):
        cpu += f" ({' '.join(facts['instructions'])})"
    told = [cpu] if cpu else []
    if facts.get("device", "cpu") != "cpu":
        told.append(facts["device"])
    if "cpus" in facts:
        told.append(f"{facts['cpus']} CPUs")
    if "system" in facts:
        told.append(facts["system"])
    if "threads" in facts:
        told.append(f"{facts['threads']} torch thread{'s' * (facts['threads'] != 1)}")
    told += [f"{name} {facts[key]}" for key, name in _VERSIONS.items() if key in facts]
    return ", ".join(told) + (f"; load {facts['load']}" if "load" in facts else "")


_VERSIONS = {"torch": "torch", "numpy": "numpy", "python": "Python"}

# -- measuring ---------------------------------------------------------------------------------------------------------


def take_turns(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    cold: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, round by round, so that a noisy neighbour meets them all.

    Args:
        contestants: what to call.
        rounds: how many count; one before them warms up.
        calls: of each contestant in a round.
        clock: what tells seconds: the time of day, or `time.process_time`.
        cold: those that are not warmed up.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, run in contestants.items():
        if name not in cold:
            run()
    for _ in range(rounds):
        for name, run in contestants.items():
            begin = clock()
            for _ in range(calls):
                run()
            times[name].append((clock() - begin) / calls)
    return times


def ratio(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Median, least and most of the ratios within a round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return [round(x, 3) for x in (statistics.median(found), min(found), max(found))]


def shown(value: float | None) -> str:
    """A figure for a table: four digits, and all that are before the point."""
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def table(header: list[str], rows: list[list[Any]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, all columns but the first ``left`` aligned to the right."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def shown_ratio(found: Iterable[float] | None, digits: int = 2) -> str:
    """A ratio for a table: the median, and the range where there is one."""
    if found is None:
        return ""
    mid, low, high = found
    return f"{mid:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if low < high else "")


# -- results on disk ---------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """What a file of results holds; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def save(path: Path, found: dict[str, Any], page: Callable[[dict[str, Any]], str] | None = None) -> None:
    """Write results, and the page of tables beside them."""
    write(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if page is not None:
        write(path.with_suffix(".md"), page(found))


def keep(
    path: Path,
    name: str,
    records: Iterable[Any],
    page: Callable[[dict[str, Any]], str] | None = None,
    *,
    key: str = "records",
    **about: Any,
) -> list[Any]:
    """Take the records of a section as they are measured and write each at once.

    Args:
        path: the JSON file; other sections in it stay.
        name: of the section.
        records: measured one by one while this runs.
        page: makes the page beside the file.
        key: the name that the records have in their section.
        about: what else belongs to the section; machine and seconds do anyway.

    Returns:
        The records.
    """
    begin, section = time.perf_counter(), {"machine": machine(), **about, key: []}
    for record in records:
        section[key].append(record)
        found = load(path)
        found.setdefault("unfinished", {})[name] = section
        save(path, found)
    found = load(path)
    unfinished = found.pop("unfinished", {})
    unfinished.pop(name, None)
    section["seconds"] = round(time.perf_counter() - begin, 1)
    save(path, found | {name: section} | ({"unfinished": unfinished} if unfinished else {}), page)
    return section[key]
