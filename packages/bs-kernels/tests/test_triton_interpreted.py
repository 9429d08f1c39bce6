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
    """In two processes side by side, since the interpreter keeps to one core."""
    suite = [str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in ("oracle", "waiting")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suite, "-k"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    half = "bias or layouts or argument"
    running = [
        subprocess.Popen([*command, which], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for which in (half, f"not ({half})")
    ]
    outputs = [process.communicate()[0] for process in running]
    passed = 0
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
        assert "skipped" not in output
        count = re.search(r"(\d+) passed", output)
        assert count, output
        passed += int(count[1])
    assert passed > 50
