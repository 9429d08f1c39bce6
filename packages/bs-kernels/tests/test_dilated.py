"""`dilated_attention` against dense masks built from the definition: values, LSE and gradients."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bs_kernels import DilatedPlan, block_sparse_attention, dilated, dilated_attention, merge_attention
from bs_kernels import _dilated_pieces as pieces
from bs_kernels.testing import branch_masks, check_dilated_against_oracle, make_dilated_case
from bs_kernels.testing.strategies import dilated_cases
from bs_patterns import BlockLayout, LocalWindow

COMBINE = dilated.COMBINE


@given(case=dilated_cases())
def test_any_call_matches_the_definition(case):
    check_dilated_against_oracle(case, dilated_attention)


@pytest.mark.parametrize("combine", COMBINE)
@given(data=st.data())
def test_the_native_backend_matches_the_definition(combine, data):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    check_dilated_against_oracle(
        data.draw(dilated_cases(combine=(combine,), dtypes=dtypes)), dilated_attention, backend="native"
    )


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "rates"),
    [([64, 128, 512], [1, 2, 4]), ([50, 100, 300], [1, 3, 7]), ([40, 40], [2, 2]), ([16], [16]), ([4], [9])],
    ids=["nested", "odd", "twice the same", "one token each", "some heads keep nothing"],
)
def test_longer_sequences(lengths, rates, dtype, causal, combine):
    case = make_dilated_case(
        lengths, rates, seq_len=(300, 300), q_heads=4, kv_heads=2, dtype=dtype, causal=causal, combine=combine
    )
    check_dilated_against_oracle(case, dilated_attention)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("length", [64, 10**9])
def test_one_segment_at_rate_one_is_dense_attention(length, combine):
    q, k, v = (torch.randn(2, 64, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for causal in (False, True):
        out = dilated_attention(q, k, v, [length], [1], causal=causal, combine=combine)
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
        torch.testing.assert_close(out, dense)
        cotangent = torch.randn_like(out)
        for got, want in zip(*(torch.autograd.grad(o, (q, k, v), cotangent) for o in (out, dense)), strict=True):
            torch.testing.assert_close(got, want)


def test_softmax_is_the_weighting_by_branch_denominators():
    """Ding et al., section 3.2: O = Σ αᵢ O|rᵢ,wᵢ with αᵢ the share of branch i's softmax denominator."""
    q, k, v = (torch.randn(1, 48, 4, 8, dtype=torch.float64) for _ in range(3))
    branches = ([8, 16, 48], [1, 2, 4])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    at = torch.arange(48)
    masks = branch_masks(at, at, *branches, 4)
    exponentials = scores.exp() * masks[:, None]
    denominators = exponentials.sum(-1, keepdim=True)  # [branches, B, H, Sq, 1]
    outputs = torch.nan_to_num(exponentials / denominators) @ v.transpose(1, 2)
    expected = (denominators / denominators.sum(0) * outputs).sum(0).transpose(1, 2)
    for combine in ("softmax", "longnet"):
        torch.testing.assert_close(dilated_attention(q, k, v, *branches, combine=combine), expected)
    assert (denominators[1] == 0).any()  # queries that a branch does not keep
    assert not torch.allclose(dilated_attention(q, k, v, *branches, combine="union"), expected)


def test_longnet_has_the_value_of_softmax_and_other_gradients():
    case = make_dilated_case([8, 24], [1, 2], dtype=torch.float64)
    found = {}
    for combine in ("softmax", "longnet"):
        case.arguments["combine"] = combine
        found[combine] = check_dilated_against_oracle(case, dilated_attention)
    assert torch.equal(found["softmax"]["out"], found["longnet"]["out"])
    assert not torch.allclose(found["softmax"]["q"], found["longnet"]["q"])
    assert torch.allclose(found["softmax"]["v"], found["longnet"]["v"])  # weights do not depend on v


def test_queries_without_keys():
    q = torch.randn(1, 12, 3, 4, requires_grad=True)
    out, lse = dilated_attention(q, q, q, [6], [3], causal=True, return_lse=True)
    kept = torch.arange(12)[:, None] % 6 % 3 == torch.arange(3)
    assert torch.equal(lse[0].T.isfinite(), kept)
    assert (out[0][~kept] == 0).all()
    out.sum().backward()
    assert q.grad.isfinite().all()
    nowhere, lse = dilated_attention(q, q, q, [8], [1], q_start=1000, return_lse=True)
    assert (nowhere == 0).all()
    assert (lse == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(nowhere.sum(), q))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=["no batch", "no tokens"])
