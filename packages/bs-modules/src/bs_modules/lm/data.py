"""Bytes to train on: the standard library's source or the user's files; batches that depend on (seed, step) alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from .errors import InputError

# Test suites and installed packages are not the library, caches are not source, and the character maps and the help
# index are tables written by a program: too easy to learn, and a quarter of the validation text if they were left in.
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_VALIDATION_SHARE = 20  # one file (or one byte of a single file) in twenty


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        train: `uint8[n]`, the training files one after another.
        validation: `uint8[m]`, likewise, from other files (or the tail, when there are too few files).
        description: One line on where the bytes come from.
    """

    train: np.ndarray
    validation: np.ndarray
    description: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over both parts: the same text gives the same digest on every machine."""
        hasher = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        hasher.update(self.train.tobytes())
        hasher.update(self.validation.tobytes())
        return hasher.hexdigest()


def load_corpus(data: Sequence[str] | None, context: int) -> Corpus:
    """Reads and splits the text.

    Args:
        data: Files, folders (read recursively, without hidden entries and `__pycache__`) and globs; `None` or empty:
            the source of the running Python's standard library.
        context: Tokens per training sequence; the training part must hold at least one sequence and its last target.

    Raises:
        InputError: A path is missing, empty or unreadable, or the text is shorter than one context.
    """
    if data:
        files = _read(_expand(data))
        corpus = _split(files, context, f"{len(files)} file{'s' * (len(files) != 1)} from {', '.join(data)}")
    else:
        files = standard_library()
        version = ".".join(map(str, sys.version_info[:3]))
        corpus = _split(files, context, f"the Python {version} standard library, {len(files)} files")
    if len(corpus.train) < context + 1:
        raise InputError(
            f"data: the training text has {len(corpus.train):,} bytes, less than one context of {context:,} and its "
            "last target; give more text or a smaller --context"
        )
    return corpus


def standard_library() -> list[tuple[str, bytes]]:
    """Returns (relative path, source) of the standard library's modules, tests excluded, sorted by path.

    Raises:
        InputError: This Python ships without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            # A dangling link or a file of another user: the rest is enough.
            with contextlib.suppress(OSError):
                files.append((path.relative_to(root).as_posix(), path.read_bytes()))
    files = sorted(((name, text) for name, text in files if text), key=lambda item: item[0])
    if not files:
        raise InputError(f"data: no standard library sources under {root}; give text with --data")
    return files


def is_validation(name: str) -> bool:
    """Says whether a file belongs to the validation part, from its relative path alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % _VALIDATION_SHARE == 0


def batch_starts(n_bytes: int, context: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Where the sequences of one step start, as `int64[batch]`: a function of its arguments and nothing else.

    Every epoch cuts the text into contexts at a new random phase and visits them in a new random order, so no byte
    is read twice before every other (but the phase's ends) was read once.
    """
    per_epoch = max((n_bytes - 1) // context - 1, 1)
    starts = np.empty(batch, np.int64)
    for i in range(batch):
        epoch, index = divmod(step * batch + i, per_epoch)
        phase, order = _epoch(n_bytes, context, per_epoch, seed, epoch)
        starts[i] = phase + order[index] * context
    return starts


def batch_at(text: np.ndarray, context: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The step's tokens and their next bytes: `uint8[batch, context + 1]`."""
    starts = batch_starts(len(text), context, batch, seed, step)
    return text[starts[:, None] + np.arange(context + 1)]


@functools.lru_cache(maxsize=4)
def _epoch(n_bytes: int, context: int, per_epoch: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    phase = int(generator.integers(0, n_bytes - 1 - per_epoch * context + 1))
    return phase, generator.permutation(per_epoch)


def _expand(data: Sequence[str]) -> list[tuple[str, Path]]:
    """Resolves the arguments to (name for the split, file), in a stable order, each file once."""
    found: dict[Path, str] = {}
    for argument in data:
        if not argument:
            raise InputError("data: expected a file, folder or glob, got ''")
        path = Path(argument).expanduser()
        if path.is_dir():
            matches = [
                (p.relative_to(path).as_posix(), p) for p in sorted(path.rglob("*")) if _is_visible_file(p, path)
            ]
            if not matches:
                raise InputError(f"data: no files in the folder {argument}")
        elif path.exists():
            matches = [(path.name, path)]
        else:
            hits = sorted(glob.glob(str(path), recursive=True))
            matches = [(Path(hit).as_posix(), Path(hit)) for hit in hits if Path(hit).is_file()]
            if not matches:
                kind = "no file matches" if glob.has_magic(argument) else "no such file or folder:"
                raise InputError(f"data: {kind} {argument}")
        for name, match in matches:
            found.setdefault(match.resolve(), name)
    return sorted(((name, path) for path, name in found.items()), key=lambda item: (item[0], str(item[1])))


def _is_visible_file(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts)


def _read(paths: Iterable[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    files = []
    for name, path in paths:
        try:
            files.append((name, path.read_bytes()))
        except OSError as error:
            raise InputError(f"data: cannot read {path}: {error.strerror or error}") from None
    if not any(text for _, text in files):
        raise InputError(f"data: {'the file is' if len(files) == 1 else 'all files are'} empty")
    return files


def _split(files: list[tuple[str, bytes]], context: int, description: str) -> Corpus:
    """Splits by file; where that leaves either part without one context, cuts the tail off the whole instead."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, text in files:
        parts[is_validation(PurePosixPath(name).as_posix())].append(text)
    train, validation = (np.frombuffer(b"".join(parts[part]), np.uint8) for part in (False, True))
    if min(len(train), len(validation)) > context and len(validation) <= len(train) // 4:
        return Corpus(train, validation, f"{description}; validation files by path hash")
    whole = np.frombuffer(b"".join(text for _, text in files), np.uint8)
    # At least one context to validate on where the text allows it, never more than a quarter of it.
    tail = min(max(len(whole) // _VALIDATION_SHARE, context + 1), len(whole) // 4)
    cut = len(whole) - max(tail, 2)
    return Corpus(whole[:cut], whole[cut:], f"{description}; the last {len(whole) - cut:,} bytes validate")
