"""oom_recovery: every step, by work that runs out on command, and for real in a child process."""

import gc
import itertools
import logging
import os
import subprocess
import sys
import textwrap
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_memory import (
    Approximation,
    BufferPool,
    DeviceCache,
    PoolBudgetError,
    RecoveryError,
    RecoveryReport,
    free_memory,
    oom_recovery,
)
from bs_memory.testing import FakeStreams


def cpu_oom(nbytes=100):
    return RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {nbytes} bytes.")


class Work:
    """Squares the units it is given, as long as they are few enough."""

    def __init__(self, fits, error=cpu_oom):
        self.fits = fits
        self.error = error
        self.calls = []

    def __call__(self, start, stop):
        self.calls.append((start, stop))
        if stop - start > self.fits:
            raise self.error()
        return [i * i for i in range(start, stop)]


def join(parts):
    return [value for part in parts for value in part]


def actions(report):
    return [step.action for step in report.steps]


# --------------------------------------------------------------------------- nothing goes wrong


def test_work_that_fits_runs_once():
    work = Work(fits=10)
    value, report = oom_recovery(work, size=10, combine=join)
    assert value == [i * i for i in range(10)]
    assert work.calls == [(0, 10)]
    assert report == RecoveryReport(piece_size=10)
    assert report.exact
    assert not report.recovered


def test_work_without_a_size():
    assert oom_recovery(lambda: "done") == ("done", RecoveryReport())


def test_nothing_to_do_is_done():
    assert oom_recovery(Work(fits=0), size=0, combine=join)[0] == []


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), KeyboardInterrupt()])
def test_other_errors_pass_untouched(error):
    calls = []

    def work():
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        oom_recovery(work)
    assert caught.value is error
    assert len(calls) == 1


def test_another_error_in_a_piece_passes_untouched():
    def work(start, stop):
        raise cpu_oom() if stop - start > 2 else KeyError("in a piece")

    with pytest.raises(KeyError, match="in a piece"):
        oom_recovery(work, size=4)


# --------------------------------------------------------------------------- free, retry


def test_freeing_is_enough():
    pool, cache = BufferPool(pressure=None), DeviceCache(pressure=None)
    with pool.lease((1000,), torch.uint8, "cpu"):
        pass
    cache.put("key", torch.ones(3))
    freed = []

    def work():
        if pool.stats().bytes_idle or len(cache) or not freed:
            raise cpu_oom()
        return "done"

    value, report = oom_recovery(work, free=[lambda: freed.append(1)])
    assert value == "done"
    assert actions(report) == ["free", "retry"]
    assert report.recovered
    assert report.exact
    assert freed == [1]


def test_free_memory_spares_leases_and_other_devices():
    pool = BufferPool(pressure=None)
    lease = pool.lease((1000,), torch.uint8, "cpu")
    with pool.lease((1000,), torch.uint8, "meta"):
        pass
    assert free_memory("cpu") >= 0
    assert pool.stats("meta").bytes_idle == 1024
    assert free_memory() >= 1024
    assert (pool.stats().bytes_held, lease.tensor.numel()) == (1024, 1000)
    lease.release()


def test_a_closed_pool_is_left_alone():
    pool = BufferPool(pressure=None)
    pool.close()
    free_memory()


def test_the_failed_attempt_lets_go_of_its_tensors_before_the_retry():
    watches = []

    def helper():
        large = torch.zeros(10)
        watches.append(weakref.ref(large))
        raise cpu_oom()

    def work():
        if watches:
            gc.collect()
            assert watches[0]() is None
            return "done"
        try:
            helper()
        except RuntimeError as error:
            raise ValueError("wrapped") from error

    assert oom_recovery(work)[0] == "done"


def test_nothing_is_freed_during_capture(monkeypatch):
    fake = FakeStreams()
    fake.is_capturing = True
    monkeypatch.setattr("bs_memory._recovery.streams_of", lambda device: fake)
    work = Work(fits=1)
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        oom_recovery(work, size=4, combine=join)
    assert len(work.calls) == 1


# --------------------------------------------------------------------------- split


@given(size=st.integers(1, 60), fits=st.integers(1, 60), granularity=st.integers(1, 8))
def test_pieces_cover_the_work_in_order(size, fits, granularity):
    work = Work(fits)
    free = mock.patch("bs_memory._recovery.free_memory", return_value=0)  # which takes its time
    whole = [i * i for i in range(size)]
    if min(size, granularity) > fits:
        with free, pytest.raises(RecoveryError):
            oom_recovery(work, size=size, combine=join, granularity=granularity)
        return
    with free:
        value, report = oom_recovery(work, size=size, combine=join, granularity=granularity)
    assert value == whole
    assert report.exact
    if size <= fits:
        assert not report.recovered
        return
    done = [(start, stop) for start, stop in work.calls if stop - start <= fits]
    assert done[0][0] == 0
    assert done[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(done))
    assert all((stop - start) % granularity == 0 for start, stop in done[:-1])
    assert report.pieces == len(done)
    assert report.piece_size <= max(fits, granularity)
    # Each size that ran out was tried once, so that at most log2(size) attempts are wasted, and the retry.
    assert len(work.calls) - len(done) <= size.bit_length() + 1


