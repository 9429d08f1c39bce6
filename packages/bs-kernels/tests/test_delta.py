"""`attention_delta` on the native core against its definition, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bs_kernels import _identities, attention_delta
from bs_kernels.backends import _native_lib
from bs_kernels.backends.native import native_delta

needs_native = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="no native core")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(seed, shape, dout_dtype, out_dtype, *, with_dlse):
    """dout, out, lse with queries that have no keys, and dlse; none of them contiguous."""
    batch, length, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    dout = random(batch, heads, length, dim).transpose(1, 2).to(dout_dtype)
    out = random(batch, length, heads, dim + 3)[..., :dim].to(out_dtype)
    lse = random(batch, length, heads).transpose(1, 2)
    lse[random(batch, heads, length) > 1] = -torch.inf
    return dout, out, lse, random(batch, length, heads).transpose(1, 2) if with_dlse else None


def defined(dout, out, lse, dlse):
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse
    return delta.masked_fill(lse == -torch.inf, 0)


@needs_native
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.integers(1, 300)),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_native_delta_is_the_sum(seed, shape, dout_dtype, out_dtype, with_dlse):
    case = make(seed, shape, dout_dtype, out_dtype, with_dlse=with_dlse)
    got, want = native_delta(*case), defined(*case)
    assert got is not None
    assert torch.equal(attention_delta(*case), got)
    terms = (case[0].double() * case[1].double()).abs().sum(-1).transpose(1, 2) + 4
    assert ((got - want).abs() <= terms * shape[3] * 2.0**-24).all()
    assert (got[case[2] == -torch.inf] == 0).all()


@needs_native
def test_threads_change_no_bit():
    case = make(0, (2, 3000, 4, 64), torch.bfloat16, torch.bfloat16, with_dlse=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(native_delta(*case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_differentiable_where_autograd_watches(dtype, monkeypatch):
    monkeypatch.setattr(_identities, "native_delta", lambda *_: pytest.fail("below autograd"))
    dout, out, lse, _ = make(1, (1, 5, 2, 4), dtype, dtype, with_dlse=False)
    dout.requires_grad_()
    (gradient,) = torch.autograd.grad(attention_delta(dout, out, lse.to(dtype)).sum(), dout)
    assert torch.equal(gradient, out * (lse != -torch.inf).transpose(1, 2)[..., None])


def test_it_can_be_mapped_and_traced():
    dout, out, lse, _ = make(2, (1, 5, 2, 4), torch.float32, torch.float32, with_dlse=False)
    want = attention_delta(dout, out, lse)
    mapped = torch.func.vmap(lambda x: attention_delta(x, out, lse))(torch.stack([dout, 2 * dout]))
    torch.testing.assert_close(mapped, torch.stack([want, 2 * want]))
    traced = make_fx(lambda *tensors: attention_delta(*tensors))(dout, out, lse)
    torch.testing.assert_close(traced(2 * dout, out, lse), 2 * want)


@needs_native
def test_it_leaves_the_rest_to_torch():
    dout, out, lse, _ = make(3, (1, 5, 2, 4), torch.float32, torch.float32, with_dlse=False)
    assert native_delta(dout.double(), out.double(), lse.double(), None) is None
    assert native_delta(dout[:, :, :1], out, lse, None) is None
    assert native_delta(dout.to("meta"), out, lse, None) is None
    assert attention_delta(dout.to("meta"), out.to("meta"), lse.to("meta")).device.type == "meta"
