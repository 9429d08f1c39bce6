"""The `flex` backend against the float64 oracle (on CPUs its unfused form), its block lists, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention, explain_backends
from bs_kernels.backends import flex
from bs_kernels.backends.base import Problem
from bs_kernels.dispatch import select
from bs_kernels.testing import assert_close_to_oracle, check_against_oracle, make_case, make_layout
from bs_kernels.testing.strategies import ARGUMENTS, cases

CAN = [name for name in ARGUMENTS if name not in ("dropout", "page_table")]


def check(case):
    what = case.layout if case.plan is None else case.plan
    with torch.no_grad():
        out, lse = block_sparse_attention(
            case.q, case.k, case.v, what, return_lse=True, backend="flex", **case.arguments
        )
    assert_close_to_oracle(case, {"out": out, "lse": lse})


@settings(max_examples=5)  # every new kind of call traces first
@given(data=st.data())
def test_any_forward_matches_the_oracle(data):
    case = data.draw(cases(arguments=CAN, dtypes=(torch.float64, torch.float32)))
    assume(case.q.shape[0] > 0)
    check(case)


@pytest.mark.parametrize(
    "argument", [None, "key_padding_mask", "segment_ids", "attn_bias", "block_bias", "sinks", "window"]
)
def test_each_argument(argument):
    layout = make_layout(np.random.default_rng(1), seq_len=(50, 70), block_size=(8, 16), heads=4, density=0.4)
    arguments = {} if argument is None else {argument: (9, 4) if argument == "window" else True}
    check(make_case(layout, batch=2, q_heads=4, kv_heads=2, causal=True, **arguments))


@pytest.mark.parametrize("cut", [False, True], ids=["as planned", "cut by the call"])
def test_the_block_mask_lists_the_plans_blocks(cut):
    layout = make_layout(np.random.default_rng(2), seq_len=(64, 64), block_size=(8, 8), heads=2, density=0.5)
    plan = LayoutPlan.build(layout, TokenMask(causal=True))
    partial = torch.ones_like(plan.partial, dtype=torch.bool) if cut else plan.partial.bool()
    (cut_counts, cut_keys), (full_counts, full_keys), active = flex._lists(plan, partial)
    seen = torch.zeros_like(active)
    for head in range(2):
        for row in range(8):
            mine = cut_keys[0, head, row, : cut_counts[0, head, row]].tolist()
            whole = full_keys[0, head, row, : full_counts[0, head, row]].tolist()
            assert not set(mine) & set(whole)
            assert all(key < row for key in whole)  # the diagonal is cut by causality
            seen[0, head, row, mine + whole] = True
    assert torch.equal(seen, active)
    expected = torch.from_numpy(layout.to_dense()) & torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(active[0], expected)
    assert bool(full_counts.sum()) != cut


def test_rubbish_stays_in_its_blocks():
    layout = make_layout(np.random.default_rng(1), seq_len=(60, 70), block_size=(8, 8), heads=4, density=0.25)
    case = make_case(layout, q_heads=4, kv_heads=2, head_dim=16)
    clean = block_sparse_attention(case.q, case.k, case.v, layout, backend="flex")
    for x in (case.k, case.v):
        x[0, 37, 0] = torch.nan
        got = block_sparse_attention(case.q, case.k, case.v, layout, backend="flex")
        hit = torch.from_numpy(layout.token_mask())[:, :, 32:40].any(-1)  # [H, Sq]
        hit[2:] = False  # the other key head
        assert torch.equal(got[0].isnan().any(-1).T & ~hit, torch.zeros_like(hit))
        assert torch.equal(got[0].transpose(0, 1)[~hit], clean[0].transpose(0, 1)[~hit])
        assert hit.any()


@pytest.fixture
def trains(monkeypatch):
    """Lets the unfused form be differentiated on a CPU, as it is on a GPU: torch has it and refuses to run it."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_WITH_BACKWARD", ("cpu", "cuda"))
    select.cache_clear()
    yield
    select.cache_clear()


