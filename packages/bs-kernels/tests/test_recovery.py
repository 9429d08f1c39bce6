"""Out of memory below autograd: the call goes on in smaller pieces, with the same result."""

import gc

import numpy as np
import pytest
import torch

from bs_kernels import block_sparse_attention, dispatch
from bs_kernels.backends._native_lib import missing_reason
from bs_kernels.backends.native import NativeBackend
from bs_kernels.backends.torch_blocks import TorchBackend
from bs_kernels.testing import check_against_oracle, evaluate, make_batched_layout, make_case, make_layout, make_pages
from bs_memory import RecoveryError


class Tight:
    """A backend (by default the torch one) on a machine with room for ``most`` (batch, kv head) pairs at a time."""

    name = "tight"

    def __init__(self, most, inner=None):
        self.most, self.calls, self._inner = most, [], inner or TorchBackend()

    def not_supported_reasons(self, problem):
        return []

    def _admit(self, call):
        units = call.q.shape[0] * call.k.shape[2]
        self.calls.append(units)
        if units > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate for {units} units")

    def forward(self, call, out_dtype):
        self._admit(call)
        return self._inner.forward(call, out_dtype)

    def backward(self, call, *args):
        self._admit(call)
        return self._inner.backward(call, *args)


@pytest.fixture
def tight(monkeypatch, caplog):
    def install(most, inner=None):
        backend = Tight(most, inner)
        dispatch.select.cache_clear()
        monkeypatch.setitem(dispatch._BY_NAME, "tight", backend)
        return backend

    gc.freeze()  # every recovery collects garbage, which what other tests have imported is not
    yield install
    gc.unfreeze()
    dispatch.select.cache_clear()


def case_of(kind, dtype=torch.float64):
    generator = np.random.default_rng(0)
    sizes = {"seq_len": (30, 41), "block_size": (8, 8), "density": 0.5}
    common = {"batch": 3, "q_heads": 4, "kv_heads": 2, "dtype": dtype}
    if kind == "batched":
        return make_case(make_batched_layout(generator, batch=3, heads=4, **sizes), **common, block_bias=True)
    layout = make_layout(generator, heads=4 if kind == "per_head" else 1, **sizes)
    if kind == "paged":
        return make_pages(make_case(layout, **common))
    every = {"attn_bias": True, "block_bias": True, "sinks": True, "key_padding_mask": True, "segment_ids": True}
    case = make_case(layout, **common, **every, dropout_p=0.3, dropout_seed=4)
    case.arguments["attn_bias"] = case.arguments["attn_bias"][:, :1]
    return case


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("kind", ["shared", "per_head", "batched", "paged"])
def test_pieces_give_the_whole(tight, kind, most):
    case, backend = case_of(kind), tight(most)
    got = check_against_oracle(case, backend="tight")
    assert max(backend.calls) == 6  # the whole was tried first
    assert sum(n for n in backend.calls if n <= most) == 2 * 6  # forward and backward, every unit once
    want = evaluate(case, block_sparse_attention, backend="torch")
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(missing_reason() is not None, reason="the native core is not built")
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("kind", ["shared", "per_head", "batched", "paged"])
def test_native_pieces_have_the_same_bits(tight, kind, most):
    case, backend = case_of(kind, torch.float32), tight(most, NativeBackend())
    got = check_against_oracle(case, backend="tight")
    assert sum(n for n in backend.calls if n <= most) == 2 * 6
    want = evaluate(case, block_sparse_attention, backend="native")
    for name in got:
        if name not in ("attn_bias", "block_bias"):  # sums over what the pieces share
            assert torch.equal(got[name], want[name]), name


def test_nothing_fits(tight):
    case = case_of("shared")
    tight(0)
    with pytest.raises(RecoveryError, match="attention: out of memory on cpu"):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="tight")


def test_other_errors_pass_through(tight, monkeypatch):
    case, backend = case_of("shared"), tight(9)
    monkeypatch.setattr(backend, "forward", lambda call, out_dtype: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="tight")
