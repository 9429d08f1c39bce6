"""BlockSparseRingMultiheadDilatedAttention against nn.MultiheadAttention, over its whole argument space."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from torch import nn

from bs_modules.attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from bs_modules.testing.multihead import as_dense_call, cases, pair

DENSE = {"sparsity_ratio": 1.0, "block_size": 4}
SPARSE = {"pattern_type": "local_window", "window_size": 4, "block_size": 4}


def results(module, call, inputs=None):
    """Output, weights, and the gradients of a random functional of both in `inputs` (those of the call), by name."""
    out, weights = module(**call)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator).to(weights)).sum()
    inputs = {n: x for n, x in (inputs or call).items() if isinstance(x, torch.Tensor) and x.requires_grad}
    wanted = {**inputs, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = dict(zip((f"gradient of {name}" for name in wanted), gradients, strict=True))
    return {"out": out, "weights": weights, **{name: g for name, g in named.items() if g is not None}}


def assert_as_near(ours, theirs, exact):
    """Each of `ours` is as near the fp64 results as twice the dense module of the same dtype is."""
    assert ours.keys() == theirs.keys()
    for name, want in exact.items():
        if want is None:
            assert ours[name] is None
            continue
        assert ours[name].shape == theirs[name].shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        # A sum of n terms rounds each; what both compute exactly may still differ by an ulp of the largest term.
        band = 16 * torch.finfo(theirs[name].dtype).eps * (1 + want.abs().max().item() if want.numel() else 1)
        allowed = 2 * (theirs[name].double() - want).abs().max().item() + band
        error = (ours[name].double() - want).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@given(case=cases())
def test_equals_the_dense_module_forward_backward_and_weights(case):
    dense, sparse = case.modules()
    call = case.call()
    exact_dense, exact_call = copy.deepcopy(dense).double(), case.call(torch.float64)
    for name, tensor in call.items():  # the very same numbers
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            exact_call[name].data.copy_(tensor.data)
    for same in ("key", "value"):
        if call[same] is call["query"]:
            exact_call[same] = exact_call["query"]
    causal = {"is_causal": case.is_causal}
    ours = results(sparse, {**call, **causal})
    theirs = results(dense, as_dense_call(sparse, case, call), call)
    exact = results(exact_dense, as_dense_call(sparse, case, exact_call), exact_call)
    assert_as_near(ours, theirs, exact)


@given(case=cases())
def test_output_does_not_depend_on_need_weights_or_mode(case):
    _, sparse = case.modules()
    call = {**case.call(), "is_causal": case.is_causal}
    out, _ = sparse(**{**call, "need_weights": True})
    again, none = sparse.eval()(**{**call, "need_weights": False})
    assert none is None
    assert torch.equal(out, again)
    with torch.no_grad():
        assert torch.equal(sparse(**call)[0], out)


@given(case=cases())
def test_weights_make_the_output(case):
    _, sparse = case.modules(torch.float64)
    call = {**case.call(torch.float64), "need_weights": True, "is_causal": case.is_causal}
    _, each = sparse(**{**call, "average_attn_weights": False})
    _, mean = sparse(**{**call, "average_attn_weights": True})
    torch.testing.assert_close(each.mean(-3), mean)
    torch.testing.assert_close(each.sum(-1), torch.ones_like(each.sum(-1)))
    visible = torch.from_numpy(sparse.layout(case.lengths, case.is_causal).token_mask())
    assert (each[..., : case.lengths[1]].masked_select(~visible.expand((*each.shape[:-1], case.lengths[1]))) == 0).all()


@given(case=cases())
def test_state_dict_is_interchangeable(case):
    dense, sparse = case.modules()
    assert list(dense.state_dict()) == list(sparse.state_dict())
    torch.manual_seed(1)
    other = nn.MultiheadAttention(**case.arguments)
    sparse.load_state_dict(other.state_dict())
    dense.load_state_dict(sparse.state_dict())
    for name, parameter in other.named_parameters():
        assert torch.equal(dense.get_parameter(name), parameter)


@given(case=cases())
def test_equal_seeds_give_equal_weights_and_the_same_stream(case):
    torch.manual_seed(case.seed)
    dense, after_dense = nn.MultiheadAttention(**case.arguments), torch.rand(1)
    torch.manual_seed(case.seed)
    sparse, after_sparse = Multihead(**case.arguments), torch.rand(1)
    assert torch.equal(after_dense, after_sparse)
    for name, parameter in dense.named_parameters():
        assert torch.equal(sparse.get_parameter(name), parameter)
    torch.manual_seed(1)
    dense._reset_parameters()
    torch.manual_seed(1)
    sparse._reset_parameters()
    for name, parameter in dense.named_parameters():
        assert torch.equal(sparse.get_parameter(name), parameter)


def test_positional_arguments_are_those_of_the_dense_module():
    dense = nn.MultiheadAttention(8, 2, 0.25, False, True, True, 4, 6, True, "cpu", torch.float64)
    sparse = Multihead(8, 2, 0.25, False, True, True, 4, 6, True, "cpu", torch.float64)
    for name in ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first", "head_dim"):
        assert getattr(sparse, name) == getattr(dense, name)
    assert isinstance(sparse, nn.MultiheadAttention)
    assert {n: (p.shape, p.dtype) for n, p in sparse.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in dense.named_parameters()
    }


def test_dropout_with_weights_drops_what_the_dense_module_drops():
    dense, sparse = pair(16, 4, dropout=0.4, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 10, 16)
    torch.manual_seed(3)
    out, weights = dense(x, x, x)
    torch.manual_seed(3)
    mine, own = sparse(x, x, x)
    torch.testing.assert_close(mine, out)
    torch.testing.assert_close(own, weights)
    assert (own == 0).any()


@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_dropout_without_weights_keeps_the_mean_and_drops_probabilities(add_bias_kv):
    torch.manual_seed(0)
    _, sparse = pair(8, 2, dropout=0.5, batch_first=True, add_bias_kv=add_bias_kv)
    x = torch.randn(1, 6, 8).expand(2000, -1, -1)  # entries are dropped apart in every element of the batch
    with torch.no_grad():
        runs = sparse(x, x, x, need_weights=False)[0]
        expected = sparse.eval()(x[:1], x[:1], x[:1], need_weights=False)[0]
    spread = runs.std(0)
    assert (spread > 0).all()
    # The mean of n runs is within six standard errors.
    assert ((runs.mean(0) - expected[0]).abs() <= 6 * spread / math.sqrt(len(runs))).all()


def test_dropout_set_later_counts_and_total_dropout_gives_the_bias():
    _, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(1, 6, 8)
    still = sparse(x, x, x, need_weights=False)[0]
    sparse.dropout = 0.5
    assert not torch.equal(sparse(x, x, x, need_weights=False)[0], still)
    sparse.dropout = 1.0
    for need_weights in (False, True):
        out = sparse(x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(out, sparse.out_proj.bias.expand_as(out))
    sparse.dropout = 0.0
    assert torch.equal(sparse(x, x, x, need_weights=False)[0], still)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("which", ["key_padding_mask", "attn_mask", "both"])
def test_fully_masked_rows_are_zero_never_nan(which, kind, need_weights):
    _, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8, requires_grad=True)
    masks = {
        "key_padding_mask": torch.tensor([[True] * 6, [False] * 6]),
        "attn_mask": torch.zeros(6, 6, dtype=torch.bool).index_fill(0, torch.tensor(3), True),
    }
    masks = masks if which == "both" else {which: masks[which]}
    if kind != torch.bool:
        masks = {name: torch.zeros(m.shape).masked_fill(m, -math.inf) for name, m in masks.items()}
    out, weights = sparse(x, x, x, need_weights=need_weights, **masks)
    row = (0, 0) if which == "key_padding_mask" else (1, 3)
    torch.testing.assert_close(out[row], sparse.out_proj.bias)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *sparse.parameters()))
    if need_weights:
        assert (weights[row] == 0).all()
        assert weights.isfinite().all()


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_appended_keys_are_seen_where_all_others_are_masked(extra):
    dense, sparse = pair(8, 2, batch_first=True, **extra)
    x = torch.randn(2, 6, 8, requires_grad=True)
    padding = torch.ones(2, 6, dtype=torch.bool)
    for need_weights in (False, True):
        want, got = (m(x, x, x, key_padding_mask=padding, need_weights=need_weights) for m in (dense, sparse))
        torch.testing.assert_close(got, want)
    got[0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty_inputs(lengths, extra, need_weights):
    dense, sparse = pair(8, 2, batch_first=True, **extra)
    query, key = (torch.randn(2, n, 8) for n in lengths)
    for batch in (slice(None), slice(0)):
        want, got = (m(query[batch], key[batch], key[batch], need_weights=need_weights) for m in (dense, sparse))
        torch.testing.assert_close(got, want)


def test_is_causal_alone_is_real_causality():
    _, sparse = pair(8, 2, batch_first=True, sparse_config=dict(SPARSE))
    x = torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 13:] += 1
    before, weights = sparse(x, x, x, is_causal=True)
    after, _ = sparse(changed, changed, changed, is_causal=True)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_causal_mask_with_the_hint_is_the_causal_layout(kind):
    dense, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(2, 10, 8)
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    mask = mask if kind == torch.bool else nn.Transformer.generate_square_subsequent_mask(10)
    seen = []
    sparse.attention.register_forward_pre_hook(lambda m, args, kw: seen.append((args[3], kw)), with_kwargs=True)
    got = sparse(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert seen == [(True, {})], "the mask is the layout's own, so no bias is needed"
    torch.testing.assert_close(got, dense(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])
    more = mask.clone()
    more[9, 2] = True if kind == torch.bool else -math.inf
    got = sparse(x, x, x, attn_mask=more, is_causal=True)[0]
    torch.testing.assert_close(got, dense(x, x, x, attn_mask=more)[0])


@pytest.mark.parametrize("lengths", [(4, 7), (7, 4)])
def test_of_unequal_lengths_a_mask_alone_says_what_is_causal(lengths):
    dense, sparse = pair(8, 2, batch_first=True)
    query, key = (torch.randn(2, n, 8) for n in lengths)
    mask = torch.ones(lengths, dtype=torch.bool).triu(1)
    for need_weights in (False, True):
        call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(sparse(query, key, key, **call), dense(query, key, key, **call))


def test_decoding_one_query_at_a_time_equals_the_causal_call():
    _, sparse = pair(8, 2, batch_first=True, sparse_config=dict(SPARSE))
    x = torch.randn(1, 18, 8)
    whole = sparse(x, x, x, is_causal=True)[0]
    for t in (0, 5, 17):
        step = sparse(x[:, t : t + 1], x[:, : t + 1], x[:, : t + 1], is_causal=True)[0]
        torch.testing.assert_close(step[:, 0], whole[:, t])


def test_moves_between_dtypes_and_devices_and_is_functional():
    sparse = Multihead(8, 2, batch_first=True, device="meta", sparse_config=dict(SPARSE))
    sparse = sparse.to_empty(device="cpu")
    sparse._reset_parameters()  # leaves out_proj.weight alone, as torch's own does
    sparse.out_proj.reset_parameters()
    x = torch.randn(1, 12, 8)
    assert sparse(x, x, x)[0].isfinite().all()
    doubled = {name: 2 * p for name, p in sparse.named_parameters()}
    twice = torch.func.functional_call(sparse, doubled, (x, x, x))[0]
    assert not torch.equal(twice, sparse(x, x, x)[0])
    assert sparse.double()(x.double(), x.double(), x.double())[0].dtype == torch.float64


def test_a_mask_leaves_the_layout_alone():
    _, sparse = pair(8, 2, batch_first=True, sparse_config=dict(SPARSE))
    x = torch.randn(1, 32, 8)
    before = sparse.layout(32)
    sparse(x, x, x, attn_mask=torch.zeros(32, 32), need_weights=False)
    assert sparse.layout(32) == before
    assert before.density < 0.5
    assert torch.equal(
        sparse(x, x, x, attn_mask=torch.zeros(32, 32, dtype=torch.bool), need_weights=False)[0],
        sparse(x, x, x, attn_mask=torch.zeros(2, 32, 32, dtype=torch.bool), need_weights=False)[0],
    )


def test_bool_padding_as_floats_needs_no_bias():
    _, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    seen = []
    sparse.attention.register_forward_pre_hook(lambda m, args, kw: seen.append(set(kw)), with_kwargs=True)
    floats = torch.zeros(2, 6).masked_fill(padding, -math.inf)
    outs = [sparse(x, x, x, key_padding_mask=mask, need_weights=False)[0] for mask in (padding, floats, floats - 1.0)]
    assert seen == [{"key_padding_mask"}, {"key_padding_mask"}, {"attn_bias"}]
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[2], outs[0])  # one constant on every key changes nothing


def test_nan_reaches_only_queries_with_an_active_block():
    _, sparse = pair(8, 2, batch_first=True, sparse_config=dict(SPARSE))
    x = torch.randn(1, 32, 8)
    x[0, 31] = math.nan
    out, weights = sparse(x, x, x)
    assert out[0, :16].isfinite().all()
    assert weights[0, :16].isfinite().all()
    assert out[0, 31].isnan().all()


def test_inputs_without_common_identity_and_any_strides():
    dense, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(6, 2, 8).transpose(0, 1)
    wide = torch.randn(2, 6, 16)[..., ::2]
    for call in ((x, x, x), (x, wide, wide), (x, wide, wide.clone()), (x.clone(), x, x)):
        torch.testing.assert_close(sparse(*call), dense(*call))


def test_copies_and_pickles():
    _, sparse = pair(8, 2, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 6, 8)
    want = sparse(x, x, x)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        torch.testing.assert_close(twin(x, x, x), want, rtol=0, atol=0)
        assert twin.attention is not sparse.attention


def test_autocast_and_half_precision():
    dense, sparse = pair(16, 2, batch_first=True, add_zero_attn=True)
    x = torch.randn(2, 12, 16)
    exact = copy.deepcopy(dense).double()(x.double(), x.double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = dense(x, x, x), sparse(x, x, x)
    low = [m(x.bfloat16(), x.bfloat16(), x.bfloat16()) for m in (dense.bfloat16(), sparse.bfloat16())]
    for reference, own in ((want, got), low):
        for r, o, e in zip(reference, own, exact, strict=True):
            assert o.dtype == r.dtype
            band = torch.finfo(torch.bfloat16).eps * e.abs().max()
            assert (o.double() - e).abs().max() <= 2 * (r.double() - e).abs().max() + band


class Tempered(nn.Module):
    """An attention of the user's own: everything, with a fixed temperature."""

    def forward(self, q, k, v, is_causal, *, key_padding_mask=None, attn_bias=None, return_lse=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 3
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], -math.inf)
        if attn_bias is not None:
            scores = scores + attn_bias
        lse = scores.logsumexp(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), v)
        return (out, lse) if return_lse else out


