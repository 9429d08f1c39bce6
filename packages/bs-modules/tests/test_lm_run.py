"""Runs on disk: atomic files, checkpoints, resume, signals, SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch

from bs_modules.lm.build import starting_weights
from bs_modules.lm.checkpoint import load_checkpoint, save_checkpoint
from bs_modules.lm.data import load_corpus
from bs_modules.lm.durable import write_atomically
from bs_modules.lm.errors import InputError, RunError
from bs_modules.lm.run import Run, locked, new_folder
from bs_modules.lm.settings import settings_from
from bs_modules.lm.signals import StopSignals
from bs_modules.lm.train import Interrupted, Trainer, train
from bs_modules.testing import tiny_corpus, tiny_settings

KILLS = int(os.environ.get("BS_SIGKILLS", "1"))


class Silent:
    def step(self, step, steps, bits_per_byte, tokens_per_second):
        pass


def start(path: Path, **changes) -> Run:
    path.mkdir(exist_ok=True)
    return Run.create(path, tiny_settings(**changes), {"text": tiny_corpus().digest})


def stop_after(count):
    calls = iter(range(count - 1))
    return lambda: next(calls, None) is None


def state_of(run: Run):
    found = load_checkpoint(run.checkpoint)
    values = {k: v for k, v in found.values.items() if k not in ("seconds", "peak_memory")}
    return found.tensors, values


def assert_same_state(left: Run, right: Run):
    (a, a_values), (b, b_values) = state_of(left), state_of(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert a_values == b_values


def losses(run: Run):
    return [(record["step"], record["bits_per_byte"]) for record in run.metrics()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stops", [(1,), (3,), (2, 2, 1)], ids=str)
def test_resume_equals_an_uninterrupted_run_tensor_by_tensor(tmp_path, stops, dtype):
    whole = start(tmp_path / "whole", dtype=dtype)
    expected = train(whole, tiny_corpus(), Silent())
    parts = start(tmp_path / "parts", dtype=dtype)
    for count in stops:
        with pytest.raises(Interrupted):
            train(parts, tiny_corpus(), Silent(), stop_after(count))
        parts = Run.open(tmp_path / "parts")
    assert state_of(parts)[1]["step"] == sum(stops)
    result = train(parts, tiny_corpus(), Silent())
    assert_same_state(whole, parts)
    assert losses(whole) == losses(parts)
    assert result.validation == expected.validation


def test_a_gate_resumes_bit_for_bit_with_its_noise_and_its_temperature(tmp_path):
    gate = {"attention": "adaptive", "query_block_size": 4, "distill_rows": 3, "temperatures": (0.4, 0.1)}
    whole = start(tmp_path / "whole", **gate)
    expected = train(whole, tiny_corpus(), Silent())
    assert abs(expected.density_met - 0.5) < 0.01
    assert expected.density_requested == 0.5
    parts = start(tmp_path / "parts", **gate)
    for count in (2, 1):
        with pytest.raises(Interrupted):
            train(parts, tiny_corpus(), Silent(), stop_after(count))
    assert train(parts, tiny_corpus(), Silent()).validation == expected.validation
    assert_same_state(whole, parts)
    assert losses(whole) == losses(parts)
    tensors = state_of(whole)[0]
    assert tensors["model.blocks.0.attention.scorer.q_weight_1"].abs().max() > 0  # zeros at first: it was trained


def test_a_gate_is_validated_without_noise():
    trainer = Trainer(tiny_settings(attention="adaptive", temperatures=(5.0, 5.0)), tiny_corpus())
    trainer.train_step(1.0)
    found = {trainer.validate(trainer.windows()).bits_per_byte for _ in range(3)}
    assert len(found) == 1
    assert trainer.model.training


@pytest.mark.parametrize("attention", ["base", "adaptive", "dense"])
def test_a_run_starts_from_the_weights_of_another(tmp_path, attention):
    first = start(tmp_path / "first")
    train(first, tiny_corpus(), Silent())
    settings = {"attention": attention, "context": 64, "start_from": str(first.path), "seed": 5}
    second = start(tmp_path / "second", **settings)
    with pytest.raises(Interrupted):
        train(second, tiny_corpus(), Silent(), stop_after(1))
    given, taken = (state_of(run)[0] for run in (first, second))
    # One step of Muon and AdamW cannot move a weight by more than this.
    assert (given["model.blocks.1.qkv"] - taken["model.blocks.1.qkv"]).abs().max() < 0.05
    fresh = Trainer(tiny_settings(seed=5), tiny_corpus()).model.state_dict()["blocks.1.qkv"]
    assert (fresh - taken["model.blocks.1.qkv"]).abs().max() > 0.1
    shutil.rmtree(first.path)  # what it started with is its own by now
    train(second, tiny_corpus(), Silent())


def test_starting_weights_that_do_not_fit_are_refused(tmp_path):
    first = start(tmp_path / "first", width=16)
    with pytest.raises(InputError, match=r"start_from: .* has no checkpoint yet"):
        starting_weights(tiny_settings(start_from=str(first.path)))
    train(first, tiny_corpus(), Silent())
    with pytest.raises(InputError, match=r"start_from: expected a model of the sizes .*width=32.* has .*width=16"):
        starting_weights(tiny_settings(start_from=str(first.path)))
    with pytest.raises(InputError, match="holds no run"):
        starting_weights(tiny_settings(start_from=str(tmp_path)))


def test_training_learns(tmp_path):
    result = train(start(tmp_path / "run", steps=60), tiny_corpus(), Silent())
    found = [bits for _, bits in losses(Run.open(tmp_path / "run"))]
    assert sum(found[-5:]) / 5 < 0.6 * found[0]
    assert result.validation.bits_per_byte < 0.6 * found[0]
    assert result.density_requested == 0.5
    assert abs(result.density_met - 0.5) < 0.1
    assert result.tokens == 60 * 96
    assert 0 < result.attention_share < 1


def test_batches_do_not_depend_on_what_came_before():
    one, other = (Trainer(tiny_settings(), tiny_corpus()) for _ in range(2))
    one.train_step(1.0)
    assert torch.equal(one.batch(5)[0], other.batch(5)[0])
    tokens, targets = one.batch(3)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_nan_loss_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    run = start(tmp_path / "run", save_seconds=0.0)
    with pytest.raises(Interrupted):
        train(run, tiny_corpus(), Silent(), stop_after(3))
    good = state_of(run)
    settings = tiny_settings(save_seconds=0.0, matrix_lr=1e38, embedding_lr=1e38)
    broken = Run(run.path, settings, run.facts)
    with pytest.raises(RunError, match=r"(loss is nan at step|NaN or infinity after step) \d.*checkpoint of step \d"):
        train(broken, tiny_corpus(), Silent())
    kept = load_checkpoint(run.checkpoint)
    assert kept.values["step"] >= good[1]["step"]
    assert all(torch.isfinite(tensor).all() for tensor in kept.tensors.values())


def test_checkpoints_switch_as_one_unit_and_leave_no_litter(tmp_path):
    folder = tmp_path / "checkpoint"
    for step in (1, 2, 3):
        save_checkpoint(folder, step, {"a": torch.full((3,), step)}, {"seconds": 0.5})
        found = load_checkpoint(folder)
        assert found.values["step"] == step
        assert found.tensors["a"].tolist() == [step] * 3
        assert sorted(p.name for p in folder.iterdir()) == ["state.json", f"step-{step:08d}.safetensors"]


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_while_saving_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, moment):
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, 1, {"a": torch.ones(3)}, {})
    calls = iter(range(100))

    def crash(real):
        def call(*arguments, **options):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", crash(os.replace))
    monkeypatch.setattr(os, "fsync", crash(os.fsync))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, 2, {"a": torch.full((3,), 2.0)}, {})
    monkeypatch.undo()
    found = load_checkpoint(folder)
    assert found.tensors["a"].tolist() == [found.values["step"]] * 3
    save_checkpoint(folder, 3, {"a": torch.full((3,), 3.0)}, {})
    assert load_checkpoint(folder).values["step"] == 3


def damage_truncated(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def damage_flipped(folder):
    path = next(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def damage_missing(folder):
    next(folder.glob("*.safetensors")).unlink()


def damage_json(folder):
    (folder / "state.json").write_text('{"format": 1, "step"')


def damage_keys(folder):
    (folder / "state.json").write_text('{"format": 1}')


def damage_version(folder):
    (folder / "state.json").write_text('{"format": 99}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncated, "is truncated: .* bytes of"),
        (damage_flipped, "is corrupt: its SHA-256"),
        (damage_missing, "is missing"),
        (damage_json, "state.json is corrupt"),
        (damage_keys, "state.json is corrupt"),
        (damage_version, "format 99, expected 1"),
    ],
    ids=["truncated", "bit flipped", "missing", "bad json", "missing keys", "other format"],
)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(tmp_path, damage, words):
    run = start(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(run, tiny_corpus(), Silent(), stop_after(2))
    damage(run.checkpoint)
    before = {p.name: p.read_bytes() for p in run.checkpoint.iterdir()}
    with pytest.raises(InputError, match=words):
        train(run, tiny_corpus(), Silent())
    assert {p.name: p.read_bytes() for p in run.checkpoint.iterdir()} == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(run, tiny_corpus(), Silent(), stop_after(2))
    wider = Run(run.path, tiny_settings(width=64), run.facts)
    with pytest.raises(InputError, match="does not fit the model"):
        train(wider, tiny_corpus(), Silent())


def test_writes_are_atomic(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_atomically(file, b"new")
    assert file.read_text() == "new"


def test_metrics_rewind_to_the_checkpoint_and_survive_a_cut_line(tmp_path):
    run = start(tmp_path / "run")
    for step in range(5):
        run.log({"step": step, "bits_per_byte": 1.0})
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "bits')
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3, 4]
    run.rewind_metrics(3)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_a_run_folder_is_opened_by_one_process_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_new_folders(tmp_path):
    new_folder(tmp_path / "a" / "b")
    new_folder(tmp_path / "a" / "b")
    run = start(tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a run already.*--resume"):
        new_folder(run.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match=r"not empty \(it holds diary.txt\)"):
        new_folder(tmp_path / "full")
    with pytest.raises(InputError, match="cannot write to"):
        new_folder(tmp_path / "full" / "diary.txt" / "run")


def test_another_configuration_or_text_is_refused(tmp_path):
    run = start(tmp_path / "run")
    run.check_same({"context": 96, "data": (), "dtype": "auto", "steps": None}, {"text": tiny_corpus().digest})
    with pytest.raises(InputError, match="started with context=96, not 128"):
        run.check_same({"context": 128}, {})
    with pytest.raises(InputError, match="another text"):
        run.check_same({}, {"text": "0"})
    with pytest.raises(InputError, match="holds no run"):
        Run.open(tmp_path / "other")
    (run.path / "config.toml").write_text("context = 'many'\n")
    with pytest.raises(InputError, match="context: expected int, got 'many'"):
        Run.open(run.path)
    (run.path / "config.toml").write_text("context = \n")
    with pytest.raises(InputError, match="not valid TOML"):
        Run.open(run.path)


# -- real processes ----------------------------------------------------------------------------------------------------

STEPS = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    corpus = tiny_corpus()
    file.write_bytes(corpus.train.tobytes() + corpus.validation.tobytes())
    return file


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The run that interrupted ones must equal."""
    path = tmp_path_factory.mktemp("uninterrupted")
    settings = settings_from(values_for(text), "test")
    run = Run.create(path, settings, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(run, load_corpus(settings.data, settings.context), Silent())
    torch.set_num_threads(threads)
    return run


def values_for(text: Path) -> dict[str, object]:
    sizes = {"context": 64, "width": 16, "layers": 1, "head_dim": 16, "block_size": 16, "density": 0.5}
    rest = {"steps": STEPS, "threads": 1, "dtype": "float32", "device": "cpu", "save_seconds": 0.02}
    return {"data": [str(text)], **sizes, **rest}


class Process:
    """`bsattn train` in a process of its own."""

    def __init__(self, text: Path, runs: Path, *, resume: bool) -> None:
        self.run = runs / "run"
        config = runs / "tiny.toml"
        config.write_text(tomli_w.dumps(values_for(text)))
        which = ["--resume"] if resume else ["--config", str(config)]
        command = [sys.executable, "-m", "bs_modules.cli", "train", "--runs", str(runs), "--name", "run", *which]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for_step(self, step: int) -> None:
        """Returns once the run has logged so many steps, or ended."""
        log, deadline = self.run / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._process.poll() is not None or (log.exists() and log.read_text().count("\n") >= step):
                return
            time.sleep(0.005)
        raise AssertionError(f"no step {step} within two minutes")

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Sends a signal, if any, and returns exit status and stderr."""
        if number is not None:
            self._process.send_signal(number)
        _, errors = self._process.communicate(timeout=240)
        assert "Traceback" not in errors
        return self._process.returncode, errors


def test_signals_at_random_moments_cost_nothing_but_time(text, tmp_path, uninterrupted):
    """SIGTERM once, then SIGKILL `BS_SIGKILLS` times (1 by default), then to the end: the same bits."""
    chance = random.Random(os.environ.get("BS_SIGKILL_SEED", "0"))
    process = Process(text, tmp_path, resume=False)
    process.wait_for_step(5)
    status, errors = process.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "saved; continue with: bsattn train" in errors
    checkpoint = tmp_path / "run" / "checkpoint"
    survived = load_checkpoint(checkpoint).values["step"]
    assert survived >= 5
    for _ in range(KILLS):
        process = Process(text, tmp_path, resume=True)
        process.wait_for_step(min(survived + chance.randrange(1, 60), STEPS))
        time.sleep(chance.random() * 0.03)  # anywhere within a step or a save
        assert process.end(signal.SIGKILL)[0] in (-signal.SIGKILL, 0)
        saved = load_checkpoint(checkpoint).values["step"]
        assert saved >= survived
        survived = saved
    status, errors = Process(text, tmp_path, resume=True).end()
    assert status == 0, errors
    run = Run.open(tmp_path / "run")
    assert_same_state(run, uninterrupted)
    assert losses(run) == losses(uninterrupted)
    assert len(losses(run)) == STEPS

    names = {p.name for p in run.path.iterdir()}
    assert {"config.toml", "metrics.jsonl", "checkpoint", "loss.png", "layout.png", "results.json"} <= names
    assert not [name for name in names if "partial" in name]
    for picture in ("loss.png", "layout.png"):
        assert (run.path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_first_signal_is_a_question_and_the_second_acts():
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with none
    try:
        with StopSignals() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            assert stop.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, given)
