"""Gradients of block_bias for layouts of each batch element's own, where owners of slots share a buffer."""

import pytest
import torch

from bs_kernels import BatchedLayout, block_sparse_attention, explain_backends


@pytest.mark.parametrize(
    ("batch", "heads", "layout_heads"), [(2, 4, 4), (2, 4, 1), (1, 1, 1), (3, 2, 2), (1, 2, 2), (1, 2, 1)]
)
def test_native_gradients_are_those_of_the_torch_backend(batch, heads, layout_heads):
    generator = torch.Generator().manual_seed(batch + heads)
    rows = batch * layout_heads * 6
    indices = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(rows)])
    counts = torch.randint(1, 4, (batch, layout_heads, 6), generator=generator)
    layout = BatchedLayout(indices.view(batch, layout_heads, 6, 3), counts, (8, 8), (44, 44))
    q, k, v = (torch.randn(batch, 44, heads, 16, generator=generator) for _ in range(3))
    gradients = {}
    for backend in ("native", "torch", "reference"):
        dtype = torch.float64 if backend == "reference" else torch.float32
        bias = torch.zeros(layout.indices.shape, dtype=dtype, requires_grad=True)
        if backend == "native" and explain_backends(q, k, v, layout, block_bias=bias).selected != "native":
            pytest.skip("the native core was not built")
        out = block_sparse_attention(*(x.to(dtype) for x in (q, k, v)), layout, block_bias=bias, backend=backend)
        (out * torch.arange(16)).sum().backward()
        gradients[backend] = bias.grad.double()
    exact = gradients["reference"]
    allowed = 2 * (gradients["torch"] - exact).abs().max() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (gradients["native"] - exact).abs().max() <= allowed
    used = torch.arange(3) < counts[..., None]
    assert (gradients["native"][~used] == 0).all()