def test_any_inner_attention_tells_its_weights():
    sparse = Multihead(8, 2, batch_first=True, attention=Tempered())
    x = torch.randn(2, 6, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    out, weights = sparse(x, x, x, key_padding_mask=padding, average_attn_weights=False, is_causal=True)
    torch.testing.assert_close(out, sparse(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0])
    q, k, _ = (t.unflatten(-1, (2, 4)) for t in nn.functional.linear(x, sparse.in_proj_weight).chunk(3, -1))
    blocked = padding[:, None, None] | torch.ones(6, 6, dtype=torch.bool).triu(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 3
    torch.testing.assert_close(weights, scores.masked_fill(blocked, -math.inf).softmax(-1))


class PerCall(BlockSparseRingDilatedAttention):
    """A block-sparse attention that may choose its layout anew at each call."""

    def _layout_or_plan(self, q, k, is_causal):
        return super()._layout_or_plan(q, k, is_causal)


@given(case=cases())
def test_weights_by_unit_values_are_the_weights(case):
    _, fixed = case.modules(torch.float64)
    inner = PerCall(sparse_config=dict(case.sparse))
    other = Multihead(**case.arguments, dtype=torch.float64, attention=inner)
    other.load_state_dict(fixed.state_dict())
    call = {**case.call(torch.float64), "need_weights": True, "is_causal": case.is_causal}
    torch.testing.assert_close(other(**call), fixed(**call))


def test_learned_bias_gets_the_gradient_of_active_blocks_only():
    _, sparse = pair(8, 2, batch_first=True, sparse_config=dict(SPARSE))
    x, bias = torch.randn(1, 32, 8), torch.zeros(32, 32, requires_grad=True)
    sparse(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
    visible = torch.from_numpy(sparse.layout(32).token_mask())[0]
    assert (bias.grad[~visible] == 0).all()
    assert bias.grad[visible].abs().sum() > 0


def test_shows_pattern_and_density_and_follows_its_configuration():
    sparse = Multihead(8, 2, sparse_config={"sparsity_ratio": 0.25, "block_size": 4})
    assert "density=0.25" in repr(sparse)
    assert sparse.get_pattern_stats(64)["density"] == pytest.approx(0.25, abs=1 / 16)
    sparse.sparse_config.sparsity_ratio = 0.5
    assert sparse.prepare(64).density == pytest.approx(0.5, abs=1 / 16)
    assert isinstance(sparse.attention, BlockSparseAttention)


def test_a_mask_per_element_and_head_is_that_mask_for_the_element_alone():
    _, sparse = pair(8, 4, sparse_config=dict(SPARSE))
    query, key = torch.randn(6, 3, 8), torch.randn(9, 3, 8)
    blocked = torch.rand(3, 6, 9) < 0.5
    each = torch.zeros(3, 6, 9).masked_fill(blocked, -math.inf)
    whole = sparse(query, key, key, attn_mask=each.repeat_interleave(4, 0))[0]
    for n in range(3):
        alone = sparse(query[:, n : n + 1], key[:, n : n + 1], key[:, n : n + 1], attn_mask=each[n])[0]
        torch.testing.assert_close(whole[:, n : n + 1], alone)


def test_attributes_that_code_looks_at():
    for arguments in ({}, {"bias": False}, {"kdim": 4, "vdim": 6}, {"add_bias_kv": True}):
        dense, sparse = pair(8, 2, **arguments)
        for name in (
            "in_proj_weight",
            "in_proj_bias",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "bias_k",
            "bias_v",
        ):
            theirs, ours = getattr(dense, name), getattr(sparse, name)
            assert (theirs is None) == (ours is None), name
        assert sparse._qkv_same_embed_dim == dense._qkv_same_embed_dim  # private, but adapters and quantizers look
        assert (dense.out_proj.bias is None) == (sparse.out_proj.bias is None)
        assert type(sparse.out_proj) is type(dense.out_proj)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_shapes_of_the_weights_with_appended_keys(batched, average, need_weights):
    dense, sparse = pair(8, 2, add_bias_kv=True, add_zero_attn=True)
    query, key = (torch.randn(n, 3, 8) if batched else torch.randn(n, 8) for n in (5, 7))
    call = {"need_weights": need_weights, "average_attn_weights": average}
    want, got = (module(query, key, key, **call) for module in (dense, sparse))
    assert got[0].shape == want[0].shape
    assert (got[1] is None) == (want[1] is None)
    if need_weights:
        assert got[1].shape == want[1].shape
        torch.testing.assert_close(got, want)


def test_batch_first_is_ignored_for_unbatched_inputs():
    _, first = pair(8, 2, batch_first=True)
    second = Multihead(8, 2, sparse_config=dict(DENSE))
    second.load_state_dict(first.state_dict())
    x = torch.randn(6, 8)
    torch.testing.assert_close(first(x, x, x), second(x, x, x))


def test_a_hint_that_disagrees_with_its_mask_changes_nothing_that_the_mask_says():
    """nn.MultiheadAttention calls a wrong hint undefined; here both act, so a masked key stays masked."""
    _, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(1, 6, 8)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:, 0] = True
    mask[0, 0] = False
    _, weights = sparse(x, x, x, attn_mask=mask, is_causal=True)
    assert (weights[0, 1:, 0] == 0).all()
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_meta_tensors_tell_shapes(masked, need_weights):
    dense = nn.MultiheadAttention(8, 2, add_bias_kv=True, device="meta")
    sparse = Multihead(8, 2, add_bias_kv=True, device="meta")
    x = torch.empty(6, 3, 8, device="meta")
    masks = {}
    if masked:
        masks = {"attn_mask": torch.empty(6, 6, device="meta"), "key_padding_mask": torch.empty(3, 6, device="meta")}
    want, got = (module(x, x, x, need_weights=need_weights, **masks) for module in (dense, sparse))
    assert got[0].shape == want[0].shape
    assert got[0].is_meta
    assert (got[1] is None) == (want[1] is None)
    if need_weights:
        assert got[1].shape == want[1].shape


def test_a_bias_converted_alone_works_as_in_the_dense_module():
    dense, sparse = pair(4, 4, batch_first=True, dtype=torch.float64)
    for module in (dense, sparse):
        module.in_proj_bias = nn.Parameter(torch.randn(12).half())
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    for value in (x, x.clone()):
        want, got = (module(x, value, value)[0] for module in (dense, sparse))
        torch.testing.assert_close(got, want)
