"""The guide of the earlier block-sparse ring dilated attention API, snippet by snippet: only import lines change.

A snippet runs as it was written, after `dilated_attention_pytorch` became `bs_modules` in its imports. Names that the
guide took for granted (tensors, an optimizer, classes imported pages before) are given. What it leaves is then checked.
"""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bs_modules
from bs_modules.testing import assert_matches_dense

IMPORT = re.compile(r"^from dilated_attention_pytorch(\.\w+)? import ", re.M)


def run(code: str, **given: Any) -> SimpleNamespace:
    """Runs a snippet in one namespace, as a script runs, and returns its names."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    names.update({name: getattr(bs_modules, name) for name in bs_modules.__all__ if not name.startswith("_")})
    names.update(given)
    exec(IMPORT.sub("from bs_modules import ", code), names)
    return SimpleNamespace(**names)


def qkv(tokens=500, heads=4, dim=16, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(3)]


def works(attention, tokens=500, heads=4):
    """Calls a module that takes q, k and v both ways, against the dense oracle over its own layout."""
    tensors = qkv(tokens, heads)
    for is_causal in (False, True):
        out = attention(*tensors, is_causal=is_causal)
        assert_matches_dense(out, *tensors, attention.layout(tokens, is_causal, heads))


def density(attention, tokens=8192):
    return attention.get_pattern_stats(tokens)["density"]


def test_quick_start():
    found = run("""
from dilated_attention_pytorch.block_sparse_factory import create_block_sparse_attention

attention = create_block_sparse_attention("auto",
    sparsity_ratio=0.1,  # 90% sparse
    block_size=64
)
first = attention

attention = create_block_sparse_attention("hierarchical")
second = attention

attention = get_block_sparse_preset("ultra_sparse")
third = attention
""")
    assert density(found.first) == pytest.approx(0.1, abs=1 / 128)
    for attention in (found.first, found.second, found.third):
        works(attention)


def test_base_with_a_pattern_and_simple():
    found = run("""
from dilated_attention_pytorch import create_block_sparse_attention

attention = create_block_sparse_attention("base",
    sparse_config=SparsePatternConfig(
        pattern_type="dilated_sparse",  # or "local_window", "global_local"
        sparsity_ratio=0.1,             # 90% sparse
        block_size=64,
        dilation_rates=[1, 2, 4, 8]    # For dilated pattern
    )
)
simple = create_block_sparse_attention("base",
    sparsity_ratio=0.05  # 95% sparse
)
""")
    works(found.attention)
    works(found.simple)
    assert density(found.attention) == pytest.approx(0.1, abs=1 / 128)
    assert density(found.simple) == pytest.approx(0.05, abs=1 / 128)


@pytest.mark.parametrize("pattern", ["local_window", "dilated_sparse", "global_local"])
def test_the_three_pattern_types_meet_their_density(pattern):
    found = run("config = SparsePatternConfig(pattern_type=pattern, sparsity_ratio=0.1)", pattern=pattern)
    attention = bs_modules.BlockSparseRingDilatedAttention(sparse_config=found.config)
    assert density(attention) == pytest.approx(0.1, abs=1 / 128)
    works(attention)


def test_hierarchical():
    found = run("""
preset = create_block_sparse_attention("hierarchical")

from dilated_attention_pytorch import HierarchicalConfig

config = HierarchicalConfig(
    level_configs=[
        {"stride": 1, "window_size": 128, "block_size": 32},    # Fine
        {"stride": 4, "window_size": 512, "block_size": 64},    # Medium
        {"stride": 16, "window_size": -1, "block_size": 128},   # Coarse (-1 = global)
    ]
)
attention = create_block_sparse_attention("hierarchical",
    hierarchical_config=config
)
long = get_block_sparse_preset("hierarchical_long")
fine = get_block_sparse_preset("hierarchical_fine")
""")
    assert found.attention.sparse_config is found.config
    for attention in (found.preset, found.attention, found.long, found.fine):
        works(attention)
        assert density(attention, 16_384) < 0.15


def test_adaptive_and_its_trainer():
    torch.manual_seed(0)
    found = run("""
from dilated_attention_pytorch import AdaptiveConfig

basic = create_block_sparse_attention("adaptive")

