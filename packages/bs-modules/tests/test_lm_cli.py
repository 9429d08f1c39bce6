"""The `bsattn` command: what works, and one clear line for each thing that cannot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tomli_w

from bs_modules.cli import main
from bs_modules.lm.run import Run
from bs_modules.testing import tiny_corpus

SMALL = {"context": 96, "width": 16, "layers": 1, "head_dim": 16, "block_size": 16, "density": 0.5, "steps": 4}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text, a config for a small run, and a run that ended."""
    monkeypatch.chdir(tmp_path)
    corpus = tiny_corpus()
    (tmp_path / "words.txt").write_bytes(corpus.train.tobytes() + corpus.validation.tobytes())
    config = {**SMALL, "data": ["words.txt"], "dtype": "float32", "device": "cpu", "threads": 1}
    (tmp_path / "small.toml").write_text(tomli_w.dumps(config))
    return tmp_path


@pytest.fixture
def trained(place, capsys):
    assert main(["train", "--config", "small.toml", "--name", "one"]) == 0
    capsys.readouterr()
    return place / "runs" / "one"


def snapshot(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails(arguments, status, words, capsys):
    """Asserts one line on stderr, nothing overwritten."""
    from pathlib import Path

    before = snapshot(Path.cwd())
    assert main(arguments) == status
    errors = capsys.readouterr().err
    assert errors.startswith("bsattn: error: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    for word in words.split(" … "):
        assert word in errors, errors
    after = snapshot(Path.cwd())
    assert {name: after[name] for name in before} == before


def test_train_reports_all_that_was_promised(place, capsys):
    assert main(["train", "--config", "small.toml", "--name", "one", "--steps", "5"]) == 0
    out = capsys.readouterr().out
    for word in (
        "validation bits per byte",
        "0–1K",
        "order-1 byte model",
        "order-2 byte model",
        "gzip -9",
        "xz -9",
        "tokens/s",
        "peak memory",
        "density requested",
        "density met",
        "attention's share of the step",
        "bsattn generate",
    ):
        assert word in out, word
    run = Run.open(place / "runs" / "one")
    assert run.settings.steps == 5
    assert run.settings.context == 96
    result = json.loads((run.path / "results.json").read_text())
    assert result["steps"] == 5
    assert result["density_requested"] == 0.5


def test_a_context_that_is_no_multiple_of_the_block_size_works(place, capsys):
    assert main(["train", "--config", "small.toml", "--name", "odd", "--context", "101", "--batch", "2"]) == 0
    assert Run.open(place / "runs" / "odd").settings.context == 101


@pytest.mark.parametrize(
    "flags",
    [
        ["--pattern", "local_window", "--window-size", "40"],
        ["--pattern", "global_local", "--global-tokens", "20", "--density", "0.4"],
        ["--dilation-rate", "1", "--dilation-rate", "3"],
        ["--dtype", "bf16", "--block-size", "32"],
        ["--pattern", "local_window", "--density", "1"],
        ["--attention", "hierarchical", "--density", "0.3"],
        ["--attention", "adaptive", "--query-block-size", "4", "--distill-rows", "2"],
    ],
    ids=" ".join,
)
def test_flags_override_the_config_file(place, capsys, flags):
    assert main(["train", "--config", "small.toml", "--name", "one", *flags]) == 0
    settings = Run.open(place / "runs" / "one").settings
    stored = settings.to_dict()
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag[2:].replace("-", "_").replace("dilation_rate", "dilation_rates")
        assert value in (str(stored[name]), str(int(stored[name])) if value == "1" and name == "density" else "") or (
            name == "dtype" or int(value) in stored[name]
        )


def test_minutes_become_steps_once_and_stay(place, capsys):
    arguments = ["train", "--config", "small.toml", "--name", "one", "--minutes", "0.2"]
    assert main(arguments) == 0
    settings = Run.open(place / "runs" / "one").settings
    assert settings.steps is not None
    assert settings.minutes == 0.2
    # The file with its recorded steps is a config like any other, and repeats the run.
    assert main(["train", "--config", "runs/one/config.toml", "--name", "two"]) == 0
    first, second = (Run.open(place / "runs" / name) for name in ("one", "two"))
    assert [r["bits_per_byte"] for r in first.metrics()] == [r["bits_per_byte"] for r in second.metrics()]


def test_resume_of_a_finished_run_reports_again_and_changes_nothing(trained, capsys):
    before = snapshot(trained / "checkpoint")
    assert main(["train", "--name", "one", "--resume"]) == 0
    assert main(["train", "--resume"]) == 0
    assert capsys.readouterr().out.count("validation bits per byte") == 2
    assert snapshot(trained / "checkpoint") == before


def test_compare_dense_trains_the_controls_and_judges(place, capsys):
    flags = ["--context", "1100", "--steps", "2", "--compare", "dense"]
    assert main(["train", "--config", "small.toml", "--name", "one", *flags]) == 0
    out = capsys.readouterr().out
    results = json.loads((place / "runs" / "one" / "compare.json").read_text())
    assert list(results) == [
        "block-sparse",
        "dense, equal seconds",
        "dense, 1,024-token context, equal seconds",
        "dense, equal steps",
    ]
    scored = {result["validation"]["scored"] for result in results.values()}
    assert len(scored) == 1
    for result in results.values():
        assert list(result["validation"]["by_position"]) == ["0–1K", "1K–4K"]
    assert results["dense, equal steps"]["steps"] == 2
    assert results["dense, equal steps"]["density_met"] == 1.0
    assert "Block-sparse attention is" in out
    assert "Long context" in out
    first = json.loads((place / "runs" / "one" / "metrics.jsonl").read_text().splitlines()[0])
    dense = place / "runs" / "one" / "dense-equal-steps" / "metrics.jsonl"
    # The same weights and batch, and output projections that start at zero: the first loss is the same.
    assert json.loads(dense.read_text().splitlines()[0])["bits_per_byte"] == pytest.approx(first["bits_per_byte"])


def test_a_gated_run_is_drawn_and_sampled_and_another_starts_from_it(place, capsys):
    assert main(["train", "--config", "small.toml", "--name", "gate", "--attention", "adaptive"]) == 0
    assert (place / "runs" / "gate" / "layout.png").read_bytes().startswith(b"\x89PNG")
    assert main(["generate", "gate", "--tokens", "3", "--prompt", "x"]) == 0
    assert main(["train", "--config", "small.toml", "--name", "next", "--start-from", "gate"]) == 0
    assert Run.open(place / "runs" / "next").settings.start_from == str(
        place.joinpath("runs", "gate").relative_to(place)
    )
    assert "density met" in capsys.readouterr().out


BAD = {
    "missing file": (["--data", "none.txt"], 2, "no such file or folder: none.txt"),
    "no match": (["--data", "*.none"], 2, "no file matches *.none"),
    "empty data": (["--data", ""], 2, "data: expected a file, folder or glob, got ''"),
    "empty start": (["--start-from", ""], 2, "start_from: expected the folder of a run, got ''"),
    "empty file": (["--data", "empty.txt"], 2, "the file is empty"),
    "short text": (["--data", "short.txt"], 2, "less than one context of 96"),
    "density 0": (["--density", "0"], 2, "density: expected a density in (0, 1] … got 0"),
    "density 1.5": (["--density", "1.5"], 2, "density … got 1.5"),
    "density nan": (["--density", "nan"], 2, "density … got nan"),
    "density word": (["--density", "half"], 2, "'half' is not a valid float"),
    "pattern": (["--pattern", "local_windw"], 2, "pattern: expected one of local_window … did you mean 'local_window'"),
    "block size": (["--block-size", "0"], 2, "block_size: expected an integer ≥ 1, got 0"),
    "context": (["--context", "-5"], 2, "context: expected an integer ≥ 1, got -5"),
    "head dim": (["--head-dim", "5"], 2, "head_dim: expected an even divisor of width=16, got 5"),
    "steps": (["--steps", "0"], 2, "steps: expected an integer ≥ 1, got 0"),
    "minutes": (["--minutes", "-1"], 2, "minutes: expected a number > 0, got -1"),
    "both": (["--steps", "3", "--minutes", "1"], 2, "minutes: has no effect beside --steps"),
    "seed": (["--seed", "-1"], 2, "seed: expected an integer in [0, 2^63), got -1"),
    "device": (["--device", "abacus"], 2, "device: 'abacus' cannot be used"),
    "meta device": (["--device", "meta"], 2, "device: expected auto, cpu or cuda"),
    "dtype": (["--dtype", "int8"], 2, "'int8' is not one of"),
    "ineffective": (["--window-size", "64"], 2, "window_size: has no effect with pattern_type='dilated_sparse'"),
    "attention": (["--attention", "adaptve"], 2, "attention: expected one of base … did you mean 'adaptive'"),
    "pattern of a gate": (
        ["--attention", "adaptive", "--pattern", "local_window"],
        2,
        "pattern: has no effect with attention='adaptive', which reads density, block_size",
    ),
    "dense density": (["--attention", "dense"], 2, "density: has no effect with attention='dense'"),
    "gate of a pattern": (["--distill-rows", "4"], 2, "distill_rows: has no effect with attention='base'"),
    "distill rows": (["--attention", "adaptive", "--distill-rows", "-1"], 2, "distill_rows: expected an integer ≥ 0"),
    "query block size": (["--attention", "adaptive", "--query-block-size", "0"], 2, "query_block_size: expected an"),
    "shared gate": (["--attention", "adaptive", "--nproc", "2"], 2, "nproc: expected 1 with adaptive attention"),
    "weight": (["--config", "weight.toml"], 2, "distillation_weight: has no effect without distill_rows"),
    "temperatures": (["--config", "warm.toml"], 2, "temperatures: expected two numbers > 0, got (1.0,)"),
    "start from nothing": (["--start-from", "none"], 2, "run: runs/none holds no run"),
    "unknown flag": (["--densty", "1"], 2, "No such option"),
    "no config": (["--config", "none.toml"], 2, "config: cannot read none.toml"),
    "bad config": (["--config", "words.txt"], 2, "config: words.txt is not valid TOML"),
    "unknown setting": (["--config", "typo.toml"], 2, "unknown setting 'contxt' (did you mean 'context'?)"),
    "wrong type": (["--config", "type.toml"], 2, "context: expected int, got 'long'"),
    "nothing to resume": (["--resume", "--runs", "elsewhere"], 2, "nothing to resume"),
    "resume of nothing": (["--resume", "--name", "none"], 2, "holds no run"),
    "unwritable": (["--runs", "words.txt/runs"], 2, "cannot write to words.txt/runs"),
    "nan": (["--config", "nan.toml"], 1, "at step … nothing was saved yet"),
    "compare": (["--compare", "sparse"], 2, "'sparse' is not 'dense'"),
    "dense compared": (["--config", "dense.toml", "--compare", "dense"], 2, "the run is dense itself"),
}


@pytest.mark.parametrize(("flags", "status", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(place, capsys, flags, status, words):
    (place / "empty.txt").touch()
    (place / "short.txt").write_text("too short")
    base = {**SMALL, "data": ["words.txt"], "device": "cpu", "dtype": "float32"}
    (place / "typo.toml").write_text("contxt = 5\n")
    (place / "type.toml").write_text('context = "long"\n')
    (place / "weight.toml").write_text('attention = "adaptive"\ndistillation_weight = 1\n')
    (place / "warm.toml").write_text('attention = "adaptive"\ntemperatures = [1]\n')
    (place / "nan.toml").write_text(tomli_w.dumps({**base, "matrix_lr": 1e38, "embedding_lr": 1e38}))
    (place / "dense.toml").write_text(
        tomli_w.dumps({"attention": "dense", "steps": 4, "context": 96, "data": ["words.txt"]})
    )
    config = [] if "--config" in flags or "--resume" in flags else ["--config", "small.toml"]
    fails(["train", *config, *flags], status, words, capsys)


def test_an_existing_run_is_never_overwritten(trained, capsys):
    fails(["train", "--config", "small.toml", "--name", "one"], 2, "holds a run already", capsys)


def test_resume_under_another_configuration_is_refused(trained, capsys):
    fails(["train", "--name", "one", "--resume", "--context", "64"], 2, "context=96, not 64", capsys)
    fails(["train", "--name", "one", "--resume", "--density", "0.1"], 2, "density=0.5, not 0.1", capsys)
    (trained.parent.parent / "words.txt").write_text("other words " * 2000)
    fails(["train", "--name", "one", "--resume"], 2, "another text", capsys)


def test_a_truncated_checkpoint_is_refused_by_resume_and_generate(trained, capsys):
    (trained / "results.json").unlink()
    path = next((trained / "checkpoint").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    fails(["train", "--name", "one", "--resume"], 2, "is truncated", capsys)
    fails(["generate", "one"], 2, "is truncated", capsys)


def test_a_run_in_use_is_refused(trained, capsys):
    from bs_modules.lm.run import locked

    with locked(trained):
        fails(["train", "--name", "one", "--resume"], 2, "in use by another process", capsys)


def test_generate_streams_the_prompt_and_what_follows(trained, capsys):
    for target in (str(trained), "one"):
        assert main(["generate", target, "--prompt", "abé ", "--tokens", "30", "--seed", "3", "--top-k", "5"]) == 0
    first, second = capsys.readouterr().out.split("abé ")[1:]
    assert first == second
    assert len(first.encode(errors="replace")) >= 30
    assert main(["generate", "one", "--tokens", "0", "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "none holds no run"),
        (["one", "--prompt", ""], "prompt: expected at least one character"),
        (["one", "--temperature", "-1"], "-1.0 is not in the range"),
        (["one", "--top-k", "0"], "0 is not in the range"),
        (["one", "--tokens", "-3"], "-3 is not in the range"),
        (["one", "--device", "abacus"], "device: 'abacus' cannot be used"),
        ([], "Missing argument 'RUN'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_in_one_line(trained, capsys, arguments, words):
    fails(["generate", *arguments], 2, words, capsys)


def test_a_run_without_checkpoint_cannot_generate(trained, capsys):
    (trained / "checkpoint" / "state.json").unlink()
    fails(["generate", "one"], 2, "has no checkpoint yet", capsys)


@pytest.mark.parametrize("library", ["click", "rich", "safetensors.torch", "tomli_w"])
def test_a_missing_library_is_one_line_that_says_what_to_install(place, capsys, monkeypatch, library):
    for name in [name for name in sys.modules if name.startswith("bs_modules.lm")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name == library or name.startswith(library + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["train", "--config", "small.toml", "--name", "one"]) == 2
    errors = capsys.readouterr().err
    assert "pip install 'bs-modules[train]'" in errors
    assert errors.count("\n") == 1


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train", "generate", "show", "ring-plan"):
        assert word in out
    assert main(["--version"]) == 0
    assert "0.1.0" in capsys.readouterr().out
    assert main(["trian"]) == 2


def test_as_a_process_errors_are_one_line_and_status_two(place):
    done = subprocess.run(
        [sys.executable, "-m", "bs_modules.cli", "train", "--data", "none"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "bsattn: error: data: no such file or folder: none\n"
    assert done.stdout == ""


def test_show_and_ring_plan_belong_to_the_packages_below(capsys, tmp_path):
    picture = tmp_path / "layout.png"
    window = ["local_window", "--window-size", "128", "--tokens", "1024", "--causal"]
    assert main(["show", *window, "--png", str(picture)]) == 0
    assert "density" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["show", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["ring-plan", *window, "--world-size", "4"]) == 0
    assert "rank" in capsys.readouterr().out
