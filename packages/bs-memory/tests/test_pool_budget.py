"""BufferPool on the CPU: budget, eviction, priorities, statistics."""

import gc

import pytest
import torch

from bs_memory import BufferPool, PoolBudgetError, bucket_bytes

F32 = torch.float32
KIB = 1024


def new_pool(**options):
    """A pool that no pressure on the machine that runs the tests can disturb."""
    return BufferPool(pressure=None, **options)


@pytest.fixture
def pool():
    return new_pool()


# --------------------------------------------------------------------------- budget, eviction, priorities


def idle_addresses(pool, sizes, priorities=None):
    """Makes one idle buffer per size, oldest first; their addresses."""
    priorities = [0] * len(sizes) if priorities is None else priorities
    leases = [
        pool.lease((n,), torch.uint8, "cpu", priority=priority) for n, priority in zip(sizes, priorities, strict=True)
    ]
    addresses = [lease.tensor.data_ptr() for lease in leases]
    for lease in leases:
        lease.release()
    return addresses


def idle_sizes(pool):
    return sorted(block.bucket.charge for account in pool._accounts.values() for block in account._idle())


def test_the_budget_evicts_the_least_recently_used():
    pool = new_pool(max_bytes=7 * KIB)
    idle_addresses(pool, [1 * KIB, 2 * KIB, 4 * KIB])
    with pool.lease((1 * KIB,), torch.uint8, "cpu"):  # now the most recent
        pass
    with pool.lease((512,), torch.uint8, "cpu"):
        assert idle_sizes(pool) == [1 * KIB, 4 * KIB]
    assert pool.stats().evictions == 1


def test_priority_outlives_recency():
    pool = new_pool(max_bytes=7 * KIB)
    idle_addresses(pool, [1 * KIB, 2 * KIB, 4 * KIB], priorities=[1, 1, 0])
    with pool.lease((3 * KIB,), torch.uint8, "cpu"):
        assert idle_sizes(pool) == [1 * KIB, 2 * KIB]


def test_a_later_lease_sets_the_priority_anew():
    pool = new_pool(max_bytes=7 * KIB)
    idle_addresses(pool, [1 * KIB, 2 * KIB, 4 * KIB], priorities=[5, 5, 5])
    with pool.lease((4 * KIB,), torch.uint8, "cpu"):  # priority 0 from here on
        pass
    pool.trim(3 * KIB)
    assert idle_sizes(pool) == [1 * KIB, 2 * KIB]


def test_a_budget_full_of_leases_is_an_error_that_says_what_would_fit():
    pool = new_pool(max_bytes=4 * KIB)
    lease = pool.lease((3 * KIB,), torch.uint8, "cpu")
    with pytest.raises(PoolBudgetError, match=r"2048 bytes .* max_bytes=4096: 3072 bytes are leased .* most 1024 more"):
        pool.lease((2 * KIB,), torch.uint8, "cpu")
    assert isinstance(PoolBudgetError(), MemoryError)
    lease.release()
    with pool.lease((2 * KIB,), torch.uint8, "cpu"):
        assert pool.stats().bytes_held <= 4 * KIB


def test_the_budget_may_change(pool):
    idle_addresses(pool, [1 * KIB, 2 * KIB, 4 * KIB])
    pool.max_bytes = 5 * KIB
    assert (pool.max_bytes, idle_sizes(pool)) == (5 * KIB, [4 * KIB])
    lease = pool.lease((4 * KIB,), torch.uint8, "cpu")
    pool.max_bytes = KIB
    with pytest.raises(PoolBudgetError):
        pool.lease((64,), torch.uint8, "cpu")
    assert lease.tensor.numel() == 4 * KIB
    lease.release()
    pool.max_bytes = None
    idle_addresses(pool, [8 * KIB])
    with pytest.raises(ValueError, match=r"max_bytes: .*got -1"):
        pool.max_bytes = -1


def test_alignment_slack_counts_against_the_budget():
    with pytest.raises(PoolBudgetError):
        new_pool(max_bytes=4 * KIB, alignment=256).lease((4 * KIB,), torch.uint8, "cpu")


