"""`DilatedAttention`: exact LongNet as a module."""

import copy
import io
import pickle

import pytest
import torch

from bs_kernels import dilated_attention
from bs_kernels.testing import branch_masks
from bs_modules import (
    BlockSparseAttention,
    DilatedAttention,
    SparsePatternConfig,
    create_block_sparse_attention,
    create_multihead_block_sparse,
)
from bs_patterns import LocalWindow

BRANCHES = ([16, 64], [1, 3])


def tensors(tokens=70, heads=4, kv_heads=2, **options):
    return [torch.randn(2, tokens, n, 8, **options) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("combine", ["softmax", "longnet", "union"])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward_are_the_ops(combine, causal):
    module = DilatedAttention(*BRANCHES, combine=combine, scale=0.3)
    real = torch.rand(2, 70) < 0.8
    found = []
    for call in (module, lambda *x, **given: dilated_attention(*x[:3], *BRANCHES, **given)):
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in tensors()]
        given = {} if call is module else {"causal": causal, "combine": combine, "scale": 0.3}
        out, lse = call(*leaves, causal, key_padding_mask=real, return_lse=True, **given)
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_defaults_are_the_papers():
    module = DilatedAttention()
    assert module.segment_lengths == [2048, 4096, 8192, 16384, 32768]
    assert module.dilation_rates == [1, 2, 4, 6, 12]
    assert module.sparse_config is None
    assert isinstance(module, BlockSparseAttention)
    assert "combine='softmax'" in repr(module)


def test_layout_and_stats_tell_what_is_computed():
    module = DilatedAttention(*BRANCHES, num_heads=4)
    at = torch.arange(70)
    masks = branch_masks(at, at, *BRANCHES, 4)
    assert torch.equal(torch.from_numpy(module.layout(70).token_mask()), masks.any(0))
    stats = module.get_pattern_stats(70)
    assert stats["pairs"] == [n / 4 for n in masks.flatten(1).sum(1).tolist()]
    assert stats["density"] == pytest.approx(float(masks.sum()) / (4 * 70 * 70))
    assert stats["sparsity"] == 1 - stats["density"]
    module.combine = "union"
    assert module.get_pattern_stats(70)["density"] == pytest.approx(float(masks.any(0).double().mean()))
    module(*tensors(33), is_causal=True)
    assert (module.get_pattern_stats()["seq_len"], module.get_pattern_stats()["is_causal"]) == (33, True)
    assert DilatedAttention().get_pattern_stats(2**20)["density"] < 0.02


@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_inside_segments(causal):
    config = SparsePatternConfig("local_window", window_size=8, block_size=4)
    module = DilatedAttention(*BRANCHES, config)
    q, k, v = tensors()

    def layout(rows):
        return LocalWindow(8).layout(rows, block_size=4, causal=causal)

    want = dilated_attention(q, k, v, *BRANCHES, causal=causal, segment_layout=layout)
    assert torch.equal(module(q, k, v, causal), want)
    assert module.get_pattern_stats(70)["density"] < DilatedAttention(*BRANCHES).get_pattern_stats(70)["density"]
    config.window_size = None
    config.sparsity_ratio = 1.0  # takes effect at the next call: every segment is dense
    torch.testing.assert_close(module(q, k, v, causal), DilatedAttention(*BRANCHES)(q, k, v, causal))
    assert "pattern=local_window" in repr(module)


def test_from_the_factory():
    module = create_block_sparse_attention("dilated", segment_lengths=[32], dilation_rates=[2], combine="longnet")
    assert type(module) is DilatedAttention
    assert (module.segment_lengths, module.combine, module.sparse_config) == ([32], "longnet", None)
    assert create_block_sparse_attention("auto", combine="union").combine == "union"
    sparse = create_block_sparse_attention("dilated", sparsity_ratio=0.25, block_size=16)
    assert sparse.sparse_config == SparsePatternConfig(sparsity_ratio=0.25, block_size=16)
    with pytest.raises(TypeError, match=r"combined: not an argument of variant 'dilated'.*did you mean 'combine'"):
        create_block_sparse_attention("dilated", combined="union")


