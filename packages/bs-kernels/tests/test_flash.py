"""The `flash` backend where layouts are dense per segment, against the float64 oracle, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_kernels import (
    BatchedLayout,
    LayoutPlan,
    TokenMask,
    attention_delta,
    block_sparse_attention,
    dilated_attention,
    explain_backends,
    merge_attention,
    partial_backward,
    partial_forward,
)
from bs_kernels.backends import flash
from bs_kernels.backends.base import Problem
from bs_kernels.backends.flash import FlashBackend
from bs_kernels.testing import check_against_oracle, evaluate, make_batched_layout, make_case, make_layout
from bs_kernels.testing.strategies import cases
from bs_patterns import BlockLayout

DTYPES = (torch.float64, torch.float32)


def dense(seq_len, block_size=(4, 8), **options):
    lengths = (seq_len, seq_len) if isinstance(seq_len, int) else seq_len
    return make_layout(np.random.default_rng(0), seq_len=lengths, block_size=block_size, density=2.0, **options)


@given(data=st.data())
def test_dense_calls_match_the_oracle(data):
    causal = data.draw(st.booleans())
    keys = data.draw(st.integers(1, 60))
    queries = keys if causal else data.draw(st.integers(1, 60))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    blocks = data.draw(st.sampled_from(((4, 8), (16, 16), (64, 1))))
    case = make_case(
        dense((queries, keys), blocks, heads=data.draw(st.sampled_from((1, kv_heads * group)))),
        seed=data.draw(st.integers(0, 2**31)),
        batch=data.draw(st.integers(1, 2)),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from((1, 8, 20))),
        value_dim=data.draw(st.sampled_from((3, 8, 20))),
        dtype=data.draw(st.sampled_from(DTYPES)),
        scale=data.draw(st.sampled_from((None, 0.3, -1.0, 0.0))),
        causal=causal,
    )
    check_against_oracle(case, backend="flash")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_head_dims(head_dim, dtype):
    case = make_case(dense(130, (64, 64)), q_heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype, causal=True)
    check_against_oracle(case, backend="flash")


def test_gradient_through_the_lse_alone():
    """δ is then not Σ dout · out of any output: it reaches the kernel through the extra columns."""
    layout = dense(40)
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grads = []
    for name in ("flash", "reference"):
        _, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend=name)
        grads.append(torch.autograd.grad(lse.square().sum(), (q, k)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 0


def test_partial_form():
    q, k, v, dout = (torch.randn(1, 32, 2, 8, dtype=torch.float64) for _ in range(4))
    plans = [LayoutPlan.build(dense((32, 16)), q_start=0, kv_start=start) for start in (0, 16)]
    parts = [(k[:, :16], v[:, :16]), (k[:, 16:], v[:, 16:])]
    out, lse = merge_attention(
        [partial_forward(q, *part, plan, backend="flash") for part, plan in zip(parts, plans, strict=True)]
    )
    delta = attention_delta(dout, out, lse)
    found = [
        partial_backward(dout, delta, lse, q, *part, plan, backend="flash")
        for part, plan in zip(parts, plans, strict=True)
    ]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(block_sparse_attention(*leaves, dense(32), backend="reference"), leaves, dout)
    torch.testing.assert_close(found[0].q + found[1].q, want[0])
    torch.testing.assert_close(torch.cat((found[0].k, found[1].k), 1), want[1])
    torch.testing.assert_close(torch.cat((found[0].v, found[1].v), 1), want[2])


def test_zero_batch():
    q = torch.zeros(0, 20, 2, 16, requires_grad=True)
    block_sparse_attention(q, q, q, dense(20), backend="flash").sum().backward()
    assert q.grad.shape == q.shape


def test_dense_segments_of_longnet_run_on_it():
    """Where lengths are multiples of the rates, a dilated call is dense attention, piece by piece."""
    q, k, v = (torch.randn(1, 64, 4, 8, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        got = dilated_attention(q, k, v, [16, 64], [1, 4], causal=causal, backend="flash")
        torch.testing.assert_close(got, dilated_attention(q, k, v, [16, 64], [1, 4], causal=causal, backend="torch"))


@pytest.mark.parametrize(
    ("layout", "options", "offset"),
    [
        (dense(30), {}, 0),
        (dense(30, causal=True), {}, 0),
        (dense((10, 30)), {}, 20),
        (dense((10, 30)), {"q_start": 7, "kv_start": 3}, 4),
        (dense(30), {"token_mask": TokenMask(True, (5, 0))}, 0),
        (dense(30, heads=3), {"token_mask": TokenMask(True)}, 0),
        (make_layout(np.random.default_rng(0), seq_len=(30, 30), block_size=(4, 8), density=0.9), {}, None),
        (dense(32, (8, 8)), {"kv_start": np.array([0, 8, 24, 32])}, None),
        (dense(32, (8, 8), causal=True), {"q_start": 8, "kv_start": 0}, None),
    ],
)
def test_which_plans_are_dense(layout, options, offset):
    plan = LayoutPlan.build(layout, **options)
    assert plan.dense_offset == offset
    assert plan.select(slice(0, 1), slice(0, 1)).dense_offset == offset


def test_a_causal_layout_cut_to_a_window_needs_no_more_than_the_window():
    """Blocks that the window drops need not be in the layout for it to be dense."""
    from bs_patterns import LocalWindow

    layout = LocalWindow(16).layout(64, block_size=8, causal=True)
    assert LayoutPlan.build(layout).dense_offset is None
    assert LayoutPlan.build(layout, TokenMask(True, (8, 0))).dense_offset == 0


# -- segments ----------------------------------------------------------------------------------------------------------


def documents(lengths, ids):
    return torch.cat([torch.full((n,), i) for n, i in zip(lengths, ids, strict=True)])


@st.composite
def packed(draw):
    """Operands in documents, under a layout that lists every block of theirs and perhaps more."""
    batch, count = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    names = draw(st.lists(st.integers(-3, 9), min_size=count, max_size=count, unique=True))
    lengths = draw(st.lists(st.integers(1, 14), min_size=count, max_size=count))
    ids = torch.stack([documents(order, names) for order in (lengths, lengths[::-1])[:batch]])
    mask = (ids[:, :, None] == ids[:, None, :]).any(0)
    block = draw(st.sampled_from([(1, 1), (4, 8), (16, 5)]))
    causal = draw(st.booleans())
    layout = (
        BlockLayout.from_token_mask(mask.numpy(), block_size=block) if draw(st.booleans()) else dense(*mask.shape[:1])
    )
    case = make_case(
        layout,
        seed=draw(st.integers(0, 2**31)),
        batch=batch,
        q_heads=4,
        kv_heads=draw(st.sampled_from((1, 2))),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=causal,
        segment_ids=True,
        **draw(st.sampled_from(({}, {"sinks": True}))),
    )
    case.arguments["segment_ids"] = ids
    return case


@given(case=packed())
def test_documents_match_the_oracle(case):
    check_against_oracle(case, backend="flash")


@given(data=st.data())
def test_what_it_takes_is_dense_per_segment(data):
    """Any layout, ids and padding: what it says it can compute matches the oracle, and nothing else runs."""
    case = data.draw(
        cases(arguments=("segment_ids", "key_padding_mask", "causal", "order", "batched", "sinks"), dtypes=DTYPES)
    )
    table = explain_backends(case.q, case.k, case.v, case.layout if case.plan is None else case.plan, **case.arguments)
    report = next(report for report in table if report.name == "flash")
    if report.supported:
        check_against_oracle(case, backend="flash")
    else:
        with pytest.raises(ValueError, match="'flash' cannot compute this"):
            evaluate(case, block_sparse_attention, backend="flash")


DIAGONAL = BlockLayout.from_dense(
    np.array([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]], np.bool_),
    block_size=(4, 8),
    seq_len=(18, 30),
)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_diagonal_layout_needs_no_ids(dtype, heads):
    layout = BlockLayout.from_dense(
        np.repeat(DIAGONAL.to_dense(), heads, 0), block_size=DIAGONAL.block_size, seq_len=DIAGONAL.seq_len
    )
    check_against_oracle(make_case(layout, batch=2, q_heads=4, kv_heads=2, dtype=dtype), backend="flash")


def test_rows_without_blocks():
    blocks = np.zeros((1, 5, 4), np.bool_)
    blocks[0, 1, :2] = blocks[0, 3, 3] = True
    layout = BlockLayout.from_dense(blocks, block_size=(4, 8), seq_len=(18, 30))
    got = check_against_oracle(make_case(layout, batch=2, q_heads=2), backend="flash")
    assert (got["out"][:, :4] == 0).all()
    check_against_oracle(make_case(layout, batch=2, q_heads=2, sinks=True), backend="flash")


def test_no_block_at_all():
    layout = make_layout(np.random.default_rng(0), seq_len=(18, 30), block_size=(4, 8), density=0)
    check_against_oracle(make_case(layout), backend="flash")


def test_documents_in_another_order_of_keys():
    case = make_case(dense((20, 30)), batch=2, q_heads=2, dtype=torch.float64, segment_ids=True)
    queries = documents((7, 9, 4), (1, 2, 5)).expand(2, -1)
    keys = documents((10, 3, 12, 5), (5, 9, 1, 3)).expand(2, -1)
    case.arguments["segment_ids"] = (queries, keys)
    got = check_against_oracle(case, backend="flash")
    assert (got["lse"][:, :, 7:16] == -torch.inf).all()  # document 2 has no keys
    assert (got["k"][:, 10:13] == 0).all()  # nobody asks document 9


CASE = make_case(dense(24), batch=2)
EXTRA = make_case(dense(24), batch=2, block_bias=True, attn_bias=True)
SCATTERED = torch.tensor([[0, 1] * 12, [0] * 24])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"window": (3, 3)}, "it has no window"),
        ({"dropout_p": 0.1}, "it has no dropout by position"),
        ({"attn_bias": EXTRA.arguments["attn_bias"]}, "it has no attn_bias"),
        ({"block_bias": EXTRA.arguments["block_bias"]}, "it has no block_bias"),
        ({"segment_ids": SCATTERED}, "runs of consecutive tokens, and here one id has several runs"),
        ({"key_padding_mask": SCATTERED.bool()}, "runs of consecutive tokens, and here one id has several runs"),
    ],
)
def test_refuses_with_the_reason(arguments, reason):
    table = explain_backends(CASE.q, CASE.k, CASE.v, CASE.layout, **arguments)
    assert any(reason in found for found in next(report.reasons for report in table if report.name == "flash"))
    with pytest.raises(ValueError, match=f"'flash' cannot compute this: .*{reason}"):
        block_sparse_attention(CASE.q, CASE.k, CASE.v, CASE.layout, backend="flash", **arguments)


def test_refuses_sparse_layouts_and_shifted_causal_ones():
    sparse = make_layout(np.random.default_rng(0), seq_len=(24, 24), block_size=(4, 8), density=0.5)
    batched = make_batched_layout(np.random.default_rng(0), batch=2, seq_len=(24, 24), block_size=(4, 8), density=1)
    for layout in (sparse, batched):
        with pytest.raises(ValueError, match="leaves blocks of a segment out"):
            block_sparse_attention(CASE.q, CASE.k, CASE.v, layout, backend="flash")
    with pytest.raises(ValueError, match="at the same positions"):
        block_sparse_attention(CASE.q[:, :10], CASE.k, CASE.v, dense((10, 24)), causal=True, backend="flash")
    gaps = LayoutPlan.build(dense(32, (8, 8)), TokenMask(True), kv_start=np.array([0, 8, 24, 32]))
    q = torch.zeros(1, 32, 2, 8)
    with pytest.raises(ValueError, match="only where positions have no gaps"):
        block_sparse_attention(q, q, q, gaps, backend="flash")
    with pytest.raises(ValueError, match="equally far apart"):
        block_sparse_attention(
            *(CASE.q, CASE.k, CASE.v, dense(24)), key_padding_mask=PADDED, causal=True, backend="flash"
        )


PADDED = torch.arange(24) < torch.tensor([[17], [24]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_at_an_end(dtype):
    case = make_case(dense(24), batch=2, q_heads=2, dtype=dtype, key_padding_mask=True)
    for mask in (PADDED, PADDED.flip(1), torch.zeros_like(PADDED), torch.ones_like(PADDED)):
        case.arguments["key_padding_mask"] = mask
        check_against_oracle(case, backend="flash")


def test_a_plan_that_batch_elements_do_not_share():
    """Two batch elements, each block-diagonal in its own way."""
    blocks = np.zeros((2, 1, 4, 4), np.bool_)
    blocks[0, 0, :2, :2] = blocks[0, 0, 2:, 2:] = blocks[1, 0] = True
    indices = torch.from_numpy(blocks).int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    layout = BatchedLayout(indices, torch.from_numpy(blocks.sum(-1, dtype=np.int32)), (4, 4), (16, 16))
    check_against_oracle(make_case(layout, batch=2, q_heads=2, dtype=torch.float64), backend="flash")


def test_auto_takes_it_for_dense_layouts_that_native_cannot_compute():
    wide = [x.double() for x in (CASE.q, CASE.k, CASE.v)]
    assert explain_backends(*wide, CASE.layout).selected == "flash"
    sparse = make_layout(np.random.default_rng(0), seq_len=(24, 24), block_size=(4, 8), density=0.5)
    assert explain_backends(*wide, sparse).selected == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_refuses_half_precision_on_cpus(dtype):
    q, k, v = (x.to(dtype) for x in (CASE.q, CASE.k, CASE.v))
    with pytest.raises(ValueError, match=r"less exact in .*float16 than"):
        block_sparse_attention(q, k, v, CASE.layout, backend="flash")


def test_reasons_on_gpus_need_no_gpu():
    def reasons(**changes):
        asked = {"device": "cuda", "dtype": torch.bfloat16, "batch": 1, "q_heads": 1, "kv_heads": 1} | changes
        sizes = {"head_dim": 64, "value_dim": 64, "seq_len": (8, 8), "block_size": (8, 8), "dense_offset": 0}
        return "; ".join(FlashBackend().not_supported_reasons(Problem(**(sizes | asked))))

    assert "float16 and bfloat16 and float32, not float64" in reasons(dtype=torch.float64)
    assert "does not promise the same bits" in reasons(backward=True)
    assert "not on mps" in reasons(device="mps")


def test_names_its_kernel():
    table = explain_backends(CASE.q.double(), CASE.k.double(), CASE.v.double(), CASE.layout)
    assert next(report.detail for report in table if report.name == "flash") == "torch's CPU kernel"


@pytest.mark.parametrize(
    ("capability", "dtype", "detail"),
    [
        ((7, 5), torch.float16, "torch's memory-efficient kernel"),
        ((8, 0), torch.bfloat16, "torch's flash kernel, else torch's memory-efficient kernel"),
        ((9, 0), torch.float32, "torch's memory-efficient kernel"),
    ],
)
def test_says_what_would_run_on_a_gpu(monkeypatch, capability, dtype, detail):
    monkeypatch.setattr(flash, "nvidia_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    problem = Problem("cuda", dtype, 1, 2, 2, 64, 64, (8, 8), (8, 8), dense_offset=0)
    assert FlashBackend().not_supported_reasons(problem) == []
    assert FlashBackend().detail(problem) == detail