config = AdaptiveConfig(
    base_sparsity=0.9,          # Start with 90% sparsity
    temperature=1.0,            # Gumbel-softmax temperature
    learnable_temperature=True,  # Anneal during training
    hidden_dim=128,             # Importance network size
    share_across_heads=False    # Per-head patterns
)
attention = create_block_sparse_attention("adaptive",
    adaptive_config=config
)

from dilated_attention_pytorch import AdaptiveSparsityTrainer

trainer = AdaptiveSparsityTrainer(
    model=attention,
    initial_temperature=1.0,
    final_temperature=0.1,
    annealing_steps=10000
)
""")
    q, k, v = qkv(700)
    assert found.basic(q, k, v, is_causal=True).shape == q.shape
    found.attention(q, k, v)  # the first call makes the parameters that an optimizer then takes
    trained = run(
        """
for batch in dataloader:
    output = attention(q, k, v)
    loss = compute_loss(output)
    loss.backward()
    optimizer.step()
    trainer.step()  # Anneal temperature
""",
        dataloader=range(2),
        attention=found.attention,
        compute_loss=lambda output: output.square().mean(),
        optimizer=torch.optim.Adam(found.attention.parameters(), 1e-3),
        trainer=found.trainer,
        q=q,
        k=k,
        v=v,
    )
    assert trained.output.shape == q.shape
    gradients = [p.grad for p in found.attention.parameters() if p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    assert density(found.attention, 700) == pytest.approx(0.1, abs=1 / 11)


def test_multihead():
    query = torch.randn(2, 130, 768)
    padding_mask = torch.zeros(2, 130, dtype=torch.bool)
    padding_mask[0, 100:] = True
    found = run(
        """
attention = create_block_sparse_attention("multihead",
    embed_dim=768,
    num_heads=12,
    sparsity_ratio=0.1,
    dropout=0.1,
    batch_first=True
)

output = attention(query, key, value, is_causal=True)
first = output

output, attn_weights = attention(
    query, key, value,
    need_weights=True,
    key_padding_mask=padding_mask
)
""",
        query=query,
        key=query,
        value=query,
        padding_mask=padding_mask,
    )
    assert isinstance(found.first, tuple)  # a pair, as nn.MultiheadAttention returns; see the docs
    assert found.first[0].shape == found.output.shape == query.shape
    assert found.attn_weights.shape == (2, 130, 130)
    assert (found.attn_weights[0, :, 100:] == 0).all()


def test_distributed():
    found = run("""
from dilated_attention_pytorch import DistributedSparseConfig

config = DistributedSparseConfig(
    enable_gradient_compression=True,
    compression_ratio=0.1,
    pattern_update_interval=100,
    load_balance_interval=1000
)

attention = create_block_sparse_attention("distributed",
    distributed_config=config,
    enable_deepspeed_integration=True
)
""")
    works(found.attention)  # without a process group: world size 1
    assert found.attention.distributed_config is found.config


def test_decision_tree_is_the_one_of_the_package():
    found = run("""
def choose_block_sparse(seq_len, use_case, num_gpus=1):
    if use_case == "research":
        return "adaptive"

    elif use_case == "production":
        if num_gpus > 1:
            return "distributed"
        elif seq_len > 50000:
            return "hierarchical"
        else:
            return "base"

    elif use_case == "drop_in_replacement":
        return "multihead"

    elif use_case == "extreme_length":
        return "hierarchical"

    else:
        return "base"
""")
    for seq_len in (1, 50_000, 50_001, 10**6):
        for use_case in ("research", "production", "drop_in_replacement", "extreme_length", "something else"):
            for num_gpus in (1, 2):
                arguments = (seq_len, use_case, num_gpus)
                assert bs_modules.choose_block_sparse(*arguments) == found.choose_block_sparse(*arguments)


def test_extreme_sparsity():
    found = run("""
preset = get_block_sparse_preset("ultra_sparse")

