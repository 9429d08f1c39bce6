"""BlockSparseHierarchical and HierarchicalConfig."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_modules.config import SparsePatternConfig
from bs_modules.hierarchical import BlockSparseHierarchical, HierarchicalConfig
from bs_modules.schedules import ProgressiveSparsityScheduler
from bs_modules.testing import assert_matches_dense
from bs_patterns import Hierarchical, LongNetSegments

LEVELS = [
    {"stride": 1, "window_size": 8, "block_size": 4},
    {"stride": 2, "window_size": 32, "block_size": 8},
    {"stride": 4, "window_size": -1, "block_size": 8},
]


@given(
    length=st.integers(1, 70),
    is_causal=st.booleans(),
    density=st.sampled_from((None, 0.3, 1.0)),
    auto=st.booleans(),
)
def test_is_exact_attention_over_its_layout(length, is_causal, density, auto):
    config = {"auto_levels": True} if auto else {"level_configs": LEVELS}
    module = BlockSparseHierarchical(sparse_config={**config, "sparsity_ratio": density})
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 2, 4, generator=generator) for _ in range(3))
    assert_matches_dense(module(q, k, v, is_causal), q, k, v, module.layout(length, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_layout_is_the_union_of_its_levels(is_causal):
    module = BlockSparseHierarchical(sparse_config=HierarchicalConfig(LEVELS))
    layout = module.layout(256, is_causal)
    assert layout == Hierarchical(LEVELS).layout(256, block_size=4, causal=is_causal)
    assert layout.block_size == (4, 4)
    for level in LEVELS:
        one = BlockSparseHierarchical(sparse_config={"level_configs": [level]}).layout(256, is_causal)
        scale = level["block_size"] // 4
        big, small = one.to_dense()[0], layout.to_dense()[0]
        wide = big.repeat(scale, 0).repeat(scale, 1)
        allowed = Hierarchical(LEVELS).layout(256, block_size=4, causal=is_causal, density=1.0).to_dense()[0]
        assert (small | ~(wide & allowed)).all()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("auto", [False, True])
def test_meets_a_density_and_auto_levels_default_to_a_tenth(density, auto):
    module = BlockSparseHierarchical(sparse_config={"auto_levels": auto, "sparsity_ratio": density})
    layout = module.layout(4096)
    assert abs(layout.nnz - density * 64 * 64) <= 64
    assert module.get_pattern_stats(4096)["requested_density"] == density
    alone = BlockSparseHierarchical(sparse_config={"auto_levels": True})
    assert alone.layout(4096).density == pytest.approx(0.1, abs=1 / 64)


def test_segments_are_candidates():
    module = BlockSparseHierarchical([64, 128], [1, 2], {"level_configs": LEVELS})
    everything = BlockSparseHierarchical(sparse_config={"level_configs": LEVELS}).layout(128)
    assert module.layout(128) == Hierarchical(LEVELS).layout(
        128, block_size=4, candidates=LongNetSegments((64, 128), (1, 2))
    )
    assert module.layout(128).nnz < everything.nnz


def test_a_change_of_the_config_counts_at_the_next_call():
    config = HierarchicalConfig(LEVELS)
    module = BlockSparseHierarchical(hierarchical_config=config)
    assert module.sparse_config is config
    before = module.layout(128)
    config.sparsity_ratio = 0.9
    assert module.layout(128).density == pytest.approx(0.9, abs=1 / 32)
    config.sparsity_ratio = None
    assert module.layout(128) == before
    config.level_configs[2]["stride"] = 2
    assert module.layout(128).nnz > before.nnz
    config.level_configs = None
    assert module.layout(128).block_size == (64, 64)
    ProgressiveSparsityScheduler(module, 0.5, 0.9, 10)
    assert config.sparsity_ratio == 0.5


def test_config_owns_its_levels():
    levels = copy.deepcopy(LEVELS)
    config = HierarchicalConfig(levels)
    levels[0]["stride"] = 0
    config.validate()
    config.level_configs[0]["stride"] = 0
    with pytest.raises(ValueError, match=r"level_configs\[0\].stride"):
        config.validate()


@pytest.mark.parametrize(
    "config",
    [
        HierarchicalConfig(),
        HierarchicalConfig(LEVELS, 0.25),
        HierarchicalConfig(auto_levels=True),
    ],
)
def test_config_converts_and_copies(config):
    assert HierarchicalConfig.from_dict(config.to_dict()) == config
    assert HierarchicalConfig.from_toml(config.to_toml()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config).fingerprint() == config.fingerprint()
    assert config.replace(sparsity_ratio=0.5).sparsity_ratio == 0.5


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"level_configs": []}, ValueError, "level_configs: expected at least one"),
        ({"level_configs": "levels"}, TypeError, "level_configs: expected a sequence"),
        ({"level_configs": [3]}, TypeError, r"level_configs\[0\]: expected a HierarchicalLevel or a mapping"),
        ({"level_configs": [{"stride": 1}]}, ValueError, r"level_configs\[0\]: expected the keys"),
        ({"level_configs": [{**LEVELS[0], "window_size": 0}]}, ValueError, r"level_configs\[0\].window_size"),
        ({"level_configs": LEVELS, "auto_levels": True}, ValueError, "level_configs: has no effect with auto_levels"),
        ({"auto_levels": 1}, TypeError, "auto_levels: expected a bool"),
        ({"sparsity_ratio": 0}, ValueError, "sparsity_ratio: expected a density"),
        ({"sparsity_ratio": "0.1"}, TypeError, "sparsity_ratio"),
        ({"sparsity": 0.1}, ValueError, "did you mean 'sparsity_ratio'"),
    ],
)
def test_config_rejects(fields, error, match):
    with pytest.raises(error, match=match):
        HierarchicalConfig.from_dict(fields)


def test_config_has_no_other_fields():
    with pytest.raises(AttributeError, match=r"no field 'block_size'|property"):
        HierarchicalConfig().block_size = 3


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sparse_config": SparsePatternConfig()}, TypeError, "sparse_config: expected a HierarchicalConfig"),
        ({"hierarchical_config": 3}, TypeError, "hierarchical_config: expected a HierarchicalConfig"),
        ({"hierarchical_config": {}, "sparse_config": {}}, ValueError, "give one of the two"),
        ({"hierarchical_config": {"levels": LEVELS}}, ValueError, "valid: level_configs"),
    ],
)
def test_module_rejects(kwargs, error, match):
    with pytest.raises(error, match=match):
        BlockSparseHierarchical(**kwargs)


def test_module_copies_and_tells_what_it_is():
    module = BlockSparseHierarchical(sparse_config={"level_configs": LEVELS, "sparsity_ratio": 0.5})
    assert "hierarchical (3 levels), density=0.5, block_size=4" in repr(module)
    assert module.get_pattern_stats(64)["pattern"] == "hierarchical (3 levels)"
    q = torch.randn(1, 40, 2, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(q, q, q), module(q, q, q))
        assert twin.sparse_config is not module.sparse_config
