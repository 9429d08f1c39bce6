"""Memory of results that is used again, and never while anything can still read it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch

from bs_kernels import LayoutPlan, block_sparse_attention
from bs_kernels.backends import _native_lib, _results
from bs_kernels.backends._results import empty_result
from bs_kernels.testing import make_layout
from bs_memory import BufferPool

SHAPE = (2, 1024, 8, 128)  # 8 MiB in float32


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    gc.collect()
    own = BufferPool(max_bytes=1 << 26)
    monkeypatch.setattr(_results, "_pool", own)
    monkeypatch.setattr(_results, "_returned", type(_results._returned)())
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_an_ordinary_tensor(dtype):
    x = empty_result(SHAPE, dtype)
    assert (x.shape, x.dtype, x.device.type, x.is_contiguous()) == (SHAPE, dtype, "cpu", True)
    assert x._base is None
    assert not x.requires_grad
    x.copy_(torch.randn(SHAPE))
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert torch.equal(other, x)
    y = x.requires_grad_() * 2
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        x.add_(1)


def test_the_next_result_has_the_memory_of_the_last():
    x = empty_result(SHAPE, torch.float32)
    place = x.data_ptr()
    del x
    assert empty_result((*SHAPE[:-1], 2 * SHAPE[-1]), torch.bfloat16).data_ptr() == place


@pytest.mark.parametrize("hold", [lambda x: x[1, 5:6], lambda x: x.detach(), lambda x: x.numpy()])
def test_what_can_still_be_read_is_not_used_again(hold):
    x = empty_result(SHAPE, torch.float32).zero_()
    held = hold(x)
    del x
    others = [empty_result(SHAPE, torch.float32).fill_(1) for _ in range(3)]
    assert not np.asarray(held).any()
    del others


def test_a_graph_holds_what_it_saved():
    x = empty_result(SHAPE, torch.float32).fill_(3).requires_grad_()
    y = (x * x).sum()
    place = x.data_ptr()
    leaf = torch.autograd.grad(y, x, retain_graph=True)[0]
    del x, leaf
    for _ in range(3):
        other = empty_result(SHAPE, torch.float32).fill_(7)
        assert other.data_ptr() != place


def test_small_results_and_those_beyond_the_budget_are_torchs(pool):
    assert empty_result((8,), torch.float32).untyped_storage().resizable()
    held = [empty_result(SHAPE, torch.float32) for _ in range(12)]  # 96 MiB
    assert len({x.data_ptr() for x in held}) == 12
    assert pool.stats().bytes_leased <= pool.max_bytes
    assert empty_result((1 << 25,), torch.float32).untyped_storage().resizable()
    assert empty_result((0, 8), torch.float32).shape == (0, 8)


def test_memory_that_nobody_uses_can_be_given_up(pool):
    x = empty_result(SHAPE, torch.float32)
    del x
    _results.take_back()
    assert pool.stats().bytes_leased == 0
    assert pool.trim() >= 1 << 23


def test_threads_never_share_a_result():
    wrong = []

    def work(number):
        for n in range(60):
            x = empty_result(SHAPE, torch.float32).fill_(number * 1000 + n)
            kept = x[1, 1000:]
            del x
            y = empty_result(SHAPE, torch.float32).fill_(-1)
            if not bool((kept == number * 1000 + n).all()):
                wrong.append((number, n))
            del y

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="no native core")
def test_results_of_calls_stay_what_they_are(pool):
    layout = make_layout(np.random.default_rng(0), seq_len=(2048, 2048), block_size=(64, 64), density=0.2)
    plan = LayoutPlan.build(layout)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        q, k, v = (torch.randn(1, 2048, 8, 64, generator=generator).requires_grad_() for _ in range(3))
        out = block_sparse_attention(q, k, v, plan, backend="native")
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        found.append(([x.detach().clone() for x in (out, *gradients)], (out, *gradients)))
    for copies, results in found:
        for one, other in zip(copies, results, strict=True):
            assert torch.equal(one, other)
    assert pool.stats().leases == 16
