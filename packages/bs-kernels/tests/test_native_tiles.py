"""The AMX engine where there is no AMX: its object code on trapped instructions, its guard, its place in the library.

`test_native_numerics` runs the same source on emulated tiles through the whole oracle.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bs_kernels import explain_backends
from bs_kernels.backends import _native_lib
from bs_patterns import BlockLayout

ROOT = Path(__file__).resolve().parent.parent
TILE_INSTRUCTIONS = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
CORE = None if _native_lib.missing_reason() else _native_lib.load()
needs_core = pytest.mark.skipif(CORE is None, reason="the native core is not built")
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or not (ROOT / "csrc").exists(), reason="no compiler or no sources"
)


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bs_kernels_hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep(hook: ModuleType, patch: pytest.MonkeyPatch, names: tuple[str, ...], level: str) -> None:
    """Build only these instruction sets, at this optimisation level."""
    patch.setattr(hook, "ISA_FLAGS", {name: hook.ISA_FLAGS[name] for name in names})
    patch.setattr(hook, "FLAGS", tuple(level if flag == "-O3" else flag for flag in hook.FLAGS))


@needs_compiler
@pytest.mark.skipif(
    CORE is None or "avx512_bf16" not in CORE.supported or "amx_bf16" in CORE.supported,
    reason="needs a processor with AVX-512 bfloat16 and without AMX",
)
def test_object_code_on_trapped_instructions(hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile instruction of the compiled engine traps, is decoded and carried out; a driver checks the results."""
    keep(hook, monkeypatch, ("portable", "avx512", "amx_bf16"), "-O1")
    monkeypatch.setenv("CXXFLAGS", "-DBSA_TRAPPED_TILES")
    driver = tmp_path / "driver"
    built = hook.compile_core(ROOT / "csrc", driver, tmp_path, main=ROOT / "csrc" / "tests" / "driver.cpp")
    if "amx_bf16" not in built["isa"]:
        pytest.skip(f"the compiler does not know AMX: {built['notes']['amx_bf16']}")
    done = subprocess.run([str(driver), "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    ran = re.search(r"amx_bf16 ran: (\d+) tile instructions trapped", done.stdout)
    assert ran is not None, done.stdout
    assert int(ran[1]) > 10_000
    assert "8 problems, 0 failures" in done.stdout


@needs_compiler
def test_an_engine_that_fails_its_self_test_is_refused(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong element per tile, in a core whose tiles are broken on purpose."""
    keep(hook, monkeypatch, ("portable", "amx_bf16_emulated"), "-O0")
    monkeypatch.setenv("CXXFLAGS", "-DBSA_FAULTY_TILES")
    library = tmp_path / "faulty.so"
    hook.compile_core(ROOT / "csrc", library, tmp_path)
    core = _native_lib.NativeCore(library)
    assert core.supported == ("portable",)
    assert "self-test" in core.refused["amx_bf16_emulated"]
    monkeypatch.setenv("BS_KERNELS_ISA", "amx_bf16_emulated")
    with pytest.raises(ValueError, match=r"BS_KERNELS_ISA.*self-test"):
        _ = core.isa


@needs_core
@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64", reason="needs objdump for x86-64"
)
def test_tile_instructions_are_in_their_own_unit_only() -> None:
    """Reads the built library: all six instructions are there, and only in functions of isa_amx_bf16.cpp."""
    assert CORE is not None
    dump = [shutil.which("objdump") or "", "--no-show-raw-insn", str(CORE.path)]
    symbols = subprocess.run([*dump, "-t"], capture_output=True, text=True, check=True).stdout.splitlines()
    ranges, unit = [], ""
    for line in symbols:
        if " df *ABS*" in line:
            unit = line.split()[-1]
        elif unit == "isa_amx_bf16.cpp" and re.match(r"[0-9a-f]+ l +F \.text", line):
            ranges.append((int(line.split()[0], 16), int(line.split("\t")[1].split()[0], 16)))
    if not ranges:
        pytest.skip("the library has no symbols, or no AMX engine")
    code = subprocess.run([*dump, "-d"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^ *([0-9a-f]+):\s+(\S*tile\S*|tdp\S+)", code, re.MULTILINE)
    assert {name for _, name in found} == TILE_INSTRUCTIONS
    for where, name in found:
        at = int(where, 16)
        assert any(begin <= at < begin + size for begin, size in ranges), f"{name} at {where}"


@needs_core
def test_it_is_never_emulated_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CORE is not None
    monkeypatch.delenv("BS_KERNELS_ISA", raising=False)
    assert CORE.isa != _native_lib.EMULATED
    assert _native_lib.EMULATED in CORE.supported


@needs_core
def test_explain_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.from_dense(torch.ones(2, 2, dtype=torch.bool).numpy(), block_size=64, seq_len=128)
    q, k, v = torch.randn(3, 1, 128, 2, 32, dtype=torch.bfloat16).unbind(0)
    monkeypatch.setenv("BS_KERNELS_ISA", "amx_bf16_emulated")
    report = next(r for r in explain_backends(q, k, v, layout) if r.name == "native")
    assert report.detail == "amx_bf16_emulated"
    line = next(line for line in str(explain_backends(q, k, v, layout)).splitlines() if line.startswith("native "))
    assert "selected" in line
    assert "amx_bf16_emulated" in line
    wide = next(r for r in explain_backends(q.float(), k.float(), v.float(), layout) if r.name == "native")
    assert wide.detail == "portable"
    assert all(not r.detail for r in explain_backends(q, k, v, layout) if r.name != "native")
