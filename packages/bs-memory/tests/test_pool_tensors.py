"""BufferPool on the CPU: autograd, inference mode, poison, copies, and what a dropped pool leaves."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bs_memory import BufferPool, Lease, default_pool

F32 = torch.float32
KIB = 1024


def new_pool(**options):
    """A pool that no pressure on the machine that runs the tests can disturb."""
    return BufferPool(pressure=None, **options)


@pytest.fixture
def pool():
    return new_pool()


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
