"""`bsattn train --nproc`: several processes share every sequence, and nothing else changes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tomli_w
import torch

from bs_modules.cli import main
from bs_modules.lm.errors import InputError, RunError
from bs_modules.lm.run import Run
from bs_modules.lm.team import assemble
from bs_modules.lm.train import Interrupted, Trainer, resolve, train
from bs_modules.testing import tiny_corpus, tiny_settings


class Watcher:
    """Calls a function after a step."""

    def __init__(self, at=None, act=None):
        self.at, self.act = at, act

    def step(self, step, steps, bits_per_byte, tokens_per_second):
        if step == self.at:
            self.act()


def run_in(folder, settings):
    folder.mkdir()
    return Run.create(folder, resolve(settings), {})


def losses(run):
    return [record["bits_per_byte"] for record in run.metrics()]


def test_loss_and_validation_are_those_of_one_process(tmp_path):
    """Six steps over an odd length; every process starts from the same weights and takes the same steps."""
    runs = {}
    for nproc in (1, 2):
        settings = tiny_settings(context=101, batch=2, nproc=nproc)
        run = run_in(tmp_path / str(nproc), settings)
        with assemble(run.settings, Trainer) as team:
            result = train(run, tiny_corpus(), Watcher(), team=team)
        runs[nproc] = (losses(run), result)
    torch.testing.assert_close(torch.tensor(runs[2][0]), torch.tensor(runs[1][0]), rtol=1e-4, atol=0)
    one, two = (runs[n][1].validation for n in (1, 2))
    assert two.scored == one.scored
    assert two.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-4)
    assert list(two.by_position) == list(one.by_position)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    settings = tiny_settings(nproc=3, batch=1)
    stopped, whole = run_in(tmp_path / "stopped", settings), run_in(tmp_path / "whole", settings)
    with assemble(settings, Trainer) as team:
        train(whole, tiny_corpus(), Watcher(), team=team)
        asked = []
        with pytest.raises(Interrupted):
            train(stopped, tiny_corpus(), Watcher(3, lambda: asked.append(1)), lambda: bool(asked), team=team)
        train(stopped, tiny_corpus(), Watcher(), team=team)
    assert losses(stopped) == losses(whole)


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    run = run_in(tmp_path / "run", tiny_settings(nproc=3, save_seconds=0.0))
    with assemble(run.settings, Trainer) as team:
        kill = Watcher(2, lambda: os.kill(team._workers[1].process.pid, signal.SIGKILL))
        with pytest.raises(RunError, match="process 2 of 3 was killed by SIGKILL; the checkpoint of step 2 is kept"):
            train(run, tiny_corpus(), kill, team=team)
    assert not torch.distributed.is_initialized()


def test_an_error_in_a_worker_is_told(tmp_path):
    run = run_in(tmp_path / "run", tiny_settings(nproc=2))
    with assemble(run.settings, Trainer) as team:
        wrong = Watcher(1, lambda: team.tell("no_such_thing"))
        with pytest.raises(RunError, match=r"process 1 of 2 failed: AttributeError: .*no_such_thing"):
            train(run, tiny_corpus(), wrong, team=team)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"nproc": 7},
            r"nproc: expected an integer in \[1, 6\] .*96 tokens has 6 blocks.*, got 7",
        ),
        ({"nproc": 0}, "nproc: expected an integer ≥ 1, got 0"),
        ({"nproc": 2, "attention": "dense", "density": None}, "nproc: expected 1 with dense attention"),
        ({"nproc": 2, "device": "cuda"}, "nproc: expected 1 on cuda"),
    ],
)
def test_settings_that_cannot_share(changes, words):
    with pytest.raises(InputError, match=words):
        tiny_settings(**changes)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = tiny_corpus()
    (tmp_path / "words.txt").write_bytes(corpus.train.tobytes() + corpus.validation.tobytes())
    values = dataclasses.asdict(tiny_settings(steps=4, width=16, layers=1))
    values = {name: value for name, value in values.items() if value not in (None, ())}
    (tmp_path / "small.toml").write_text(tomli_w.dumps({**values, "data": ["words.txt"]}))
    return tmp_path


def test_the_command_trains_and_resumes_with_the_same_processes(place, capsys):
    assert main(["train", "--config", "small.toml", "--name", "one", "--nproc", "2"]) == 0
    assert "every sequence shared by 2 processes" in capsys.readouterr().out
    run = Run.open(place / "runs" / "one")
    assert run.settings.nproc == 2
    assert json.loads((run.path / "results.json").read_text())["steps"] == 4
    assert main(["train", "--name", "one", "--resume", "--nproc", "3"]) == 2
    assert "was started with nproc=2, not 3" in capsys.readouterr().err
    assert main(["train", "--config", "small.toml", "--name", "two", "--nproc", "2", "--compare", "dense"]) == 2
    assert "compare: the dense controls run in one process" in capsys.readouterr().err


NUMBERS = [signal.SIGINT, signal.SIGKILL] + [signal.SIGTERM] * bool(os.environ.get("BS_SOAK"))


def descendants(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return children + [pid for child in children for pid in descendants(child)]


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_no_process_outlives_the_command(place, number):
    """Ctrl-C goes to all processes, SIGTERM to the first: both save. After SIGKILL the others leave by themselves."""
    command = [sys.executable, "-m", "bs_modules.cli", "train", "--config", "small.toml", "--name", "one"]
    process = subprocess.Popen(
        [*command, "--nproc", "2", "--steps", "100000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = place / "runs" / "one" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = descendants(process.pid)
    assert len(children) > 1
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "saved; continue with: bsattn train" in errors
        assert Run.open(place / "runs" / "one").started
    while not all(gone(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
