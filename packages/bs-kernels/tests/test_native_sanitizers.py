"""The native core under the address and undefined-behaviour sanitizers.

Takes a compiler and most of a minute: opt in with ``BS_KERNELS_SANITIZE=1``, as continuous integration does.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bs_kernels_hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(os.environ.get("BS_KERNELS_SANITIZE") != "1", reason="set BS_KERNELS_SANITIZE=1 to run it")
def test_driver_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without AMX the tile engine's instructions trap and are carried out: see csrc/tests/trapped_tiles.h.
    monkeypatch.setenv("CXXFLAGS", " ".join((*SANITIZE, "-DBSA_TRAPPED_TILES")))
    driver = tmp_path / "driver"
    built = hook().compile_core(ROOT / "csrc", driver, tmp_path, main=ROOT / "csrc" / "tests" / "driver.cpp")
    assert "portable" in built["isa"]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([str(driver), "24"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "24 problems, 0 failures" in done.stdout
