"""The base module with order="hilbert"."""

import pytest
import torch

from bs_kernels import block_sparse_attention
from bs_kernels.testing import check_against_oracle, make_case
from bs_modules.attention import BlockSparseRingDilatedAttention
from bs_modules.hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern as Hilbert

CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.3, "block_size": 4}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_the_base_function_in_another_order(is_causal, dtype):
    hilbert, base = Hilbert(sparse_config=dict(CONFIG)), BlockSparseRingDilatedAttention(sparse_config=dict(CONFIG))
    layout = hilbert.layout(37, is_causal)
    assert layout == base.layout(37, is_causal)

    def attend(q, k, v, layout, **arguments):
        return hilbert(q, k, v, is_causal, **arguments)

    check_against_oracle(make_case(layout, batch=2, dtype=dtype), attend)


def test_its_order_reaches_the_kernel_and_is_not_for_choosing(monkeypatch):
    orders = []

    def recorded(*args, order, **kwargs):
        orders.append(order)
        return block_sparse_attention(*args, order=order, **kwargs)

    monkeypatch.setattr("bs_modules.attention.block_sparse_attention", recorded)
    q = torch.randn(1, 16, 2, 4)
    Hilbert(sparse_config=dict(CONFIG))(q, q, q)
    assert orders == ["hilbert"]
    with pytest.raises(TypeError, match="order"):
        Hilbert(order="row")  # pyright: ignore[reportCallIssue]