def test_a_piece_that_runs_out_later_is_split_again_and_nothing_is_redone():
    calls = []

    def work(start, stop):
        calls.append((start, stop))
        if stop - start > (4 if start < 4 else 1):
            raise cpu_oom()

    value, report = oom_recovery(work, size=8)
    assert value is None
    assert calls == [(0, 8), (0, 8), (0, 4), (4, 8), (4, 6), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert (report.pieces, report.piece_size) == (5, 1)


def test_the_reported_piece_size_starts_the_next_run():
    first = Work(fits=3)
    _, report = oom_recovery(first, size=12, combine=join)
    second = Work(fits=3)
    value, again = oom_recovery(second, size=12, combine=join, piece_size=report.piece_size)
    assert value == [i * i for i in range(12)]
    assert all(stop - start <= 3 for start, stop in second.calls)
    assert again == RecoveryReport(pieces=len(second.calls), piece_size=report.piece_size)
    assert not again.recovered  # memory did not run out this time


def test_a_piece_size_of_the_whole_or_more_is_the_whole():
    work = Work(fits=5)
    oom_recovery(work, size=5, combine=join, piece_size=9)
    assert work.calls == [(0, 5)]


def test_a_budget_is_met_in_pieces():
    pool = BufferPool(max_bytes=1024, pressure=None)
    out = torch.zeros(4096, dtype=torch.uint8)

    def work(start, stop):
        with pool.lease((stop - start,), torch.uint8, "cpu") as scratch:
            scratch.copy_(torch.arange(start, stop) % 251)
            out[start:stop] = scratch

    _, report = oom_recovery(work, size=4096)
    assert report.pieces == 4
    assert torch.equal(out, (torch.arange(4096) % 251).to(torch.uint8))


def test_going_on_in_pieces_is_logged(caplog):
    with caplog.at_level(logging.INFO, "bs_memory"):
        oom_recovery(Work(fits=2), size=4, combine=join, name="attention", unit="query blocks")
    assert "attention: out of memory on cpu; going on in pieces of 2 of 4 query blocks" in caplog.text


# --------------------------------------------------------------------------- approximate


def test_approximations_need_permission():
    cheap = Approximation("lower density", lambda: "approximate")
    with pytest.raises(RecoveryError, match="Not tried without allow_approximation=True: lower density"):
        oom_recovery(Work(fits=0), size=2, combine=join, approximations=[cheap])


def test_an_approximation_is_logged_and_visible(caplog):
    tried = [
        Approximation("smaller blocks", Work(fits=0), size=4, combine=join),
        Approximation("lower density", Work(fits=2), size=4, combine=join),
        Approximation("never reached", lambda: pytest.fail("reached")),
    ]
    value, report = oom_recovery(
        Work(fits=0), size=2, combine=join, approximations=tried, allow_approximation=True, name="attention"
    )
    assert value == [0, 1, 4, 9]
    assert not report.exact
    assert report.approximation == "lower density"
    assert [step.detail for step in report.steps if step.action == "approximate"] == ["smaller blocks", "lower density"]
    assert "approximating: smaller blocks" in caplog.text
    assert "approximating: lower density" in caplog.text


def test_permission_alone_changes_nothing():
    cheap = Approximation("lower density", lambda: "approximate")
    value, report = oom_recovery(Work(fits=2), size=4, combine=join, approximations=[cheap], allow_approximation=True)
    assert value == [0, 1, 4, 9]
    assert report.exact


# --------------------------------------------------------------------------- the error


def test_the_error_says_what_was_tried_and_what_would_fit(monkeypatch):
    from bs_memory import MemoryReading

    monkeypatch.setattr("bs_memory._recovery.read_memory", lambda device: MemoryReading(250 << 20, 1 << 30, "cgroup"))
    work = Work(fits=0, error=lambda: cpu_oom(1000 << 20))
    with pytest.raises(RecoveryError) as caught:
        oom_recovery(work, size=8, combine=join, granularity=2, name="attention", unit="query blocks")
    text = str(caught.value)
    assert "attention: out of memory on cpu" in text
    assert "whole (8 query blocks), in pieces of 4, 2" in text
    assert "asked for 1000.0 MiB" in text
    assert "250.0 MiB of 1.0 GiB are free (cgroup)" in text
    assert "What would fit: about 50% of one of the query blocks" in text
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert actions(caught.value.report)[:2] == ["free", "retry"]


@pytest.mark.parametrize(
    ("size", "need", "expected"),
    [
        (None, 1000, "about 25% of this work"),
        (None, 100, "not in one piece"),
        (8, 1000, "What would fit: about 2 rows at a time"),
        (8, 100, "not in one piece"),
        (8, 1 << 20, "about 0% of one of the rows"),
    ],
)
def test_what_would_fit_by_case(monkeypatch, size, need, expected):
    from bs_memory import MemoryReading

    monkeypatch.setattr("bs_memory._recovery.read_memory", lambda device: MemoryReading(250, 2000, "fake"))

    def work(*_):
        raise cpu_oom(need)

    granularity = {} if size is None else {"granularity": 8}
    with pytest.raises(RecoveryError, match=expected):
        oom_recovery(work, size=size, unit="rows", **granularity)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.0 GiB"),
        (MemoryError("Unable to allocate 7.25 GiB for an array with shape (1000,)"), "7.2 GiB"),
        (PoolBudgetError("pool: a buffer of 2048 bytes on cpu does not fit"), "2.0 KiB"),
    ],
    ids=["cuda", "numpy", "pool"],
)
def test_the_size_asked_for_is_read_from_every_allocator(error, asked):
    def work():
        raise error

    with pytest.raises(RecoveryError, match=f"asked for {asked}"):
        oom_recovery(work)


