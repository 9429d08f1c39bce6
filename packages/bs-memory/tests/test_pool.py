"""BufferPool on the CPU: leases, reuse, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_memory import BufferPool, LeaseError, PoolClosedError, default_pool
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
        ({"alignment": 64.0}, TypeError, "alignment: .*got float"),
        ({"poison": 1}, TypeError, "poison: expected a bool, got int"),
        ({"streams": "main"}, TypeError, "streams: expected a callable, got str"),
        ({"pressure": "high"}, TypeError, "pressure: .*got 'high'"),
    ],
)
def test_bad_pools_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        BufferPool(**options)


def test_streams_of_ordinary_host_memory_are_refused(pool):
    with pool.lease((2,), F32, "cpu") as _, pytest.raises(ValueError, match="stream: "):
        pool.lease((2,), F32, "cpu").record_stream(object())