@pytest.mark.parametrize("argument", [None, "segment_ids", "sinks", "window"])
def test_backward(trains, argument):
    layout = make_layout(np.random.default_rng(1), seq_len=(50, 70), block_size=(8, 16), heads=4, density=0.4)
    arguments = {} if argument is None else {argument: (9, 4) if argument == "window" else True}
    case = make_case(layout, batch=2, q_heads=4, kv_heads=2, causal=True, dtype=torch.float64, **arguments)
    check_against_oracle(case, backend="flex")


def test_backward_in_bfloat16(trains):
    layout = make_layout(np.random.default_rng(1), seq_len=(50, 70), block_size=(8, 16), density=0.4)
    check_against_oracle(make_case(layout, q_heads=2, dtype=torch.bfloat16), backend="flex")


def test_backward_with_biases_that_need_no_gradient(trains):
    layout = make_layout(np.random.default_rng(1), seq_len=(50, 70), block_size=(8, 16), density=0.4)
    case = make_case(layout, q_heads=2, dtype=torch.float64, attn_bias=True, block_bias=True)
    grads = []
    for name in ("flex", "torch"):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out = block_sparse_attention(*leaves, layout, backend=name, **case.arguments)
        grads.append(torch.autograd.grad(out, leaves, case.dout))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_partial_form(trains):
    """δ and the LSE are those of a softmax with more keys than the call has."""
    from bs_kernels import attention_delta, merge_attention, partial_backward, partial_forward

    q, k, v, dout = (torch.randn(1, 32, 2, 8, dtype=torch.float64) for _ in range(4))
    half = make_layout(np.random.default_rng(1), seq_len=(32, 16), block_size=(8, 8), density=0.7)
    plans = [LayoutPlan.build(half, q_start=0, kv_start=start) for start in (0, 16)]
    parts = [(k[:, :16], v[:, :16]), (k[:, 16:], v[:, 16:])]
    out, lse = merge_attention(
        [partial_forward(q, *part, plan, backend="flex") for part, plan in zip(parts, plans, strict=True)]
    )
    delta = attention_delta(dout, out, lse)
    for part, plan in zip(parts, plans, strict=True):
        found = [partial_backward(dout, delta, lse, q, *part, plan, backend=name) for name in ("flex", "torch")]
        for got, want in zip(*(x[:3] for x in found), strict=True):
            torch.testing.assert_close(got, want)


def test_refuses_with_the_reason():
    layout = make_layout(np.random.default_rng(1), seq_len=(24, 24), block_size=(8, 8), density=0.4)
    q, k, v = (getattr(make_case(layout), name) for name in "qkv")
    with pytest.raises(ValueError, match="'flex' cannot compute this: torch's FlexAttention has no backward on CPUs"):
        block_sparse_attention(q.clone().requires_grad_(), k, v, layout, backend="flex")
    with pytest.raises(ValueError, match="no dropout by position"):
        block_sparse_attention(q, k, v, layout, backend="flex", dropout_p=0.5)
    bias = torch.zeros(layout.nnz, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient of block_bias"):
        block_sparse_attention(q, k, v, layout, backend="flex", block_bias=bias)
    assert explain_backends(q, k, v, layout).selected != "flex"  # unfused on a CPU: only when named


def test_reasons_on_gpus_need_no_gpu(monkeypatch):
    def reasons(**changes):
        asked = {"device": "cuda", "dtype": torch.bfloat16, "batch": 1, "q_heads": 1, "kv_heads": 1} | changes
        sizes = {"head_dim": 64, "value_dim": 64, "seq_len": (256, 256), "block_size": (128, 128)}
        return "; ".join(flex.FlexBackend().not_supported_reasons(Problem(**(sizes | asked))))

    monkeypatch.setattr(flex, "importable", lambda module: True)
    assert reasons() == reasons(backward=True) == ""
    assert "multiples of 128 tokens, not (64, 128)" in reasons(block_size=(64, 128))
    assert "no float64" in reasons(dtype=torch.float64)
    assert "head dims from 16 on, not 8" in reasons(value_dim=8)
    assert "no gradient of attn_bias" in reasons(attn_bias="float", attn_bias_grad=True, backward=True)
    assert "not on mps" in reasons(device="mps")
    monkeypatch.setattr(flex, "nvidia_capability", lambda: (7, 5))
    assert reasons() == "it needs compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(flex, "importable", lambda module: False)
    assert "compiled by Triton, which is not installed" in reasons()
