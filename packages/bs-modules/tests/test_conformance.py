"""What every variant owes its users, whichever blocks it chooses."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bs_kernels.watch import BackendRun, watch
from bs_modules import (
    BlockSparseAttention,
    DilatedAttention,
    create_block_sparse_attention,
    create_multihead_block_sparse,
)
from bs_patterns import LocalWindow, LongNetSegments

SMALL = {
    "base": {"sparsity_ratio": 0.4, "block_size": 16},
    "hierarchical": {
        "level_configs": [
            {"stride": 1, "window_size": 32, "block_size": 16},
            {"stride": 3, "window_size": -1, "block_size": 16},
        ]
    },
    "adaptive": {"base_sparsity": 0.6, "block_size": 16},
    "hilbert": {"sparsity_ratio": 0.4, "block_size": 16},
    "dilated": {"segment_lengths": [32, 128], "dilation_rates": [1, 2]},
    "distributed": {"sparsity_ratio": 0.4, "block_size": 16},
}
every_variant = pytest.mark.parametrize("variant", SMALL)


def make(variant, **more):
    torch.manual_seed(0)
    return create_block_sparse_attention(variant, **{**SMALL[variant], **more})


def inputs(tokens=100, heads=4, dim=8, *, keys=None, batch=2, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, heads, dim), *[(batch, keys or tokens, heads, dim)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


@every_variant
def test_takes_the_arguments_of_the_convention(variant):
    module = make(variant)
    names = list(inspect.signature(type(module)).parameters)
    assert names[:3] == ["segment_lengths", "dilation_rates", "sparse_config"]
    assert {"device", "dtype", "num_heads", "dropout", "scale", "mixed_precision", "use_memory_pool", "backend"} <= {
        *names
    }
    assert isinstance(module, BlockSparseAttention)
    assert list(inspect.signature(module.forward).parameters)[:4] == ["q", "k", "v", "is_causal"]
    assert list(inspect.signature(module.get_pattern_stats).parameters) == ["seq_len"]


@every_variant
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 16, 77, 130])
def test_takes_any_length(variant, tokens, is_causal):
    tensors = inputs(tokens, grad=True)
    out = make(variant)(*tensors, is_causal=is_causal)
    assert out.shape == tensors[0].shape
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), tensors))


@every_variant
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_causality_hides_the_future_bit_for_bit(variant, backend):
    module = make(variant, backend=backend).eval()
    tensors = inputs(120)
    before = module(*tensors, is_causal=True)
    for at in (1, 37, 64, 119):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, at:] += 1
        assert torch.equal(module(*changed, is_causal=True)[:, :at], before[:, :at])


@every_variant
def test_padding_hides_keys(variant):
    module = make(variant).eval()
    q, k, v = inputs(90)
    keep = torch.ones(2, 90, dtype=torch.bool)
    keep[1, 60:] = False
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[1, 60:] = 50.0
    want, got = (module(q, *kv, key_padding_mask=keep) for kv in ((k, v), changed))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1, :60], want[1, :60])
    nothing = module(q, k, v, key_padding_mask=torch.zeros(2, 90, dtype=torch.bool))
    assert (nothing == 0).all()


@every_variant
def test_copies_pickles_and_state_dicts_compute_the_same_bits(variant):
    module = make(variant).eval()
    tensors = inputs()
    expected = module(*tensors, is_causal=True)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    fresh = make(variant).eval()
    fresh(*tensors)  # lazy parameters are made by the first call
    fresh.load_state_dict(module.state_dict())
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False), fresh]
    for twin in copies:
        assert torch.equal(twin(*tensors, is_causal=True), expected)


@every_variant
def test_a_state_dict_that_does_not_fit_is_refused(variant):
    module = make(variant)
    module(*inputs())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**module.state_dict(), "weight": torch.zeros(3)})


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_follows_to(variant, dtype):
    module = make(variant)
    module(*inputs())
    moved = module.to(dtype)
    out = moved(*inputs(dtype=dtype))
    assert out.dtype == dtype
    assert all(p.dtype == dtype for p in moved.parameters())


@every_variant
def test_dtype_and_device_are_promises(variant):
    module = make(variant, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(TypeError, match=r"q: expected dtype torch\.bfloat16"):
        module(*inputs())
    assert module(*inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_variant
def test_reads_the_number_of_heads_from_its_input_or_holds_it_to_what_was_said(variant):
    assert make(variant)(*inputs(heads=3)).shape[2] == 3
    with pytest.raises(ValueError, match="q: expected 2 heads"):
        make(variant, num_heads=2)(*inputs(heads=3))


@every_variant
def test_mixed_precision_and_the_pool_return_the_dtype_that_came(variant):
    module = make(variant, mixed_precision=True, use_memory_pool=True).eval()
    plain = make(variant).eval()
    tensors = inputs()
    with torch.no_grad():
        out, want = module(*tensors), plain(*tensors)
    assert out.dtype == torch.float32
    spread = (plain(*(x.bfloat16() for x in tensors)).float() - want).abs().max()
    assert (out - want).abs().max() <= 2 * spread + 2**-7


@every_variant
def test_compiles_with_the_same_result(variant):
    module = make(variant).eval()
    tensors = inputs()
    expected = module(*tensors, is_causal=True)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, is_causal=True), expected)


@every_variant
def test_replicas_in_threads_agree(variant):
    module = make(variant).eval()
    sets = [inputs(60 + n) for n in range(4)]
    expected = [module(*x, is_causal=True) for x in sets]
    replicas = [module._replicate_for_data_parallel() for _ in sets]
    for replica in replicas:  # what replicate() does after it: children and parameters of their own
        for name, child in module._modules.items():
            replica._modules[name] = child
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda pair: pair[0](*pair[1], is_causal=True), zip(replicas, sets, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert torch.equal(nn.DataParallel(module)(*sets[0], is_causal=True), expected[0])


@every_variant
def test_shows_what_it_does_and_tells_its_figures(variant):
    module = make(variant)
    module(*inputs(), is_causal=True)
    text = repr(module)
    assert "density" in text or "segment_lengths=[32, 128]" in text
    stats = module.get_pattern_stats()
    assert {"density", "sparsity", "requested_density", "seq_len", "is_causal", "pattern", "block_size"} <= stats.keys()
    assert stats["density"] + stats["sparsity"] == pytest.approx(1)
    assert (stats["seq_len"], stats["is_causal"]) == (100, True)
    assert module.get_pattern_stats(50)["seq_len"] == 50
    with pytest.raises((TypeError, ValueError), match="seq_len"):
        module.get_pattern_stats(0)


@every_variant
def test_segments_restrict_every_pattern(variant):
    segments = {"segment_lengths": [32, 128], "dilation_rates": [1, 2]}
    module = make(variant, **segments)
    assert (module.segment_lengths, module.dilation_rates) == ([32, 128], [1, 2])
    q, k, _ = inputs(128, batch=1)
    seen = torch.zeros(128, 128, dtype=torch.bool)
    unit = torch.eye(128)[None, :, None].expand(1, 128, 4, 128)
    with torch.no_grad():
        weights = module.eval()(q, k, unit.contiguous())
    seen |= (weights[0] > 0).any(1)
    if isinstance(module, DilatedAttention):
        apart = torch.arange(128)[:, None] // 32 != torch.arange(128) // 32
        odd = (torch.arange(128)[:, None] - torch.arange(128)) % 2 == 1
        assert not (seen & apart & odd).any()
    else:
        every = LocalWindow(10_000).layout(128, block_size=16, candidates=LongNetSegments((32, 128), (1, 2)))
        assert not (seen & ~torch.from_numpy(every.token_mask())[0]).any()
    assert seen.any(1).all()


@every_variant
def test_a_changed_density_counts_from_the_next_call(variant):
    module = make(variant) if variant != "dilated" else make(variant, sparse_config={"block_size": 4})
    q, k, v = inputs(160)
    module.eval()(q, k, v)
    before = module.get_pattern_stats()["density"]
    config = module.sparse_config
    if variant == "adaptive":
        config.base_sparsity = 0.2
    else:
        config.sparsity_ratio = 0.8
    module(q, k, v)
    assert module.get_pattern_stats()["density"] > before + 0.1


@every_variant
def test_runs_on_the_optimised_backend(variant):
    ran = set()
    module = make(variant)
    tensors = inputs(grad=True)
    with watch(lambda event: ran.add(event.backend) if isinstance(event, BackendRun) else None):
        module(*tensors, is_causal=True).sum().backward()
    assert ran == {create_block_sparse_attention("base").explain(*tensors, is_causal=True).backend}


@every_variant
@pytest.mark.parametrize("arguments", [{"dropout": 1.0}, {"dropout": "much"}, {"num_heads": 0}, {"mixed_precision": 1}])
def test_bad_arguments_are_named(variant, arguments):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        make(variant, **arguments)


@every_variant
def test_bad_inputs_are_named(variant):
    q, k, v = inputs(64)
    with pytest.raises(ValueError, match=r"q: expected \[batch, seq, heads, head_dim\]"):
        make(variant)(q[0], k, v)
    with pytest.raises(TypeError, match="k: expected a tensor"):
        make(variant)(q, None, v)


@every_variant
def test_trains_between_projections(variant):
    inner = make(variant, num_heads=4) if variant == "dilated" else variant
    more = {} if variant == "dilated" else SMALL[variant]
    torch.manual_seed(0)
    module = create_multihead_block_sparse(32, 4, attention=inner, batch_first=True, **more)
    x = torch.randn(2, 96, 32)
    module(x, x, x, is_causal=True, need_weights=False)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        out, _ = module(x, x, x, is_causal=True, need_weights=False)
        loss = (out - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_variant
def test_warns_of_nothing(variant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(variant)(*inputs())