def test_nothing_to_do(shape, combine):
    q = torch.zeros(*shape, 2, 4, requires_grad=True)
    out, lse = dilated_attention(q, q, q, [4, 8], [1, 2], combine=combine, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], 2, shape[1])
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("combine", COMBINE)
def test_gradcheck_and_gradgradcheck(combine):
    case = make_dilated_case(
        [5, 12], [1, 3], seq_len=(13, 13), q_heads=4, kv_heads=2, head_dim=2, dtype=torch.float64, key_padding_mask=True
    )

    def function(q, k, v):
        out, lse = dilated_attention(q, k, v, [5, 12], [1, 3], combine=combine, return_lse=True, **case.arguments)
        return out, torch.where(lse == -torch.inf, 0, lse)

    leaves = tuple(x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    if combine == "longnet":  # not a gradient of its value: only its second derivatives' finiteness can be asked for
        first = torch.autograd.grad(sum(x.square().sum() for x in function(*leaves)), leaves, create_graph=True)
        assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        return
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("combine", ["softmax", "union"])
def test_rides_a_ring(combine):
    """Shards of the keys, each with its own absolute positions, merge into the whole; so do shards of the queries."""
    q, k, v = (torch.randn(2, 40, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    branches = ([8, 20, 40], [1, 2, 4])
    want = dilated_attention(q, k, v, *branches, causal=True, combine=combine, return_lse=True)
    cuts = [0, 13, 16, 40]
    outs = []
    for q0, q1 in pairwise(cuts):
        parts = [
            dilated_attention(
                q[:, q0:q1],
                k[:, k0:k1],
                v[:, k0:k1],
                *branches,
                causal=True,
                combine=combine,
                q_start=q0,
                kv_start=k0,
                return_lse=True,
            )
            for k0, k1 in pairwise(cuts)
        ]
        outs.append(merge_attention(parts))
    torch.testing.assert_close(torch.cat([out for out, _ in outs], 1), want[0])
    torch.testing.assert_close(torch.cat([lse for _, lse in outs], 2), want[1])


def test_decoding_is_the_last_row():
    q, k, v = (torch.randn(1, 100, 2, 8) for _ in range(3))
    whole = dilated_attention(q, k, v, [16, 64], [1, 4], causal=True)
    for t in (0, 15, 16, 63, 99):
        step = dilated_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], [16, 64], [1, 4], causal=True)
        torch.testing.assert_close(step, whole[:, t : t + 1])


def test_nothing_leaks_from_the_future():
    q, k, v = (torch.randn(1, 70, 4, 8) for _ in range(3))
    before = dilated_attention(q, k, v, [16, 70], [1, 3], causal=True)
    k, v = k.clone(), v.clone()
    k[:, 33:], v[:, 33:] = 5.0, -1e30
    after = dilated_attention(q, k, v, [16, 70], [1, 3], causal=True)
    assert torch.equal(before[:, :33], after[:, :33])


def _count_pairs(monkeypatch, tokens, lengths, rates, **arguments):
    """Pairs that the plans of one call hold, and the calls that were given a mask."""
    seen = {"pairs": 0, "masks": 0}
    run = dilated.run_forward

    def counted(call, *rest, **more):
        plan = call.plan
        size = plan.q_bounds.diff()[:, None] * plan.kv_bounds.diff()[None]
        active = torch.zeros(size.shape, dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(plan.q_blocks), (plan.row_end - plan.row_begin).flatten())
        active[rows, plan.indices.long()] = True
        seen["pairs"] += int(size[active].sum()) * call.q.shape[0] * call.q.shape[2]
        seen["masks"] += call.attn_bias is not None
        return run(call, *rest, **more)

    monkeypatch.setattr(dilated, "run_forward", counted)
    q = torch.randn(1, tokens, 4, 4)
    dilated_attention(q, q, q, lengths, rates, **arguments)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("combine", COMBINE)
def test_work_is_linear_in_tokens(monkeypatch, combine):
    branches = ([128, 512, 1024], [1, 2, 4])
    small, large = (_count_pairs(monkeypatch, n, *branches, combine=combine) for n in (2048, 8192))
    assert large["pairs"] == 4 * small["pairs"]
    assert large["masks"] == small["masks"] == 0
    per_token = 4 * (128 + 512 / 4 + 1024 / 16)
    if combine == "union":
        per_token -= 4 * (128 / 4 + 512 / 16)  # what an earlier branch reached already
    assert small["pairs"] == 2048 * per_token


def test_union_needs_a_mask_only_where_branches_do_not_nest(monkeypatch):
    assert _count_pairs(monkeypatch, 256, [64, 256], [1, 2], combine="union")["masks"] == 0
    assert _count_pairs(monkeypatch, 256, [64, 250], [1, 2], combine="union")["masks"] > 0
    redundant = _count_pairs(monkeypatch, 256, [256, 128, 10**6], [1, 2, 3], combine="union")
    assert redundant == {"pairs": 4 * 256 * 256, "masks": 0}


def test_segments_may_be_block_sparse():
    """With ``segment_layout`` the pairs of a branch are those whose rows the layout has."""
    q, k, v = (torch.randn(2, 90, 4, 8, dtype=torch.float64) for _ in range(3))

    def layout(rows):
        return LocalWindow(4).layout(rows, block_size=4, causal=True)

    lengths, rates = [32, 90], [1, 3]
    got = dilated_attention(q, k, v, lengths, rates, causal=True, segment_layout=layout)
    at = torch.arange(90)
    masks = branch_masks(at, at, lengths, rates, 4, causal=True)
    for mask, w, r in zip(masks, lengths, rates, strict=True):
        for head in range(4):
            for begin in range(0, 90, w):
                mine = [p for p in range(begin, min(begin + w, 90)) if (p - begin) % r == head % r]
                rows = -(-(min(begin + w, 90) - begin) // r)
                tokens = torch.from_numpy(layout(rows).to_dense()[0]).repeat_interleave(4, 0).repeat_interleave(4, 1)
                kept = tokens[: len(mine), : len(mine)]
                mask[head][torch.tensor(mine)[:, None], torch.tensor(mine)] &= kept
    count = masks.sum(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    weights = count * scores.exp()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(got, torch.einsum("bhqk,bkhd->bqhd", weights, v))
    last = dilated_attention(q[:, 80:], k, v, lengths, rates, causal=True, segment_layout=layout)
    torch.testing.assert_close(last, got[:, 80:])


@pytest.mark.parametrize("shape", [(2, 4, 30, 30), (1, 1, 30, 30), (2, 1, 1, 30), (30, 30)], ids=str)
@pytest.mark.parametrize("combine", ["softmax", "union"])
def test_floating_bias_and_its_gradient(shape, combine):
    q, k, v = (torch.randn(2, 30, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    branches = ([7, 30], [1, 3])
    at = torch.arange(30)
    masks = branch_masks(at, at, *branches, 4, causal=True)
    count = masks.sum(0) if combine == "softmax" else masks.any(0)

    def dense(bias):
        k4, v4 = (x.repeat_interleave(2, 2) for x in (k, v))
        weights = count * (torch.einsum("bqhd,bkhd->bhqk", q, k4) / 2 + bias).exp()
        return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v4)

    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outs = (dilated_attention(q, k, v, *branches, causal=True, combine=combine, attn_bias=bias), dense(bias))
    torch.testing.assert_close(*outs)
    cotangent = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, bias, cotangent)[0] for out in outs))


def test_dropout_drops_what_block_sparse_attention_drops():
    q, k, v = (torch.randn(2, 40, heads, 8) for heads in (4, 2, 2))
    layout = BlockLayout.from_dense([[[True]]], block_size=64, seq_len=40)
    one = dilated_attention(q, k, v, [40], [1], dropout_p=0.3, dropout_seed=5)
    torch.testing.assert_close(one, block_sparse_attention(q, k, v, layout, dropout_p=0.3, dropout_seed=5))
    torch.manual_seed(3)
    first = dilated_attention(q, k, v, [16, 40], [1, 2], dropout_p=0.3)
    torch.manual_seed(3)
    assert torch.equal(dilated_attention(q, k, v, [16, 40], [1, 2], dropout_p=0.3), first)
    assert not torch.equal(dilated_attention(q, k, v, [16, 40], [1, 2], dropout_p=0.3), first)


def test_pieces_of_a_branch_are_few():
    found = pieces.pieces_of(pieces.Branch(7, 2), (-20, 10_000), (3, 9_000), 2)
    assert len(found) <= 5
    assert sum(piece.segments for piece in found) == 9_000 // 7 + 1


q = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"segment_lengths": []}, ValueError, "segment_lengths: expected at least one"),
        ({"segment_lengths": 4}, TypeError, "segment_lengths: expected a sequence"),
        ({"segment_lengths": [4.0]}, TypeError, r"segment_lengths\[0\]: expected an integer ≥ 1, got 4.0"),
        ({"dilation_rates": [0]}, ValueError, r"dilation_rates\[0\]: expected an integer from 1"),
        ({"dilation_rates": [True]}, TypeError, r"dilation_rates\[0\]"),
        ({"dilation_rates": [1, 2]}, ValueError, "expected one rate per segment length, got 2 rates for 1 lengths"),
        ({"combine": "sum"}, ValueError, "combine: expected one of softmax, longnet, union, got 'sum'"),
        ({"combine": 1}, TypeError, "combine"),
        ({"causal": 1}, TypeError, "causal: expected a bool"),
        ({"return_lse": None}, TypeError, "return_lse: expected a bool"),
        ({"deterministic": 1}, TypeError, "deterministic"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ({"q_start": 1.5}, TypeError, "q_start: expected an integer"),
        ({"kv_start": 2**31}, ValueError, "kv_start: expected a position"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\)"),
        ({"attn_bias": torch.zeros(1, 2, 7, 8)}, ValueError, "attn_bias: expected a shape that broadcasts"),
        ({"key_padding_mask": torch.ones(1, 7, dtype=torch.bool)}, ValueError, r"\[1, 8\], got \[1, 7\]"),
        ({"segment_ids": torch.ones(1, 8)}, TypeError, "segment_ids"),
        ({"segment_layout": 3}, TypeError, "segment_layout: expected a function"),
        ({"segment_layout": lambda n: None}, TypeError, "segment_layout: expected it to return a BlockLayout"),
        ({"segment_layout": lambda n: None, "combine": "union"}, ValueError, "combine: expected 'softmax' or"),
        ({"segment_layout": lambda n: LocalWindow(4).layout(n + 1)}, ValueError, r"expected a layout of \(4, 4\) rows"),
        ({"segment_layout": lambda n: LocalWindow(4).layout(n, causal=True)}, ValueError, "not causal"),
        (
            {"segment_layout": lambda n: BlockLayout.from_dense([[[True]]] * 2, block_size=8, seq_len=n)},
            ValueError,
            "one layout for all heads, got 2",
        ),
        ({"k": torch.zeros(1, 8, 3, 4)}, ValueError, "v: expected the batch, seq, heads of k"),
        ({"k": None}, TypeError, "k: expected a tensor"),
    ],
)
def test_bad_input(arguments, error, match):
    called = {"q": q, "k": q, "v": q, "segment_lengths": [4], "dilation_rates": [1]} | arguments
    with pytest.raises(error, match=match):
        dilated_attention(**called)


