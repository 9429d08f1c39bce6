"""The training loop: from settings to a finished run, resumable at any step bit for bit."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bs_comm import Placement

from .._adaptive_training import AdaptiveSparsityTrainer
from .build import build_model, density_met, start_with, starting_weights
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Corpus, batch_at
from .errors import InputError, NotFinite, RunError
from .measure import (
    Validation,
    attention_share,
    peak_memory,
    reset_peak_memory,
    validate,
    validation_windows,
)
from .optimizer import Muon
from .run import Run
from .settings import Settings
from .team import Team, gathered_attention

_WARM_STEPS, _TIMED_STEPS = 2, 5
# Small validations on the way, and windows in each.
_PROBES, _PROBE_WINDOWS = 8, 4
# What follows training and is not validation: yardsticks, pictures, the last checkpoint.
_RESERVED_SECONDS = 6.0


class Progress(Protocol):
    """What the loop tells its watcher."""

    def step(self, step: int, steps: int, bits_per_byte: float, tokens_per_second: float) -> None:
        """After every step."""


@dataclasses.dataclass
class Result:
    """What a finished run measured."""

    validation: Validation
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    attention_share: float
    parameters: int
    density_requested: float | None
    density_met: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


class Interrupted(Exception):
    """Training was asked to stop and saved at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Trainer:
    """Model, optimizer and position of one run.

    With a team every process has a trainer of its own with all the weights, and a slice of every sequence; what the
    first one does, the others do with it. Gradients are summed over the processes, so weights stay equal.

    Args:
        settings: With device, dtype and threads resolved.
        corpus: The text.
        team: The processes that share every sequence, as many as `settings.nproc`; `None`: this one alone.
    """

    def __init__(self, settings: Settings, corpus: Corpus, team: Team | None = None) -> None:
        self.settings, self.corpus, self.team = settings, corpus, team
        self.device = torch.device(settings.device)
        self.start, self.stop = 0, settings.context
        if team is not None:
            assert settings.block_size is not None
            place = Placement.contiguous(settings.context, team.world_size, block_size=settings.block_size)
            self.stop = int(place.lengths[: team.rank + 1].sum())
            self.start = self.stop - int(place.lengths[team.rank])
            team.tell("begin", settings, corpus)
        self.reset()

    def reset(self) -> None:
        """Starts from step 0 with the weights of the seed."""
        settings = self.settings
        self.step = 0
        self.seconds = 0.0
        self.peak_memory = 0
        torch.manual_seed(settings.seed)  # the scorer and the noise of a gate draw from it
        self.model = build_model(settings, spread=self.team is not None).to(self.device)
        half = settings.dtype == "bfloat16"
        self.optimizer = Muon(
            *self.model.parameter_groups(),
            matrix_lr=settings.matrix_lr,
            embedding_lr=settings.embedding_lr,
            gain_lr=settings.gain_lr,
            gate_lr=settings.gate_lr,
            momentum=settings.momentum,
            iteration_dtype=torch.bfloat16 if half else torch.float32,
        )
        self.gates: AdaptiveSparsityTrainer | None = None
        if settings.attention == "adaptive":
            assert settings.temperatures is not None
            self.gates = AdaptiveSparsityTrainer(
                self.model,
                *settings.temperatures,
                annealing_steps=settings.steps or 1,
                distillation_weight=settings.distillation_weight or 0.0,
            )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step, each `uint8[batch, context]`: a function of (seed, step) alone."""
        settings = self.settings
        array = batch_at(self.corpus.train, settings.context, settings.batch, settings.seed, step)
        both = torch.from_numpy(array).to(self.device)
        return both[:, :-1], both[:, 1:]

    def train_step(self, rate: float) -> float:
        """Takes one step and returns its loss in bits per byte.

        Raises:
            RunError: The loss is not finite; nothing was updated.
        """
        loss = self._team_loss(rate) if self.team is not None else self._loss()
        bits = loss / math.log(2)
        if not math.isfinite(bits):
            raise NotFinite(f"the loss is {bits} at step {self.step}")
        self.optimizer.step(rate)
        self.optimizer.zero_grad()
        self.step += 1
        return bits

    def _loss(self) -> float:
        """The loss of the step in nats; gradients are left in the parameters."""
        if self.gates is not None:  # the schedule depends on the step alone, also after a resume
            self.gates.load_state_dict({**self.gates.state_dict(), "current_step": self.step})
        loss = self.model.loss(*self.batch(self.step))
        (loss if self.gates is None else loss + self.gates.loss()).backward()
        return loss.item()

    def _team_loss(self, rate: float) -> float:
        """The same, from this process's slice and those of the others.

        Raises:
            RunError: Another process failed.
        """
        assert self.team is not None
        self.team.tell("train_step", rate, self.step)
        tokens, targets = (x[:, self.start : self.stop] for x in self.batch(self.step))
        try:
            loss = self.model.loss(tokens, targets, reduction="sum", start=self.start)
            loss = loss / (self.settings.batch * self.settings.context)
            loss.backward()
            gradients = [p.grad for p in self.model.parameters()]
            return self.team.sum_gradients(loss.item(), [g for g in gradients if g is not None])
        except RuntimeError as error:  # RingPeerError is one, and so is what a collective raises
            raise RunError(self.team.what_happened(error)) from error

    def validate(self, windows: list[Any], visible: int | None = None) -> Validation:
        """Scores windows of text; see `measure.validate`."""
        if self.team is None:
            self.model.eval()  # a gate picks without noise
            try:
                return validate(self.model, windows, self.device, visible)
            finally:
                self.model.train()
        self.team.tell("validate", windows, visible)
        with gathered_attention(self.model):
            try:
                return validate(self.model, windows, self.device, visible, self.team)
            except RuntimeError as error:
                raise RunError(self.team.what_happened(error)) from error

    def probe_step(self) -> None:
        """Takes a whole step that leaves the weights alone (the optimizer's averages move)."""
        self.train_step(0.0)
        self.step -= 1

    def save(self, folder: Path) -> None:
        """Writes a checkpoint.

        Raises:
            RunError: A weight is not finite (the checkpoint before stays), or the disk refuses.
        """
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in model.items():
            if not torch.isfinite(tensor).all():
                raise RunError(f"{name} holds NaN or infinity after step {self.step}")
        optimizer = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        tensors = {**model, **optimizer, "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        try:
            self.peak_memory = max(self.peak_memory, peak_memory(self.device))
            save_checkpoint(folder, self.step, tensors, {"seconds": self.seconds, "peak_memory": self.peak_memory})
        except OSError as error:
            raise RunError(f"cannot write the checkpoint: {error.strerror or error}") from None

    def load(self, folder: Path) -> None:
        """Restores a checkpoint.

        Raises:
            InputError: It is corrupt, or was made by a model of another shape.
        """
        found = load_checkpoint(folder)
        if self.team is not None:
            self.team.tell("load", folder)
        state = {n.removeprefix("model."): t for n, t in found.tensors.items() if n.startswith("model.")}
        optimizer = {n.removeprefix("optimizer."): t for n, t in found.tensors.items() if n.startswith("optimizer.")}
        try:
            self.model.load_state_dict(state)
            self.optimizer.load_state_tensors(optimizer, found.values["step"])
        except (RuntimeError, KeyError) as error:
            raise InputError(f"checkpoint: {folder} does not fit the model of config.toml: {error}") from None
        torch.set_rng_state(found.tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in found.tensors:
            torch.cuda.set_rng_state(found.tensors["random.cuda"], self.device)
        self.step, self.seconds = found.values["step"], found.values["seconds"]
        self.peak_memory = found.values["peak_memory"]

    def windows(self) -> list[Any]:
        """The validation windows of this run."""
        settings = self.settings
        return validation_windows(self.corpus.validation, settings.context, settings.validation_bytes)


def train(
    run: Run,
    corpus: Corpus,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    *,
    windows: list[Any] | None = None,
    visible: int | None = None,
    team: Team | None = None,
) -> Result:
    """Trains to the last step of the run's settings, from its checkpoint if it has one.

    Args:
        run: Its `settings.steps` is known.
        corpus: The text the run was started on.
        progress: Is told of every step.
        stop: Asked after every step; when it says yes, the run is saved and left.
        windows: What to validate on; `None`: windows of the run's own context.
        visible: Let validation see at most so many bytes; see `validate`.
        team: As for `Trainer`.

    Raises:
        Interrupted: `stop` said yes.
        RunError: The loss or a weight is not finite, or the disk refuses. The last good checkpoint is kept.
    """
    settings = run.settings
    assert settings.steps is not None
    trainer = Trainer(settings, corpus, team)
    if settings.start_from is not None and not run.started:
        start_with(trainer.model, starting_weights(settings))
        trainer.save(run.checkpoint)  # from here on the other run may change or go
    if run.started:
        trainer.load(run.checkpoint)
    run.rewind_metrics(trainer.step)
    reset_peak_memory(trainer.device)
    windows = windows or trainer.windows()
    probe = windows[:: max(len(windows) // _PROBE_WINDOWS, 1)][:_PROBE_WINDOWS]
    tokens_per_step = settings.batch * settings.context
    saved = time.perf_counter()
    try:
        while trainer.step < settings.steps:
            step, start = trainer.step, time.perf_counter()
            rate = settings.learning_rate(step)
            bits = trainer.train_step(rate)
            seconds = time.perf_counter() - start
            trainer.seconds += seconds
            record = {"step": step, "bits_per_byte": bits, "rate": rate, "seconds": trainer.seconds}
            if trainer.step % max(settings.steps // _PROBES, 1) == 0 and trainer.step < settings.steps:
                record["validation"] = trainer.validate(probe, visible).bits_per_byte
            run.log(record)
            progress.step(trainer.step, settings.steps, bits, tokens_per_step * trainer.step / trainer.seconds)
            if stop():
                trainer.save(run.checkpoint)
                raise Interrupted(trainer.step)
            if time.perf_counter() - saved > settings.save_seconds:
                trainer.save(run.checkpoint)
                saved = time.perf_counter()
        trainer.save(run.checkpoint)
    except RunError as error:
        kept = f"the checkpoint of step {_saved_step(run)} is kept" if run.started else "nothing was saved yet"
        raise RunError(f"{error}; {kept}") from None
    finally:
        run.close()
    # After the last checkpoint and at a learning rate of zero: the weights stay as they are.
    share = attention_share(trainer.model, trainer.probe_step)
    density, config = density_met(trainer.model, settings), settings.sparse_config()
    return Result(
        validation=trainer.validate(windows, visible),
        steps=settings.steps,
        tokens=settings.steps * tokens_per_step,
        seconds=trainer.seconds,
        tokens_per_second=settings.steps * tokens_per_step / trainer.seconds,
        peak_memory=trainer.peak_memory,
        attention_share=share,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        density_requested=1.0 if config is None else config.density,
        density_met=density,
    )


def steps_within(
    settings: Settings, corpus: Corpus, seconds: float, *, validation: bool = False, team: Team | None = None
) -> int:
    """How many steps fit into some seconds, from a few timed ones whose effect is thrown away.

    Args:
        settings: Resolved but for `steps`.
        corpus: The text.
        seconds: Of training.
        validation: Whether the seconds, counted from now, are to hold validation, the probes that follow training and
            this very measurement too.
        team: As for `Trainer`.
    """
    begun = time.perf_counter()
    trainer = Trainer(settings, corpus, team)
    times = []
    for _ in range(_WARM_STEPS + _TIMED_STEPS):
        start = time.perf_counter()
        trainer.probe_step()
        times.append(time.perf_counter() - start)
    per_step = sorted(times[_WARM_STEPS:])[_TIMED_STEPS // 2]
    if validation:
        windows = trainer.windows()
        start = time.perf_counter()
        at_once = settings.nproc  # a team scores as many windows in the time of one
        trainer.validate(windows[:at_once])
        scored = (len(windows) + _PROBES * _PROBE_WINDOWS) / at_once
        seconds -= (time.perf_counter() - start) * scored + 4 * per_step + _RESERVED_SECONDS
        seconds -= time.perf_counter() - begun
    return max(int(seconds / per_step), 1)


def resolve(settings: Settings) -> Settings:
    """Turns `"auto"` and `None` into what this machine does best.

    Raises:
        InputError: The device does not exist or cannot do the dtype.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and settings.nproc == 1 else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if torch.device(device).type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {settings.device!r}")
    threads = settings.threads or max(torch.get_num_threads() // settings.nproc, 1)
    torch.set_num_threads(threads)
    dtype = fast_dtype(torch.device(device)) if settings.dtype == "auto" else settings.dtype
    return dataclasses.replace(settings, device=device, dtype=dtype, threads=threads)


def fast_dtype(device: torch.device) -> str:
    """bf16 where its matrix products are clearly faster than fp32's, measured; else fp32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return "bfloat16" if best[torch.bfloat16] < best[torch.float32] / 1.3 else "float32"


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step: returning and refaulting it costs a tenth of a step."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(option, 2**31 - 1)


def _saved_step(run: Run) -> int:
    return load_checkpoint(run.checkpoint).values["step"]
