"""The tolerance rule has teeth: it accepts a dense computation and rejects small mistakes."""

import numpy as np
import pytest
import torch

from bs_kernels.testing import (
    assert_close_to_oracle,
    dense_results,
    make_case,
    make_layout,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    layout = make_layout(np.random.default_rng(0), seq_len=(48, 48), block_size=(16, 16), heads=2, density=0.6)
    return make_case(layout, head_dim=16, dtype=request.param, sinks=True, attn_bias=True, block_bias=True)


def test_a_dense_computation_passes(case):
    assert_close_to_oracle(case, dense_results(case))


@pytest.mark.parametrize("name", ["out", "lse", "q", "k", "v", "sinks", "attn_bias", "block_bias"])
def test_one_wrong_element_fails(case, name):
    got = dense_results(case)
    at = got[name].double().abs().argmax()
    wrong = got[name].double().flatten()
    eps = torch.finfo(case.q.dtype).eps
    wrong[at] *= 1 + max(40 * eps, eps**0.5)
    with pytest.raises(AssertionError, match=f"^{name}: off by"):
        assert_close_to_oracle(case, got | {name: wrong.view(got[name].shape)})


def test_nan_shape_and_infinity_fail(case):
    got = dense_results(case)
    with pytest.raises(AssertionError, match="infinities or NaNs"):
        assert_close_to_oracle(case, {"out": got["out"] * torch.nan})
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close_to_oracle(case, {"out": got["out"][:, 1:]})
    empty = got["lse"].clone()
    empty[0, 0, 0] = -torch.inf
    with pytest.raises(AssertionError, match="infinities or NaNs"):
        assert_close_to_oracle(case, {"lse": empty})


@pytest.mark.parametrize(
    "mistake", ["scale", "block_dropped", "unmasked_key", "per_block_softmax"], ids=lambda x: x.replace("_", " ")
)
def test_mistakes_are_caught(mistake):
    layout = make_layout(np.random.default_rng(1), seq_len=(64, 64), block_size=(16, 16), density=0.7)
    case = make_case(layout, head_dim=16, dtype=torch.bfloat16, window=(20, 20))
    from bs_kernels import block_sparse_attention
    from bs_kernels.testing import evaluate
    from bs_patterns import BlockLayout

    def wrong(q, k, v, what, **arguments):
        if mistake == "scale":
            return block_sparse_attention(q, k, v, what, scale=0.26, **arguments)
        if mistake == "unmasked_key":
            return block_sparse_attention(q, k, v, what, **arguments | {"window": (21, 20)})
        dense = what.to_dense()
        if mistake == "block_dropped":
            dense[0][tuple(np.argwhere(dense[0])[3])] = False
            less = BlockLayout.from_dense(dense, block_size=what.block_size, seq_len=what.seq_len)
            return block_sparse_attention(q, k, v, less, **arguments)
        halves = []
        for columns in (slice(0, 2), slice(2, 4)):
            part = np.zeros_like(dense)
            part[:, :, columns] = dense[:, :, columns]
            half = BlockLayout.from_dense(part, block_size=what.block_size, seq_len=what.seq_len)
            halves.append(block_sparse_attention(q, k, v, half, **arguments))
        return halves[0][0] + halves[1][0], torch.logaddexp(halves[0][1], halves[1][1])

    with pytest.raises(AssertionError, match="off by"):
        assert_close_to_oracle(case, evaluate(case, wrong))
