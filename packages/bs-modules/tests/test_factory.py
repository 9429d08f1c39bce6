"""Factory, presets and the choice table."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import distributed as dist

from bs_modules import (
    BlockSparseAdaptive,
    BlockSparseHierarchical,
    BlockSparseRingDilatedAttention,
    BlockSparseRingDistributedDilatedAttention,
    HierarchicalConfig,
    SparsePatternConfig,
    choose_block_sparse,
    create_block_sparse_attention,
    factory,
    get_block_sparse_preset,
)


@pytest.mark.parametrize("variant", ["auto", "base"])
def test_variants_that_exist(variant):
    module = create_block_sparse_attention(variant, sparsity_ratio=0.05, block_size=32)
    assert type(module) is BlockSparseRingDilatedAttention
    assert module.sparse_config == SparsePatternConfig(sparsity_ratio=0.05, block_size=32)


def test_a_config_object_is_kept_as_it_is():
    config = SparsePatternConfig("local_window", window_size=64)
    assert create_block_sparse_attention(sparse_config=config).sparse_config is config


def test_segments_and_constructor_arguments_pass_through():
    module = create_block_sparse_attention(
        "base", segment_lengths=[2048], dilation_rates=[1], sparsity_ratio=0.01, dropout=0.1, num_heads=4
    )
    assert (module.segment_lengths, module.dilation_rates) == ([2048], [1])
    assert (module.dropout, module.num_heads) == (0.1, 4)


def test_unknown_variant_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"variant: expected one of auto, base, .*got 'bass' \(did you mean 'base'\?\)"
    ):
        create_block_sparse_attention("bass")
    with pytest.raises(TypeError, match="variant"):
        create_block_sparse_attention(7)


def test_unknown_argument_lists_the_valid_ones():
    with pytest.raises(TypeError, match=r"sparsity: not an argument .*did you mean 'sparsity_ratio'.*block_size"):
        create_block_sparse_attention("base", sparsity=0.1)
    with pytest.raises(TypeError, match="embed_dim: not an argument of variant 'base'"):
        create_block_sparse_attention("base", embed_dim=64, num_heads=4)


def test_one_field_in_two_places_is_an_error():
    with pytest.raises(ValueError, match="sparsity_ratio: given beside sparse_config"):
        create_block_sparse_attention(sparsity_ratio=0.1, sparse_config=SparsePatternConfig())


def test_the_reason_is_told_on_request(caplog):
    with caplog.at_level(logging.INFO, "bs_modules"):
        create_block_sparse_attention()
        assert not caplog.records
        create_block_sparse_attention(explain=True)
    assert "variant 'base'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "variant"),
    [
        ((8192, "research"), "adaptive"),
        ((8192, "production"), "base"),
        ((50_000, "production"), "base"),
        ((50_001, "production"), "hierarchical"),
        ((50_001, "production", 2), "distributed"),
        ((512, "drop_in_replacement"), "multihead"),
        ((10**6, "extreme_length"), "hierarchical"),
        ((8192, "anything"), "base"),
    ],
)
def test_the_choice_table(arguments, variant):
    assert choose_block_sparse(*arguments) == variant


@pytest.mark.parametrize(
    "arguments", [(0, "research"), (8192, 3), ("8192", "research"), (8192, "production", -1), (True, "research")]
)
def test_the_choice_table_checks_its_arguments(arguments):
    with pytest.raises((TypeError, ValueError), match=r"seq_len|use_case|num_gpus"):
        choose_block_sparse(*arguments)


@pytest.mark.parametrize("name", ["local", "dilated", "global_local", "ultra_sparse"])
def test_presets_and_their_overrides(name):
    module = get_block_sparse_preset(name)
    assert 0 < module.layout(16_384).density < 0.15
    assert get_block_sparse_preset(name, sparsity_ratio=0.5).sparse_config.sparsity_ratio == 0.5


def test_preset_names():
    with pytest.raises(ValueError, match="did you mean 'local'"):
        get_block_sparse_preset("locl")
    with pytest.raises(ValueError, match="did you mean 'adaptive_standard'"):
        get_block_sparse_preset("adaptive_standart")
    with pytest.raises(TypeError, match="name"):
        get_block_sparse_preset(None)
    with pytest.raises(TypeError, match="windowsize"):
        get_block_sparse_preset("local", windowsize=3)


def test_the_densities_in_the_docs_are_the_measured_ones():
    table = [line.split("|")[1:-1] for line in (get_block_sparse_preset.__doc__ or "").splitlines() if "|" in line]
    lengths = [int(cell.split()[0].replace(",", "")) for cell in table[0][1:]]
    assert len(table) > 2 + 4
    for row in table[2:]:
        module = get_block_sparse_preset(row[0].split("`")[1])
        for length, cell in zip(lengths, row[1:], strict=True):
            told = [float(number) for number in cell.split("/")]
            if isinstance(module, BlockSparseAdaptive):  # has no layout without an input, but budgets
                met = [module._room((length, length), c, torch.device("cpu"), 1).met for c in (False, True)]
            else:
                met = [module.layout(length, causal).density for causal in (False, True)]
            assert told == [round(density, 4) for density in met]


@pytest.fixture
def four_ranks(monkeypatch):
    """A process group of four ranks over gloo, as far as the factory looks, and a ring variant to choose."""

    class Ring(BlockSparseRingDilatedAttention):
        pass

    monkeypatch.setitem(factory._VARIANTS, "distributed", factory._Variant(Ring))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    return Ring


@pytest.mark.parametrize(
    ("kwargs", "is_ring", "why"),
    [
        ({"seq_len": 60_000}, True, "4 ranks share a sequence of more than 50,000"),
        ({"seq_len": 50_000}, False, "50,000 tokens are at most 50,000, so 4 ranks are taken to hold a sequence each"),
        ({}, False, "no length is given, so 4 ranks"),
        ({"world_size": 4}, True, "world_size is 4"),
        ({"world_size": 1, "seq_len": 60_000}, False, "60,000 tokens are more than 50,000"),
        ({"device": "meta", "seq_len": 60_000}, False, "60,000 tokens are more"),
        ({"device": "meta"}, False, "does not serve meta tensors"),
        ({"embed_dim": 32, "num_heads": 4, "seq_len": 60_000}, False, "embed_dim is given"),
    ],
)
def test_auto_looks_at_ranks_device_and_length(four_ranks, kwargs, is_ring, why):
    module = create_block_sparse_attention(**kwargs)
    assert isinstance(module, four_ranks) == is_ring
    assert why in module.chosen_because


def test_a_world_size_is_never_ignored():
    with pytest.raises(ValueError, match="world_size: has no effect beside embed_dim; give attention='distributed'"):
        create_block_sparse_attention(world_size=2, embed_dim=32, num_heads=4)
    with pytest.raises(ValueError, match="world_size: has no effect with arguments of 'adaptive'"):
        create_block_sparse_attention(world_size=2, base_sparsity=0.9)
    module = create_block_sparse_attention(world_size=2, sparse_config=HierarchicalConfig())
    assert isinstance(module, BlockSparseRingDistributedDilatedAttention)
    assert isinstance(module.attention, BlockSparseHierarchical)


def test_ranks_are_for_auto_only():
    with pytest.raises(ValueError, match="world_size: has no effect with variant='base'"):
        create_block_sparse_attention("base", world_size=2)
    with pytest.raises(ValueError, match="world_size: expected an integer"):
        create_block_sparse_attention(world_size=0)
    with pytest.raises(TypeError, match="explain: expected a bool"):
        create_block_sparse_attention(explain="yes")


def test_a_module_knows_why_it_was_chosen():
    assert create_block_sparse_attention("base").chosen_because == "base: asked for by name"
    assert "nothing given asks for another" in create_block_sparse_attention().chosen_because
    assert BlockSparseRingDilatedAttention().chosen_because is None


def test_head_groups_given_directly():
    groups = [{"heads": 2, "pattern_type": "local_window"}, {"heads": 2, "dilation_rates": [4]}]
    module = create_block_sparse_attention(head_groups=groups, sparsity_ratio=0.2, block_size=16)
    assert module.layout(256).heads == 4
    assert module(*[torch.randn(1, 100, 4, 8)] * 3).shape == (1, 100, 4, 8)
