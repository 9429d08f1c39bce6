"""Building, finding and refusing the native core."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bs_kernels.backends import _native_lib
from bs_kernels.backends.base import Problem
from bs_kernels.backends.native import NativeBackend

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = Problem("cpu", torch.float32, 1, 2, 2, 64, 64, (128, 128), (64, 64))
needs_core = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="the native core is not built")
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the sources are not here")


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bs_kernels_hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    (tmp_path / "src" / "bs_kernels").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    for path in (ROOT / "csrc").glob("*.*"):
        shutil.copy(path, tmp_path / "csrc")
    return tmp_path


@pytest.fixture
def no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package as if it had been installed with ``tmp_path`` as its ``_native`` directory."""
    monkeypatch.setattr(_native_lib, "_DIRECTORY", tmp_path)
    monkeypatch.delenv("BS_KERNELS_NATIVE", raising=False)
    _native_lib._load.cache_clear()
    yield tmp_path
    _native_lib._load.cache_clear()


@needs_core
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "CPU"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_reasons(change: dict, reason: str) -> None:
    backend = NativeBackend()
    assert backend.not_supported_reasons(PROBLEM) == []
    reasons = backend.not_supported_reasons(replace(PROBLEM, **change))
    assert len(reasons) == 1
    assert reason in reasons[0]


@needs_core
@pytest.mark.parametrize(
    "change", [{"attn_bias": "float", "attn_bias_grad": True}, {"dropout": True}, {"paged": True}], ids=str
)
def test_arguments_are_no_reason(change: dict) -> None:
    problem = replace(PROBLEM, backward=True, **change)
    assert NativeBackend().not_supported_reasons(problem) == []


@needs_core
def test_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    core = _native_lib.load()
    monkeypatch.setenv("BS_KERNELS_ISA", "portable")
    assert core.isa == "portable"
    monkeypatch.setenv("BS_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match=r"BS_KERNELS_ISA: expected one of portable.*'sse9'"):
        _ = core.isa
    monkeypatch.delenv("BS_KERNELS_ISA")
    assert core.isa == [name for name in core.supported if name != _native_lib.EMULATED][-1]


@needs_core
def test_every_instruction_set_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    core = _native_lib.load()
    assert {*core.supported, *core.refused} == set(_native_lib.ISA_NAMES)
    assert core.supported == tuple(name for name in _native_lib.ISA_NAMES if name not in core.refused)
    assert all(core.refused.values())
    monkeypatch.setenv("BS_KERNELS_ISA", "portable")
    detail = NativeBackend().detail(replace(PROBLEM, dtype=torch.bfloat16))
    assert detail.startswith("portable")
    for name, reason in core.refused.items():
        assert (f"not {name}: {reason}" in detail) == (name != _native_lib.EMULATED)
        monkeypatch.setenv("BS_KERNELS_ISA", name)
        with pytest.raises(ValueError, match=re.escape(reason)):
            _ = core.isa


def test_missing_core_is_a_reason_with_the_compilers_words(no_core: Path) -> None:
    assert any("is not built" in reason for reason in NativeBackend().not_supported_reasons(PROBLEM))
    _native_lib._load.cache_clear()
    (no_core / "build.json").write_text(json.dumps({"error": "no C++ compiler found"}))
    assert any("no C++ compiler found" in reason for reason in NativeBackend().not_supported_reasons(PROBLEM))


def test_missing_core_is_an_error_when_required(no_core: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BS_KERNELS_NATIVE", "require")
    with pytest.raises(_native_lib.NativeUnavailableError, match="not built"):
        NativeBackend().not_supported_reasons(PROBLEM)


def test_core_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BS_KERNELS_NATIVE", "off")
    assert NativeBackend().not_supported_reasons(PROBLEM) == [
        "the native core is switched off by BS_KERNELS_NATIVE=off"
    ]


def test_a_file_that_is_no_library_is_a_reason(no_core: Path) -> None:
    (no_core / _native_lib._LIBRARY).write_bytes(b"not a library")
    assert any("does not load" in reason for reason in NativeBackend().not_supported_reasons(PROBLEM))


@needs_sources
def test_binding_matches_the_header() -> None:
    header = (ROOT / "csrc" / "call.h").read_text()
    assert f"#define BSA_ABI_VERSION {_native_lib.ABI_VERSION}\n" in header
    names = [name.lower() for name in re.findall(r"BSA_ISA_(\w+) = \d", header) if name != "COUNT"]
    assert tuple(names) == _native_lib.ISA_NAMES
    body = re.sub(r"//.*", "", header[header.index("bsa_tensor;") : header.index("} bsa_call;")])
    fields = re.findall(r"(\w+)(?=[,;])", body.replace("bsa_tensor;", "", 1))
    assert fields == [name for name, *_ in _native_lib.CoreCall._fields_]


@needs_sources
@pytest.mark.parametrize("command", ["/nonexistent/c++", sys.executable])
def test_build_without_a_working_compiler(
    command: str, hook: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.delenv("BS_KERNELS_NATIVE", raising=False)
    assert hook.build_in_place(checkout) is None
    record = json.loads((checkout / "src" / "bs_kernels" / "_native" / "build.json").read_text())
    assert command in record["error"]
    monkeypatch.setenv("BS_KERNELS_NATIVE", "require")
    with pytest.raises(hook.BuildError, match=re.escape(command)):
        hook.build_in_place(checkout)


@needs_sources
def test_build_leaves_out_what_the_compiler_does_not_know(
    hook: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    monkeypatch.delenv("BS_KERNELS_NATIVE", raising=False)
    monkeypatch.setattr(hook, "ISA_FLAGS", {"portable": (), "avx2": ("-mno-such-flag",)})
    monkeypatch.setattr(hook, "X86", (hook.platform.machine().lower(),))
    monkeypatch.setattr(hook, "FLAGS", tuple(flag for flag in hook.FLAGS if flag != "-O3"))
    library = hook.build_in_place(checkout)
    assert library is not None
    record = json.loads(library.with_name("build.json").read_text())
    assert record["isa"] == ["portable"]
    assert "-mno-such-flag" in record["notes"]["avx2"]
    assert _native_lib.NativeCore(library).supported == ("portable",)
    stamp = library.stat().st_mtime_ns
    assert hook.build_in_place(checkout) == library
    assert library.stat().st_mtime_ns == stamp  # up to date: not built again


@needs_core
def test_importing_does_not_load_the_core() -> None:
    code = "import bs_kernels, bs_kernels.backends._native_lib as n; print(n._load.cache_info().currsize)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0"
