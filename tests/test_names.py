"""The table of earlier names: everything in it resolves, and nothing that users imported is missing."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

import bs_modules.names
from bs_modules.attention import BlockSparseAttention

PAGE = Path(__file__).resolve().parent.parent / "docs" / "names.md"
ROW = re.compile(r"^\| `(\w+)` \| `([\w.]+)` \|", re.M)
ROWS = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
WANTED = {
    "AdaptiveConfig",
    "AdaptiveSparsityTrainer",
    "BlockSparseAdaptive",
    "BlockSparseAttention",
    "BlockSparseBase",
    "BlockSparseDistributed",
    "BlockSparseHierarchical",
    "BlockSparseMultihead",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionFixed",
    "BlockSparseRingDilatedAttentionHilbertPostPattern",
    "BlockSparseRingDilatedAttentionOriginal",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DistributedSparseConfig",
    "HierarchicalConfig",
    "ImportanceScorer",
    "PersistentPatternCache",
    "ProgressiveSparsityScheduler",
    "RingAttentionMemoryPool",
    "RingDilatedAttentionProduction",
    "RingDilatedAttentionV2",
    "RingDistributedDilatedAttention",
    "SmartPatternCache",
    "SparseConfig",
    "SparsePatternConfig",
    "StandardizedRingAttentionMixin",
    "create_block_sparse_attention",
    "create_multihead_block_sparse",
    "get_block_sparse_preset",
}


def resolve(path):
    package, *names = path.split(".")
    module = importlib.import_module(package)
    while names and not hasattr(module, names[0]):
        package = f"{package}.{names.pop(0)}"
        module = importlib.import_module(package)
    return reduce(getattr, names, module)


@pytest.mark.parametrize("name", ROWS)
def test_what_the_table_names_exists(name):
    assert callable(resolve(ROWS[name]))


def test_no_earlier_name_is_missing():
    assert ROWS.keys() >= WANTED
    assert len(ROW.findall(PAGE.read_text(encoding="utf-8"))) == len(ROWS), "a name is listed twice"


def test_every_alias_is_in_the_table_and_is_the_class_of_today():
    for name in bs_modules.names.__all__:
        assert ROWS[name] == f"bs_modules.names.{name}"
        assert resolve(ROWS[name]).__module__ != "bs_modules.names"
    assert issubclass(bs_modules.names.BlockSparseBase, BlockSparseAttention)
