"""SparsePatternConfig: defaults, checks, conversion."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_modules import AdaptiveConfig, DistributedSparseConfig, HierarchicalConfig, SparsePatternConfig
from bs_patterns import DilatedSparse, GlobalLocal, LocalWindow


def test_defaults_are_the_documented_ones():
    config = SparsePatternConfig()
    assert config.pattern_type == "dilated_sparse"
    assert config.sparsity_ratio is None
    assert config.block_size == 64
    assert config.window_size is None
    assert config.global_tokens == 64
    assert config.dilation_rates is None
    assert config.density == 0.1
    assert config.pattern() == DilatedSparse((1, 2, 4, 8))


@pytest.mark.parametrize(
    ("fields", "pattern", "density"),
    [
        ({"pattern_type": "local_window"}, LocalWindow(256), 0.1),
        ({"pattern_type": "local_window", "window_size": 512}, LocalWindow(512), None),
        ({"pattern_type": "local_window", "window_size": 512, "sparsity_ratio": 0.3}, LocalWindow(512), 0.3),
        ({"pattern_type": "global_local"}, GlobalLocal(64, 256), 0.1),
        ({"pattern_type": "global_local", "global_tokens": 128}, GlobalLocal(128, 256), None),
        ({"dilation_rates": [2, 6]}, DilatedSparse((2, 6)), None),
        ({"pattern_type": LocalWindow(32)}, LocalWindow(32), None),
    ],
)
def test_pattern_and_density_follow_from_the_fields(fields, pattern, density):
    config = SparsePatternConfig(**fields)
    assert config.pattern() == pattern
    assert config.density == density


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"sparsity_ratio": 0}, ValueError, r"sparsity_ratio: .*\(0, 1\].*got 0"),
        ({"sparsity_ratio": 1.5}, ValueError, "got 1.5"),
        ({"sparsity_ratio": float("nan")}, ValueError, "got nan"),
        ({"sparsity_ratio": "0.1"}, TypeError, "got '0.1'"),
        ({"sparsity_ratio": True}, TypeError, "got True"),
        ({"block_size": 0}, ValueError, "block_size: .*got 0"),
        ({"block_size": 6.4}, TypeError, "got 6.4"),
        ({"block_size": (64, 32, 16)}, ValueError, "pair"),
        ({"pattern_type": "local"}, ValueError, "did you mean 'local_window'"),
        ({"pattern_type": 3}, TypeError, "got 3"),
        ({"pattern_type": "local_window", "window_size": -1}, ValueError, "window_size: .*got -1"),
        ({"dilation_rates": []}, ValueError, "at least one"),
        ({"dilation_rates": [1, 0]}, ValueError, r"dilation_rates\[1\]: .*got 0"),
        ({"dilation_rates": 4}, TypeError, "sequence"),
        ({"window_size": 128}, ValueError, "window_size: has no effect with pattern_type='dilated_sparse'"),
        ({"global_tokens": 128}, ValueError, "global_tokens: has no effect"),
        ({"pattern_type": "local_window", "dilation_rates": [2]}, ValueError, "dilation_rates: has no effect"),
        ({"pattern_type": LocalWindow(8), "window_size": 8}, ValueError, "window_size: has no effect"),
    ],
)
def test_bad_fields_are_refused_with_their_name(fields, error, words):
    with pytest.raises(error, match=words):
        SparsePatternConfig(**fields)


def test_assignment_is_checked_at_once_and_keeps_the_old_value():
    config = SparsePatternConfig(sparsity_ratio=0.2)
    with pytest.raises(ValueError, match="sparsity_ratio"):
        config.sparsity_ratio = 2.0
    assert config.sparsity_ratio == 0.2
    with pytest.raises(AttributeError, match="sparsity"):
        config.sparsity = 0.9


def test_a_conflict_made_by_assignment_is_found_at_the_next_use():
    config = SparsePatternConfig(dilation_rates=[2])
    config.pattern_type = "local_window"
    with pytest.raises(ValueError, match="dilation_rates: has no effect"):
        config.pattern()


@given(
    st.sampled_from(["local_window", "dilated_sparse", "global_local"]),
    st.none() | st.floats(0.001, 1),
    st.integers(1, 512) | st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.none() | st.integers(1, 4096),
    st.integers(1, 512),
    st.none() | st.lists(st.integers(1, 64), min_size=1),
)
def test_dict_and_toml_round_trip(pattern, density, block, window, tokens, rates):
    fields = {"pattern_type": pattern, "sparsity_ratio": density, "block_size": block}
    if pattern != "dilated_sparse":
        fields["window_size"] = window
    else:
        fields["dilation_rates"] = rates
    if pattern == "global_local":
        fields["global_tokens"] = tokens
    config = SparsePatternConfig(**fields)
    assert SparsePatternConfig.from_dict(config.to_dict()) == config
    assert SparsePatternConfig.from_toml(config.to_toml()) == config
    assert deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_toml_file(tmp_path: Path):
    file = tmp_path / "sparse.toml"
    file.write_text('pattern_type = "local_window"\nwindow_size = 96\n')
    assert SparsePatternConfig.from_toml(file) == SparsePatternConfig("local_window", window_size=96)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sparsity_ratio'"):
        SparsePatternConfig.from_dict({"sparsity_ration": 0.1})


def test_a_pattern_object_has_no_dict():
    with pytest.raises(TypeError, match="pattern_type"):
        SparsePatternConfig(LocalWindow(8)).to_dict()


GROUPS = [
    {"heads": 2, "pattern_type": "local_window", "window_size": 64},
    {"heads": 1, "dilation_rates": [4], "sparsity_ratio": 0.5},
    {"heads": 1},
]


@pytest.mark.parametrize("causal", [False, True])
def test_each_head_group_has_its_own_pattern_and_density(causal):
    config = SparsePatternConfig(head_groups=GROUPS, block_size=16)
    layout = config.layout(512, heads=4, causal=causal)
    alone = [
        LocalWindow(64).layout(512, block_size=16, causal=causal),
        DilatedSparse((4,)).layout(512, block_size=16, causal=causal, density=0.5),
        DilatedSparse((1, 2, 4, 8)).layout(512, block_size=16, causal=causal, density=0.1),
    ]
    blocks = layout.to_dense()
    for head, want in zip(range(4), (alone[0], *alone), strict=True):
        assert (blocks[head] == want.to_dense()[0]).all()
    assert config.heads == 4
    assert config.density is None
    assert config._pattern_name() == "2 × local_window + 1 × dilated_sparse + 1 × dilated_sparse"


def test_the_common_density_is_for_groups_without_their_own():
    config = SparsePatternConfig(head_groups=GROUPS, sparsity_ratio=0.25, block_size=16)
    blocks = config.layout(512, heads=4).to_dense()
    densities = blocks.mean((1, 2))
    assert densities == pytest.approx([0.25, 0.25, 0.5, 0.25], abs=1 / 32)
    before = config.fingerprint()
    config.sparsity_ratio = 0.3
    assert config.fingerprint() != before
    assert config.layout(512, heads=4).to_dense().mean((1, 2))[0] == pytest.approx(0.3, abs=1 / 32)


def test_head_groups_as_data():
    config = SparsePatternConfig(head_groups=GROUPS, sparsity_ratio=0.25)
    assert SparsePatternConfig.from_dict(config.to_dict()) == config
    assert SparsePatternConfig.from_toml(config.to_toml()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert {config.fingerprint(): 1}
    objects = SparsePatternConfig(head_groups=[{"heads": 1, "pattern_type": LocalWindow(8)}])
    with pytest.raises(TypeError, match="pattern_type: expected a name"):
        objects.to_dict()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"head_groups": []}, ValueError, "at least one group"),
        ({"head_groups": {"heads": 2}}, TypeError, "sequence of mappings"),
        ({"head_groups": [3]}, TypeError, r"head_groups\[0\]: expected a mapping"),
        ({"head_groups": [{"pattern_type": "local_window"}]}, ValueError, "expected the field heads"),
        ({"head_groups": [{"heads": 0}]}, ValueError, r"head_groups\[0\].heads"),
        ({"head_groups": [{"heads": 1, "block_size": 3}]}, ValueError, "block_size: not a field of a head group"),
        (
            {"head_groups": [{"heads": 1, "window_size": 3}]},
            ValueError,
            r"\[0\]: window_size: has no effect",
        ),
        ({"head_groups": GROUPS, "pattern_type": "local_window"}, ValueError, "pattern_type: has no effect beside"),
        ({"head_groups": GROUPS, "window_size": 8}, ValueError, "window_size: has no effect beside head_groups"),
        (
            {"head_groups": [{"heads": 1, "sparsity_ratio": 0.1}], "sparsity_ratio": 0.2},
            ValueError,
            "sparsity_ratio: has no effect beside head_groups that all have their own",
        ),
    ],
)
def test_bad_head_groups(fields, error, words):
    with pytest.raises(error, match=words):
        SparsePatternConfig(**fields)


def test_head_groups_must_add_up():
    config = SparsePatternConfig(head_groups=GROUPS)
    with pytest.raises(ValueError, match="expected 3 heads in all groups, the query heads, got 4"):
        config.layout(512, heads=3)


def test_conversions_refuse_what_is_no_config():
    with pytest.raises(TypeError, match="values: expected a mapping of the fields of SparsePatternConfig, got 3"):
        SparsePatternConfig.from_dict(3)
    with pytest.raises(ValueError, match="window: not a field"):
        SparsePatternConfig().replace(window=3)
    with pytest.raises(ValueError):
        SparsePatternConfig.from_toml("pattern_type = ")


@pytest.mark.parametrize(
    "config",
    [
        SparsePatternConfig("global_local", global_tokens=32, sparsity_ratio=0.2, block_size=(32, 16)),
        SparsePatternConfig(head_groups=GROUPS),
        HierarchicalConfig([{"stride": 2, "window_size": -1, "block_size": 32}], sparsity_ratio=0.1),
        HierarchicalConfig(auto_levels=True),
        AdaptiveConfig(base_sparsity=0.8, learn_density=True, max_density=0.5),
        DistributedSparseConfig(enable_gradient_compression=True, compression_ratio=0.2, placement="zigzag"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_config_is_plain_data(config, tmp_path):
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert kind.from_toml(tmp_path / "config.toml") == kind.from_toml(config.to_toml()) == config
    assert deepcopy(config) == pickle.loads(pickle.dumps(config)) == config.replace() == config
    assert hash(config.fingerprint()) == hash(kind.from_dict(config.to_dict()).fingerprint())
    field = next(iter(config.to_dict()))
    with pytest.raises(ValueError, match=f"did you mean '{field}'"):
        kind.from_dict({f"{field}s": 1})
    with pytest.raises(AttributeError, match="no field 'nonsense'"):
        config.nonsense = 1
    with pytest.raises(TypeError, match="source: expected TOML as a str or a file as a Path"):
        kind.from_toml(3)