attention = create_block_sparse_attention("base",
    sparsity_ratio=0.001,  # 99.9% sparse
    block_size=256,        # Larger blocks for efficiency
    segment_lengths=[8192, 16384, 32768],
    dilation_rates=[1, 8, 64]
)
""")
    works(found.preset)
    works(found.attention)
    assert density(found.preset, 65_536) == pytest.approx(0.01, abs=1 / 1024)
    # A query keeps at least one block, so 0.001 is met where a row has 1,000 of them.
    assert found.attention.layout(32_768).density == 1 / 128
    assert found.attention.layout(1 << 19).density == pytest.approx(0.001, abs=1 / 2048)


def test_local_and_global():
    found = run("""
preset = get_block_sparse_preset("global_local")

from dilated_attention_pytorch import SparsePatternConfig

config = SparsePatternConfig(
    pattern_type="global_local",
    global_tokens=128,    # First 128 tokens are global
    window_size=512,      # Local window size
    sparsity_ratio=0.05
)
attention = create_block_sparse_attention("base", sparse_config=config)
""")
    works(found.preset)
    works(found.attention)
    blocks = found.attention.layout(8192, True).to_dense()[0]
    assert density(found.attention) == pytest.approx(0.05, abs=1 / 128)
    assert blocks[:, 0].mean() > 0.9  # the first tokens come first in the ranking


def test_its_own_progressive_scheduler_takes_effect_at_the_next_call():
    found = run("""
class ProgressiveSparsityScheduler:
    def __init__(self, model, initial_sparsity=0.5, final_sparsity=0.95):
        self.model = model
        self.initial = initial_sparsity
        self.final = final_sparsity
        self.current_step = 0
        self.total_steps = 10000

    def step(self):
        progress = min(self.current_step / self.total_steps, 1.0)
        current_sparsity = self.initial + (self.final - self.initial) * progress

        # Update model's sparsity
        self.model.sparse_config.sparsity_ratio = current_sparsity
        self.current_step += 1

model = create_block_sparse_attention("base", block_size=16)
scheduler = ProgressiveSparsityScheduler(model)
scheduler.total_steps = 2
""")
    met = []
    for _ in range(3):
        found.scheduler.step()
        met.append(density(found.model))
    # It hands a sparsity to a field that holds a density, and so ends denser: the package's own scheduler converts.
    assert met == pytest.approx([0.5, 0.725, 0.95], abs=1 / 512)
    own = bs_modules.ProgressiveSparsityScheduler(found.model, initial_sparsity=0.5, final_sparsity=0.95, total_steps=2)
    met = [density(found.model)]
    for _ in range(2):
        own.step()
        met.append(density(found.model))
    assert met == pytest.approx([0.5, 0.275, 0.05], abs=1 / 512)


def test_custom_pattern():
    found = run("""
class CustomPatternBlockSparse(BlockSparseRingDilatedAttention):
    def _get_sparse_block_indices(self, num_blocks, num_heads, device):
        row_indices = []
        col_indices = []

        for i in range(num_blocks):
            # Local connections
            row_indices.append(i)
            col_indices.append(i)

            # Butterfly connections
            stride = 1
            while stride < num_blocks:
                if i + stride < num_blocks:
                    row_indices.append(i)
                    col_indices.append(i + stride)
                stride *= 2

        return torch.tensor(row_indices), torch.tensor(col_indices)

attention = CustomPatternBlockSparse()
""")
    works(found.attention)
    assert found.attention.layout(64 * 8).rows(0, 2).tolist() == [2, 3, 4, 6]
    assert found.attention.layout(64 * 8, True).rows(0, 2).tolist() == [2]  # it looks ahead, so causality leaves itself


def test_combining_patterns():
    found = run("""
class MultiPatternAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.head_dim = embed_dim // num_heads

        self.local_heads = create_block_sparse_attention("base",
            sparse_config=SparsePatternConfig(pattern_type="local_window")
        )
        self.global_heads = create_block_sparse_attention("base",
            sparse_config=SparsePatternConfig(pattern_type="dilated_sparse")
        )

    def forward(self, q, k, v):
        # Split heads
        local_output = self.local_heads(q[..., :6, :], k[..., :6, :], v[..., :6, :])
        global_output = self.global_heads(q[..., 6:, :], k[..., 6:, :], v[..., 6:, :])

        # Combine
        return torch.cat([local_output, global_output], dim=-2)

