"""Reuse across streams, on fake streams: each rule by itself."""

import pytest
import torch

from bs_memory import BufferPool, DeviceCache, LeaseError, PoolBudgetError
from bs_memory._storage import Bucket
from bs_memory.testing import FakeStreams

F32 = torch.float32


@pytest.fixture
def fake():
    return FakeStreams()


@pytest.fixture
def pool(fake):
    return BufferPool(streams=fake, pressure=None)


def use_and_release(pool, fake, *, stream="main", also=()):
    fake.current_stream = stream
    lease = pool.lease((16,), F32, "cpu")
    fake.issue()
    for other in also:
        lease.record_stream(other)
        fake.issue(other)
    address = lease.tensor.data_ptr()
    lease.release()
    return address


def lease_address(pool, fake, stream):
    fake.current_stream = stream
    return pool.lease((16,), F32, "cpu")


def test_the_same_stream_reuses_at_once(pool, fake):
    address = use_and_release(pool, fake)
    assert lease_address(pool, fake, "main").tensor.data_ptr() == address
    assert fake.waits == fake.host_waits == []


def test_another_stream_gets_another_buffer_while_work_is_pending(pool, fake):
    address = use_and_release(pool, fake)
    assert lease_address(pool, fake, "side").tensor.data_ptr() != address
    assert fake.waits == fake.host_waits == []


def test_another_stream_reuses_once_the_work_is_done(pool, fake):
    address = use_and_release(pool, fake)
    fake.finish("main")
    assert lease_address(pool, fake, "side").tensor.data_ptr() == address


def test_a_recorded_stream_counts(pool, fake):
    address = use_and_release(pool, fake, also=["copy"])
    with lease_address(pool, fake, "main") as tensor:
        assert tensor.data_ptr() != address
    fake.finish("copy")
    pool.trim()


def test_release_on_another_stream_fences_both(pool, fake):
    lease = lease_address(pool, fake, "main")
    fake.issue()
    fake.current_stream = "side"
    fake.issue()
    address = lease.tensor.data_ptr()
    lease.release()
    third = lease_address(pool, fake, "third")
    assert third.tensor.data_ptr() != address
    fake.finish("main")
    fourth = lease_address(pool, fake, "third")
    assert fourth.tensor.data_ptr() != address
    fake.finish("side")
    assert lease_address(pool, fake, "third").tensor.data_ptr() == address


def test_work_on_the_leasing_stream_counts_although_another_released(pool, fake):
    lease = lease_address(pool, fake, "main")
    fake.issue()
    address = lease.tensor.data_ptr()
    fake.current_stream = "side"
    lease.release()
    assert lease_address(pool, fake, "side").tensor.data_ptr() != address
    fake.finish("main")
    assert lease_address(pool, fake, "side").tensor.data_ptr() == address


@pytest.fixture
def pinned(pool, fake, monkeypatch):
    """Leases of pinned buffers without a driver to pin them: what counts here is when they come back."""
    monkeypatch.setattr(Bucket, "allocate", lambda bucket: torch.empty(bucket.nbytes, dtype=torch.uint8))
    return lambda pool=pool: pool.lease((64,), torch.uint8, "cpu", pinned=True)


def test_a_pinned_buffer_is_not_reused_before_its_copy_is_done_even_on_the_same_stream(pinned, fake):
    lease = pinned()
    fake.issue()
    address = lease.tensor.data_ptr()
    lease.release()
    assert pinned().tensor.data_ptr() != address
    fake.finish("main")
    assert pinned().tensor.data_ptr() == address


def test_a_pinned_buffer_is_not_given_back_before_its_copy_is_done(pinned, pool, fake):
    lease = pinned()
    fake.issue()
    lease.release()
    assert pool.trim() == 0
    fake.finish("main")
    assert pool.trim() == 64


def test_closing_waits_for_copies_of_pinned_buffers(pinned, pool, fake):
    lease = pinned()
    fake.issue()
    lease.release()
    pool.close()
    assert fake.host_waits == [("main", 1)]
    assert pool.stats().bytes_held == 0


def test_a_pinned_budget_makes_the_host_wait(pinned, fake):
    pool = BufferPool(max_bytes=64, streams=fake, pressure=None)
    lease = pinned(pool)
    fake.issue()
    address = lease.tensor.data_ptr()
    lease.release()
    assert pinned(pool).tensor.data_ptr() == address
    assert fake.host_waits == [("main", 1)]


