"""The partial form: parts over disjoint keys merge into the whole, forward and backward."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bs_kernels import (
    LayoutPlan,
    TokenMask,
    attention_delta,
    block_sparse_attention,
    merge_attention,
    partial_backward,
    partial_forward,
    sinks_gradient,
)
from bs_kernels.backends._native_lib import missing_reason
from bs_kernels.testing import assert_close_to_oracle, evaluate, make_case, make_layout
from bs_patterns import BlockLayout

BLOCK = 8
needs_native = pytest.mark.skipif(missing_reason() is not None, reason="the native core is not built")


def split_columns(layout, cuts):
    """(key tokens, layout, kv_start) of each run of key columns."""
    dense = layout.to_dense()
    edges = [0, *cuts, dense.shape[2]]
    for low, high in pairwise(edges):
        begin, stop = low * BLOCK, min(high * BLOCK, layout.seq_len[1])
        part = BlockLayout.from_dense(
            dense[:, :, low:high], block_size=BLOCK, seq_len=(layout.seq_len[0], stop - begin)
        )
        yield slice(begin, stop), part, begin


class Pages:
    """The keys and values of a part, each block in a page of its own, last block first."""

    def __init__(self, k, v):
        batch, length = k.shape[:2]
        self.blocks, self.length = -(-length // BLOCK), length
        self.k, self.v = (self.packed(x) for x in (k, v))
        self.table = torch.arange(batch * self.blocks, dtype=torch.int32).flip(0).view(batch, self.blocks)

    def packed(self, x):
        full = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.blocks * BLOCK - self.length))
        return full.reshape(-1, BLOCK, *x.shape[2:]).flip(0)

    def unpacked(self, x):
        return x.flip(0).reshape(-1, self.blocks * BLOCK, *x.shape[2:])[:, : self.length]


def in_parts(case, cuts, backend, mask=TokenMask(), paged=False):  # noqa: B008 - a frozen value
    """The results of `evaluate`, computed part by part the way a ring does."""
    arguments = {name: case.arguments[name] for name in ("dropout_p", "dropout_seed") if name in case.arguments}
    bias = case.arguments.get("attn_bias")
    per_key = bias is not None and bias.shape[-1] > 1
    shift = case.layout.seq_len[1] - case.layout.seq_len[0]
    plans = [
        (keys, LayoutPlan.build(part, mask, q_start=shift, kv_start=start))
        for keys, part, start in split_columns(case.layout, cuts)
    ]

    def operands(keys):
        """k, v and the other arguments of a part."""
        more = {**arguments, "backend": backend}
        if bias is not None:
            more["attn_bias"] = bias[..., keys] if per_key else bias
        if not paged:
            return case.k[:, keys], case.v[:, keys], more
        pages = Pages(case.k[:, keys], case.v[:, keys])
        return pages.k, pages.v, more | {"page_table": pages.table}

    parts = []
    for keys, plan in plans:
        k, v, more = operands(keys)
        parts.append(partial_forward(case.q, k, v, plan, **more))
    out, lse = merge_attention(parts)
    sinks = case.arguments.get("sinks")
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
        out = out * torch.exp(lse - total).transpose(1, 2)[..., None].to(out.dtype)
        lse = total
    dlse = torch.where(lse == -torch.inf, 0, case.dlse)
    delta = attention_delta(case.dout, out, lse, dlse)
    dq, dk, dv, dbias = torch.zeros(case.q.shape, dtype=lse.dtype), [], [], []
    for keys, plan in plans:
        k, v, more = operands(keys)
        got = partial_backward(case.dout, delta, lse, case.q, k, v, plan, **more)
        assert got.q.dtype == got.k.dtype == lse.dtype
        dq += got.q
        pages = Pages(case.k[:, keys], case.v[:, keys])
        dk.append(pages.unpacked(got.k) if paged else got.k)
        dv.append(pages.unpacked(got.v) if paged else got.v)
        dbias.append(got.attn_bias)
    found = {"out": out.to(case.q.dtype), "lse": lse, "q": dq, "k": torch.cat(dk, 1), "v": torch.cat(dv, 1)}
    if sinks is not None:
        found["sinks"] = sinks_gradient(sinks, lse, delta)
    if bias is not None:
        found["attn_bias"] = torch.cat(dbias, -1) if per_key else torch.stack(dbias).sum(0)
    return found


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.sets(st.integers(1, 5), max_size=3))
def test_parts_merge_into_the_whole(backend, seed, causal, with_sinks, cuts):
    layout = make_layout(np.random.default_rng(seed), seq_len=(40, 45), block_size=(BLOCK, BLOCK), density=0.4)
    arguments = {"causal": True} if causal else {}
    case = make_case(layout, seed=seed, batch=2, q_heads=4, kv_heads=2, sinks=with_sinks or None, **arguments)
    got = in_parts(case, sorted(cuts), backend, TokenMask(causal=causal))
    assert_close_to_oracle(case, got)


@needs_native
@given(st.data())
def test_native_parts_with_dropout_bias_and_pages(data):
    seed, causal = data.draw(st.integers(0, 2**31)), data.draw(st.booleans())
    layout = make_layout(np.random.default_rng(seed), seq_len=(40, 45), block_size=(BLOCK, BLOCK), density=0.4)
    arguments = {"causal": True} if causal else {}
    if data.draw(st.booleans()):
        arguments |= {"dropout_p": 0.3, "dropout_seed": seed}
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    with_sinks, with_bias = data.draw(st.booleans()) or None, data.draw(st.booleans()) or None
    case = make_case(
        layout,
        seed=seed,
        batch=2,
        q_heads=4,
        kv_heads=2,
        sinks=with_sinks,
        attn_bias=with_bias,
        dtype=dtype,
        **arguments,
    )
    if with_bias:
        whole = data.draw(st.tuples(*[st.booleans()] * 4))
        bias = case.arguments["attn_bias"]
        case.arguments["attn_bias"] = bias[tuple(slice(None) if keep else slice(1) for keep in whole)].clone()
    cuts = data.draw(st.sets(st.integers(1, 5), max_size=3))
    got = in_parts(case, sorted(cuts), "native", TokenMask(causal=causal), paged=data.draw(st.booleans()))
    assert_close_to_oracle(case, got)


def test_in_low_precision_parts_are_float32():
    layout = make_layout(np.random.default_rng(0), seq_len=(40, 40), block_size=(BLOCK, BLOCK), density=0.5)
    case = make_case(layout, dtype=torch.bfloat16)
    out, lse = partial_forward(case.q, case.k, case.v, layout)
    assert out.dtype == lse.dtype == torch.float32
    assert_close_to_oracle(case, in_parts(case, [2], "torch"))


def test_biases_and_dropout_in_parts():
    layout = make_layout(np.random.default_rng(3), seq_len=(24, 24), block_size=(BLOCK, BLOCK), density=0.7)
    case = make_case(layout, dtype=torch.float64, attn_bias=True, block_bias=True, dropout_p=0.4, dropout_seed=2)
    want = evaluate(case, block_sparse_attention, backend="torch")
    out, lse = partial_forward(case.q, case.k, case.v, layout, **case.arguments)
    dlse = torch.where(lse == -torch.inf, 0, case.dlse)
    delta = attention_delta(case.dout, out, lse, dlse)
    got = partial_backward(case.dout, delta, lse, case.q, case.k, case.v, layout, **case.arguments)
    for name in ("q", "k", "v", "attn_bias", "block_bias"):
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-12, atol=1e-12)
    without = partial_backward(case.dout, delta, lse, case.q, case.k, case.v, layout)
    assert without.attn_bias is None
    assert without.block_bias is None


def test_refusals():
    layout = make_layout(np.random.default_rng(3), seq_len=(24, 24), block_size=(BLOCK, BLOCK), density=0.7)
    case = make_case(layout)
    with pytest.raises(ValueError, match="sinks: expected None in a partial form"):
        partial_forward(case.q, case.k, case.v, layout, sinks=torch.zeros(2))
    rows = torch.zeros(1, 2, 24)
    with pytest.raises(ValueError, match="dropout_seed: expected the seed of the forward"):
        partial_backward(case.dout, rows, rows, case.q, case.k, case.v, layout, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"delta: expected floating \[1, 2, 24\]"):
        partial_backward(case.dout, rows[..., 1:], rows, case.q, case.k, case.v, layout)
    with pytest.raises(TypeError, match="dout: expected a tensor"):
        partial_backward(None, rows, rows, case.q, case.k, case.v, layout)
    with pytest.raises(TypeError, match="unexpected keyword"):
        partial_forward(case.q, case.k, case.v, layout, return_lse=True)


def test_merging_parts_without_keys():
    out, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 2, 4)
    empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for parts in ([(out, lse), empty], [empty, (out, lse)], [empty, (out, lse), empty]):
        merged, total = merge_attention(parts)
        assert torch.equal(merged, out)
        assert torch.equal(total, lse)
    nothing, total = merge_attention([empty, empty])
    assert (nothing == 0).all()
    assert (total == -torch.inf).all()


def test_merge_far_apart():
    out = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)
    lse = torch.tensor([1e4, -1e4]).view(2, 1, 1, 1)
    merged, total = merge_attention(list(zip(out, lse, strict=True)))
    assert merged.item() == 1.0
    assert total.item() == 1e4


def test_merge_is_differentiable_twice():
    torch.manual_seed(0)
    outs = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(3)]
    lses[0][0, 0, 0] = lses[1][0, 0, 1] = lses[2][0, 0, 1] = lses[0][0, 0, 1] = -torch.inf
    holes = [lse == -torch.inf for lse in lses]

    def merge(*tensors):
        parts = [(o, s.masked_fill(h, -torch.inf)) for o, s, h in zip(tensors[:3], tensors[3:], holes, strict=True)]
        out, lse = merge_attention(parts)
        return out, torch.where(lse == -torch.inf, 0, lse)

    leaves = (*outs, *(lse.masked_fill(lse == -torch.inf, 0).requires_grad_() for lse in lses))
    assert gradcheck(merge, leaves)
    assert gradgradcheck(merge, leaves)
