"""Text, splits, batches, yardsticks."""

from __future__ import annotations

import gzip
import lzma
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_modules.lm.data import batch_at, batch_starts, is_validation, load_corpus, standard_library
from bs_modules.lm.errors import InputError
from bs_modules.lm.measure import validated_text, validation_windows
from bs_modules.lm.yardsticks import compressor_bits_per_byte, ngram_bits_per_byte, yardsticks


def test_the_standard_library_is_split_by_file_and_holds_no_tests():
    corpus = load_corpus(None, 8192)
    names = [name for name, _ in standard_library()]
    assert names == sorted(names)
    assert {"os.py", "typing.py"} <= set(names)
    for part in ("test", "tests", "idle_test", "site-packages", "__pycache__"):
        assert not any(part in name.split("/") for name in names)
    assert len(corpus.train) > 10 * len(corpus.validation) > 10 * 8192
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in corpus.description
    held_out = b"".join(text for name, text in standard_library() if is_validation(name))
    assert corpus.validation.tobytes() == held_out
    assert load_corpus(None, 8192).digest == corpus.digest


def test_a_python_without_sources_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(InputError, match=r"no standard library sources under .*--data"):
        load_corpus(None, 8192)


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name, text in {"a.txt": "A" * 300, "deep/b.txt": "B" * 300, "deep/er/c.bin": "C" * 300}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden" / "d.txt").write_text("D" * 300)

    def letters(*data):
        corpus = load_corpus([str(x) for x in data], 20)
        both = corpus.train.tobytes() + corpus.validation.tobytes()
        return {chr(b): both.count(b) for b in sorted(set(both))}

    assert letters(tmp_path / "a.txt") == {"A": 300}
    assert letters(tmp_path) == {"A": 300, "B": 300, "C": 300}
    assert letters(tmp_path / "**" / "*.txt") == {"A": 300, "B": 300}
    assert letters(tmp_path, tmp_path / "a.txt", tmp_path / "*.txt") == {"A": 300, "B": 300, "C": 300}


def test_binary_bytes_come_through_unchanged(tmp_path):
    raw = bytes(range(256)) * 8
    (tmp_path / "x.bin").write_bytes(raw)
    corpus = load_corpus([str(tmp_path / "x.bin")], 64)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == raw


def test_many_files_are_split_by_the_hash_of_their_path(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i]) * 100)
    corpus = load_corpus([str(tmp_path)], 50)
    held_out = {i for i in range(200) if is_validation(f"{i}.txt")}
    assert set(corpus.validation.tolist()) == held_out
    assert set(corpus.train.tolist()) == set(range(200)) - held_out
    assert 2 <= len(held_out) <= 25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: [p / "nothing.txt"], "no such file or folder: .*nothing.txt"),
        (lambda p: [p / "*.txt"], r"no file matches .*\*\.txt"),
        (lambda p: [p], "no files in the folder"),
        (lambda p: [(p / "empty.txt").touch() or p / "empty.txt"], "the file is empty"),
        (lambda p: [(p / "short.txt").write_text("x" * 50) and p / "short.txt"], "less than one context of 100"),
    ],
    ids=["missing", "no match", "empty folder", "empty file", "short"],
)
def test_bad_data_names_what_is_wrong(tmp_path, make, words):
    with pytest.raises(InputError, match=words):
        load_corpus([str(path) for path in make(tmp_path)], 100)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("x" * 1000)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read .*secret\.txt: Permission denied"):
        load_corpus([str(file)], 10)


@given(st.integers(60, 5000), st.integers(1, 50), st.integers(1, 4), st.integers(0, 3), st.integers(0, 300))
def test_batches_depend_on_seed_and_step_alone_and_stay_inside(n, context, batch, seed, step):
    text = np.arange(n).astype(np.uint8)
    tokens = batch_at(text, context, batch, seed, step)
    assert tokens.shape == (batch, context + 1)
    starts = batch_starts(n, context, batch, seed, step)
    assert (starts >= 0).all()
    assert (starts + context + 1 <= n).all()
    assert np.array_equal(tokens, batch_at(text, context, batch, seed, step))
    for row, start in zip(tokens, starts, strict=True):
        assert np.array_equal(row, text[start : start + context + 1])


def test_an_epoch_reads_no_byte_twice():
    n, context = 10_000, 100
    starts = np.sort(np.concatenate([batch_starts(n, context, 1, 5, step) for step in range(98)]))
    assert (np.diff(starts) == context).all()
    again = np.sort(np.concatenate([batch_starts(n, context, 1, 5, step) for step in range(98, 196)]))
    assert not np.array_equal(starts, again)
    assert not np.array_equal(batch_starts(n, context, 4, 5, 0), batch_starts(n, context, 4, 6, 0))


@given(st.integers(2, 3000), st.integers(1, 700), st.integers(1, 4000))
def test_validation_windows_score_every_byte_at_most_once(n, context, limit):
    text = (np.arange(n) % 251).astype(np.uint8)
    windows = validation_windows(text, context, limit)
    whole = (n - 1) // context
    if whole == 0:
        assert [window.tolist() for window in windows] == [text.tolist()]
        return
    assert all(len(window) == context + 1 for window in windows)
    assert len(windows) == min(whole, max(limit // context, 1))
    if len(windows) == whole:
        assert np.array_equal(validated_text(windows), text[1 : 1 + whole * context])


def test_ngram_models_by_hand():
    text = np.frombuffer(b"abababab", np.uint8)
    # Order 0 after 8 bytes of 2 kinds: (4 + 2/256) / 10 for each.
    zero = -np.log2((4 + 2 / 256) / 10)
    assert ngram_bits_per_byte(text, text, 0) == pytest.approx(zero)
    p0 = (4 + 2 / 256) / 10
    after_a, after_b = (4 + 1 * p0) / 5, (3 + 1 * p0) / 4
    one = -(4 * np.log2(after_a) + 3 * np.log2(after_b)) / 7
    assert ngram_bits_per_byte(text, text, 1) == pytest.approx(one)
    with pytest.raises(ValueError, match="order"):
        ngram_bits_per_byte(text, text, 3)


def test_ngram_probabilities_sum_to_one():
    generator = np.random.default_rng(0)
    train = generator.integers(0, 4, 500).astype(np.uint8)
    for order in (0, 1):  # order 2 is the same rule once more, on 256 times the table
        past = train[:order]
        bits = [ngram_bits_per_byte(train, np.append(past, x).astype(np.uint8), order) for x in range(256)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1)


def test_compressors_and_the_names_of_all_yardsticks():
    text = np.frombuffer(b"spam and eggs, " * 300, np.uint8)
    found = compressor_bits_per_byte(text)
    assert found["gzip -9"] == 8 * len(gzip.compress(text.tobytes(), 9)) / len(text)
    assert found["xz -9"] == 8 * len(lzma.compress(text.tobytes(), preset=9)) / len(text)
    assert list(yardsticks(text, text)) == ["order-1 byte model", "order-2 byte model", "gzip -9", "xz -9"]
