"""BlockSparseAdaptive: what it computes, what it composes with, and its business as a module."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bs_modules import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    DistributedSparseConfig,
    HierarchicalConfig,
    ProgressiveSparsityScheduler,
    SparsePatternConfig,
    create_block_sparse_attention,
    create_multihead_block_sparse,
    get_block_sparse_preset,
)
from bs_modules.testing import SMALL_GATE, assert_matches_dense, attention_inputs, layout_of_element, small_gate
from bs_modules.testing.strategies import gate_kinds
from bs_patterns import LocalWindow


@given(kind=gate_kinds, length=st.integers(1, 45), is_causal=st.booleans(), seed=st.integers(0, 99))
def test_is_exact_attention_over_the_blocks_it_picks(kind, length, is_causal, seed):
    kind["gate"] = "straight_through"
    module = small_gate(seed, **kind)
    q, k, v = attention_inputs(length, seed=seed)
    out, made = module(q, k, v, is_causal), module.select(q, k, is_causal)
    made.layout.validate()
    for b in range(2):
        layout = layout_of_element(made.layout, b)
        one = slice(b, b + 1)
        assert_matches_dense(out[one], q[one], k[one], v[one], layout)
    if not kind["learn_density"]:
        allowed = layout.allowed // 4
        least = float(module._room((length, length), is_causal, q.device, 4).least.sum())
        assert abs(layout.nnz / 4 - max(0.4 * allowed, least)) <= 0.5 + 1e-6
        assert module.get_pattern_stats()["density"] == pytest.approx(layout.density)


# -- backends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(None, 16), (1, 16)])
def test_native_runs_forward_and_backward(dtype, blocks):
    query, size = blocks
    module = small_gate(train=True, backend="native", query_block_size=query, block_size=size, head_dim=16)
    q, k, v = attention_inputs(80, dim=16, dtype=dtype, grad=True)
    explained = module.explain(q, k, v, True)
    assert explained.backend == "native"
    torch.manual_seed(1)
    out = module(q, k, v, True)
    torch.manual_seed(1)
    made = module.select(q, k, True)
    for b in range(2):
        one = slice(b, b + 1)
        assert_matches_dense(out[one], q[one], k[one], v[one], layout_of_element(made.layout, b))
    out.float().square().sum().backward()
    native = module.scorer.gain.grad.clone()
    assert out.dtype == dtype
    module.zero_grad()
    module.backend = "torch"
    torch.manual_seed(1)
    module(q, k, v, True).float().square().sum().backward()
    room = 0.05 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(native, module.scorer.gain.grad, rtol=room, atol=room * float(native.abs().max()))


def test_mixed_precision_and_bf16_modules():
    q, k, v = attention_inputs(48)
    module = small_gate(mixed_precision=True)
    assert module(q, k, v, True).dtype == torch.float32
    half = small_gate().to(torch.bfloat16)
    assert half(*(x.bfloat16() for x in (q, k, v)), True).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(small_gate()(q, k, v, True)).all()


# -- restricted choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidates",
    [
        LocalWindow(16),
        SparsePatternConfig(pattern_type="local_window", window_size=16, block_size=4),
        HierarchicalConfig(
            [{"stride": 1, "window_size": 8, "block_size": 4}, {"stride": 4, "window_size": -1, "block_size": 4}]
        ),
    ],
    ids=["pattern", "config", "levels"],
)
def test_picks_inside_its_candidates(candidates):
    module = small_gate(candidates=candidates, base_sparsity=0.8)
    q, k, _ = attention_inputs(64)
    for is_causal in (False, True):
        given_pattern = candidates
        if not isinstance(candidates, LocalWindow):
            given_pattern = (
                candidates.pattern(64) if isinstance(candidates, HierarchicalConfig) else candidates.pattern()
            )
        outer = given_pattern.layout(64, block_size=4, causal=is_causal).to_dense()[0]
        made = module.select(q, k, is_causal).layout
        for b in range(2):
            assert not (layout_of_element(made, b).to_dense()[0] & ~outer).any()
        assert float(module.select(q, k, is_causal).density) == pytest.approx(0.2, abs=0.01)


def test_segments_are_candidates_and_the_shortfall_is_told():
    module = small_gate(segment_lengths=[16], dilation_rates=[1], base_sparsity=0.9)
    q, k, v = attention_inputs(64)
    layout = layout_of_element(module.select(q, k, True).layout, 0)
    rows, columns = layout.to_dense()[0].nonzero()
    assert (rows // 4 == columns // 4).all()
    greedy = small_gate(segment_lengths=[16], dilation_rates=[1], base_sparsity=0.1)
    with pytest.warns(UserWarning, match="candidates: only .* the density is"):
        greedy(q, k, v)


# -- composition -------------------------------------------------------------------------------------------------------


def test_inside_multihead_with_padding_weights_and_causality():
    torch.manual_seed(0)
    module = create_multihead_block_sparse(32, 4, attention="adaptive", batch_first=True, **SMALL_GATE)
    assert all(not isinstance(p, nn.UninitializedParameter) for p in module.parameters())  # ready for an optimizer
    x = torch.randn(2, 40, 32)
    ignore = torch.zeros(2, 40, dtype=torch.bool)
    ignore[1, 33:] = True
    _, weights = module(x, x, x, key_padding_mask=ignore, is_causal=True, average_attn_weights=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40))
    assert (weights[1, :, :, 33:] == 0).all()
    assert (weights.triu(1) == 0).all()
    assert (weights == 0).float().mean() > 0.6
    module.eval()
    plain = module(x, x, x, key_padding_mask=ignore, is_causal=True, need_weights=False)[0]
    again = module(x, x, x, key_padding_mask=ignore, is_causal=True)[0]
    torch.testing.assert_close(plain, again)
    blocked = torch.rand(40, 40).triu(1) > 0.5
    assert torch.isfinite(module(x, x, x, attn_mask=blocked)[0]).all()
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    layer.self_attn = module
    assert torch.isfinite(layer(x)).all()


def test_made_by_the_factory_and_the_presets():
    q, k, v = attention_inputs(70)
    for module in (
        create_block_sparse_attention("adaptive", **SMALL_GATE),
        create_block_sparse_attention(adaptive_config=AdaptiveConfig(**SMALL_GATE)),
        create_block_sparse_attention("adaptive", head_dim=8, num_heads=4, num_kv_heads=2),
        get_block_sparse_preset("adaptive_standard", block_size=16),
    ):
        assert isinstance(module, BlockSparseAdaptive)
        assert torch.isfinite(module(q, k, v, True)).all()
    made = get_block_sparse_preset("multihead_adaptive_standard", embed_dim=32, num_heads=4)
    assert isinstance(made.attention, BlockSparseAdaptive)
    with pytest.raises(TypeError, match=r"tempreature.*did you mean 'temperature'"):
        create_block_sparse_attention("adaptive", tempreature=2.0)


def test_a_schedule_moves_the_density():
    module = small_gate()
    scheduler = ProgressiveSparsityScheduler(module, 0.25, 0.75, total_steps=2)
    q, k, v = attention_inputs(64)
    met = []
    for _ in range(3):
        module(q, k, v)
        met.append(module.get_pattern_stats()["density"])
        scheduler.step()
    assert met == pytest.approx([0.75, 0.5, 0.25], abs=0.01)


# -- nn.Module's own business ------------------------------------------------------------------------------------------


def test_copies_pickles_and_state_dicts_compute_the_same():
    module = small_gate(learn_density=True)
    q, k, v = attention_inputs(40, grad=True)
    module.train()(q, k, v, True).sum().backward()  # leaves losses with a graph behind
    out = module.eval()(q, k, v, True)
    lazy = BlockSparseAdaptive(sparse_config={**SMALL_GATE, "learn_density": True}).eval()
    lazy.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = BlockSparseAdaptive(sparse_config={**SMALL_GATE, "learn_density": True}).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), lazy, loaded):
        assert torch.equal(twin(q, k, v, True), out)


def test_an_optimizer_made_before_the_first_call_trains_a_lazy_gate():
    module = BlockSparseAdaptive(sparse_config=SMALL_GATE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    q, k, v = attention_inputs(40, grad=True)
    module(q, k, v, True).square().sum().backward()
    before = module.scorer.gain.detach().clone()
    optimizer.step()
    assert not torch.equal(module.scorer.gain, before)


def test_printing_and_statistics():
    module = small_gate(learn_density=True)
    assert "pattern=adaptive, density=0.4, block_size=4, blocks=(4, 4), gate=straight_through" in repr(module)
    before = module.get_pattern_stats(64)
    assert before["measured"] is False
    assert before["density"] + before["sparsity"] == 1
    q, k, v = attention_inputs(64)
    module(q, k, v)
    after = module.get_pattern_stats()
    assert after["measured"] is True
    assert after["density"] == pytest.approx(float(module.select(q, k).density))
    assert after["requested_density"] == pytest.approx(0.4)
    explained = module.explain(q, k, v)
    assert explained.layout is None
    assert "BlockSparseAdaptive" in str(explained)


@pytest.mark.parametrize("prepared", [False, True], ids=["made while tracing", "prepared"])
def test_compiles_into_one_graph(prepared):
    torch._dynamo.reset()
    module = small_gate(train=not prepared, query_block_size=2)
    q, k, v = attention_inputs(24, grad=True)
    if prepared:
        module.prepare(24, True)
    torch.manual_seed(3)
    eager = module(q, k, v, True)
    if not prepared:
        module.clear_caches()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch.manual_seed(3)
        out = compiled(q, k, v, True)
        out.square().sum().backward()
    torch.testing.assert_close(out, eager)
    assert (module.scorer.gain.grad != 0).any()


def test_bad_arguments():
    with pytest.raises(ValueError, match="adaptive_config: given beside sparse_config"):
        BlockSparseAdaptive(sparse_config={}, adaptive_config={})
    with pytest.raises(TypeError, match="sparse_config: expected a AdaptiveConfig"):
        BlockSparseAdaptive(sparse_config=SparsePatternConfig())
    with pytest.raises(ValueError, match="order: expected one of auto, longest_first"):
        BlockSparseAdaptive(order="hilbert")
    with pytest.raises(TypeError, match="candidates: expected a bs_patterns pattern"):
        BlockSparseAdaptive(candidates="local")
    with pytest.raises(TypeError, match="candidates: expected a bs_patterns pattern"):
        BlockSparseAdaptive(candidates=DistributedSparseConfig())
    with pytest.raises(TypeError, match="candidates: expected a fixed pattern"):
        BlockSparseAdaptive(candidates=AdaptiveConfig())
    with pytest.raises(ValueError, match=r"layout: expected an input"):
        small_gate().layout(64)
    with pytest.raises(ValueError, match="num_heads: expected the number"):
        BlockSparseAdaptive().prepare(64)
    assert small_gate().prepare(64, True).density == 1
    with pytest.raises(TypeError, match="cache: expected a bool"):
        BlockSparseAdaptive(cache=1)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
            small_gate().set_temperature(temperature)


def test_statistics_follow_a_change_of_the_config():
    module = small_gate()
    q, k, v = attention_inputs(40)
    module(q, k, v)
    module.sparse_config.sparsity_ratio = 1.0
    found = module.get_pattern_stats(40)
    assert (found["density"], found["measured"]) == (1.0, False)
    module(q, k, v)
    assert module.get_pattern_stats(40)["measured"]


def test_saved_before_its_first_input_and_loaded():
    lazy, made = BlockSparseAdaptive(), small_gate()
    state = lazy.state_dict()
    assert state.keys() == made.state_dict().keys()
    again = BlockSparseAdaptive()
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    q, k, v = attention_inputs(16)
    assert again(q, k, v).shape == q.shape
    with pytest.raises(RuntimeError, match="uninitialized parameter"):
        made.load_state_dict(state)


def test_every_parameter_has_the_dtype_asked_for():
    module = BlockSparseAdaptive(num_heads=2, head_dim=8, dtype=torch.float64)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
