"""What comes later changes no bit of what came before: a query's result is its own, whatever shares its tile."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_kernels import block_sparse_attention
from bs_kernels.dispatch import BACKENDS
from bs_kernels.testing import make_layout

CPU = [backend.name for backend in BACKENDS if backend.name in ("native", "torch")]


@pytest.mark.parametrize("backend", CPU)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(2, 150),
    block=st.sampled_from((8, 16, 32, 64)),
    dim=st.sampled_from((8, 24, 64)),
    spread=st.sampled_from((1.0, 4.0, 16.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    data=st.data(),
)
def test_later_tokens_change_no_bit_of_earlier_outputs(backend, seed, tokens, block, dim, spread, dtype, data):
    generator, torch_generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sizes = {"seq_len": (tokens, tokens), "block_size": (block, block)}
    layout = make_layout(generator, heads=1, **sizes, density=0.7, causal=True)
    tensors = [torch.randn(1, tokens, 2, dim, generator=torch_generator) for _ in range(3)]
    tensors[0] *= spread  # large scores move the running maximum often
    tensors = [x.to(dtype) for x in tensors]
    at = data.draw(st.integers(1, tokens - 1), "first token that changes")
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, at:] = torch.randn(x[:, at:].shape, generator=torch_generator).to(dtype) * 3 * spread
    before, after = (block_sparse_attention(*x, layout, backend=backend, return_lse=True) for x in (tensors, changed))
    assert torch.equal(after[0][:, :at], before[0][:, :at])
    assert torch.equal(after[1][..., :at], before[1][..., :at])
