"""Threads of bs-comm and the end of the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import time
from bs_comm.health import StoreThread

def blocks():
    time.sleep({seconds})
    print("came back", flush=True)

StoreThread().submit(blocks)
"""


@pytest.mark.parametrize(("seconds", "comes_back"), [("0.5", True), ("600", False)])
def test_the_process_waits_for_calls_in_progress_but_not_forever(seconds, comes_back):
    """What comes back from outside Python while the interpreter ends would abort the process."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seconds=seconds)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert ("came back" in result.stdout) == comes_back
