"""What a run leaves on disk: `runs/<name>/` with config, metrics, checkpoint, pictures and results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .._extras import require
from .checkpoint import has_checkpoint
from .durable import sync, write_atomically
from .errors import InputError
from .settings import NAMES, Settings, read_toml, settings_from


class Run:
    """A run folder.

    Attributes:
        path: The folder.
        settings: The run's settings; `steps` is known.
        facts: What else was true when it started: the digest of its text, versions, device.
    """

    def __init__(self, path: Path, settings: Settings, facts: dict[str, Any]) -> None:
        self.path, self.settings, self.facts = path, settings, facts
        self._metrics: TextIO | None = None

    @classmethod
    def create(cls, path: Path, settings: Settings, facts: dict[str, Any]) -> Run:
        """Writes `config.toml` into the (empty) folder of a new run."""
        text = require("tomli_w").dumps({**settings.to_dict(), "facts": facts})
        write_atomically(path / "config.toml", text)
        return cls(path, settings, facts)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens an existing run.

        Raises:
            InputError: There is none, or its `config.toml` cannot be read.
        """
        if not (path / "config.toml").is_file():
            raise InputError(f"run: {path} holds no run (no config.toml)")
        values = read_toml(path / "config.toml")
        facts = values.pop("facts", {})
        return cls(path, settings_from(values, str(path / "config.toml")), facts)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint folder."""
        return self.path / "checkpoint"

    @property
    def started(self) -> bool:
        """Whether a checkpoint was ever completed."""
        return has_checkpoint(self.checkpoint)

    def check_same(self, given: dict[str, Any], facts: dict[str, Any]) -> None:
        """Refuses to continue a run under another configuration or on another text.

        Args:
            given: Settings named on the command line or in its config file.
            facts: What is true now; only what must not change.

        Raises:
            InputError: Something differs; the message names it.
        """
        stored = self.settings.to_dict()
        for name, value in given.items():
            value = list(value) if isinstance(value, tuple) else value
            if name in NAMES and value not in (None, "auto") and stored.get(name) != value:
                raise InputError(
                    f"run: {self.path} was started with {name}={stored.get(name)!r}, not {value!r}; "
                    "leave it out to continue, or start another run"
                )
        for name, value in facts.items():
            if self.facts.get(name) != value:
                raise InputError(
                    f"run: {self.path} was started with another {name} ({self.facts.get(name)}, now {value})"
                )

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of `metrics.jsonl`; a last line cut by a crash is left out."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drops the records after a step: those of steps that will be taken again."""
        self.close()
        kept = [record for record in self.metrics() if record["step"] < step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Flushes and closes the metrics file."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
            sync(self.path / "metrics.jsonl")

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder."""
        write_atomically(self.path / name, json.dumps(value, indent=1) + "\n")


def new_folder(path: Path) -> None:
    """Makes the folder of a new run.

    Raises:
        InputError: It holds a run or other files already, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = sorted(child.name for child in path.iterdir() if child.name != ".lock")
        if "config.toml" in found:
            raise InputError(f"run: {path} holds a run already; continue it with --resume or choose another --name")
        if found:
            raise InputError(f"run: {path} is not empty (it holds {found[0]}) and holds no run; choose another --name")
    except OSError as error:
        raise InputError(f"run: cannot write to {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the folder for one process; the lock ends with the process, however it ends.

    Raises:
        InputError: Another process holds it, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    try:
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"run: cannot write to {path}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"run: {path} is in use by another process") from None
        yield
    finally:
        os.close(handle)