def test_inside_multihead():
    torch.manual_seed(1)
    module = create_multihead_block_sparse(
        32, 4, attention="dilated", segment_lengths=[8, 24], dilation_rates=[1, 2], batch_first=True
    )
    assert type(module.attention) is DilatedAttention
    x = torch.randn(2, 24, 32)
    mask = torch.rand(24, 24) < 0.2
    out, weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)
    plain, none = module(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(out, plain)
    assert none is None
    _, _, v = (t.unflatten(-1, (4, 8)) for t in torch.nn.functional.linear(x, module.in_proj_weight).chunk(3, -1))
    torch.testing.assert_close(module.out_proj(torch.einsum("nhls,nshd->nlhd", weights, v).flatten(2)), out)
    seen = branch_masks(torch.arange(24), torch.arange(24), [8, 24], [1, 2], 4).any(0) & ~mask
    assert torch.equal(weights[0] > 0, seen)


def test_one_segment_is_multihead_attention():
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    module = create_multihead_block_sparse(
        32, 4, attention="dilated", segment_lengths=[64], dilation_rates=[1], batch_first=True
    )
    module.load_state_dict(reference.state_dict())
    x = torch.randn(2, 50, 32)
    for got, want in zip(module(x, x, x), reference(x, x, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropout_only_while_training():
    module = DilatedAttention(*BRANCHES, dropout=0.5)
    q, k, v = tensors(30)
    torch.manual_seed(0)
    dropped = module(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(module(q, k, v), dropped)
    assert not torch.equal(module.eval()(q, k, v), dropped)
    assert torch.equal(module(q, k, v), dilated_attention(q, k, v, *BRANCHES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    module = DilatedAttention(*BRANCHES, {"sparsity_ratio": 0.5, "block_size": 4}, combine="longnet")
    q, k, v = tensors()
    want = module(q, k, v)
    twin = copied(module)
    assert torch.equal(twin(q, k, v), want)
    assert twin.sparse_config is not module.sparse_config
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    assert module.state_dict() == {}


@pytest.mark.parametrize("prepared", [False, True])
def test_compiles_into_one_graph(prepared):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    module = DilatedAttention(*BRANCHES)
    if prepared:
        module.prepare(70, True, num_heads=4)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    q, k, v = tensors()
    out = compiled(q, k, v, True)
    assert torch.equal(compiled(q, k, v, True), out)
    assert counter.frame_count == 1
    assert torch.equal(module(q, k, v, True), out)


def test_mixed_precision():
    module = DilatedAttention(*BRANCHES, mixed_precision=True, use_memory_pool=True)
    q, k, v = tensors()
    out = module(q, k, v)
    assert out.dtype == torch.float32
    assert torch.equal(out, DilatedAttention(*BRANCHES)(*(x.bfloat16() for x in (q, k, v))).float())


def test_decoding_sees_what_the_whole_sequence_sees():
    module = DilatedAttention(*BRANCHES, num_heads=4)
    q, k, v = tensors(50)
    whole = module(q, k, v, True)
    torch.testing.assert_close(module(q[:, 47:], k, v, True), whole[:, 47:])
    assert module.layout((3, 50), True) == module.layout(50, True).rows_at(47, 50)


def test_explains_itself():
    module = DilatedAttention(*BRANCHES, combine="union", backend="torch", num_heads=4)
    q, k, v = tensors()
    text = module.explain(q.requires_grad_(), k, v, attn_bias=torch.zeros(70, 70), key_padding_mask=None)
    assert [(b.segment_length, b.dilation_rate) for b in text.branches] == [(16, 1), (64, 3)]
    assert [b.pairs / 4 for b in text.branches] == module.get_pattern_stats(70)["pairs"]
    assert text.branches[1].rows == (22, 2)
    assert "on 'torch'" in str(text)
    plain = DilatedAttention(*BRANCHES).explain(*(x.detach() for x in (q, k, v)))
    assert all(table.selected in ("native", "torch") for branch in plain.branches for table in branch.backends)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"segment_lengths": [4]}, ValueError, "segment_lengths: expected dilation_rates with it"),
        ({"segment_lengths": [4], "dilation_rates": [1, 2]}, ValueError, "expected one rate per segment length"),
        ({"combine": "sum"}, ValueError, "combine: expected one of softmax, longnet, union"),
        ({"combine": "union", "sparse_config": {}}, ValueError, "combine: expected 'softmax' or 'longnet'"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"sparse_config": 3}, TypeError, "sparse_config: expected a SparsePatternConfig"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DilatedAttention(**arguments)


def test_bad_calls():
    q = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="q: expected 4 heads"):
        DilatedAttention(num_heads=4)(q, q, q)
    with pytest.raises(ValueError, match="num_heads: expected the number of query heads"):
        DilatedAttention().prepare(8)


def test_a_ring_takes_it():
    ring = create_block_sparse_attention(
        "distributed", attention="dilated", segment_lengths=[16], dilation_rates=[2], combine="union"
    )
    assert isinstance(ring.attention, DilatedAttention)
    q = torch.randn(1, 40, 2, 8)
    assert torch.equal(ring(q, q, q), ring.attention(q, q, q))
