"""The benchmarks: pages say what their JSON says, and what was measured survives a kill."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
#: The module that makes the page of each file of results.
PAGES = {
    "adaptive": "bench_adaptive",
    "comm": "comm_report",
    "cpu": "cpu_report",
    "longnet": "bench_longnet",
    "memory": "bench_memory",
    "patterns": "bench_patterns",
    "quality": "bench_quality",
    "small": "bench_small",
    "variants": "variants_report",
}


@pytest.fixture(scope="module")
def tool():
    """Imports a module of tools/."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_its_file_says(tool, name):
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    made = tool(PAGES[name]).page(found)
    assert made == (FOLDER / f"{name}.md").read_text(encoding="utf-8"), "make it again with --page"


def test_every_file_of_results_has_a_page_and_every_page_is_listed():
    files = {path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("gpu-")}
    assert files == {*PAGES, "training"}
    listed = set(re.findall(r"^(\w+)$", (FOLDER / "index.md").read_text(encoding="utf-8"), re.M))
    assert listed == {path.stem for path in FOLDER.glob("*.md")} - {"index"}


def test_the_training_page_shows_the_recorded_runs(tool):
    runs = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))["runs"]
    shown = (FOLDER / "training.md").read_text(encoding="utf-8").replace("*", "")
    for name, run in runs.items():
        for row in tool("record_runs").rows(name, run):
            cells = row.strip("| ").split(" | ")
            # Names are spelt out on the page; a control that shared the machine has no times there.
            tail = " | ".join(cells[-4:])
            assert f" | {tail} |" in shown, row
            if not name.startswith("compared"):
                assert f"| {' | '.join(cells[1:])} |" in shown, row


def test_the_readme_quotes_the_variants_as_measured():
    found = json.loads((FOLDER / "variants.json").read_text(encoding="utf-8"))["variants"]["records"]
    times = {r["variant"]: (r["forward"]["ms"], r["both"]["ms"]) for r in found if r["tokens"] == 8192}
    quoted = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (sparse, sparse_both), (dense, dense_both) = times["base"], times["dense"]
    for text in (
        f"takes {sparse:.0f} ms",
        f"takes {dense:.0f} ms",
        f"{sparse_both:.0f} ms instead of {dense_both:.0f} ms",
    ):
        assert text in quoted, text


KILLED = """
import os, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import results

def records():
    yield {"n": 1}
    yield {"n": 2}
    os.kill(os.getpid(), 9)

results.keep(Path(sys.argv[2]), "speed", records(), lambda found: "a page", settings=3)
"""


def test_a_killed_benchmark_loses_neither_its_records_nor_earlier_ones(tool, tmp_path):
    path, before = tmp_path / "out.json", {"speed": {"records": [0]}, "memory": {"records": [5]}}
    path.write_text(json.dumps(before), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT / "tools"), str(path)], check=False)
    assert done.returncode == -9
    found = json.loads(path.read_text(encoding="utf-8"))
    unfinished = found.pop("unfinished")
    assert found == before
    assert unfinished["speed"]["records"] == [{"n": 1}, {"n": 2}]
    assert unfinished["speed"]["settings"] == 3
    assert unfinished["speed"]["machine"]["cpus"]

    results = tool("results")
    assert results.keep(path, "speed", iter([7]), lambda found: f"{sorted(found)}\n") == [7]
    found = results.load(path)
    assert found["memory"] == before["memory"]
    assert found["speed"]["records"] == [7]
    assert "unfinished" not in found
    assert path.with_suffix(".md").read_text(encoding="utf-8") == "['memory', 'speed']\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.md"]


def test_a_benchmark_that_fails_leaves_its_records(tool, tmp_path):
    results, path = tool("results"), tmp_path / "out.json"

    def records():
        yield 1
        raise SystemExit("meant to measure another backend")

    with pytest.raises(SystemExit):
        results.keep(path, "speed", records())
    assert results.load(path)["unfinished"]["speed"]["records"] == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_turns_and_ratios(tool):
    results, seen, clock = tool("results"), [], iter(range(100))
    times = results.take_turns(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, calls=2, clock=lambda: next(clock), cold="b"
    )
    assert "".join(seen) == "a" + "aabb" * 2
    assert times == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    assert results.ratio([3.0, 1.0, 8.0], [1.0, 1.0, 4.0]) == [2.0, 1.0, 3.0]
    assert results.shown_ratio([2.0, 1.0, 3.0]) == "2.00 (1.00 to 3.00)"
    assert results.shown_ratio([2.0, 2.0, 2.0]) == "2.00"


@pytest.mark.parametrize("name", ["bench_slow_link", "record_runs", "soak"])
def test_tools_explain_themselves(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert not list(tmp_path.iterdir())
