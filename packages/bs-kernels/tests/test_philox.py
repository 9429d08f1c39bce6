"""Dropout bits: the published known answers, the rate, and one mask for every backend and every cut of the work."""

import numpy as np
import pytest
import torch

from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels.philox import dropout_threshold, keep_mask, philox_word
from bs_kernels.testing import make_case, make_layout

#: Philox4x32-10 of the Random123 distribution's known-answer file: counter, key, first word of the result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN)
def test_known_answers(counter, key, word):
    words = tuple(torch.tensor(c) for c in counter)
    seed = key[0] | key[1] << 32
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert int(philox_word(words, signed)) == word
    assert int(philox_word(words, torch.tensor(signed))) == word


def test_threshold():
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(0.1) == 429496729
    assert dropout_threshold(0.0) == 0


def test_negative_positions_are_their_low_32_bits():
    at = torch.tensor
    below = philox_word((at(0), at(0), at(-5), at(0)), 3)
    assert int(below) == int(philox_word((at(0), at(0), at(2**32 - 5), at(0)), 3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    n = 400
    query, key = torch.arange(n)[:, None], torch.arange(n)
    kept = keep_mask(torch.tensor(0), torch.tensor(1), query, key, 42, p).double()
    deviation = (p * (1 - p) / n**2) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
    rows = kept.mean(1)
    assert abs(rows.std().item() / (p * (1 - p) / n) ** 0.5 - 1) < 0.25


def test_backends_drop_the_same_entries():
    layout = make_layout(np.random.default_rng(0), seq_len=(40, 40), block_size=(8, 8), heads=2, density=0.6)
    case = make_case(layout, batch=2, dtype=torch.float64)
    a, b = (
        block_sparse_attention(case.q, case.k, case.v, layout, dropout_p=0.4, dropout_seed=9, backend=name)
        for name in ("torch", "reference")
    )
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    other = block_sparse_attention(case.q, case.k, case.v, layout, dropout_p=0.4, dropout_seed=10, backend="torch")
    assert not torch.allclose(a, other)


def test_a_chunk_of_queries_drops_what_the_whole_drops():
    layout = make_layout(np.random.default_rng(1), seq_len=(64, 64), block_size=(16, 16), density=0.7, causal=True)
    case = make_case(layout, dtype=torch.float64)
    dropout = {"dropout_p": 0.3, "dropout_seed": 5}
    whole = block_sparse_attention(case.q, case.k, case.v, layout, **dropout)
    rows = layout.rows_at(24, 48)
    plan = LayoutPlan.build(rows, TokenMask(causal=True), q_start=24)
    keys = rows.seq_len[1]
    part = block_sparse_attention(case.q[:, 24:48], case.k[:, :keys], case.v[:, :keys], plan, **dropout)
    torch.testing.assert_close(part, whole[:, 24:48], rtol=1e-12, atol=1e-12)


def test_without_a_seed_torch_draws_it():
    layout = make_layout(np.random.default_rng(0), seq_len=(32, 32), block_size=(8, 8), density=1.0)
    case = make_case(layout)

    def draw():
        return block_sparse_attention(case.q, case.k, case.v, layout, dropout_p=0.5)

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
