"""BufferPool under threads and forks."""

import contextlib
import math
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bs_memory import BufferPool, LeaseError, PoolClosedError, bucket_bytes
from bs_memory._account import Account

CPU = torch.device("cpu")
SHAPES = [(64,), (4, 16), (100,), (1000,), (17, 9)]


def run_threads(count, work):
    """Runs `work(index)` in threads that start together; re-raises the first failure."""
    gate = threading.Barrier(count)

    def start(index):
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(start, range(count)))


@pytest.fixture(autouse=True)
def frequent_switches():
    """Makes the interpreter change threads a thousand times more often than it would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


# What eight threads hold at most: three leases each, of the three largest buckets. Any less may be refused, this never.
TIGHT = 8 * sum(sorted(bucket_bytes(8 * math.prod(shape)) for shape in SHAPES)[-3:])


@pytest.mark.parametrize("max_bytes", [None, TIGHT], ids=["no budget", "tight budget"])
def test_threads_never_share_a_poisoned_buffer(max_bytes):
    pool = BufferPool(max_bytes=max_bytes, pressure=None, poison=True)

    def hammer(index):
        held = []
        for round_ in range(300):
            mark = index * 1000 + round_
            lease = pool.lease(SHAPES[(index + round_) % len(SHAPES)], torch.int64, CPU, priority=round_ % 3)
            lease.tensor.fill_(mark)
            held.append((lease, mark))
            if len(held) > 2:
                oldest, expected = held.pop(0)
                assert bool((oldest.tensor == expected).all())
                oldest.release()
            if round_ % 50 == 49:
                pool.trim(1000)
        for lease, expected in held:
            assert bool((lease.tensor == expected).all())
            lease.release()

    run_threads(8, hammer)
    stats = pool.stats()
    assert (stats.leases, stats.bytes_leased, stats.bytes_requested, stats.abandoned) == (0, 0, 0, 0)
    assert stats.hits + stats.misses == 8 * 300
    assert stats.bytes_held == pool._accounts[CPU].held
    assert max_bytes is None or stats.high_water_bytes <= max_bytes


def test_a_lease_may_end_in_another_thread():
    pool = BufferPool(pressure=None)
    leases = [pool.lease((8,), device=CPU) for _ in range(8)]
    run_threads(8, lambda index: leases[index].release())
    stats = pool.stats()
    assert (stats.leases, stats.buffers) == (0, 8)


class Crowded:
    """A lock that lets nobody in before `count` threads want to."""

    def __init__(self, count):
        self.lock = threading.Lock()
        self.gate = threading.Barrier(count)

    def __enter__(self):
        self.gate.wait(60)
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_of_many_threads_that_release_at_once_one_succeeds():
    pool = BufferPool(pressure=None)
    lease = pool.lease((8,), device=CPU)
    bucket = next(iter(pool._buckets.values()))
    bucket.lock = Crowded(4)

    def release(_):
        try:
            lease.release()
        except LeaseError:
            return 0
        return 1

    assert sum(run_threads(4, release)) == 1
    bucket.lock = threading.Lock()
    stats = pool.stats()
    assert (stats.buffers, stats.leases) == (1, 0)


def test_a_finaliser_that_strikes_under_a_lock_may_use_the_pool():
    pool = BufferPool(max_bytes=1 << 10, pressure=None)
    lease = pool.lease((8,), device=CPU)
    bucket = next(iter(pool._buckets.values()))
    with bucket.lock, bucket.account.lock, pool._lock:  # this thread's own: what the collector would find
        lease.release()
        with pool.lease((8,), device=CPU), pool.lease((100,), device=CPU):
            assert pool.stats().leases == 2
        pool.trim()
    assert pool.stats().buffers == 0


def test_a_block_that_moves_while_the_pool_looks_for_room_is_not_missed(monkeypatch):
    pool = BufferPool(max_bytes=1024, pressure=None)
    with pool.lease((1024,), torch.uint8, CPU):
        pass
    walks = []

    def walk_past(account):  # as if the block had been leased here and released where the walk had been before
        walks.append(1)
        return [] if len(walks) == 1 else real(account)

    real = Account._idle
    monkeypatch.setattr(Account, "_idle", walk_past)
    with pool.lease((512,), torch.uint8, CPU):
        assert pool.stats().evictions == 1


def test_closing_under_load_loses_nothing():
    pool = BufferPool(pressure=None)

    def work(index):
        if index == 0:
            pool.close()
            return
        with contextlib.suppress(PoolClosedError):
            for _ in range(200):
                with pool.lease(SHAPES[index], device=CPU):
                    pass

    run_threads(4, work)
    stats = pool.stats()
    assert (stats.leases, stats.bytes_held, pool._accounts.get(CPU) and pool._accounts[CPU].held) in (
        (0, 0, 0),
        (0, 0, None),
    )


FORK = """
    import os, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point
    import torch
    from bs_memory import BufferPool, DeviceCache, LeaseError, PressureLevel, default_pool, default_pressure

    pool, cache = BufferPool(pressure=None), DeviceCache(pressure=None)
    with pool.lease((8,), torch.float32, "cpu"):
        pass
    held = pool.lease((8,), torch.float32, "cpu")
    held.tensor.fill_(7)
    cache.put("key", torch.ones(3))
    inside, leave = threading.Event(), threading.Event()

    def hold_every_lock():
        bucket = next(iter(pool._buckets.values()))
        with bucket.lock, bucket.account.lock, pool._lock, cache._lock, default_pressure()._lock:
            inside.set()
            leave.wait()

    def build_for_ever():
        cache.get_or_build("slow", leave.wait)

    builder = threading.Thread(target=build_for_ever)
    builder.start()
    while not cache._flights:
        pass
    holder = threading.Thread(target=hold_every_lock)
    holder.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert bool((held.tensor == 7).all())
            held.release()
            try:
                held.release()
            except LeaseError:
                pass
            else:
                raise AssertionError("released twice")
            assert pool.stats().buffers == 0, pool.stats()
            with pool.lease((8,), torch.float32, "cpu") as tensor:
                tensor.fill_(1)
            with pool.lease((8,), torch.float32, "cpu") as tensor:
                pass
            assert (pool.stats().hits, pool.stats().misses) == (1, 1)
            assert len(cache) == 0
            assert cache.get_or_build("slow", lambda: "built") == "built"
            assert cache.get_or_build("key", lambda: 5) == 5
            assert default_pressure().level("cpu") in PressureLevel
            with default_pool().lease((8,), torch.float32, "cpu"):
                pass
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    leave.set()
    holder.join()
    builder.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert bool((held.tensor == 7).all())
    held.release()
    assert pool.stats().buffers == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_afresh_even_if_the_parent_held_every_lock():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
