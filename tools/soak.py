"""Run the long forms of the checks and keep their outcome in docs/benchmarks/soak.log.

    make soak                                    # all jobs, 300 examples a property, 50 killed ranks and runs
    HYPOTHESIS_PROFILE=ci python tools/soak.py   # 30 examples a property
    python tools/soak.py memory comm             # jobs whose names contain one of these; the log keeps the others

Each job is a command. The log has its last lines, its time and its exit status, one entry a job: its last run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "benchmarks" / "soak.log"
PYTEST = [sys.executable, "-m", "pytest", "-q", "--timeout=3600"]
JOBS: dict[str, list[str]] = {
    "patterns: properties": [*PYTEST, "packages/bs-patterns"],
    "memory: state machine, threads, hard limits": [*PYTEST, "packages/bs-memory"],
    "memory: 8 threads for a minute": [
        sys.executable, "tools/bench_memory.py", "--only", "hammer", "--seconds", "60", "--out", "build/memory.json",
    ],
    "kernels: oracle over the whole argument space": [*PYTEST, "packages/bs-kernels"],
    "comm: plans, rings, killed and stopped ranks": [*PYTEST, "packages/bs-comm"],
    "modules: kill and resume": [*PYTEST, "packages/bs-modules/tests/test_lm_run.py"],
    "modules: properties, rings of up to 8 ranks": [
        *PYTEST, "packages/bs-modules", "--ignore=packages/bs-modules/tests/test_lm_run.py",
    ],
}  # fmt: skip
#: What makes a check long, for all jobs. The environment may say otherwise.
LENGTH = {"HYPOTHESIS_PROFILE": "soak", "BS_SIGKILLS": "50", "BS_SOAK_SEED": "0"}


def run(name: str, command: list[str]) -> tuple[bool, str]:
    """Run one job; return whether it passed and its entry in the log."""
    length = {key: os.environ.get(key, value) for key, value in LENGTH.items()}
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    head = (
        f"{time.strftime('%Y-%m-%d')}  commit {done.stdout.strip() or 'unknown'}  Python {platform.python_version()}  "
        f"{os.cpu_count()} CPUs"
    )
    env = {**os.environ, **length, "BS_SOAK": "1"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    shown = " ".join(
        [*(f"{key}={value}" for key, value in length.items()), "BS_SOAK=1"]
        + ["python" if part == sys.executable else part for part in command]
    )
    lines = done.stdout.replace(f"{ROOT}/", "").strip().splitlines()[-(5 if done.returncode == 0 else 60) :]
    tail = "\n".join("    " + line for line in lines)
    return (
        done.returncode == 0,
        f"{name}\n  {head}\n  $ {shown}\n{tail}\n  exit {done.returncode} after {seconds:.0f} s\n",
    )


def entries(text: str) -> dict[str, str]:
    """The entries of a log by the name of their job."""
    found = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return {entry.splitlines()[0]: entry.strip("\n") + "\n" for entry in found if entry.strip()}


def main() -> int:
    """Run every job, or those whose names contain an argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the jobs whose names contain one of these [all]")
    parser.add_argument("--log", type=Path, default=LOG, help="[%(default)s]")
    options = parser.parse_args()
    jobs = {
        name: command for name, command in JOBS.items()
        if not options.words or any(word in name for word in options.words)
    }  # fmt: skip
    if not jobs:
        parser.error(f"words: expected some of a job's name, one of {', '.join(map(repr, JOBS))}, got {options.words}")
    (ROOT / "build").mkdir(exist_ok=True)
    failed = 0
    for name, command in jobs.items():
        passed, entry = run(name, command)
        failed += not passed
        print(entry, flush=True)
        kept = entries(options.log.read_text(encoding="utf-8")) if options.log.exists() else {}
        kept[name] = entry
        options.log.write_text("\n".join(kept[job] for job in JOBS if job in kept), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
