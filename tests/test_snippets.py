"""Every Python snippet in the README files and the docs runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(?:python|\{code-block\} python)\n(.*?)^```", re.M | re.S)
# Documents that are built, or belong to no reader.
SKIPPED = {"_build", "node_modules", ".venv"}


def _pages() -> list[Path]:
    folders = [ROOT / "docs", *(ROOT / "packages").iterdir()]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for folder in folders for p in folder.rglob("*.md"))]
    return sorted(p for p in pages if not SKIPPED & set(p.parts) and FENCE.search(p.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", _pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_page(page, tmp_path):
    """The blocks of one page run in order, in one fresh process with an empty folder to write in."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{page.relative_to(ROOT)}\n{done.stdout}\n{done.stderr}"


def test_there_are_pages():
    assert ROOT / "README.md" in _pages()
