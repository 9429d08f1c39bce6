"""BufferPool on the CPU: leases, errors, reuse, budget, eviction, statistics."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from bs_memory import BufferPool, Lease, LeaseError, PoolBudgetError, PoolClosedError, bucket_bytes, default_pool
from bs_memory.testing import dtypes, shapes

F32 = torch.float32
KIB = 1024


def new_pool(**options):
    """A pool that no pressure on the machine that runs the tests can disturb."""
    return BufferPool(pressure=None, **options)


@pytest.fixture
def pool():
    return new_pool()


# --------------------------------------------------------------------------- what a lease is


@given(shapes(), dtypes(), st.sampled_from([64, 256, 4096]))
def test_a_lease_has_the_shape_dtype_and_alignment_asked_for(shape, dtype, alignment):
    pool = new_pool(alignment=alignment)
    for _ in range(2):  # new, then recycled
        with pool.lease(shape, dtype, "cpu") as tensor:
            assert tuple(tensor.shape) == shape
            assert tensor.dtype == dtype
            assert tensor.device == torch.device("cpu")
            assert tensor.is_contiguous()
            assert tensor.numel() == 0 or tensor.data_ptr() % alignment == 0
            assert not tensor.requires_grad
            tensor.fill_(1)
            assert bool((tensor == 1).all())
    assert (pool.stats().hits, pool.stats().misses) == (1, 1)


def test_dtype_and_device_default_to_those_of_torch(pool):
    with torch.device("meta"):
        assert pool.lease((2,)).tensor.device.type == "meta"
    with pool.lease((2,)) as tensor:
        assert (tensor.dtype, tensor.device.type) == (torch.get_default_dtype(), "cpu")


@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size([2, 3])], ids=["tuple", "list", "torch.Size"])
def test_shapes_come_in_any_sequence(pool, shape):
    with pool.lease(shape, F32, "cpu") as tensor:
        assert tensor.shape == (2, 3)


def test_numpy_integers_are_sizes(pool):
    import numpy as np

    with pool.lease((np.int64(2), np.int32(3)), F32, "cpu") as tensor:
        assert tensor.shape == (2, 3)


def test_explicit_release_returns_the_same_memory(pool):
    lease = pool.lease((8,), F32, "cpu")
    address = lease.tensor.data_ptr()
    assert not lease.released
    lease.release()
    assert lease.released
    assert pool.lease((8,), F32, "cpu").tensor.data_ptr() == address


def test_shapes_of_one_bucket_share_a_buffer(pool):
    with pool.lease((4, 4), F32, "cpu") as tensor:
        address = tensor.data_ptr()
    with pool.lease((2, 8), F32, "cpu") as tensor:
        assert tensor.data_ptr() == address
        assert tensor.shape == (2, 8)


@pytest.mark.parametrize("other", [((16,), torch.int32), ((200,), F32)], ids=["dtype", "size"])
def test_other_keys_do_not_share(pool, other):
    with pool.lease((16,), F32, "cpu"):
        pass
    with pool.lease(*other, "cpu"):
        pass
    assert pool.stats().misses == 2


def test_two_leases_never_alias(pool):
    with pool.lease((16,), F32, "cpu") as a, pool.lease((16,), F32, "cpu") as b:
        a.fill_(1)
        b.fill_(2)
        assert bool((a == 1).all())


def test_release_through_the_pool_is_the_same(pool):
    lease = pool.lease((4,), F32, "cpu")
    pool.release(lease)
    assert lease.released


def test_an_exception_releases(pool):
    with pytest.raises(KeyError), pool.lease((4,), F32, "cpu"):
        raise KeyError
    assert pool.stats().leases == 0


def test_repr_says_what_it_is(pool):
    lease = pool.lease((2, 3), F32, "cpu")
    assert repr(lease) == "Lease((2, 3), torch.float32, cpu)"
    lease.release()
    assert repr(lease) == "Lease(released)"
    assert "64 bytes idle" in repr(pool)


def test_the_default_pool_is_one():
    assert default_pool() is default_pool()
    assert not default_pool().closed


# --------------------------------------------------------------------------- misuse


def test_a_second_release_raises(pool):
    lease = pool.lease((4,), F32, "cpu")
    lease.release()
    with pytest.raises(LeaseError, match="already released"):
        lease.release()
    with pytest.raises(LeaseError, match="already released"):
        pool.release(lease)
    assert pool.stats().leases == 0


def test_a_release_inside_the_with_block_raises_at_its_end(pool):
    lease = pool.lease((4,), F32, "cpu")
    with pytest.raises(LeaseError), lease:
        lease.release()


def test_a_release_inside_the_with_block_does_not_hide_an_exception(pool):
    lease = pool.lease((4,), F32, "cpu")

    def fail_after_release():
        with lease:
            lease.release()
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_release()


def test_the_tensor_of_a_released_lease_raises(pool):
    lease = pool.lease((4,), F32, "cpu")
    lease.release()
    with pytest.raises(LeaseError, match="already released"):
        _ = lease.tensor
    with pytest.raises(LeaseError):
        lease.__enter__()


def test_release_to_another_pool_raises(pool):
    lease = new_pool().lease((4,), F32, "cpu")
    with pytest.raises(LeaseError, match="another pool"):
        pool.release(lease)
    assert not lease.released


def test_release_of_something_else_raises(pool):
    with pytest.raises(TypeError, match="lease: expected a Lease, got Tensor"):
        pool.release(torch.empty(3))


def test_a_closed_pool_refuses_work_but_takes_leases_back(pool):
    with pool.lease((4,), F32, "cpu"):
        pass
    lease = pool.lease((4,), F32, "cpu")
    pool.close()
    pool.close()
    for use in (lambda: pool.lease((4,), F32, "cpu"), pool.trim, pool.clear, pool.__enter__):
        with pytest.raises(PoolClosedError):
            use()
    assert lease.tensor.shape == (4,)
    lease.release()
    assert pool.stats().bytes_held == 0
    assert repr(pool) == "BufferPool(closed)"


def test_a_pool_as_context_manager_closes():
    with new_pool() as pool:
        assert not pool.closed
    assert pool.closed


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (((-1,), F32, "cpu"), ValueError, "shape: .*≥ 0"),
        (((2.5,), F32, "cpu"), TypeError, "shape: expected ints, got 2.5"),
        ((7, F32, "cpu"), TypeError, "shape: expected a sequence of ints, got int"),
        (("ab", F32, "cpu"), TypeError, "shape: expected a sequence of ints, got str"),
        (((2,), "float32", "cpu"), TypeError, "dtype: expected a torch.dtype, got str"),
        (((2,), F32, "nowhere"), ValueError, "device: .*got 'nowhere'"),
        (((2,), F32, 1.5), TypeError, "device: "),
    ],
)
def test_bad_arguments_are_named(pool, arguments, error, match):
    with pytest.raises(error, match=match):
        pool.lease(*arguments)
    assert pool.stats().leases == 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"priority": 1.0}, TypeError, "priority: expected an int, got float"),
        ({"pinned": 1.0}, TypeError, "pinned: expected a bool"),
        ({"pinned": True, "device": "meta"}, ValueError, "pinned: expected False on meta"),
    ],
)
def test_bad_options_are_named(pool, options, error, match):
    with pytest.raises(error, match=match):
        pool.lease((2,), F32, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine can pin memory")
def test_pinned_memory_without_an_accelerator_is_an_error(pool):
    with pytest.raises(ValueError, match=r"pinned: .*without an accelerator"):
        pool.lease((2,), F32, "cpu", pinned=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_bytes": 0}, ValueError, "max_bytes: .*got 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes: .*got float"),
        ({"alignment": 32}, ValueError, "alignment: .*got 32"),
        ({"alignment": 96}, ValueError, "alignment: .*got 96"),
        ({"pressure": "high"}, TypeError, "pressure: .*got 'high'"),
    ],
)
def test_bad_pools_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        BufferPool(**options)


def test_streams_of_ordinary_host_memory_are_refused(pool):
    with pool.lease((2,), F32, "cpu") as _, pytest.raises(ValueError, match="stream: "):
        pool.lease((2,), F32, "cpu").record_stream(object())


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


# --------------------------------------------------------------------------- autograd, inference mode, poison


def test_history_of_one_lease_does_not_reach_the_next(pool):
    weight = torch.ones(4, requires_grad=True)
    with pool.lease((4,), F32, "cpu") as tensor:
        tensor.copy_(weight * 2)
        assert tensor.grad_fn is not None
    with pool.lease((4,), F32, "cpu") as tensor:
        assert tensor.grad_fn is None
        assert tensor.is_leaf
        tensor.requires_grad_()
    with pool.lease((4,), F32, "cpu") as tensor:
        assert not tensor.requires_grad


def test_autograd_sees_a_buffer_released_too_early(pool):
    x = torch.ones(4, requires_grad=True)
    with pool.lease((4,), F32, "cpu") as factor:
        factor.fill_(3)
        y = x * factor  # saves the buffer for backward
    with pool.lease((4,), F32, "cpu") as other:
        other.fill_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_buffer_held_through_backward_is_safe_to_write_in_place(pool):
    x = torch.ones(4, requires_grad=True)
    with pool.lease((4,), F32, "cpu") as factor:
        factor.fill_(3)
        (x * factor).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("first", [True, False], ids=["allocated in inference mode", "reshaped in inference mode"])
def test_inference_mode_leaves_no_mark_on_buffers(pool, first):
    with torch.inference_mode(first), pool.lease((4,), F32, "cpu") as tensor:
        tensor.fill_(1)
    with torch.inference_mode(not first), pool.lease((2, 2), F32, "cpu") as tensor:
        tensor.fill_(2)
    x = torch.ones(2, 2, requires_grad=True)
    with pool.lease((2, 2), F32, "cpu") as tensor:
        assert not tensor.is_inference()
        tensor.fill_(3)
        (x * tensor).sum().backward()
    assert pool.stats().hits == 2
    assert torch.equal(x.grad, torch.full((2, 2), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_poison_turns_released_floats_into_nan(dtype):
    pool = new_pool(poison=True)
    with pool.lease((5,), dtype, "cpu") as tensor:
        tensor.zero_()
    assert bool(torch.isnan(tensor).all())


def test_poison_overwrites_integers():
    pool = new_pool(poison=True)
    with pool.lease((5,), torch.uint8, "cpu") as tensor:
        tensor.zero_()
    assert bool((tensor == 0xCB).all())


def test_a_dropped_pool_lets_go_at_once():
    pool = BufferPool()
    with pool.lease((4,), F32, "cpu"):
        pass
    block = next(iter(pool._buckets.values())).free[0]
    watches = [weakref.ref(pool), weakref.ref(block.flat)]
    del block
    gc.disable()
    try:
        del pool
        assert [watch() for watch in watches] == [None, None]
    finally:
        gc.enable()


def test_copies_of_a_pool_are_the_pool(pool):
    assert copy.deepcopy({"pool": pool})["pool"] is pool
    assert copy.copy(pool) is pool
    assert pickle.loads(pickle.dumps(default_pool())) is default_pool()


def test_a_pickled_pool_keeps_its_options_and_no_buffers():
    pool = new_pool(max_bytes=KIB, alignment=128)
    lease = pool.lease((4,), F32, "cpu")
    twin = pickle.loads(pickle.dumps(pool))
    assert (twin.stats().buffers, twin.max_bytes, twin._options) == (0, KIB, pool._options)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(lease)
    lease.release()


def test_fake_tensors_are_not_recycled(pool):
    with FakeTensorMode(), pool.lease((4,), F32, "cpu") as fake:
        assert type(fake) is not torch.Tensor
    with pool.lease((4,), F32, "cpu") as real:
        assert type(real) is torch.Tensor


def test_leasing_warns_of_nothing(pool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pool.lease((4,), F32, "cpu"):
            pass


def test_a_lease_keeps_its_pool_alive():
    lease = new_pool().lease((4,), F32, "cpu")
    gc.collect()
    assert isinstance(lease, Lease)
    lease.release()
