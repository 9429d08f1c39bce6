"""The distributed module in one process: what it is made of, what it refuses, its config."""

import pickle
from copy import deepcopy

import pytest
import torch

from bs_comm import Placement
from bs_modules import (
    BlockSparseHierarchical,
    BlockSparseRingDilatedAttention,
    DistributedSparseConfig,
    HierarchicalConfig,
    SparsePatternConfig,
)
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules.testing.rings import whole_tensors

CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.4, "block_size": 16}


def test_without_a_group_it_is_the_attention_inside(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = Distributed(sparse_config=CONFIG, dropout=0.2)
    q, k, v, _ = whole_tensors()
    torch.manual_seed(0)
    got = module(q, k, v, is_causal=True, return_lse=True)
    torch.manual_seed(0)
    want = module.attention(q, k, v, is_causal=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (module.world_size, module.rank) == (1, 0)
    assert torch.equal(module.positions(203), torch.arange(203))
    stats = module.get_pattern_stats()
    assert stats["seq_len"] == 203
    assert stats["world_size"] == 1


def test_a_launcher_without_a_group_is_an_error_at_the_call(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    module = Distributed(sparse_config=CONFIG)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 4.*init_process_group"):
        module(*whole_tensors()[:3])


def test_attributes_are_those_of_the_attention_inside():
    module = Distributed(sparse_config=SparsePatternConfig(sparsity_ratio=0.3), dropout=0.1)
    module.dropout = 0.25
    module.sparse_config.sparsity_ratio = 0.5
    assert module.attention.dropout == 0.25
    assert module.layout(1024).density == pytest.approx(0.5, abs=0.06)
    levels = Distributed(sparse_config=HierarchicalConfig())
    assert isinstance(levels.attention, BlockSparseHierarchical)


def test_copies():
    module = Distributed(sparse_config=CONFIG)
    q, k, v, _ = whole_tensors()
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copy(q, k, v), module(q, k, v))
        copy.sparse_config.sparsity_ratio = 0.9
        assert module.sparse_config.sparsity_ratio == 0.4
    assert module.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attention": 3}, TypeError, "attention: expected a BlockSparseAttention, got int"),
        ({"attention": BlockSparseRingDilatedAttention(), "dropout": 0.1}, ValueError, "dropout: has no effect beside"),
        ({"attention": Distributed()}, ValueError, "does not communicate itself"),
        ({"distributed_config": 3}, TypeError, "distributed_config: expected a DistributedSparseConfig or a mapping"),
        ({"distributed_config": {"placment": "zigzag"}}, ValueError, "did you mean 'placement'"),
        ({"group": 3}, TypeError, "group: expected a process group or a DeviceMesh, got int"),
        ({"use_memory_pool": 1}, TypeError, "use_memory_pool: expected a bool, got 1"),
    ],
)
def test_what_it_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        Distributed(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("placement", "zigzg", ValueError, "did you mean 'zigzag'"),
        ("placement", 3, TypeError, "placement: expected one of"),
        ("hop_timeout", 0, ValueError, "hop_timeout: expected seconds > 0, got 0"),
        ("hop_timeout", "1", TypeError, "hop_timeout: expected seconds > 0"),
        ("wire_dtype", "int8", ValueError, "wire_dtype: expected one of bfloat16"),
        ("compression_ratio", 1.5, ValueError, r"compression_ratio: expected a number in \(0, 1\], got 1.5"),
        ("compression_ratio", 0.5, ValueError, "compression_ratio: has no effect without"),
        ("pattern_update_interval", 0, ValueError, "pattern_update_interval: expected an integer ≥ 1, got 0"),
        ("load_balance_interval", True, TypeError, "load_balance_interval: expected an integer"),
        ("enable_gradient_compression", 1, TypeError, "enable_gradient_compression: expected"),
        ("keep_kv", 1, TypeError, "keep_kv: expected"),
    ],
)
def test_config_refuses(field, value, error, words):
    with pytest.raises(error, match=words):
        DistributedSparseConfig(**{field: value})


def test_config_there_and_back():
    config = DistributedSparseConfig(
        True, 0.2, placement="zigzag", hop_timeout=5, wire_dtype=torch.bfloat16, keep_kv=True
    )
    assert DistributedSparseConfig.from_dict(config.to_dict()) == config
    assert DistributedSparseConfig.from_toml(config.to_toml()) == config
    assert config.replace(placement="stripe").placement == "stripe"
    assert DistributedSparseConfig() == DistributedSparseConfig(
        enable_gradient_compression=False,
        compression_ratio=0.1,
        pattern_update_interval=100,
        load_balance_interval=1000,
    )
    with pytest.raises(TypeError, match="placement: expected a name"):
        DistributedSparseConfig(placement=Placement.zigzag(64, 2)).to_dict()
