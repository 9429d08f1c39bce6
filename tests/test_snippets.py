"""Every Python snippet in the README files and the docs runs as it stands, and every command is one that there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bs_modules.cli import main
from bs_modules.lm.commands import bsattn

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


SHELL = re.compile(r"^```(?:console|sh)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"(?:python (tools/\w+\.py)|bsattn ([a-z-]+)|python -m (bs_\w+ \w+))\b(.*)$")


def _commands() -> list[tuple[str, str]]:
    """What fenced blocks tell to run, in two parts: whose command it is and its arguments."""
    folders = [ROOT / "docs", *(ROOT / "packages").iterdir()]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for folder in folders for p in folder.rglob("*.md"))]
    lines = [
        line
        for page in pages
        if not SKIPPED & set(page.parts)
        for block in SHELL.findall(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if not line.startswith("pip ")
    ]
    found = [match.groups() for match in map(COMMAND.search, lines) if match]
    return sorted({(tool or command or module, rest.strip()) for tool, command, module, rest in found})


@pytest.mark.parametrize(("name", "rest"), _commands(), ids=map(" ".join, _commands()))
def test_command(name, rest, tmp_path, monkeypatch, capsys):
    """Commands that draw or plan run as they stand; the words of those that take long are known to them."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(rest, comments=True)
    delegated = {"bs_patterns show": "show", "bs_comm plan": "ring-plan", "show": "show", "ring-plan": "ring-plan"}
    if name.startswith("tools/"):
        text = "".join((ROOT / file).read_text(encoding="utf-8") for file in (name, "tools/results.py"))
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), words
    elif name in delegated:
        assert main([delegated[name], *words]) == 0, capsys.readouterr().err
    else:
        bsattn.commands[name].make_context(name, words)


def test_there_are_commands():
    assert {name for name, _ in _commands()} >= {"train", "generate", "bs_patterns show", "bs_comm plan"}
