"""What only a GPU can show: events, pinned memory, graphs, the driver's readings. Skipped where there is none."""

import pytest
import torch

from bs_memory import BufferPool, DeviceCache, MemoryPressure, oom_recovery, read_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CYCLES = 200_000_000  # of torch.cuda._sleep: long against the calls of a test, short against its limit


@pytest.fixture
def pool():
    torch.cuda.synchronize()
    return BufferPool(pressure=None)


def busy():
    torch.cuda._sleep(CYCLES)


def test_the_same_stream_reuses_while_work_is_pending(pool):
    with pool.lease((1024,), torch.float32, "cuda") as tensor:
        address = tensor.data_ptr()
        busy()
    with pool.lease((1024,), torch.float32, "cuda") as tensor:
        assert tensor.data_ptr() == address


def test_another_stream_waits_for_nobody_and_gets_another_buffer(pool):
    with pool.lease((1024,), torch.float32, "cuda") as tensor:
        address = tensor.data_ptr()
        busy()
    with torch.cuda.stream(torch.cuda.Stream()):
        with pool.lease((1024,), torch.float32, "cuda") as tensor:
            assert tensor.data_ptr() != address
        torch.cuda.synchronize()
        with pool.lease((1024,), torch.float32, "cuda"):
            assert (pool.stats().hits, pool.stats().misses) == (1, 2)


def test_a_slow_reader_on_a_recorded_stream_sees_its_own_bytes(pool):
    side = torch.cuda.Stream()
    out = torch.empty(1 << 20, device="cuda")
    lease = pool.lease((1 << 20,), torch.float32, "cuda")
    lease.tensor.fill_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        out.copy_(lease.tensor)
    lease.record_stream(side)
    lease.release()
    with pool.lease((1 << 20,), torch.float32, "cuda") as tensor:
        tensor.fill_(2)
    torch.cuda.synchronize()
    assert bool((out == 1).all())


def test_eviction_while_another_stream_reads_keeps_the_bytes(pool):
    side = torch.cuda.Stream()
    out = torch.empty(1 << 20, device="cuda")
    lease = pool.lease((1 << 20,), torch.float32, "cuda")
    lease.tensor.fill_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        out.copy_(lease.tensor)
    lease.record_stream(side)
    lease.release()
    del lease
    pool.clear()
    others = [torch.full((1 << 20,), 3.0, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert bool((out == 1).all())
    assert len(others) == 8


def test_pinned_buffers_wait_for_their_copy(pool):
    target = torch.empty(1 << 20, device="cuda")
    with pool.lease((1 << 20,), torch.float32, "cpu", pinned=True) as host:
        assert host.is_pinned()
        host.fill_(1)
        busy()
        target.copy_(host, non_blocking=True)
    with pool.lease((1 << 20,), torch.float32, "cpu", pinned=True) as host:
        host.fill_(2)
    torch.cuda.synchronize()
    assert bool((target == 1).all())
    with pool.lease((1 << 20,), torch.float32, "cpu", pinned=True):
        assert pool.stats().hits >= 1


def test_a_pinned_budget_makes_the_host_wait():
    pool = BufferPool(max_bytes=4096, pressure=None)
    target = torch.empty(1024, device="cuda")
    with pool.lease((1024,), torch.float32, "cpu", pinned=True) as host:
        host.fill_(1)
        busy()
        target.copy_(host, non_blocking=True)
    with pool.lease((1024,), torch.float32, "cpu", pinned=True) as host:
        assert torch.cuda.current_stream().query()
        host.fill_(2)
    assert bool((target == 1).all())


def test_a_graph_owns_what_it_leases(pool):
    with pool.lease((1024,), torch.float32, "cuda") as tensor:
        outside = tensor.data_ptr()
    graph, out = torch.cuda.CUDAGraph(), torch.zeros(1024, device="cuda")
    with torch.cuda.graph(graph), pool.lease((1024,), torch.float32, "cuda") as tensor:
        assert tensor.data_ptr() != outside
        tensor.fill_(3)
        out.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 3).all())
    assert pool.stats().buffers == 1


def test_a_cached_value_is_whole_on_every_stream():
    cache = DeviceCache(pressure=None)

    def build():
        busy()
        return torch.ones(1 << 20, device="cuda")

    value = cache.get_or_build("key", build, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert cache.get_or_build("key", build, device="cuda") is value
        total = value.sum()
    assert float(total) == 1 << 20


def test_unused_memory_of_the_caching_allocator_counts_as_free():
    torch.cuda.empty_cache()
    before = read_memory("cuda").free
    tensor = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    held = read_memory("cuda")
    assert held.source == "cuda"
    assert before - held.free >= 200 << 20
    del tensor
    assert read_memory("cuda").free - held.free >= 200 << 20
    assert MemoryPressure().reading("cuda").total > 0


def test_the_gpu_really_runs_out_and_recovers():
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (256 << 20)) / total))
    try:
        rows = torch.randn(64, 1, device="cuda")
        columns = torch.randn(4 << 20, device="cuda")  # 16 MiB of scratch per row, 1 GiB for all
        out = torch.empty(64, device="cuda")

        def work(start, stop):
            torch.sum((rows[start:stop] * columns).cos_(), dim=1, out=out[start:stop])

        _, report = oom_recovery(work, size=64)
        assert report.pieces > 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    expected = torch.stack([(row * columns).cos_().sum() for row in rows])
    reference = torch.stack([(row.double() * columns.double()).cos_().sum() for row in rows])
    error = (expected.double() - reference).abs().max()
    band = torch.finfo(torch.float32).eps * columns.numel()
    assert float((out.double() - reference).abs().max()) <= 2 * float(error) + band
