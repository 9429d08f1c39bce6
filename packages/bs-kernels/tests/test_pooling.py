"""`pool_blocks` on the native core and in torch against its definition, and where the core steps aside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from bs_kernels import pool_blocks, pooling
from bs_kernels.backends import _native_lib
from bs_kernels.backends.native import native_pool
from bs_kernels.testing import dense_pool

needs_native = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="no native core")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.integers(1, 300))


def make(seed, shape, dtype, form="contiguous"):
    batch, length, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    wide = (batch, length + 1, heads, dim + 3)
    x = 3 * torch.randn(wide, generator=generator, dtype=torch.float64).to(dtype)
    if form == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:, :, :dim]
    return x[:, 1:, :, 1::1][..., :dim].contiguous() if form == "contiguous" else x[:, 1:, :, :dim]


def check(got, x, block, parts, roundings, first=None):
    """The extremes are exact; the mean is off by `roundings` of the sum of absolute values, at most."""
    want = dense_pool(x, block, first)[..., :parts, :]
    assert got.dtype == torch.promote_types(x.dtype, torch.float32)
    assert got.shape == want.shape
    assert torch.equal(got[..., 1:, :].double(), want[..., 1:, :])
    size = dense_pool(x.double().abs(), block, first)[..., 0, :]
    assert ((got[..., 0, :] - want[..., 0, :]).abs() <= roundings * size).all()


forms = st.sampled_from(["contiguous", "strided", "heads first"])


@needs_native
@given(st.integers(0, 2**31), shapes, st.sampled_from(DTYPES), st.integers(1, 80), st.integers(1, 3), forms)
def test_native_pooling_is_the_definition(seed, shape, dtype, block, parts, form):
    x, first = make(seed, shape, dtype, form), 1 + seed % block
    got = native_pool(x, block, parts, first)
    assert got is not None
    assert torch.equal(pool_blocks(x, block, parts, first=first), got)
    check(got, x, block, parts, (block + 1) * 2.0**-24, first)


@given(st.integers(0, 2**31), shapes, st.sampled_from((*DTYPES, torch.float64)), st.integers(1, 80), st.integers(1, 3))
def test_watched_pooling_is_the_definition(seed, shape, dtype, block, parts):
    x, first = make(seed, shape, dtype, "strided"), 1 + seed % block
    got = pool_blocks(x.clone().requires_grad_(), block, parts, first=first).detach()
    check(got, x, block, parts, (block + 3) * torch.finfo(dtype).eps, first)


@needs_native
@pytest.mark.parametrize("name", _native_lib.load().supported if _native_lib.missing_reason() is None else ())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 64, 520])
def test_every_instruction_set(name, dtype, dim, monkeypatch):
    monkeypatch.setenv("BS_KERNELS_ISA", name)
    x = make(0, (2, 45, 3, dim), dtype)
    for parts in (1, 2, 3):
        check(native_pool(x, 16, parts, 16), x, 16, parts, 17 * 2.0**-24)


@needs_native
def test_threads_change_no_bit():
    x = make(0, (2, 3001, 4, 64), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(native_pool(x, 64, 3, 64))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_zeros_and_infinities(dtype):
    x = torch.zeros(1, 12, 1, 3, dtype=dtype)
    x[0, 1::2] = -0.0
    x[0, 5, 0, 0], x[0, 6, 0, 1] = float("inf"), -float("inf")
    got = pool_blocks(x, 4)
    assert torch.equal(got.double(), dense_pool(x, 4))


def test_a_token_that_is_not_a_number_shows_in_the_mean():
    x = make(1, (1, 12, 2, 5), torch.float32)
    x[0, 5, 1, 2] = float("nan")
    mean = pool_blocks(x, 4)[..., 0, :]
    assert mean.isnan().sum() == 1
    assert mean[0, 1, 1, 2].isnan()


def test_gradients():
    x = make(2, (1, 10, 2, 3), torch.float64).requires_grad_()
    assert gradcheck(lambda y: pool_blocks(y, 4, 3), (x,))


def test_it_compiles_and_maps():
    x = make(3, (2, 20, 2, 8), torch.float32)
    want = pool_blocks(x, 8)
    compiled = torch.compile(lambda y: pool_blocks(y, 8), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    mapped = torch.func.vmap(lambda y: pool_blocks(y[None], 8)[0])(x)
    torch.testing.assert_close(mapped, want)
    assert pool_blocks(x.to("meta"), 8).shape == want.shape


@pytest.mark.parametrize("block", [70, 71, 2**31 - 1, 2**31, 2**40, np.int64(75)])
@pytest.mark.parametrize("watched", [False, True])
def test_one_block_however_long(block, watched):
    x = make(5, (1, 70, 2, 8), torch.float32)
    got = pool_blocks(x.clone().requires_grad_(watched), block).detach()
    check(got, x, 70, 3, 2.0**-16)


def test_nothing_to_pool():
    assert pool_blocks(torch.empty(2, 0, 3, 4), 8).shape == (2, 3, 0, 3, 4)
    assert pool_blocks(torch.empty(0, 9, 3, 4), 8, 1).shape == (0, 3, 2, 1, 4)
    assert pool_blocks(torch.empty(0, 10, 3, 4), 8, 1, first=1).shape == (0, 3, 3, 1, 4)


@needs_native
def test_autograd_is_watched(monkeypatch):
    monkeypatch.setattr(pooling, "native_pool", lambda *_: pytest.fail("below autograd"))
    pool_blocks(make(4, (1, 9, 2, 4), torch.float32).requires_grad_(), 4)


X = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X.long(), 4), TypeError, "x: expected a floating-point tensor, got torch.int64"),
        (([1.0], 4), TypeError, "x: expected a floating-point tensor, got list"),
        ((X[0], 4), ValueError, r"x: expected \[B, S, H, D\], got 3 dimensions"),
        ((X, 4.0), TypeError, "block_size: expected an integer, got 4.0"),
        ((X, 0), ValueError, "block_size: expected at least 1, got 0"),
        ((X, 4, 4), ValueError, "parts: expected 1 to 3, got 4"),
        ((X, 4, True), TypeError, "parts: expected an integer, got True"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        pool_blocks(*arguments)


@pytest.mark.parametrize(("first", "error"), [(0, ValueError), (5, ValueError), (2.0, TypeError)])
def test_bad_first_blocks(first, error):
    with pytest.raises(error, match=f"first: expected .*, got {first}"):
        pool_blocks(X, 4, first=first)