def test_a_request_as_large_as_the_budget_fits():
    with new_pool(max_bytes=1 << 20).lease((1 << 20,), torch.uint8, "cpu") as tensor:
        assert tensor.numel() == 1 << 20


def test_trim_leaves_the_target_and_reports_what_it_freed(pool):
    idle_addresses(pool, [1 * KIB, 2 * KIB, 4 * KIB])
    assert pool.trim(5 * KIB) == 3 * KIB  # the two oldest
    assert pool.trim(100 * KIB) == 0
    assert pool.trim(device="cpu") == 4 * KIB
    assert pool.trim(device="meta") == 0
    with pytest.raises(ValueError, match=r"target_bytes: .*got -1"):
        pool.trim(-1)
    with pytest.raises(TypeError, match=r"target_bytes: .*got float"):
        pool.trim(0.5)


def test_trim_spares_leases(pool):
    with pool.lease((KIB,), torch.uint8, "cpu") as tensor:
        assert pool.trim() == 0
        tensor.fill_(3)
        assert pool.stats().bytes_leased == KIB


def test_clear_drops_leased_buffers_at_their_release(pool):
    lease = pool.lease((KIB,), torch.uint8, "cpu")
    idle_addresses(pool, [KIB])
    assert pool.clear() == KIB
    lease.release()
    assert pool.stats().bytes_held == 0
    with pool.lease((KIB,), torch.uint8, "cpu"):
        pass
    assert pool.stats().bytes_idle == KIB


def test_memory_that_ran_out_is_retried_after_giving_up_idle_buffers(pool, monkeypatch):
    idle_addresses(pool, [KIB])
    real, failures = torch.empty, []

    def empty(*arguments, **options):
        if not failures:
            failures.append(1)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pool.lease((2 * KIB,), torch.uint8, "cpu"):
        assert pool.stats().bytes_held == 2 * KIB


def test_a_failed_allocation_leaves_no_trace(pool):
    with pytest.raises(RuntimeError):
        pool.lease((1 << 60,), torch.uint8, "cpu")
    stats = pool.stats()
    assert (stats.leases, stats.bytes_held, pool._accounts[torch.device("cpu")].held) == (0, 0, 0)


# --------------------------------------------------------------------------- statistics


def test_statistics_add_up(pool):
    lease = pool.lease((100,), F32, "cpu")  # 400 bytes in a bucket of 448
    idle_addresses(pool, [KIB])
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.leases, stats.buffers) == (0, 2, 1, 2)
    assert (stats.bytes_leased, stats.bytes_requested) == (bucket_bytes(400), 400)
    assert (stats.bytes_held, stats.bytes_idle, stats.high_water_bytes) == (448 + KIB, KIB, 448 + KIB)
    assert stats.fragmentation == 1 - 400 / (448 + KIB)
    lease.release()
    assert pool.stats("meta").bytes_held == 0
    pool.trim()
    stats = pool.stats()
    assert (stats.bytes_held, stats.fragmentation, stats.high_water_bytes) == (0, 0.0, 448 + KIB)


def test_an_abandoned_lease_is_not_recycled_while_its_tensor_lives(pool):
    tensor = pool.lease((16,), F32, "cpu").tensor
    gc.collect()
    tensor.fill_(1)
    with pool.lease((16,), F32, "cpu") as other:
        other.fill_(2)
    assert bool((tensor == 1).all())
    stats = pool.stats()
    assert (stats.abandoned, stats.leases, stats.bytes_leased) == (1, 0, 0)


def test_abandoned_leases_make_room_in_the_budget():
    pool = new_pool(max_bytes=KIB)
    for _ in range(3):
        assert pool.lease((KIB,), torch.uint8, "cpu").tensor.numel() == KIB
        gc.collect()


def test_many_shapes_do_not_pile_up(pool):
    for n in range(5000):
        with pool.lease((n % 7, n), torch.uint8, "meta"):
            pass
    assert len(pool._requests) <= 4096
