"""BlockSparseAdaptive: nothing is read ahead, and no padding."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_modules.testing import attention_inputs, small_gate
from bs_modules.testing.strategies import gate_kinds


def changed_after(last, seed, *tensors):
    made = [x.clone() for x in tensors]
    generator = torch.Generator().manual_seed(seed + 1)
    for x in made:
        x[:, last + 1 :] = 3 * torch.randn(x[:, last + 1 :].shape, generator=generator)
    return made


@given(kind=gate_kinds, length=st.integers(2, 45), at=st.floats(0, 1), train=st.booleans(), seed=st.integers(0, 99))
def test_later_tokens_do_not_change_a_bit_of_earlier_picks_and_outputs(kind, length, at, train, seed):
    module = small_gate(seed, train, **kind, distill_rows=2)
    last = int(at * (length - 1))  # everything up to this position stays
    q, k, v = attention_inputs(length, seed=seed)
    outs, picks = [], []
    for arguments in ((q, k, v), changed_after(last, seed, q, k, v)):
        torch.manual_seed(7)  # the same noise
        outs.append(module(*arguments, True))
        torch.manual_seed(7)
        picks.append(module.select(*arguments[:2], True))
    assert torch.equal(outs[0][:, : last + 1], outs[1][:, : last + 1])
    rows = slice(last // module.sparse_config.blocks[0] + 1)  # every block that starts up to there
    one, two = (made.layout for made in picks)
    assert torch.equal(one.counts[:, :, rows], two.counts[:, :, rows])
    used = torch.arange(one.indices.shape[-1]) < one.counts[:, :, rows, None]
    assert torch.equal(one.indices[:, :, rows][used], two.indices[:, :, rows][used])
    if picks[0].bias is not None:
        assert torch.equal(picks[0].bias[:, :, rows], picks[1].bias[:, :, rows])


@given(kind=gate_kinds, length=st.integers(2, 45), at=st.floats(0, 1), seed=st.integers(0, 99))
def test_no_gradient_of_earlier_outputs_reaches_later_tokens(kind, length, at, seed):
    module = small_gate(seed, True, **kind)
    last = int(at * (length - 1))
    q, k, v = attention_inputs(length, seed=seed, grad=True)
    module(q, k, v, True)[:, : last + 1].square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert (x.grad[:, last + 1 :] == 0).all()


def test_nan_after_a_position_does_not_reach_it():
    module = small_gate(query_block_size=1)
    q, k, v = attention_inputs(40)
    before = module(q, k, v, True)
    for x in (q, k, v):
        x[:, 23:] = float("nan")
    assert torch.equal(module(q, k, v, True)[:, :23], before[:, :23])


def test_decoding_one_query_at_a_time_is_the_last_row():
    module = small_gate(query_block_size=1)
    q, k, v = attention_inputs(37)
    whole = module(q, k, v, True)
    torch.testing.assert_close(module(q[:, -1:], k, v, True), whole[:, -1:])
    torch.testing.assert_close(module(q[:, -9:], k, v, True), whole[:, -9:])


def test_padding_is_neither_pooled_nor_preferred():
    module = small_gate(base_sparsity=0.5)
    q, k, v = attention_inputs(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[:, 20:30] = False
    out = module(q, k, v, key_padding_mask=real)
    layout = module.select(q, k, key_padding_mask=real).layout
    used = layout.indices[layout.counts[..., None] > torch.arange(layout.indices.shape[-1])]
    assert not ((used == 5) | (used == 6)).any()  # 5 of 10 blocks, and two of the ten hold padding alone
    k[:, 20:30], v[:, 20:30] = 1e3, float("nan")
    assert torch.equal(module(q, k, torch.nan_to_num(v), key_padding_mask=real), out)