def test_under_a_full_budget_the_stream_waits_and_not_the_host(fake):
    pool = BufferPool(max_bytes=64, streams=fake, pressure=None)
    address = use_and_release(pool, fake)
    assert lease_address(pool, fake, "side").tensor.data_ptr() == address
    assert fake.waits == [("side", ("main", 1))]
    assert fake.host_waits == []


def test_under_a_full_budget_of_leases_there_is_an_error(fake):
    pool = BufferPool(max_bytes=64, streams=fake, pressure=None)
    lease = lease_address(pool, fake, "main")
    with pytest.raises(PoolBudgetError):
        lease_address(pool, fake, "main")
    lease.release()


def test_eviction_tells_the_allocator_of_foreign_streams(pool, fake):
    address = use_and_release(pool, fake, stream="main", also=["copy"])
    pool.trim()
    assert fake.kept == [(address, "copy")]  # main allocated it, so that torch orders main by itself


def test_poison_is_ordered_after_the_work_it_overwrites(fake):
    pool = BufferPool(streams=fake, pressure=None, poison=True)
    lease = lease_address(pool, fake, "side")
    fake.issue()
    fake.current_stream = "main"
    lease.release()
    assert ("main", ("side", 1)) in fake.waits


def test_a_device_that_fails_at_release_leaves_no_lease_behind(pool, fake, monkeypatch):
    lease = lease_address(pool, fake, "main")

    def fail(stream):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fake, "record", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        lease.release()
    stats = pool.stats()
    assert (stats.leases, stats.bytes_held, pool._accounts[torch.device("cpu")].held) == (0, 0, 0)


def test_leases_during_capture_belong_to_the_graph(pool, fake):
    address = use_and_release(pool, fake)
    fake.is_capturing = True
    lease = lease_address(pool, fake, "main")
    assert lease.tensor.data_ptr() != address
    lease.release()
    fake.is_capturing = False
    stats = pool.stats()
    assert (stats.buffers, stats.leases) == (1, 0)
    assert lease_address(pool, fake, "main").tensor.data_ptr() == address


def test_a_lease_from_before_the_capture_is_not_recycled_when_released_in_it(pool, fake):
    lease = lease_address(pool, fake, "main")
    fake.is_capturing = True
    lease.release()
    fake.is_capturing = False
    assert pool.stats().bytes_held == 0


def test_an_abandoned_lease_is_announced(pool, fake):
    address = use_and_release(pool, fake, stream="main")
    fake.finish("main")
    lease = lease_address(pool, fake, "side")
    assert lease.tensor.data_ptr() == address
    del lease
    assert pool.stats().abandoned == 1
    assert fake.kept == [(address, "side")]


def test_record_stream_after_release_raises(pool, fake):
    lease = lease_address(pool, fake, "main")
    lease.release()
    with pytest.raises(LeaseError):
        lease.record_stream("side")


def test_a_cached_value_is_waited_for_once_per_stream(fake, monkeypatch):
    # A CPU tensor stands for one on an accelerator: the footprint is told that it is elsewhere.
    value = torch.ones(3)
    monkeypatch.setattr("bs_memory._cache.footprint", lambda _: (12, [value]))
    cache = DeviceCache(streams=fake, pressure=None)
    fake.issue("main")
    cache.get_or_build("key", lambda: value)
    cache.get_or_build("key", lambda: value)
    assert fake.waits == []
    fake.current_stream = "side"
    for _ in range(2):
        assert cache.get_or_build("key", lambda: value) is value
    assert fake.waits == [("side", ("main", 1))]
    assert fake.kept == [(value.data_ptr(), "side")]
    fake.current_stream = "third"
    assert cache.get("key") is value
    assert len(fake.waits) == 2


def test_a_cached_value_is_not_waited_for_during_capture(fake, monkeypatch):
    value = torch.ones(3)
    monkeypatch.setattr("bs_memory._cache.footprint", lambda _: (12, [value]))
    cache = DeviceCache(streams=fake, pressure=None)
    cache.get_or_build("key", lambda: value)
    fake.current_stream, fake.is_capturing = "side", True
    assert cache.get("key") is value
    assert fake.waits == []
