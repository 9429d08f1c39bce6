"""BlockSparseAdaptive: what it computes, that nothing leaks, that the gate is trained, and what it composes with."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bs_kernels import block_sparse_attention
from bs_modules import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseRingDilatedAttention,
    HierarchicalConfig,
    ProgressiveSparsityScheduler,
    SparsePatternConfig,
    create_block_sparse_attention,
    create_multihead_block_sparse,
    get_block_sparse_preset,
)
from bs_modules.testing import assert_matches_dense
from bs_patterns import BlockLayout, LocalWindow

CONFIG = {"block_size": 4, "base_sparsity": 0.6, "hidden_dim": 8}


def inputs(length=40, keys=None, batch=2, heads=4, kv_heads=2, dim=8, seed=0, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, dim), *[(batch, keys or length, kv_heads, dim)] * 2]
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def module_of(seed=0, train=False, num_heads=4, num_kv_heads=2, head_dim=8, **more):
    """A gate whose learned correction is awake, as after some training."""
    config = {**CONFIG, **{name: more.pop(name) for name in list(more) if name in AdaptiveConfig._checks}}
    torch.manual_seed(seed)
    module = BlockSparseAdaptive(
        sparse_config=config, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **more
    )
    with torch.no_grad():
        for parameter in module.scorer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.train(train)


def layout_of(batched, b, heads=4):
    """The layout of one batch element."""
    rows = []
    for h in range(batched.shape[1]):
        dense = torch.zeros(batched.shape[2:], dtype=torch.bool)
        for i, count in enumerate(batched.counts[b, h].tolist()):
            dense[i, batched.indices[b, h, i, :count].long()] = True
        rows.append(dense)
    made = torch.stack(rows).expand(heads, -1, -1).numpy()
    return BlockLayout.from_dense(made, block_size=batched.block_size, seq_len=batched.seq_len, causal=batched.causal)


kinds = st.fixed_dictionaries(
    {
        "query_block_size": st.sampled_from([None, 1, 2, 3, 8]),
        "pooling": st.sampled_from(["mean_max", "mean", "max"]),
        "gate": st.sampled_from(["straight_through", "soft"]),
        "share_across_heads": st.booleans(),
        "learn_density": st.booleans(),
    }
)


@given(kind=kinds, length=st.integers(1, 45), is_causal=st.booleans(), seed=st.integers(0, 99))
def test_is_exact_attention_over_the_blocks_it_picks(kind, length, is_causal, seed):
    kind["gate"] = "straight_through"
    module = module_of(seed, **kind)
    q, k, v = inputs(length, seed=seed)
    out, made = module(q, k, v, is_causal), module.select(q, k, is_causal)
    made.layout.validate()
    for b in range(2):
        layout = layout_of(made.layout, b)
        one = slice(b, b + 1)
        assert_matches_dense(out[one], q[one], k[one], v[one], layout)
    if not kind["learn_density"]:
        allowed = layout.allowed // 4
        least = float(module._room((length, length), is_causal, q.device, 4).least.sum())
        assert abs(layout.nnz / 4 - max(0.4 * allowed, least)) <= 0.5 + 1e-6
        assert module.get_pattern_stats()["density"] == pytest.approx(layout.density)


# -- nothing leaks ---------------------------------------------------------------------------------------------------


def changed_after(last, seed, *tensors):
    made = [x.clone() for x in tensors]
    generator = torch.Generator().manual_seed(seed + 1)
    for x in made:
        x[:, last + 1 :] = 3 * torch.randn(x[:, last + 1 :].shape, generator=generator)
    return made


@given(kind=kinds, length=st.integers(2, 45), at=st.floats(0, 1), train=st.booleans(), seed=st.integers(0, 99))
def test_later_tokens_do_not_change_a_bit_of_earlier_picks_and_outputs(kind, length, at, train, seed):
    module = module_of(seed, train, **kind, distill_rows=2)
    last = int(at * (length - 1))  # everything up to this position stays
    q, k, v = inputs(length, seed=seed)
    outs, picks = [], []
    for arguments in ((q, k, v), changed_after(last, seed, q, k, v)):
        torch.manual_seed(7)  # the same noise
        outs.append(module(*arguments, True))
        torch.manual_seed(7)
        picks.append(module.select(*arguments[:2], True))
    assert torch.equal(outs[0][:, : last + 1], outs[1][:, : last + 1])
    rows = slice(last // module.sparse_config.blocks[0] + 1)  # every block that starts up to there
    one, two = (made.layout for made in picks)
    assert torch.equal(one.counts[:, :, rows], two.counts[:, :, rows])
    used = torch.arange(one.indices.shape[-1]) < one.counts[:, :, rows, None]
    assert torch.equal(one.indices[:, :, rows][used], two.indices[:, :, rows][used])
    if picks[0].bias is not None:
        assert torch.equal(picks[0].bias[:, :, rows], picks[1].bias[:, :, rows])


@given(kind=kinds, length=st.integers(2, 45), at=st.floats(0, 1), seed=st.integers(0, 99))
def test_no_gradient_of_earlier_outputs_reaches_later_tokens(kind, length, at, seed):
    module = module_of(seed, True, **kind)
    last = int(at * (length - 1))
    q, k, v = inputs(length, seed=seed, grad=True)
    module(q, k, v, True)[:, : last + 1].square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert (x.grad[:, last + 1 :] == 0).all()


def test_nan_after_a_position_does_not_reach_it():
    module = module_of(query_block_size=1)
    q, k, v = inputs(40)
    before = module(q, k, v, True)
    for x in (q, k, v):
        x[:, 23:] = float("nan")
    assert torch.equal(module(q, k, v, True)[:, :23], before[:, :23])


def test_decoding_one_query_at_a_time_is_the_last_row():
    module = module_of(query_block_size=1)
    q, k, v = inputs(37)
    whole = module(q, k, v, True)
    torch.testing.assert_close(module(q[:, -1:], k, v, True), whole[:, -1:])
    torch.testing.assert_close(module(q[:, -9:], k, v, True), whole[:, -9:])


def test_padding_is_neither_pooled_nor_preferred():
    module = module_of(base_sparsity=0.5)
    q, k, v = inputs(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[:, 20:30] = False
    out = module(q, k, v, key_padding_mask=real)
    layout = module.select(q, k, key_padding_mask=real).layout
    used = layout.indices[layout.counts[..., None] > torch.arange(layout.indices.shape[-1])]
    assert not ((used == 5) | (used == 6)).any()  # 5 of 10 blocks, and two of the ten hold padding alone
    k[:, 20:30], v[:, 20:30] = 1e3, float("nan")
    assert torch.equal(module(q, k, torch.nan_to_num(v), key_padding_mask=real), out)


# -- the gate is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["straight_through", "soft"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("learn", [False, True])
def test_gradient_reaches_the_scorer(gate, share, learn):
    module = module_of(train=True, gate=gate, share_across_heads=share, learn_density=learn)
    q, k, v = inputs(48, grad=True)
    module(q, k, v, True).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def smooth(gate):
    """A module in fp64 whose selection stands still, and its inputs."""
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 4}
    module = module_of(train=False, gate=gate, base_sparsity=0.5, query_block_size=2, backend="torch", **shape).double()
    return module, inputs(16, batch=1, heads=2, kv_heads=1, dim=4, dtype=torch.float64, grad=True)


def test_gradients_of_the_soft_gate_by_finite_differences():
    module, (q, k, v) = smooth("soft")
    parameters = dict(module.named_parameters())
    names = ["scorer.gain", "scorer.slope", "scorer.q_bias_1", "scorer.k_bias_0", "log_temperature"]

    def attend(q, k, v, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (q, k, v, True))

    assert torch.autograd.gradcheck(attend, (q, k, v, *(parameters[name] for name in names)), fast_mode=True)


def test_the_straight_through_gradient_is_that_of_a_log_gate_at_zero():
    module, (q, k, v) = smooth("straight_through")
    out = module(q, k, v, True)
    made = module.select(q, k, True)
    assert torch.equal(out, block_sparse_attention(q, k, v, made.layout))  # exact in value
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    bias = torch.zeros_like(made.layout.indices, dtype=torch.float64, requires_grad=True)
    again = block_sparse_attention(q.detach(), k.detach(), v.detach(), made.layout, block_bias=bias)
    upstream = torch.autograd.grad((again * weight).sum(), bias)[0]
    module.sparse_config.gate = "soft"
    log_gates = module.select(q, k, True).bias
    wanted = torch.autograd.grad((log_gates * upstream).sum(), module.scorer.gain)[0]
    torch.testing.assert_close(module.scorer.gain.grad, wanted)


def test_a_gate_learns_where_to_look():
    """Half of the sequences hold their answer in one block, told by a marker in its keys that no query matches yet."""
    torch.manual_seed(0)
    module = BlockSparseAdaptive(
        sparse_config={"block_size": 4, "base_sparsity": 0.8, "hidden_dim": 8, "learnable_temperature": False},
        num_heads=1,
        head_dim=8,
    )
    optimizer = torch.optim.Adam(module.scorer.parameters(), lr=0.03)

    def batch():
        q, k = torch.zeros(16, 40, 1, 8), 0.3 * torch.randn(16, 40, 1, 8)
        v = torch.zeros(16, 40, 1, 1)
        q[..., 0] = 1
        for b, block in enumerate(torch.randint(10, (16,)).tolist()):
            k[b, 4 * block : 4 * block + 4, :, 1] = 3  # orthogonal to the queries: attention alone cannot tell
            v[b, 4 * block : 4 * block + 4] = 1
        return q, k, v

    def found():
        module.eval()
        with torch.no_grad():
            mean = module(*batch()).mean()
        module.train()
        return float(mean)

    before = found()
    for _ in range(40):
        loss = -module(*batch()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found() > 0.45 > 0.2 > before  # two blocks of ten are kept: 0.5 at best, 0.1 by chance


def test_losses_of_the_gate():
    module = module_of(train=True, learn_density=True, distill_rows=3)
    q, k, v = inputs(48, grad=True)
    module(q, k, v, True)
    assert set(module.gate_losses) == {"sparsity", "distillation"}
    module.gate_losses["sparsity"].backward(retain_graph=True)
    assert (module.scorer.threshold.grad < 0).all()  # a higher threshold is a lower expected density
    q.grad = k.grad = v.grad = None
    module.gate_losses["distillation"].backward()
    assert (module.scorer.gain.grad != 0).any()
    assert (q.grad != 0).any()  # queries and keys learn to be found
    assert (k.grad != 0).any()
    assert v.grad is None


# -- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(None, 16), (1, 16)])
def test_native_runs_forward_and_backward(dtype, blocks):
    query, size = blocks
    module = module_of(train=True, backend="native", query_block_size=query, block_size=size, head_dim=16)
    q, k, v = inputs(80, dim=16, dtype=dtype, grad=True)
    explained = module.explain(q, k, v, True)
    assert explained.backend == "native"
    torch.manual_seed(1)
    out = module(q, k, v, True)
    torch.manual_seed(1)
    made = module.select(q, k, True)
    for b in range(2):
        one = slice(b, b + 1)
        assert_matches_dense(out[one], q[one], k[one], v[one], layout_of(made.layout, b))
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
    q, k, v = inputs(48)
    module = module_of(mixed_precision=True)
    assert module(q, k, v, True).dtype == torch.float32
    half = module_of().to(torch.bfloat16)
    assert half(*(x.bfloat16() for x in (q, k, v)), True).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(module_of()(q, k, v, True)).all()


# -- restricted choices ----------------------------------------------------------------------------------------------


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
    module = module_of(candidates=candidates, base_sparsity=0.8)
    q, k, _ = inputs(64)
    for is_causal in (False, True):
        given_pattern = candidates
        if not isinstance(candidates, LocalWindow):
            given_pattern = (
                candidates.pattern(64) if isinstance(candidates, HierarchicalConfig) else candidates.pattern()
            )
        outer = given_pattern.layout(64, block_size=4, causal=is_causal).to_dense()[0]
        made = module.select(q, k, is_causal).layout
        for b in range(2):
            assert not (layout_of(made, b).to_dense()[0] & ~outer).any()
        assert float(module.select(q, k, is_causal).density) == pytest.approx(0.2, abs=0.01)


def test_segments_are_candidates_and_the_shortfall_is_told():
    module = module_of(segment_lengths=[16], dilation_rates=[1], base_sparsity=0.9)
    q, k, v = inputs(64)
    layout = layout_of(module.select(q, k, True).layout, 0)
    rows, columns = layout.to_dense()[0].nonzero()
    assert (rows // 4 == columns // 4).all()
    greedy = module_of(segment_lengths=[16], dilation_rates=[1], base_sparsity=0.1)
    with pytest.warns(UserWarning, match="candidates: only .* the density is"):
        greedy(q, k, v)


# -- composition -----------------------------------------------------------------------------------------------------


def test_inside_multihead_with_padding_weights_and_causality():
    torch.manual_seed(0)
    module = create_multihead_block_sparse(32, 4, attention="adaptive", batch_first=True, **CONFIG)
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
    q, k, v = inputs(70)
    for module in (
        create_block_sparse_attention("adaptive", **CONFIG),
        create_block_sparse_attention(adaptive_config=AdaptiveConfig(**CONFIG)),
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
    module = module_of()
    scheduler = ProgressiveSparsityScheduler(module, 0.25, 0.75, total_steps=2)
    q, k, v = inputs(64)
    met = []
    for _ in range(3):
        module(q, k, v)
        met.append(module.get_pattern_stats()["density"])
        scheduler.step()
    assert met == pytest.approx([0.75, 0.5, 0.25], abs=0.01)


# -- after training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_block", [None, 1])
def test_frozen_for_one_sequence_it_computes_the_same(is_causal, query_block):
    module = module_of(query_block_size=query_block)
    q, k, v = (x[:1] for x in inputs(44))
    frozen = module.freeze([(q, k, v)], is_causal)
    assert type(frozen) is BlockSparseRingDilatedAttention
    assert frozen.layout(44, is_causal, 4) == layout_of(module.select(q, k, is_causal).layout, 0)
    torch.testing.assert_close(frozen(q, k, v, is_causal), module(q, k, v, is_causal))
    assert pickle.loads(pickle.dumps(frozen)).layout(44, is_causal, 4) == frozen.layout(44, is_causal, 4)


def test_frozen_keeps_what_is_picked_most_often_and_shorter_causal_lengths():
    module = module_of(train=True)
    samples = [tuple(inputs(48, seed=seed)[:2]) for seed in range(5)]
    frozen = module.freeze(samples, is_causal=True)
    assert module.training
    room = module._room((48, 48), True, torch.device("cpu"), 4)
    layout = frozen.layout(48, True, 4)
    assert layout.nnz == 4 * int(room.budget.sum())
    module.eval()
    counts = sum(
        torch.from_numpy(layout_of(module.select(*s, True).layout, b).to_dense()).int() for s in samples for b in (0, 1)
    )
    picked = torch.from_numpy(layout.to_dense())
    for h in range(4):
        for i in range(12):
            assert counts[h, i][picked[h, i]].min() >= counts[h, i][~picked[h, i]].max()
    short = frozen.layout(30, True, 4)
    assert short == layout.rows_at(0, 30)
    with pytest.raises(ValueError, match=r"seq_len: expected lengths that were calibrated \(48 × 48 causal\)"):
        frozen.layout(64, True, 4)


def test_calibration_inside_a_model():
    module = create_multihead_block_sparse(32, 4, attention="adaptive", batch_first=True, **CONFIG)
    gate = module.attention
    with gate.calibrating():
        module(x := torch.randn(2, 40, 32), x, x, is_causal=True, need_weights=False)
    module.attention = gate.freeze()
    out = module(x, x, x, is_causal=True, need_weights=False)[0]
    assert torch.isfinite(out).all()
    with pytest.raises(ValueError, match="samples: expected at least one"):
        module_of().freeze()
    with pytest.raises(ValueError, match="is_causal: has no effect"):
        gate.freeze(is_causal=True)


def test_cache_reuses_selections_until_told_otherwise():
    module = module_of(cache=True)
    (q, k, v), (q2, k2, v2) = inputs(40, seed=1), inputs(40, seed=2)
    first = module.select(q, k, True).layout
    torch.testing.assert_close(module(q, k, v, True), block_sparse_attention(q, k, v, first))
    torch.testing.assert_close(module(q2, k2, v2, True), block_sparse_attention(q2, k2, v2, first))
    module.clear_caches()
    own = module.select(q2, k2, True).layout
    torch.testing.assert_close(module(q2, k2, v2, True), block_sparse_attention(q2, k2, v2, own))
    module.train().eval()
    torch.testing.assert_close(module(q, k, v, True), block_sparse_attention(q, k, v, first))
    module.sparse_config.base_sparsity = 0.3
    assert module(q, k, v, True).shape == q.shape
    assert len(module._selections) == 2  # a change of the config is a new selection


# -- nn.Module's own business ----------------------------------------------------------------------------------------


def test_copies_pickles_and_state_dicts_compute_the_same():
    module = module_of(learn_density=True)
    q, k, v = inputs(40, grad=True)
    module.train()(q, k, v, True).sum().backward()  # leaves losses with a graph behind
    out = module.eval()(q, k, v, True)
    lazy = BlockSparseAdaptive(sparse_config={**CONFIG, "learn_density": True}).eval()
    lazy.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = BlockSparseAdaptive(sparse_config={**CONFIG, "learn_density": True}).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), lazy, loaded):
        assert torch.equal(twin(q, k, v, True), out)


def test_an_optimizer_made_before_the_first_call_trains_a_lazy_gate():
    module = BlockSparseAdaptive(sparse_config=CONFIG)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    q, k, v = inputs(40, grad=True)
    module(q, k, v, True).square().sum().backward()
    before = module.scorer.gain.detach().clone()
    optimizer.step()
    assert not torch.equal(module.scorer.gain, before)


def test_printing_and_statistics():
    module = module_of(learn_density=True)
    assert "pattern=adaptive, density=0.4, block_size=4, blocks=(4, 4), gate=straight_through" in repr(module)
    before = module.get_pattern_stats(64)
    assert before["measured"] is False
    assert before["density"] + before["sparsity"] == 1
    q, k, v = inputs(64)
    module(q, k, v)
    after = module.get_pattern_stats()
    assert after["measured"] is True
    assert after["density"] == pytest.approx(float(module.select(q, k).density))
    assert after["requested_density"] == pytest.approx(0.4)
    explained = module.explain(q, k, v)
    assert explained.layout is None
    assert "BlockSparseAdaptive" in str(explained)


@pytest.mark.parametrize("prepared", [False, True], ids=["graph breaks", "prepared, one graph"])
def test_compiles(prepared):
    module = module_of(train=not prepared, query_block_size=2)
    q, k, v = inputs(24, grad=True)
    if prepared:
        module.prepare(24, True)
    torch.manual_seed(3)
    eager = module(q, k, v, True)
    if not prepared:
        module.clear_caches()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch.manual_seed(3)
        out = compiled(q, k, v, True)
        out.square().sum().backward()
    torch.testing.assert_close(out, eager)
    assert (module.scorer.gain.grad != 0).any()


def test_bad_arguments():
    q, k, v = inputs(16)
    with pytest.raises(ValueError, match="adaptive_config: given beside sparse_config"):
        BlockSparseAdaptive(sparse_config={}, adaptive_config={})
    with pytest.raises(TypeError, match="sparse_config: expected a AdaptiveConfig"):
        BlockSparseAdaptive(sparse_config=SparsePatternConfig())
    with pytest.raises(ValueError, match="order: expected 'auto' or 'longest_first'"):
        BlockSparseAdaptive(order="hilbert")
    with pytest.raises(TypeError, match="candidates: expected a bs_patterns pattern"):
        BlockSparseAdaptive(candidates="local")
    with pytest.raises(TypeError, match="candidates: expected a fixed pattern"):
        BlockSparseAdaptive(candidates=AdaptiveConfig())
    with pytest.raises(ValueError, match="segment_ids: expected None"):
        module_of()(q, k, v, segment_ids=torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"layout: expected an input"):
        module_of().layout(64)
    with pytest.raises(ValueError, match="num_heads: expected the number"):
        BlockSparseAdaptive().prepare(64)
    assert module_of().prepare(64, True).density == 1
    with pytest.raises(TypeError, match="cache: expected a bool"):
        BlockSparseAdaptive(cache=1)
