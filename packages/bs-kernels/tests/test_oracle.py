"""Every backend against the float64 dense oracle, forward and all gradients, over the whole argument space."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bs_kernels import block_sparse_attention, explain_backends
from bs_kernels.dispatch import BACKENDS
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_kernels.testing.strategies import ARGUMENTS, cases


def can_run(case, name):
    leaves = {n: x.detach().clone().requires_grad_() for n, x in case.leaves.items()}
    asked = case.with_leaves(leaves)
    table = explain_backends(asked.q, asked.k, asked.v, asked.layout, **asked.arguments)
    return next(report.supported for report in table if report.name == name)


#: What can compute a plain call here; backends for other devices have their own tests.
NAMES = [
    backend.name
    for backend in BACKENDS
    if can_run(make_case(make_layout(np.random.default_rng(0), seq_len=(8, 8), block_size=(4, 4))), backend.name)
]

#: What a backend does not refuse, where that is less than everything.
PART = {"native": {"dtypes": (torch.float32, torch.bfloat16, torch.float16)}}


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_call_matches_the_oracle(name, data):
    case = data.draw(cases(**PART.get(name, {})))
    assume(can_run(case, name))
    check_against_oracle(case, backend=name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
@pytest.mark.parametrize("argument", ARGUMENTS)
@given(data=st.data())
def test_each_argument_alone(argument, name, data):
    case = data.draw(cases(arguments=(), required=(argument,), **PART.get(name, {})))
    assume(can_run(case, name))
    check_against_oracle(case, backend=name)


EXCLUSIVE = ({"attn_bias", "bool_bias"}, {"order", "batched"})
PAIRS = [pair for pair in combinations(ARGUMENTS, 2) if set(pair) not in EXCLUSIVE]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_arguments_in_pairs(pair):
    def sized(*dtypes):
        return cases(arguments=(), required=pair, dtypes=dtypes, query_blocks=(4,), key_blocks=(7,))

    @settings(max_examples=3)  # 76 pairs; sizes are explored elsewhere
    @given(case=sized(torch.float64), narrow=sized(*PART["native"]["dtypes"]))
    def check(case, narrow):
        for name in ("torch", "reference"):
            check_against_oracle(case, backend=name)
        if can_run(narrow, "native"):
            check_against_oracle(narrow, backend="native")

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "block_size", [(16, 16), (64, 64), (128, 128), (1, 64), (64, 16), (16, 256), (512, 512)], ids=str
)
def test_block_sizes_and_dtypes(block_size, dtype):
    layout = make_layout(np.random.default_rng(1), seq_len=(300, 530), block_size=block_size, heads=4, density=0.4)
    case = make_case(layout, batch=1, q_heads=4, kv_heads=2, head_dim=32, value_dim=40, dtype=dtype, causal=True)
    for name in NAMES:
        if can_run(case, name):
            check_against_oracle(case, backend=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [30.0, 100.0])
def test_extreme_logits(name, spread):
    # Scores have deviation spread², so they reach ±10⁴ and beyond: exp overflows without the maximum taken out.
    layout = make_layout(np.random.default_rng(2), seq_len=(70, 90), block_size=(16, 16), density=0.6)
    case = make_case(layout, head_dim=16, spread=spread, dtype=torch.float32)
    if can_run(case, name):
        got = check_against_oracle(case, backend=name)
        assert all(x.isfinite().all() for key, x in got.items() if key != "lse")
        assert got["lse"][got["lse"].isfinite()].abs().max() > (1e3 if spread < 50 else 1e4)


def extreme(density):
    layout = make_layout(np.random.default_rng(0), seq_len=(33, 47), block_size=(16, 16), heads=2, density=density)
    return make_case(layout, batch=2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "density"), [(b.name, d) for b in BACKENDS for d in (0.0, 1.0) if can_run(extreme(d), b.name)]
)
def test_empty_and_full_layouts(name, density):
    case = extreme(density)
    got = check_against_oracle(case, backend=name)
    if density == 0:
        assert all((x == 0).all() for key, x in got.items() if key != "lse")
        assert (got["lse"] == -torch.inf).all()


def test_long_rows_are_split_into_pieces(monkeypatch):
    """A row whose scores exceed the workspace is computed in pieces that merge."""
    from bs_kernels.backends import torch_blocks

    monkeypatch.setattr(torch_blocks, "_PER_THREAD", 3 * 8 * (8 + 8 + 8))  # three blocks of scores
    monkeypatch.setattr(torch_blocks, "_MOST_THREADS", 1)
    for heads in (1, 4):
        layout = make_layout(np.random.default_rng(3), seq_len=(40, 100), block_size=(8, 8), heads=heads, density=0.7)
        case = make_case(
            layout, batch=2, q_heads=4, kv_heads=2, sinks=True, attn_bias=True, block_bias=True, window=(60, 9)
        )
        check_against_oracle(case, backend="torch")


@pytest.mark.parametrize("strides", ["expanded", "transposed", "sliced"])
def test_inputs_need_not_be_contiguous(strides):
    layout = make_layout(np.random.default_rng(4), seq_len=(50, 50), block_size=(16, 16), density=0.5)
    case = make_case(layout, batch=2, q_heads=2, kv_heads=2, head_dim=8)
    views = {
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    }
    q, k, v = (views[strides](x) for x in (case.q, case.k, case.v))
    for name in NAMES:
        if can_run(case, name):
            got = block_sparse_attention(q, k, v, layout, backend=name)
            want = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, backend=name)
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_zero_size_batch(name):
    layout = make_layout(np.random.default_rng(5), seq_len=(20, 20), block_size=(8, 8))
    q = torch.zeros(0, 20, 2, 16, requires_grad=True)
    out, lse = block_sparse_attention(q, q, q, layout, return_lse=True, backend=name)
    assert out.shape == (0, 20, 2, 16)
    assert lse.shape == (0, 2, 20)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