attention = MultiPatternAttention(192, 12)
""")
    tensors = qkv(1000, 12)
    groups = [{"heads": 6, "pattern_type": "local_window"}, {"heads": 6, "pattern_type": "dilated_sparse"}]
    one_call = bs_modules.create_block_sparse_attention("base", head_groups=groups)
    torch.testing.assert_close(found.attention(*tensors), one_call(*tensors))


def test_device():
    found = run(
        """
attention = create_block_sparse_attention("multihead", embed_dim=32, num_heads=4).to(device)
""",
        device=torch.device("cpu"),
    )
    x = torch.randn(50, 2, 32)
    assert found.attention(x, x, x)[0].device == x.device


def test_padding_to_whole_blocks_is_not_needed_and_still_allowed():
    found = run(
        """
seq_len = ((original_seq_len + block_size - 1) // block_size) * block_size
padded_input = F.pad(input, (0, 0, 0, seq_len - original_seq_len))
""",
        original_seq_len=130,
        block_size=64,
        input=torch.randn(2, 130, 32),
    )
    assert found.padded_input.shape == (2, 192, 32)
    attention = bs_modules.create_multihead_block_sparse(32, 4, batch_first=True).eval()
    ignored = torch.zeros(2, 192, dtype=torch.bool)
    ignored[:, 130:] = True
    attention.sparse_config.sparsity_ratio = 1.0
    padded = attention(*[found.padded_input] * 3, key_padding_mask=ignored)[0]
    plain = attention(*[found.padded_input[:, :130]] * 3)[0]
    torch.testing.assert_close(padded[:, :130], plain)


def test_memory_issues():
    found = run("""
attention = create_block_sparse_attention("base",
    sparsity_ratio=0.01,      # More sparse
    block_size=128,           # Larger blocks
    use_memory_pool=True,     # Enable memory pooling
    mixed_precision=True      # Use fp16
)
""")
    q, k, v = qkv()
    out = found.attention(q, k, v, is_causal=True)
    half = bs_modules.create_block_sparse_attention("base", sparsity_ratio=0.01, block_size=128)
    assert out.dtype == q.dtype
    assert torch.equal(out, half(*(x.bfloat16() for x in (q, k, v)), is_causal=True).float())


def test_recommendations_by_use_case():
    found = run("""
general = create_block_sparse_attention(
    variant="base",
    segment_lengths=[2048],
    dilation_rates=[1],
    sparsity_ratio=0.01  # 99% sparse
)
drop_in = create_multihead_block_sparse(
    embed_dim=768,
    num_heads=12,
    sparsity_ratio=0.05  # 95% sparse
)
research = BlockSparseAdaptive(
    segment_lengths=[2048],
    dilation_rates=[1],
    num_heads=8,
    head_dim=64
)
base_model = general
model = nn.DataParallel(base_model)
config = DistributedSparseConfig()
spread = create_block_sparse_attention(
    variant="distributed",
    distributed_config=config
)
""")
    works(found.general)
    works(found.spread)
    q, k, v = qkv(300, 8, 64)
    assert found.research(q, k, v).shape == q.shape
    assert torch.equal(found.model(q, k, v), found.general(q, k, v))
    x = torch.randn(200, 1, 768)
    assert found.drop_in(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize(
    "name",
    [
        "BlockSparseRingDilatedAttention",
        "BlockSparseHierarchical",
        "BlockSparseAdaptive",
        "BlockSparseRingDistributedDilatedAttention",
        "BlockSparseRingDilatedAttentionHilbertPostPattern",
    ],
)
def test_one_constructor_convention(name):
    """What the analysis of the earlier API asked for: segment lengths, dilation rates, a config, then keywords."""
    found = run(f"attention = {name}([256, 1024], [1, 2], None, device='cpu', dtype=torch.float32, dropout=0.0)")
    q, k, v = qkv(600)
    assert found.attention(q, k, v, is_causal=True).shape == q.shape
    assert found.attention.segment_lengths == [256, 1024]
    stats = found.attention.get_pattern_stats()
    assert stats["density"] + stats["sparsity"] == pytest.approx(1)
    assert found.attention.get_pattern_stats(600)["density"] == stats["density"]


def test_the_unified_factory_says_why(caplog):
    with caplog.at_level(logging.INFO, "bs_modules"):
        run("create_block_sparse_attention(variant='auto', explain=True)")
    assert "variant 'base'" in caplog.text
