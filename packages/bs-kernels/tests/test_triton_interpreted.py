"""Without a GPU: the tests of kernels in a process of their own, where Triton interprets them on CPU tensors.

Triton decides how to make kernels when it is first imported, and in this process something else may have imported it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_oracle runs on the GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.timeout(1200)  # a whole suite
def test_the_kernels_match_the_oracle_in_the_interpreter():
    suite = [str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in ("oracle", "waiting")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suite]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 50
    assert "skipped" not in done.stdout
