"""Checkpoints: model, optimizer and step as one unit that is switched in one rename.

A folder `checkpoint/` holds `step-00000400.safetensors` and `state.json`, which names it. The tensors are written and
flushed first; replacing `state.json` is the switch; the old tensors go last. Whatever moment a crash chooses,
`state.json` names a complete file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._extras import require
from .durable import write_atomically
from .errors import InputError

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by name, and plain values (step, seconds, …)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Writes a checkpoint and removes the one before it."""
    safetensors = require("safetensors.torch")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.save(contiguous))
    state = {
        "format": _FORMAT,
        "step": step,
        "tensors": path.name,
        "bytes": path.stat().st_size,
        "sha256": _digest(path),
        **values,
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=1) + "\n")
    for other in folder.iterdir():
        if other.name not in (path.name, "state.json"):
            other.unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was ever completed here."""
    return (folder / "state.json").exists()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads the checkpoint back, every byte checked.

    Raises:
        InputError: There is none, or it is truncated or corrupt.
    """
    safetensors = require("safetensors.torch")
    try:
        values = json.loads((folder / "state.json").read_bytes())
        if values["format"] != _FORMAT:
            raise InputError(f"checkpoint: {folder / 'state.json'} has format {values['format']}, expected {_FORMAT}")
        path = folder / values["tensors"]
        if path.stat().st_size != values["bytes"]:
            raise InputError(f"checkpoint: {path} is truncated: {path.stat().st_size:,} bytes of {values['bytes']:,}")
        if _digest(path) != values["sha256"]:
            raise InputError(f"checkpoint: {path} is corrupt: its SHA-256 is not the one recorded")
        return Checkpoint(safetensors.load_file(path), values)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint: {error.filename} is missing") from None
    except OSError as error:
        raise InputError(f"checkpoint: cannot read {folder}: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # unreadable JSON or keys
        raise InputError(f"checkpoint: {folder / 'state.json'} is corrupt ({type(error).__name__}: {error})") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
