"""Check that the five packages of the workspace agree with one another and with the root.

Run as `python tools/check_workspace.py`; prints every disagreement and exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
REQUIRED_FILES = ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
# What a manifest may not name: the lock alone knows where packages come from.
INDEX_KEYS = re.compile(
    r"https?://[^\s\"']*(?:/simple\b|pypi|pythonhosted)|(?:extra-)?index-url|\[\[tool\.uv\.index", re.IGNORECASE
)


def load_manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Read every package's `pyproject.toml`, keyed by distribution name."""
    manifests = {}
    for folder in sorted((root / "packages").iterdir()):
        path = folder / "pyproject.toml"
        if path.is_file():
            manifests[folder.name] = tomllib.loads(path.read_text(encoding="utf-8"))
    return manifests


def check_files(root: Path, name: str) -> Iterator[str]:
    """A package has its papers, a typed `src` module and at least one test."""
    folder = root / "packages" / name
    module = name.replace("-", "_")
    for file in (*REQUIRED_FILES, f"src/{module}/__init__.py", f"src/{module}/py.typed"):
        if not (folder / file).is_file():
            yield f"{name}: {file} is missing"
    if not list((folder / "tests").glob("test_*.py")):
        yield f"{name}: tests/ holds no test_*.py"


def check_versions(root: Path, name: str, manifest: dict[str, Any]) -> Iterator[str]:
    """The manifest, `__version__` and the newest CHANGELOG entry name one version."""
    folder = root / "packages" / name
    version = manifest["project"]["version"]
    tree = ast.parse((folder / "src" / name.replace("-", "_") / "__init__.py").read_text(encoding="utf-8"))
    declared = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets)
    ]
    if declared != [version]:
        yield f"{name}: pyproject says version {version}, __version__ says {declared or 'nothing'}"
    newest = re.search(r"^## \[?v?([0-9][^\]\s]*)", (folder / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if newest is None or newest.group(1) != version:
        yield f"{name}: the newest CHANGELOG entry is {newest.group(1) if newest else 'missing'}, expected {version}"


def _requirements(manifest: dict[str, Any]) -> list[Requirement]:
    project = manifest["project"]
    extras = [r for group in project.get("optional-dependencies", {}).values() for r in group]
    return [Requirement(r) for r in (*project.get("dependencies", []), *extras)]


def check_siblings(manifests: dict[str, dict[str, Any]], name: str) -> Iterator[str]:
    """Specifiers between siblings hold (uv ignores them) and each comes from the workspace."""
    manifest = manifests[name]
    sources = manifest.get("tool", {}).get("uv", {}).get("sources", {})
    for requirement in _requirements(manifest):
        sibling = canonicalize_name(requirement.name)
        if sibling not in manifests:
            continue
        version = manifests[sibling]["project"]["version"]
        if not requirement.specifier:
            yield f"{name}: {sibling} is required without a version"
        elif version not in requirement.specifier:
            yield f"{name}: requires {requirement}, the workspace has {sibling} {version}"
        if sources.get(sibling) != {"workspace": True}:
            yield f"{name}: tool.uv.sources lacks {sibling} = {{ workspace = true }}"


def _imported_modules(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.split(".")[0]


def check_imports(root: Path, manifests: dict[str, dict[str, Any]], name: str) -> Iterator[str]:
    """A sibling is imported, in sources and tests alike, only where the manifest declares it."""
    declared = {canonicalize_name(r.name) for r in _requirements(manifests[name])} | {name}
    folder = root / "packages" / name
    for part in ("src", "tests"):
        for path, module in _imported_modules(folder / part):
            sibling = canonicalize_name(module)
            if sibling in manifests and sibling not in declared:
                yield f"{path.relative_to(root)}: imports {module}, which {name} does not declare"


def check_root(root: Path, manifests: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The root depends on every package, and all agree on the Python and torch they need."""
    manifest = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {canonicalize_name(r.name) for r in _requirements(manifest)}
    for name in sorted(set(manifests) - wanted):
        yield f"root: does not depend on {name}"
    pythons = {m["project"]["requires-python"] for m in (manifest, *manifests.values())}
    if len(pythons) != 1:
        yield f"requires-python differs between manifests: {sorted(pythons)}"
    torches = {str(r) for m in manifests.values() for r in _requirements(m) if r.name == "torch"}
    if len(torches) > 1:
        yield f"the torch requirement differs between manifests: {sorted(torches)}"


def check_hosts(root: Path) -> Iterator[str]:
    """No tracked manifest or script but the lock names a package index."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode()
    for file in filter(None, listed.split("\0")):
        path = root / file
        if path.suffix not in {".toml", ".cfg", ".ini", ".yaml", ".yml", ""} or file.endswith("LICENSE"):
            continue
        if path.is_file() and INDEX_KEYS.search(path.read_text(encoding="utf-8", errors="replace")):
            yield f"{file}: names a package index"


def problems(root: Path = ROOT) -> list[str]:
    """Every disagreement in the workspace at `root`, one line each."""
    manifests = load_manifests(root)
    found: list[str] = []
    for name, manifest in manifests.items():
        missing = list(check_files(root, name))
        found += missing
        if not missing:
            found += check_versions(root, name, manifest)
        found += check_siblings(manifests, name)
        found += check_imports(root, manifests, name)
    found += check_root(root, manifests)
    found += check_hosts(root)
    return found


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines) or "workspace: all packages agree")
    sys.exit(bool(lines))
