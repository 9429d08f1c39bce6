"""The workspace checker finds what it is there to find, and finds nothing here."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("check_workspace", ROOT / "tools" / "check_workspace.py")
assert _spec is not None
assert _spec.loader is not None
check_workspace = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_workspace)


def test_the_workspace_agrees():
    assert check_workspace.problems(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    """The manifests and sources of the workspace, to break."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", ".venv")
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=ignore)
    check_workspace.subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    check_workspace.subprocess.run(["git", "add", "pyproject.toml"], cwd=tmp_path, check=True)
    return tmp_path


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("packages/bs-memory/pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"', "requires bs-memory~=0.1.0"),
        ("packages/bs-comm/pyproject.toml", '"bs-memory~=0.1.0"', '"bs-memory"', "without a version"),
        ("packages/bs-comm/pyproject.toml", "bs-memory = { workspace = true }", "", "tool.uv.sources lacks"),
        ("packages/bs-patterns/src/bs_patterns/__init__.py", '"0.1.0"', '"0.1.1"', "__version__ says"),
        ("packages/bs-patterns/CHANGELOG.md", "## 0.1.0", "## 0.0.9", "newest CHANGELOG entry"),
        ("packages/bs-memory/pyproject.toml", "torch>=2.11", "torch>=2.0", "torch requirement differs"),
        (
            "packages/bs-memory/pyproject.toml",
            'requires-python = ">=3.11"',
            'requires-python = ">=3.9"',
            "requires-python",
        ),
        ("pyproject.toml", '"bs-memory",', "", "does not depend on bs-memory"),
        (
            "pyproject.toml",
            "[tool.uv]",
            '[[tool.uv.index]]\nurl = "https://example.org/simple"\n[tool.uv]',
            "package index",
        ),
    ],
)
def test_a_broken_manifest_is_found(copy, file, old, new, complaint):
    _edit(copy / file, old, new)
    found = check_workspace.problems(copy)
    assert any(complaint in line for line in found), found


def test_an_undeclared_sibling_import_is_found(copy):
    (copy / "packages/bs-memory/src/bs_memory/extra.py").write_text("from bs_kernels import x\n", encoding="utf-8")
    assert any("imports bs_kernels" in line for line in check_workspace.problems(copy))


@pytest.mark.parametrize("file", ["README.md", "LICENSE", "src/bs_comm/py.typed"])
def test_a_missing_file_is_found(copy, file):
    (copy / "packages/bs-comm" / file).unlink()
    assert any(file in line for line in check_workspace.problems(copy))