def test_an_error_that_does_not_say_how_much_is_fine():
    def work():
        raise MemoryError

    with pytest.raises(RecoveryError, match="are free"):
        oom_recovery(work)


def test_a_combine_that_runs_out_is_said_to():
    def combine(parts):
        raise cpu_oom()

    with pytest.raises(RecoveryError, match="combine ran out of memory; work that writes in place"):
        oom_recovery(Work(fits=2), size=4, combine=combine)


# --------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": -1}, ValueError, r"size: .*got -1"),
        ({"size": 2.0}, TypeError, r"size: .*got float"),
        ({"size": 4, "granularity": 0}, ValueError, r"granularity: .*got 0"),
        ({"size": 4, "piece_size": 0}, ValueError, r"piece_size: .*got 0"),
        ({"combine": join}, ValueError, r"combine: expected none without a size"),
        ({"granularity": 2}, ValueError, r"granularity: expected none without a size"),
        ({"piece_size": 2}, ValueError, r"piece_size: expected none without a size"),
        ({"allow_approximation": True}, ValueError, r"allow_approximation: expected False without approximations"),
        ({"device": "nowhere"}, ValueError, r"device: "),
        ({"size": 4, "combine": 3}, TypeError, r"combine: expected a callable, got int"),
        ({"free": [3]}, TypeError, r"free\[0\]: expected a callable, got int"),
        ({"approximations": ["x"]}, TypeError, r"approximations\[0\]: expected an Approximation, got str"),
        ({"approximations": [Approximation("x", print, size=-1)]}, ValueError, r"size: .*got -1"),
    ],
)
def test_bad_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        oom_recovery(lambda *_: None, **options)


def test_a_result_that_could_not_be_put_together_is_refused_before_it_matters():
    with pytest.raises(TypeError, match="work: expected None without a combine"):
        oom_recovery(Work(fits=10), size=4)


# --------------------------------------------------------------------------- for real

CHILD = """
    import torch
    from bs_memory import BufferPool, RecoveryError, oom_recovery
    from bs_memory.testing import limited_memory

    MIB = 1 << 20
    torch.set_num_threads(1)
    rows = 256
    x = torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))
    y = torch.randn(150_000, generator=torch.Generator().manual_seed(1))

    def into(out):
        def work(start, stop):  # 586 KiB of scratch per row, 146 MiB for all
            torch.sum((x[start:stop] * y).cos_(), dim=1, out=out[start:stop])
        return work

    def fails(work):
        try:
            work()
        except RuntimeError:
            return True

    expected = torch.empty(rows)
    into(expected)(0, rows)

    def check(limit):
        pool, got = BufferPool(pressure=None), torch.empty(rows)
        with limited_memory(60 * MIB, limit=limit):
            assert fails(lambda: into(got)(0, rows)), "the limit does not bind"
            _, report = oom_recovery(into(got), size=rows, unit="rows")
            assert report.pieces >= 3, report
            assert torch.equal(got, expected)

            # Freeing alone is enough where what is missing is what a pool keeps idle. (40 MiB: above 32, so that glibc
            # maps it by itself and gives it back whole.)
            with pool.lease((40 * MIB,), torch.uint8, "cpu") as hoard:
                hoard.fill_(1)
            del hoard  # the name would keep the memory, whatever the pool gives up
            assert fails(lambda: torch.ones(40 * MIB, dtype=torch.uint8)), "the limit does not bind"
            value, report = oom_recovery(lambda: torch.ones(40 * MIB, dtype=torch.uint8).numel())
            assert value == 40 * MIB
            assert [step.action for step in report.steps] == ["free", "retry"], report
            assert pool.stats().bytes_held == 0

            try:
                oom_recovery(lambda: torch.empty(400 * MIB, dtype=torch.uint8))
            except RecoveryError as error:
                text = str(error)
            assert "asked for 400.0 MiB" in text, text
            assert "(rlimit)" in text, text
            assert "What would fit: about" in text, text

    check("address_space")
    check("data")
    print("recovered")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory limits as Linux has them")
def test_a_process_that_really_runs_out_really_recovers():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD)], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "recovered" in result.stdout