def test_autocast_and_strides():
    leaves = [torch.randn(2, 40, 4, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(*leaves, [16, 40], [1, 2])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert leaves[0].grad.dtype == torch.float32
    q, k, v = (x.detach() for x in leaves)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(dilated_attention(*strided, [16, 40], [1, 2]), dilated_attention(q, k, v, [16, 40], [1, 2]))


@pytest.mark.parametrize("combine", COMBINE)
def test_compiles_into_one_graph_with_a_plan(combine):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    case = make_dilated_case([16, 48], [1, 3], seq_len=(50, 50), q_heads=4, kv_heads=2, combine=combine)
    plan = DilatedPlan.build([16, 48], [1, 3], 50, 4, combine=combine)

    def attend(q, k, v):
        return dilated_attention(q, k, v, [16, 48], [1, 3], combine=combine, plan=plan)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    found = []
    for function in (attend, compiled):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, case.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


def test_plans_belong_to_their_call():
    plan = DilatedPlan.build([4], [2], 8, 2, causal=True)
    out = dilated_attention(q, q, q, [4], [2], causal=True, plan=plan)
    assert torch.equal(out, dilated_attention(q, q, q, [4], [2], causal=True))
    with pytest.raises(ValueError, match="plan: expected one for this call, got DilatedPlan"):
        dilated_attention(q, q, q, [4], [2], plan=plan)
    with pytest.raises(TypeError, match="plan: expected a DilatedPlan, got list"):
        dilated_attention(q, q, q, [4], [2], plan=[])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(("lengths", "rates"), [([8, 32], [1, 2]), ([7, 50, 50], [1, 3, 5]), ([5], [9])], ids=str)
def test_a_plan_tells_its_pairs(lengths, rates, combine, causal):
    plan = DilatedPlan.build(lengths, rates, 50, 3, causal=causal, combine=combine)
    at = torch.arange(50)
    masks = branch_masks(at, at, lengths, rates, 3, causal=causal)
    assert torch.equal(torch.from_numpy(plan.layout().token_mask()), masks.any(0))
    if combine == "union":
        assert sum(plan.pairs()) == masks.any(0).sum()
    else:
        assert plan.pairs() == masks.flatten(1).sum(1).tolist()
