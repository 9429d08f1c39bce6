"""The package stands alone on torch."""

import subprocess
import sys

import bs_memory

ALONE = """
import sys
for name in ("numpy", "hypothesis", "pytest", "bs_patterns", "bs_kernels", "bs_comm", "bs_modules"):
    sys.modules[name] = None  # importing it is an error now
import warnings
warnings.simplefilter("ignore")  # torch's, about the missing numpy
import torch
before = torch.cuda.is_initialized()
import bs_memory, bs_memory.testing
with bs_memory.default_pool().lease((3,), torch.float32, "cpu") as tensor:
    tensor.zero_()
assert torch.cuda.is_initialized() == before
"""


def test_it_imports_without_numpy_hypothesis_or_siblings():
    result = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_documented():
    for name in bs_memory.__all__:
        if name != "__version__":
            assert getattr(bs_memory, name).__doc__, name
