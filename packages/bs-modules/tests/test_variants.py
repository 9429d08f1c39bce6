"""Every variant through the factory, and every preset."""

import inspect
import itertools
import logging
import re

import pytest
import torch
from torch import nn

from bs_modules import BlockSparseAdaptive, create_block_sparse_attention, get_block_sparse_preset
from bs_modules.attention import BlockSparseRingDilatedAttention
from bs_modules.config import SparsePatternConfig
from bs_modules.factory import create_multihead_block_sparse
from bs_modules.hierarchical import BlockSparseHierarchical, HierarchicalConfig
from bs_modules.hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern
from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention
from bs_patterns import DilatedSparse, LocalWindow, PerHead

KINDS = {
    "base": BlockSparseRingDilatedAttention,
    "hierarchical": BlockSparseHierarchical,
    "hilbert": BlockSparseRingDilatedAttentionHilbertPostPattern,
    "multihead": BlockSparseRingMultiheadDilatedAttention,
}
PROJECTED = {"embed_dim": 32, "num_heads": 4}


def needed(name):
    return PROJECTED if name.startswith("multihead") else {}


@pytest.mark.parametrize("variant", KINDS)
def test_a_named_variant_and_its_density(variant):
    module = create_block_sparse_attention(variant, sparsity_ratio=0.25, **needed(variant))
    assert type(module) is KINDS[variant]
    assert module.sparse_config.sparsity_ratio == 0.25
    assert module.get_pattern_stats(4096)["density"] == pytest.approx(0.25, abs=1 / 64)


@pytest.mark.parametrize("variant", KINDS)
def test_every_constructor_argument_can_be_given(variant):
    module = create_block_sparse_attention(
        variant,
        segment_lengths=[256],
        dilation_rates=[1],
        dropout=0.1,
        device="cpu",
        backend="torch",
        **needed(variant),
    )
    inner = module.attention if variant == "multihead" else module
    assert (inner.segment_lengths, inner.dropout, inner.backend) == ([256], 0.1, "torch")


@pytest.mark.parametrize(
    ("kwargs", "kind", "why"),
    [
        ({}, "base", "nothing given"),
        ({"embed_dim": 32, "num_heads": 4}, "multihead", "embed_dim is given"),
        ({"auto_levels": True}, "hierarchical", "auto_levels is given"),
        ({"hierarchical_config": {}}, "hierarchical", "hierarchical_config is given"),
        ({"sparse_config": HierarchicalConfig()}, "hierarchical", "is a HierarchicalConfig"),
        ({"seq_len": 50_000}, "base", "nothing given"),
        ({"seq_len": 50_001}, "hierarchical", "50,001 tokens are more"),
        ({"seq_len": 50_001, "sparsity_ratio": 0.1}, "hierarchical", "50,001 tokens"),
        ({"seq_len": 50_001, "pattern_type": "local_window"}, "base", "describes one pattern"),
        ({"seq_len": 50_001, "sparse_config": SparsePatternConfig()}, "base", "describes one pattern"),
    ],
)
def test_auto_decides_from_what_is_given_and_says_why(kwargs, kind, why, caplog):
    with caplog.at_level(logging.INFO, "bs_modules"):
        assert type(create_block_sparse_attention(explain=True, **kwargs)) is KINDS[kind]
    assert f"variant {kind!r}" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize(
    ("variant", "kwargs", "error", "match"),
    [
        ("hierarchical", {"block_size": 32}, TypeError, "block_size: not an argument of variant 'hierarchical'"),
        ("hierarchical", {"level_config": []}, TypeError, "did you mean 'level_configs'"),
        (
            "hierarchical",
            {"auto_levels": True, "hierarchical_config": {}},
            ValueError,
            "auto_levels: given beside hier",
        ),
        ("hilbert", {"order": "row"}, TypeError, "order: not an argument of variant 'hilbert'"),
        ("base", {"seq_len": 8192}, ValueError, "seq_len: has no effect"),
        ("auto", {"seq_len": 0}, ValueError, "seq_len"),
        ("multihead", {}, TypeError, "embed_dim"),
        ("multihead", {**PROJECTED, "embeddim": 3}, TypeError, "did you mean 'embed_dim'"),
        ("multihead", {**PROJECTED, "sparsity_ratio": 0.1, "sparse_config": {}}, ValueError, "beside sparse_config"),
        ("multihead", {**PROJECTED, "sparsity_ratio": 0.1, "attention": nn.Identity()}, ValueError, "beside attention"),
        ("multihead", {**PROJECTED, "attention": "multihead"}, ValueError, "attention: expected a variant without"),
        (
            "multihead",
            {**PROJECTED, "attention": "hierarchial"},
            ValueError,
            "attention: .*did you mean 'hierarchical'",
        ),
        ("multihead", {**PROJECTED, "attention": "hilbert", "orders": 1}, TypeError, "orders: not an argument"),
    ],
)
def test_refuses_what_would_have_no_effect(variant, kwargs, error, match):
    with pytest.raises(error, match=match):
        create_block_sparse_attention(variant, **kwargs)


