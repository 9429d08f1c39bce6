"""A cold import loads nothing heavy, and works straight from src."""

import subprocess
import sys
from pathlib import Path

import bs_kernels

PACKAGES = Path(bs_kernels.__file__).parents[3]


def run(code):
    path = ":".join(str(p) for p in sorted(PACKAGES.glob("*/src")))
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_cold():
    found = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bs_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new & {'triton', 'flash_attn', 'flash_attn_interface', 'hypothesis', 'matplotlib', 'scipy'}))\n"
        "print(torch.cuda.is_initialized())"
    )
    assert found == ["False"]


def test_public_names_exist_and_are_documented():
    for name in bs_kernels.__all__:
        assert getattr(bs_kernels, name) is not None
        if name != "__version__":
            assert getattr(bs_kernels, name).__doc__, name


def test_testing_does_not_need_hypothesis():
    assert run("import sys, bs_kernels.testing\nprint('hypothesis' in sys.modules)") == ["False"]
