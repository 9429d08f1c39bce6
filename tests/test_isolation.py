"""Each package stands on what it declares, and importing one does no more than it must."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = {path.name: path.name.replace("-", "_") for path in sorted((ROOT / "packages").iterdir())}


def _declared(name: str) -> set[str]:
    manifest = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text(encoding="utf-8"))
    return {module for sibling, module in SIBLINGS.items() if f'"{sibling}' in json.dumps(manifest["project"])}


def _modules_after(statement: str, *, blocked: set[str] = frozenset()) -> set[str]:
    """The modules a fresh interpreter holds after `statement`, with `blocked` ones missing."""
    code = (
        "import sys, json\n"
        f"blocked = {sorted(blocked)!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked:\n"
        "            raise ModuleNotFoundError(f'{name} is not installed here', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"{statement}\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", SIBLINGS)
def test_imports_only_what_it_declares(name):
    absent = set(SIBLINGS.values()) - _declared(name)
    _modules_after(f"import {SIBLINGS[name]}", blocked=absent)


def test_patterns_needs_numpy_only():
    absent = {"torch", "matplotlib", "scipy", "hypothesis", "pytest", *SIBLINGS.values()} - {"bs_patterns"}
    _modules_after("import bs_patterns; bs_patterns.LocalWindow(128).layout(1000, causal=True)", blocked=absent)


@pytest.mark.parametrize("name", SIBLINGS)
def test_import_is_cold(name):
    """No optional or heavy third party comes along, and no CUDA context is made."""
    modules = _modules_after(
        f"import {SIBLINGS[name]}\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()"
    )
    heavy = {"triton", "flash_attn", "matplotlib", "scipy", "hypothesis", "pytest", "safetensors", "rich"}
    base = _modules_after("import torch" if name != "bs-patterns" else "import numpy")
    assert not (modules - base) & heavy


@pytest.mark.parametrize("name", SIBLINGS)
def test_works_from_its_sources(name):
    """`PYTHONPATH` over the src folders is enough: no installed metadata is read."""
    path = os.pathsep.join(str(folder / "src") for folder in sorted((ROOT / "packages").iterdir()))
    code = f"import {SIBLINGS[name]} as m; print(m.__version__, m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    version, file = done.stdout.split()
    manifest = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text(encoding="utf-8"))
    assert version == manifest["project"]["version"]
    assert Path(file).is_relative_to(ROOT / "packages" / name)


def test_patterns_installs_alone(tmp_path):
    """An empty environment with bs-patterns in it holds numpy, no torch, and draws a layout."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on this machine; `make isolated` covers this where it is")
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    env = {k: v for k, v in os.environ.items() if k not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    source = ROOT / "packages" / "bs-patterns"
    subprocess.run([uv, "pip", "install", "-q", "--python", python, source], check=True, env=env)
    listed = subprocess.run(
        [uv, "pip", "list", "--format", "json", "--python", python], check=True, env=env, capture_output=True, text=True
    )
    assert {package["name"] for package in json.loads(listed.stdout)} == {"bs-patterns", "numpy"}
    shown = subprocess.run(
        [python, "-m", "bs_patterns", "show", "local_window", "--tokens", "4096", "--causal"],
        cwd=tmp_path, env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "density" in shown.stdout
