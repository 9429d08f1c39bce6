"""Run the long forms of the checks and keep their outcome in docs/benchmarks/soak.log.

Run as `make soak`. Each job is a command; its last lines, its time and its exit status go to the log.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "benchmarks" / "soak.log"
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


def run(name: str, command: list[str]) -> tuple[bool, str]:
    """Run one job; return whether it passed and its entry in the log."""
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
    tail = "\n".join("    " + line for line in done.stdout.strip().splitlines()[-(5 if done.returncode == 0 else 60) :])
    return done.returncode == 0, f"{name}\n  $ {shown}\n{tail}\n  exit {done.returncode} after {seconds:.0f} s\n"


def main() -> int:
    """Run every job, or those whose names contain an argument."""
    wanted = sys.argv[1:]
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    commit = done.stdout.strip() or "unknown"
    head = f"{time.strftime('%Y-%m-%d')}  commit {commit}  Python {platform.python_version()}  {os.cpu_count()} CPUs\n"
    lines = [head]
    failed = 0
    for name, command in JOBS:
        if wanted and not any(word in name for word in wanted):
            continue
        passed, entry = run(name, command)
        failed += not passed
        lines.append(entry)
        print(entry, flush=True)
        LOG.write_text("\n".join(lines), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
