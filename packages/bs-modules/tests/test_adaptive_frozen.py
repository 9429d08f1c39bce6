"""BlockSparseAdaptive after training: fixed layouts, calibration, cached picks."""

import pickle

import pytest
import torch

from bs_kernels import block_sparse_attention
from bs_modules import BlockSparseRingDilatedAttention, create_multihead_block_sparse
from bs_modules.testing import SMALL_GATE, attention_inputs, layout_of_element, small_gate


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_block", [None, 1])
def test_frozen_for_one_sequence_it_computes_the_same(is_causal, query_block):
    module = small_gate(query_block_size=query_block)
    q, k, v = (x[:1] for x in attention_inputs(44))
    frozen = module.freeze([(q, k, v)], is_causal)
    assert type(frozen) is BlockSparseRingDilatedAttention
    assert frozen.layout(44, is_causal, 4) == layout_of_element(module.select(q, k, is_causal).layout, 0)
    torch.testing.assert_close(frozen(q, k, v, is_causal), module(q, k, v, is_causal))
    assert pickle.loads(pickle.dumps(frozen)).layout(44, is_causal, 4) == frozen.layout(44, is_causal, 4)


def test_frozen_keeps_what_is_picked_most_often_and_shorter_causal_lengths():
    module = small_gate(train=True)
    samples = [tuple(attention_inputs(48, seed=seed)[:2]) for seed in range(5)]
    frozen = module.freeze(samples, is_causal=True)
    assert module.training
    room = module._room((48, 48), True, torch.device("cpu"), 4)
    layout = frozen.layout(48, True, 4)
    assert layout.nnz == 4 * int(room.budget.sum())
    module.eval()
    counts = sum(
        torch.from_numpy(layout_of_element(module.select(*s, True).layout, b).to_dense()).int()
        for s in samples
        for b in (0, 1)
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
    module = create_multihead_block_sparse(32, 4, attention="adaptive", batch_first=True, **SMALL_GATE)
    gate = module.attention
    with gate.calibrating():
        module(x := torch.randn(2, 40, 32), x, x, is_causal=True, need_weights=False)
    module.attention = gate.freeze()
    out = module(x, x, x, is_causal=True, need_weights=False)[0]
    assert torch.isfinite(out).all()
    with pytest.raises(ValueError, match="samples: expected at least one"):
        small_gate().freeze()
    with pytest.raises(TypeError, match="samples: expected tuples"):
        gate.freeze(3)
    with pytest.raises(TypeError, match=r"samples\[0\]: expected a tuple that starts with q and k, got Tensor"):
        gate.freeze([torch.zeros(2, 8, 4, 8)])
    with pytest.raises(ValueError, match="is_causal: has no effect"):
        gate.freeze(is_causal=True)


def test_cache_reuses_selections_until_told_otherwise():
    module = small_gate(cache=True)
    (q, k, v), (q2, k2, v2) = attention_inputs(40, seed=1), attention_inputs(40, seed=2)
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