@pytest.mark.parametrize("attention", ["base", "hierarchical", "hilbert", "auto"])
def test_multihead_around_any_variant(attention):
    module = create_multihead_block_sparse(
        32, 4, attention=attention, sparsity_ratio=0.5, dropout=0.1, batch_first=True, bias=False
    )
    assert type(module.attention) is KINDS.get(attention, BlockSparseRingDilatedAttention)
    assert (module.attention.num_heads, module.attention.dropout, module.in_proj_bias) == (4, 0.1, None)
    assert module.sparse_config.sparsity_ratio == 0.5
    x = torch.randn(2, 130, 32)
    out, weights = module.eval()(x, x, x, average_attn_weights=False)
    q, k, v = (t.unflatten(-1, (4, 8)) for t in nn.functional.linear(x, module.in_proj_weight).chunk(3, -1))
    expected = torch.einsum("nhls,nshd->nlhd", weights, v).flatten(2)
    torch.testing.assert_close(out, module.out_proj(expected))
    assert torch.equal(weights.ne(0).any(0), torch.from_numpy(module.layout(130).token_mask()).expand(4, -1, -1))
    assert q.shape == k.shape


def test_multihead_around_a_module_and_total_dropout():
    inner = BlockSparseHierarchical(num_heads=4)
    assert create_multihead_block_sparse(32, 4, attention=inner).attention is inner
    module = create_multihead_block_sparse(32, 4, attention="hilbert", dropout=1.0)
    x = torch.randn(5, 1, 32)
    assert (module(x, x, x, need_weights=False)[0] == 0).all()


def test_head_groups_have_patterns_of_their_own():
    groups = PerHead([LocalWindow(64)] * 2 + [DilatedSparse((4,))] * 2)
    module = create_multihead_block_sparse(32, 4, pattern_type=groups, block_size=16, sparsity_ratio=0.2)
    layout = module.layout(512)
    blocks = layout.to_dense()
    assert layout.heads == 4
    assert (blocks[0] == blocks[1]).all()
    assert (blocks[2] == blocks[3]).all()
    assert (blocks[1] != blocks[2]).any()
    assert layout.density == pytest.approx(0.2, abs=1 / 32)
    local = LocalWindow(64).layout(512, block_size=16, density=0.2)
    assert (blocks[0] == local.to_dense()[0]).all()
    x = torch.randn(512, 1, 32)
    out, weights = module(x, x, x, average_attn_weights=False)
    assert torch.equal(weights[0].ne(0), torch.from_numpy(layout.token_mask()))
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])


def documented_densities():
    """The rows of the table in the documentation of `get_block_sparse_preset`."""
    rows = re.findall(r"\| `(\w+)` +\| (.+) \|", inspect.getdoc(get_block_sparse_preset) or "")
    return {name: [tuple(map(float, cell.split("/"))) for cell in cells.split("|")] for name, cells in rows}


LENGTHS = (4096, 16_384, 65_536)


@pytest.mark.parametrize("name", documented_densities())
def test_documented_densities_are_those_of_the_layouts(name):
    module = get_block_sparse_preset(name)
    for length, documented in zip(LENGTHS, documented_densities()[name], strict=True):
        for is_causal, density in zip((False, True), documented, strict=True):
            if isinstance(module, BlockSparseAdaptive):  # no layout without an input, but budgets, which are met
                met = module._room((length, length), is_causal, torch.device("cpu"), 1).met
            else:
                met = module.layout(length, is_causal).density
            assert met == pytest.approx(density, abs=5.1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["hierarchical_standard", "hierarchical_fine", "hierarchical_long"])
def test_hierarchical_presets_are_sparse_and_ever_sparser(name, is_causal):
    module = get_block_sparse_preset(name)
    densities = [module.layout(length, is_causal).density for length in (4096, 8192, 16_384, 32_768, 65_536)]
    assert densities[2] < 0.15
    assert all(later < earlier for earlier, later in itertools.pairwise(densities))


@pytest.mark.parametrize("base", ["local", "dilated", "global_local", "ultra_sparse"])
def test_hilbert_and_multihead_presets_have_the_base_presets_layout(base):
    layout = get_block_sparse_preset(base).layout(1024, True)
    assert get_block_sparse_preset(f"hilbert_{base}").layout(1024, True) == layout
    assert get_block_sparse_preset(f"multihead_{base}", **PROJECTED).layout(1024, True) == layout


def test_multihead_hierarchical_presets():
    module = get_block_sparse_preset("multihead_hierarchical_long", **PROJECTED, batch_first=True)
    assert module.layout(4096) == get_block_sparse_preset("hierarchical_long").layout(4096)
    assert module.batch_first
    with pytest.raises(TypeError, match="embed_dim"):
        get_block_sparse_preset("multihead_hierarchical_long")


def test_preset_overrides_and_names():
    assert get_block_sparse_preset("hierarchical_fine", sparsity_ratio=0.01).layout(16_384).density < 0.02
    with pytest.raises(ValueError, match="did you mean 'hierarchical_long'"):
        get_block_sparse_preset("hierarchical_lon")
