"""The base module against a dense oracle, and what an nn.Module owes its users."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from bs_memory import BufferPool
from bs_modules import BlockSparseAttention, BlockSparseRingDilatedAttention, SparsePatternConfig
from bs_modules.testing import assert_matches_dense, dense_attention
from bs_patterns import BlockLayout, Custom, DilatedSparse, LocalWindow, LongNetSegments, PerHead


def inputs(seq=100, heads=4, dim=16, *, keys=None, kv_heads=None, batch=2, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq, heads, dim), *[(batch, keys or seq, kv_heads or heads, dim)] * 2]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


CONFIGS = {
    "dilated": {"sparsity_ratio": 0.4, "block_size": 16},
    "local": {"pattern_type": "local_window", "window_size": 40, "block_size": 16},
    "global": {"pattern_type": "global_local", "sparsity_ratio": 0.5, "global_tokens": 20, "block_size": 16},
    "dense": {"sparsity_ratio": 1.0, "block_size": 7},
    "unequal blocks": {"sparsity_ratio": 0.5, "block_size": (16, 8)},
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_match_the_dense_oracle(name, dtype, causal):
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(**CONFIGS[name]))
    q, k, v = inputs(dtype=dtype, grad=True)
    layout = module.layout(100, causal)
    out = module(q, k, v, is_causal=causal)
    assert out.dtype == dtype
    assert_matches_dense(out, q, k, v, layout)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, (q, k, v), weight)
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(dense_attention(*exact_inputs, layout), exact_inputs, weight.double())
    own_inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    own = torch.autograd.grad(dense_attention(*own_inputs, layout), own_inputs, weight)
    for a, b, c in zip(got, exact, own, strict=True):
        # One rounding of the result, and one per summed query or key in fp64 for the oracle.
        band = (torch.finfo(dtype).eps + 100 * torch.finfo(torch.float64).eps) * b.abs().max()
        assert (a.double() - b).abs().max() <= 2 * (c.double() - b).abs().max() + band


@given(
    st.integers(1, 90),
    st.sampled_from([1, 3, 16, 64]),
    st.floats(0.05, 1),
    st.booleans(),
    st.sampled_from([(1, 1), (4, 1), (4, 2)]),
)
def test_any_length_block_density_and_head_count(seq, block, density, causal, heads):
    module = BlockSparseRingDilatedAttention(
        sparse_config=SparsePatternConfig(sparsity_ratio=density, block_size=block)
    )
    q, k, v = inputs(seq, heads[0], 8, kv_heads=heads[1], batch=1)
    assert_matches_dense(module(q, k, v, is_causal=causal), q, k, v, module.layout(seq, causal, heads[0]))


def test_density_is_met_and_stats_say_so():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.1))
    for causal in (False, True):
        layout = module.layout(8192, causal)
        rows = layout.shape[1]
        assert abs(layout.nnz - 0.1 * layout.allowed) <= rows
    stats = module.get_pattern_stats(4096)
    assert stats["seq_len"] == 4096
    assert stats["density"] == module.layout(4096).density
    assert stats["density"] + stats["sparsity"] == 1
    assert stats["requested_density"] == 0.1
    assert module.get_pattern_stats()["seq_len"] == 8192


def test_stats_follow_the_last_call():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    module(*inputs(77), is_causal=True)
    stats = module.get_pattern_stats()
    assert (stats["seq_len"], stats["is_causal"]) == (77, True)
    assert stats["density"] == module.layout(77, True).density


def test_changing_the_density_takes_effect_at_the_next_call():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.2, block_size=16))
    q, k, v = inputs(160)
    sparse = module(q, k, v)
    module.sparse_config.sparsity_ratio = 1.0
    dense = module(q, k, v)
    assert not torch.equal(sparse, dense)
    assert_matches_dense(dense, q, k, v, BlockLayout.from_dense([[[True]]], block_size=160, seq_len=160))
    module.sparse_config.sparsity_ratio = 0.2
    assert torch.equal(module(q, k, v), sparse)


def test_segments_restrict_the_pattern_to_their_candidates():
    module = BlockSparseRingDilatedAttention([32, 128], [1, 2], {"sparsity_ratio": 0.2, "block_size": 8})
    every = LocalWindow(10_000).layout(128, block_size=8, candidates=LongNetSegments((32, 128), (1, 2)))
    layout = module.layout(128)
    assert layout.nnz > 0
    assert layout <= every
    q, k, v = inputs(128)
    assert_matches_dense(module(q, k, v), q, k, v, layout)


def test_decoding_is_the_last_rows_of_the_square_layout():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.4, block_size=16))
    q, k, v = inputs(90)
    whole = module(q, k, v, is_causal=True)
    for rows in (1, 5, 16, 33):
        part = module(q[:, -rows:], k, v, is_causal=True)
        assert_matches_dense(part, q[:, -rows:], k, v, module.layout((rows, 90), True))
        torch.testing.assert_close(part, whole[:, -rows:])


def test_cross_attention_of_other_lengths():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.5, block_size=16))
    q, k, v = inputs(50, keys=120)
    assert_matches_dense(module(q, k, v), q, k, v, module.layout((50, 120)))


def test_heads_that_differ_get_their_own_rows():
    pattern = PerHead([LocalWindow(16), LocalWindow(64)])
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(pattern, block_size=16))
    q, k, v = inputs(128, heads=2)
    layout = module.layout(128, num_heads=2)
    assert layout.heads == 2
    assert_matches_dense(module(q, k, v), q, k, v, layout)


def test_equal_heads_share_one_layout():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3))
    assert module.layout(640, num_heads=8).heads == 1


def test_masks_reach_the_kernel():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=1.0, block_size=16))
    q, k, v = inputs(40)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[:, 30:] = False
    torch.testing.assert_close(module(q, k, v, key_padding_mask=keep), module(q, k[:, :30], v[:, :30]))
    bias = torch.zeros(40, 40).masked_fill(~keep[0], float("-inf"))
    torch.testing.assert_close(module(q, k, v, attn_bias=bias), module(q, k[:, :30], v[:, :30]))
    ids = (torch.arange(40) // 20).expand(2, 40)
    packed = module(q, k, v, segment_ids=ids)
    torch.testing.assert_close(packed[:, :20], module(q[:, :20], k[:, :20], v[:, :20]))
    out, lse = module(q, k, v, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 16**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert out.shape == q.shape


def test_scale_and_dropout():
    config = SparsePatternConfig(sparsity_ratio=1.0, block_size=16)
    q, k, v = inputs(40)
    layout = BlockLayout.from_dense([[[True]]], block_size=40, seq_len=40)
    scaled = BlockSparseRingDilatedAttention(sparse_config=config, scale=0.5)(q, k, v)
    torch.testing.assert_close(scaled, dense_attention(q, k, v, layout, scale=0.5))
    module = BlockSparseRingDilatedAttention(sparse_config=config, dropout=0.5)
    torch.manual_seed(0)
    first, second = module(q, k, v), module(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(module(q, k, v), first)
    torch.testing.assert_close(module.eval()(q, k, v), dense_attention(q, k, v, layout))


def test_mixed_precision_computes_in_half_and_returns_the_input_dtype():
    config = SparsePatternConfig(sparsity_ratio=0.5, block_size=16)
    q, k, v = inputs(64)
    module = BlockSparseRingDilatedAttention(sparse_config=config, mixed_precision=True)
    out, lse = module(q, k, v, return_lse=True)
    half = BlockSparseRingDilatedAttention(sparse_config=config)(*(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.float32
    assert lse.dtype == torch.float32
    assert torch.equal(out, half.float())


def test_copies_and_state_dict():
    module = BlockSparseRingDilatedAttention([64], [2], SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    q, k, v = inputs(100)
    expected = module(q, k, v, is_causal=True)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(copy(q, k, v, is_causal=True), expected)
        copy.sparse_config.sparsity_ratio = 0.9
        assert module.sparse_config.sparsity_ratio == 0.3
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert "sparsity" not in repr(module)
    assert "density=0.3" in repr(module)
    assert "pattern=dilated_sparse" in repr(module)
    assert "segment_lengths=[64]" in repr(module)


def test_device_and_dtype_are_promises():
    module = BlockSparseRingDilatedAttention(device="cpu", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q: expected dtype torch\.bfloat16.*got torch\.float32"):
        module(*inputs(64))
    assert module(*inputs(64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module.to(torch.float32)(*inputs(64)).dtype == torch.float32
    with pytest.raises(ValueError, match="q: expected device meta"):
        BlockSparseRingDilatedAttention(device="meta")(*inputs(64))


class Butterfly(BlockSparseRingDilatedAttention):
    def _get_sparse_block_indices(self, num_blocks, num_heads, device):
        pairs = [(i, i) for i in range(num_blocks)]
        pairs += [(i, i ^ 1 << b) for i in range(num_blocks) for b in range(num_blocks) if i ^ 1 << b < num_blocks]
        rows, columns = zip(*pairs, strict=True)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_an_override_of_the_block_indices_is_honoured(causal):
    module = Butterfly(sparse_config=SparsePatternConfig(block_size=16))
    layout = module.layout(100, causal)
    assert layout.rows(0, 2).tolist() == ([0, 2] if causal else [0, 2, 3, 6])
    assert layout.rows(0, 0).tolist() == ([0] if causal else [0, 1, 2, 4])
    q, k, v = inputs(100)
    assert_matches_dense(module(q, k, v, is_causal=causal), q, k, v, layout)


def test_an_override_may_add_to_the_base():
    class Wider(BlockSparseRingDilatedAttention):
        def _get_sparse_block_indices(self, num_blocks, num_heads, device):
            rows, columns = super()._get_sparse_block_indices(num_blocks, num_heads, device)
            last = torch.arange(num_blocks, device=device)
            return torch.cat([rows, last]), torch.cat([columns, torch.full_like(last, num_blocks - 1)])

    config = SparsePatternConfig(sparsity_ratio=0.3, block_size=16)
    base, wider = BlockSparseRingDilatedAttention(sparse_config=config), Wider(sparse_config=config)
    assert base.layout(160) <= wider.layout(160)
    assert wider.layout(160).to_dense()[0, :, -1].all()


@pytest.mark.parametrize(
    ("pairs", "error", "words"),
    [
        (([0, 1], [0]), ValueError, "equally many rows and columns, got 2 and 1"),
        (([0, 7], [0, 0]), ValueError, r"rows in \[0, 7\), got 7"),
        (([0], [-1]), ValueError, r"columns in \[0, 7\), got -1"),
        (([0.5], [0]), TypeError, r"rows as int"),
        ([0], TypeError, "a pair"),
    ],
)
def test_an_override_that_returns_nonsense_is_told_so(pairs, error, words):
    class Wrong(BlockSparseRingDilatedAttention):
        def _get_sparse_block_indices(self, num_blocks, num_heads, device):
            return tuple(torch.tensor(x) for x in pairs) if isinstance(pairs, tuple) else torch.tensor(pairs)

    with pytest.raises(error, match=words):
        Wrong(sparse_config=SparsePatternConfig(block_size=16))(*inputs(100))


def test_a_custom_pattern_object_meets_its_density():
    pattern = Custom(lambda rows, columns, head: (0, -2, 2, -4, 4, 1, -1, 3, -3))
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(pattern, 0.5, block_size=16))
    q, k, v = inputs(96)
    assert abs(module.layout(96).density - 0.5) <= 1 / 6
    assert_matches_dense(module(q, k, v), q, k, v, module.layout(96))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"segment_lengths": [64]}, ValueError, "segment_lengths: expected dilation_rates with it"),
        ({"dilation_rates": [2]}, ValueError, "dilation_rates: expected segment_lengths with it"),
        ({"segment_lengths": [64, 128], "dilation_rates": [2]}, ValueError, "one rate per segment length"),
        ({"segment_lengths": [0], "dilation_rates": [2]}, ValueError, "segment_lengths"),
        ({"sparse_config": 0.1}, TypeError, "sparse_config: expected a SparsePatternConfig"),
        ({"sparse_config": {"densty": 1}}, ValueError, "densty"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": "no"}, TypeError, "dropout"),
        ({"num_heads": 0}, ValueError, "num_heads"),
    ],
)
def test_bad_constructor_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        BlockSparseRingDilatedAttention(**arguments)


def test_bad_inputs():
    module = BlockSparseRingDilatedAttention(num_heads=4)
    q, k, v = inputs(64)
    with pytest.raises(ValueError, match=r"q: expected \[batch, seq, heads, head_dim\], got shape \[64, 16\]"):
        module(q[0, :, 0], k, v)
    with pytest.raises(TypeError, match="k: expected a tensor"):
        module(q, None, v)
    with pytest.raises(ValueError, match="q: expected 4 heads"):
        module(q[:, :, :2], k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="density"):
        BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(dilation_rates=[1, 2]))(q, k, v)


def test_the_base_type_leaves_the_layout_to_variants():
    with pytest.raises(NotImplementedError, match="BlockSparseAttention"):
        BlockSparseAttention()(*inputs(64))


def test_prepare_builds_what_the_call_uses():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    assert module.prepare(100, is_causal=True) is module.layout(100, True)


def test_inside_a_model_it_trains():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward = nn.Linear(16, 3 * 16)
            self.attention = BlockSparseRingDilatedAttention(
                sparse_config=SparsePatternConfig(sparsity_ratio=0.5, block_size=8)
            )

        def forward(self, x):
            q, k, v = self.inward(x).unflatten(-1, (3, 2, 8)).unbind(2)
            return self.attention(q, k, v, is_causal=True).flatten(-2)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 40, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_compiled_module_is_one_graph_per_length_and_layout():
    torch._dynamo.reset()
    counter = CompileCounter()
    eager = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for seq_len in (100, 100, 70, 130, 70):
        q, k, v = inputs(seq_len)
        torch.testing.assert_close(compiled(q, k, v, is_causal=True), eager(q, k, v, is_causal=True))
    assert counter.frame_count == 3
    before = eager(q, k, v, is_causal=True)
    eager.sparse_config.sparsity_ratio = 0.8
    torch.testing.assert_close(compiled(q, k, v, is_causal=True), eager(q, k, v, is_causal=True))
    assert not torch.equal(eager(q, k, v, is_causal=True), before)


def test_prepared_layers_that_are_compiled_one_by_one_share_a_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    config = {"sparsity_ratio": 0.3, "block_size": 16}
    layers = [BlockSparseRingDilatedAttention(sparse_config=dict(config)) for _ in range(10)]
    x = want = inputs(100)[0]
    for layer in layers:
        layer.prepare(100, True)
        want = layer(want, want, want, is_causal=True)
        layer.compile(backend=counter, fullgraph=True)
        x = layer(x, x, x, is_causal=True)
    assert counter.frame_count == 1
    torch.testing.assert_close(x, want)


def test_prepare_needs_the_number_of_heads_where_they_differ():
    pattern = DilatedSparse((2, 4), head_offsets=True)
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(pattern, block_size=16))
    with pytest.raises(ValueError, match="num_heads"):
        module.prepare(128)
    assert module.prepare(128, num_heads=2).heads == 2


def test_head_groups_in_one_call():
    groups = [{"heads": 1, "pattern_type": "local_window"}, {"heads": 3, "sparsity_ratio": 0.5}]
    module = BlockSparseRingDilatedAttention(
        sparse_config=SparsePatternConfig(head_groups=groups, sparsity_ratio=0.2, block_size=16)
    )
    q, k, v = inputs(150, kv_heads=2)
    for causal in (False, True):
        layout = module.layout(150, causal)
        assert layout.heads == 4
        assert_matches_dense(module(q, k, v, is_causal=causal), q, k, v, layout)
    assert module.prepare(150) is module.layout(150)
    assert "1 × local_window + 3 × dilated_sparse, density=0.2" in repr(module)
    module.sparse_config.sparsity_ratio = None
    assert "density=by head group" in repr(module)
    with pytest.raises(ValueError, match="head_groups: expected 2 heads in all groups"):
        module(*inputs(150, heads=2))


@pytest.mark.parametrize("grad", [False, True])
def test_the_pool_lends_half_precision_copies_where_no_backward_needs_them(grad):
    config = SparsePatternConfig(sparsity_ratio=0.5, block_size=16)
    plain = BlockSparseRingDilatedAttention(sparse_config=config, mixed_precision=True)
    pooled = BlockSparseRingDilatedAttention(sparse_config=config, mixed_precision=True, use_memory_pool=True)
    tensors = inputs(64, grad=grad)
    expected = plain(*tensors)
    leased = []
    lease = BufferPool.lease

    def counted(pool, shape, *args, **kwargs):
        leased.append(shape)
        return lease(pool, shape, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BufferPool, "lease", counted)
        out = pooled(*tensors)
        assert ((2, 64, 4, 16) in leased) == (not grad)
    assert torch.equal(out, expected)
    if grad:
        want, got = (torch.autograd.grad(x.sum(), tensors) for x in (expected, out))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_replicas_of_data_parallel_share_what_is_built_and_agree():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    tensors = [inputs(100, seed=seed) for seed in range(8)]
    expected = [module(*x, is_causal=True) for x in tensors]
    module.clear_caches()
    replicas = [module._replicate_for_data_parallel() for _ in tensors]
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda pair: pair[0](*pair[1], is_causal=True), zip(replicas, tensors, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert torch.equal(nn.DataParallel(module)(*tensors[0], is_causal=True), expected[0])


def test_one_graph_serves_another_head_dim():
    module = BlockSparseRingDilatedAttention(sparse_config=SparsePatternConfig(sparsity_ratio=0.3, block_size=16))
    module.prepare(100)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for dim in (16, 8, 24):  # from the second on, torch.compile takes the size for a variable
        q, k, v = inputs(100, dim=dim)
        torch.testing.assert_close(compiled(q, k, v), module(q, k, v))
