"""Runs the long forms of the checks and keeps their outcome in docs/benchmarks/soak.log.

    python tools/soak.py                 # as `make soak`: hours
    python tools/soak.py patterns        # the jobs with this word in their name; the log keeps the others

Each job is a command; its last lines, its time and its exit status go to the log.
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

import results

ROOT = Path(__file__).resolve().parent.parent
LOG = results.FOLDER / "soak.log"
PYTEST = [sys.executable, "-m", "pytest", "-q", "--timeout=3600"]
# name, command: the Hypothesis profile and BS_SOAK=1 reach all of them through the environment.
JOBS: list[tuple[str, list[str]]] = [
    ("patterns: properties", [*PYTEST, "packages/bs-patterns"]),
    ("memory: state machine, threads, hard limits", [*PYTEST, "packages/bs-memory"]),
    (
        "memory: 8 threads for a minute",
        [sys.executable, "tools/bench_memory.py", "--only", "hammer", "--seconds", "60"],
    ),
    ("kernels: oracle over the whole argument space", [*PYTEST, "packages/bs-kernels"]),
    ("comm: plans, rings, 50 killed or stopped ranks", [*PYTEST, "packages/bs-comm"]),
    ("modules: kill and resume", [*PYTEST, "packages/bs-modules/tests/test_lm_run.py"]),
    (
        "modules: properties, rings of up to 8 ranks",
        [*PYTEST, "packages/bs-modules", "--ignore=packages/bs-modules/tests/test_lm_run.py"],
    ),
]


def run(name: str, command: list[str], head: str) -> tuple[bool, str]:
    """Run one job; return whether it passed and its entry in the log, which begins with what it ran on."""
    env = {
        **os.environ,
        "HYPOTHESIS_PROFILE": os.environ.get("HYPOTHESIS_PROFILE", "soak"),
        "BS_SOAK": "1",
        "BS_SIGKILLS": "40",
    }
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    shown = " ".join(["python" if part == sys.executable else part for part in command])
    shown_lines = done.stdout.strip().replace(f"{ROOT}/", "").splitlines()
    tail = "\n".join("    " + line for line in shown_lines[-(5 if done.returncode == 0 else 60) :])
    return (
        done.returncode == 0,
        f"{name}\n  {head}\n  $ {shown}\n{tail}\n  exit {done.returncode} after {seconds:.0f} s\n",
    )


def main() -> int:
    """Run every job, or those whose names contain a word of the command line; the log keeps the others' outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(name for name, _ in JOBS)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"only jobs with one of these in their name: {names}")
    wanted = parser.parse_args().words
    jobs = [(name, command) for name, command in JOBS if not wanted or any(word in name for word in wanted)]
    if not jobs:
        parser.error(f"WORD: no job has {' or '.join(map(repr, wanted))} in its name")
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    commit = done.stdout.strip() or "unknown"
    head = f"{time.strftime('%Y-%m-%d')}  commit {commit}  Python {platform.python_version()}  {os.cpu_count()} CPUs"
    log = entries()
    failed = 0
    for name, command in jobs:
        print(f"{name} …", flush=True)
        passed, log[name] = run(name, command, head)
        failed += not passed
        print(log[name], flush=True)
        results.write(LOG, "\n".join(log[key] for key in [key for key, _ in JOBS] if key in log))
    return 1 if failed else 0


def entries() -> dict[str, str]:
    """The outcomes in the log, by the name of the job."""
    text = LOG.read_text(encoding="utf-8") if LOG.exists() else ""
    found = {}
    for name, _ in JOBS:
        begin = text.find(f"{name}\n  ")
        if begin >= 0:
            end = re.compile(r"^  exit .*\n", re.M).search(text, begin)
            found[name] = text[begin : end.end() if end else len(text)]
    return found


if __name__ == "__main__":
    sys.exit(main())
