"""The base module with order="hilbert"."""

import pytest
import torch

from bs_kernels import block_sparse_attention
from bs_modules.attention import BlockSparseRingDilatedAttention
from bs_modules.hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern as Hilbert
from bs_modules.testing import assert_matches_dense

CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.3, "block_size": 4}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_the_base_function_in_another_order(is_causal, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 37, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    hilbert, base = Hilbert(sparse_config=dict(CONFIG)), BlockSparseRingDilatedAttention(sparse_config=dict(CONFIG))
    layout = hilbert.layout(37, is_causal)
    assert layout == base.layout(37, is_causal)
    out = hilbert(q, k, v, is_causal)
    assert_matches_dense(out, q, k, v, layout)
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, same = base(*exact_inputs, is_causal), base(q, k, v, is_causal)
    gradients = [
        torch.autograd.grad(y, x, torch.ones_like(y))
        for y, x in ((out, (q, k, v)), (same, (q, k, v)), (exact, exact_inputs))
    ]
    for got, row_order, want in zip(*gradients, strict=True):
        band = torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= 2 * (row_order.double() - want).abs().max() + band


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
