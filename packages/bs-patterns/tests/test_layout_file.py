"""Layouts on disk: what was saved comes back, and nothing else is believed."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import BlockLayout, LocalWindow
from bs_patterns.testing import layouts


def saved(layout: BlockLayout) -> bytes:
    stream = io.BytesIO()
    layout.save(stream)
    return stream.getvalue()


def members(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@given(layouts())
def test_round_trip(layout):
    loaded = BlockLayout.load(io.BytesIO(saved(layout)))
    assert loaded == layout
    assert loaded.digest == layout.digest
    assert saved(loaded) == saved(layout)


def test_round_trip_through_a_path(tmp_path):
    layout = LocalWindow(64).layout(1000, causal=True)
    path = tmp_path / "window.npz"
    layout.save(path)
    layout.save(str(path))
    assert BlockLayout.load(path) == layout
    assert os.listdir(tmp_path) == ["window.npz"]
    with np.load(path) as arrays:
        assert sorted(arrays) == ["header", "indices", "indptr"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    LocalWindow(64).layout(1000).save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        LocalWindow(64).layout(2000).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        BlockLayout.load(tmp_path / "none.npz")


@given(layouts(max_heads=2), st.data())
def test_truncated_or_flipped_files_never_give_an_invalid_layout(layout, data):
    content = bytearray(saved(layout))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        loaded = BlockLayout.load(io.BytesIO(bytes(content)))
    except ValueError as error:
        assert "file: expected" in str(error)  # noqa: PT017 - some flips fall into unused bytes and change nothing
    else:
        assert loaded == layout


class Hostile:
    def __reduce__(self):
        return os._exit, (3,)


HEADER = np.array([1, 4, 4, 8, 8, 0])
INDPTR = np.array([[0, 1, 2]])
INDICES = np.array([0, 1], np.int32)


def compressed() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, header=HEADER, indptr=INDPTR, indices=np.zeros(10**6, np.int32))
    return stream.getvalue()


def lying_header() -> bytes:
    """An array header that promises 8 TB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in (("header", HEADER), ("indptr", INDPTR), ("indices", INDICES)):
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if name == "indices":
                content = content.replace(b"(2,), }            ", b"(2000000000000,), }")
                assert b"2000000000000" in content
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def misplaced() -> bytes:
    """An archive whose directory claims to lie further back than it does, so that members start before the file."""
    content = bytearray(members(header=HEADER, indptr=INDPTR, indices=INDICES))
    at = content.rindex(b"PK\5\6") + 16
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") + 20).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip file",
        pickle.dumps(Hostile()),
        members(),
        members(header=HEADER, indptr=INDPTR),
        members(header=HEADER, indptr=INDPTR, indices=INDICES, extra=INDICES),
        members(header=HEADER, indptr=INDPTR, indices=INDICES.astype(np.int64)),
        members(header=HEADER, indptr=INDPTR, indices=INDICES.astype(float)),
        members(header=HEADER, indptr=INDPTR, indices=np.array([Hostile()], dtype=object)),
        members(header=HEADER[:5], indptr=INDPTR, indices=INDICES),
        members(header=HEADER * [2, 1, 1, 1, 1, 1], indptr=INDPTR, indices=INDICES),
        members(header=HEADER * [1, 0, 1, 1, 1, 1], indptr=INDPTR, indices=INDICES),
        members(header=HEADER * [1, -1, 1, 1, 1, 1], indptr=INDPTR, indices=INDICES),
        members(header=HEADER, indptr=INDPTR, indices=INDICES[::-1] + np.int32(1)),
        members(header=HEADER, indptr=-INDPTR, indices=INDICES),
        members(header=HEADER, indptr=np.array([[0, 5, 2]]), indices=INDICES),
        members(header=HEADER, indptr=np.asfortranarray(np.array([[0, 1, 2], [2, 2, 2]])), indices=INDICES),
        compressed(),
        lying_header(),
        misplaced(),
    ],
)
def test_corrupt_or_hostile_files_are_refused(content, tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.npz: expected"):
        BlockLayout.load(path)
