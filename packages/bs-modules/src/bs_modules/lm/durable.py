"""Files that are whole or not there: write beside, flush to the disk, rename over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None] | bytes | str) -> None:
    """Replaces `path` with new content; a crash at any moment leaves the old or the new file.

    Args:
        path: The file.
        write: The content, or a function that writes it to the path it is given.
    """
    # Suffixes stay, so that libraries that choose a format by suffix still can.
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if callable(write):
            write(beside)
        else:
            beside.write_bytes(write.encode() if isinstance(write, str) else write)
        sync(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some file systems cannot flush a folder; a file that did not reach the disk is an error
            raise
    finally:
        os.close(handle)
