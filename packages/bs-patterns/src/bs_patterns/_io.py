"""Layouts on disk: an npz file of three plain arrays, never compressed and never pickled.

The reader trusts nothing: member names and sizes, array headers and entries are checked before an array is made, so
that a damaged or hostile file costs no more memory than its own size and ends in a ValueError.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from ._grid import Blocks

if TYPE_CHECKING:
    from zipfile import ZipFile

T = TypeVar("T")

_FORMAT = 1
_MEMBERS = {"header": np.dtype("<i8"), "indptr": np.dtype("<i8"), "indices": np.dtype("<i4")}


def save(blocks: Blocks, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """See `BlockLayout.save`."""
    grid = blocks.grid
    header = np.array([_FORMAT, *grid.block_size, *grid.seq_len, int(grid.causal)], "<i8")
    indptr, indices = blocks.indptr.astype("<i8", copy=False), blocks.indices.astype("<i4", copy=False)
    if not isinstance(file, str | os.PathLike):
        np.savez(file, header=header, indptr=indptr, indices=indices)
        return
    path = os.fspath(file)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as handle:
            np.savez(handle, header=header, indptr=indptr, indices=indices)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def load(file: str | os.PathLike[str] | IO[bytes], make: Callable[..., T]) -> T:
    """What `make` makes of ``(block_size, seq_len, indptr, indices, causal)``; see `BlockLayout.load`."""
    if not isinstance(file, str | os.PathLike):
        return _read(file, "file", make)
    with open(file, "rb") as handle:
        return _read(handle, os.fspath(file), make)


def _read(handle: IO[bytes], name: str, make: Callable[..., T]) -> T:
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(handle) as archive:
            arrays = {key: _member(archive, f"{key}.npy", dtype) for key, dtype in _MEMBERS.items()}
            if len(archive.namelist()) != len(_MEMBERS):
                raise ValueError(f"expected the arrays {sorted(_MEMBERS)} alone, got {archive.namelist()}")
    except (BadZipFile, ValueError, KeyError, EOFError, OSError, RuntimeError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the file cannot be read; EINVAL is a seek to an offset that a damaged archive names
        raise ValueError(f"{name}: expected a layout file written by BlockLayout.save, got {error}") from error
    header = arrays["header"]
    if header.shape != (6,) or header[0] != _FORMAT or header[5] not in (0, 1):
        raise ValueError(f"{name}: expected a layout header of format {_FORMAT}, got {header.tolist()}")
    _, block_q, block_k, len_q, len_k, causal = header.tolist()
    try:
        return make((block_q, block_k), (len_q, len_k), arrays["indptr"], arrays["indices"], bool(causal))
    except ValueError as error:
        raise ValueError(f"{name}: expected a valid layout, got {error}") from error


def _member(archive: ZipFile, member: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    info = archive.getinfo(member)
    if info.compress_type != 0 or info.file_size != info.compress_size:
        raise ValueError(f"a compressed member {member}")
    data = archive.read(info)
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{member} in npy format {version}")
    shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if found != dtype or fortran or size != len(data) - stream.tell():
        raise ValueError(f"{member} of {found}, shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
