"""BlockSparseAdaptive over packed documents: none steers another one's picks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_kernels import block_sparse_attention
from bs_modules._gate_documents import read_documents
from bs_modules._gate_losses import block_mass
from bs_modules._gate_room import make_room
from bs_modules.testing import attention_inputs, small_gate
from bs_modules.testing.strategies import gate_kinds


@st.composite
def packed(draw, length):
    """Ids int64[2, length]: runs of any names, some shorter than a block, or ids that come back anywhere."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        return torch.randint(0, 3, (2, length), generator=generator)
    starts = torch.rand(2, length, generator=generator) < draw(st.sampled_from([0.05, 0.12, 0.4]))
    names = torch.stack([torch.randperm(length + 1, generator=generator) for _ in range(2)])
    return names.gather(1, starts.cumsum(1)) - 5


def runs(*lengths, batch=2):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(batch, -1)


def selected(layout):
    """bool[B, H, QB, KB]."""
    used = torch.arange(layout.indices.shape[-1]) < layout.counts[..., None]
    made = torch.zeros(layout.shape, dtype=torch.int64)
    return made.scatter_add_(-1, layout.indices.long(), used.long()) > 0


lengths = st.shared(st.integers(2, 45), key="length")


@given(
    kind=gate_kinds,
    ids=lengths.flatmap(packed),
    is_causal=st.booleans(),
    train=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_bit_of_a_documents_outputs_depends_on_the_tokens_of_others(kind, ids, is_causal, train, padded, seed):
    length = ids.shape[1]
    module = small_gate(seed, train, **kind, distill_rows=2)
    q, k, v = attention_inputs(length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(2, length, generator=generator) < 0.8 if padded else None
    own = ids == ids[:, int(torch.randint(length, (), generator=generator)), None]
    others = [torch.where(own[..., None, None], x, 9 * torch.randn(x.shape, generator=generator)) for x in (q, k, v)]
    outs = []
    for tensors in ((q, k, v), others):
        torch.manual_seed(7)  # the same noise
        outs.append(module(*tensors, is_causal, segment_ids=ids, key_padding_mask=real))
        torch.manual_seed(7)
        module.select(*tensors[:2], is_causal, segment_ids=ids, key_padding_mask=real).layout.validate()
    assert torch.equal(outs[0][own], outs[1][own])
    assert torch.isfinite(outs[0]).all()


@given(kind=gate_kinds, ids=lengths.flatmap(packed), is_causal=st.booleans(), seed=st.integers(0, 99))
def test_no_gradient_of_a_documents_outputs_reaches_others(kind, ids, is_causal, seed):
    module = small_gate(seed, True, **kind)
    q, k, v = attention_inputs(ids.shape[1], seed=seed, grad=True)
    own = ids == ids[:, -1:]
    module(q, k, v, is_causal, segment_ids=ids)[own].square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert (x.grad[~own] == 0).all()


@given(kind=gate_kinds, ids=lengths.flatmap(packed), is_causal=st.booleans(), seed=st.integers(0, 99))
def test_is_exact_attention_over_its_picks_whatever_the_documents_are_called(kind, ids, is_causal, seed):
    module = small_gate(seed, **kind)
    q, k, v = attention_inputs(ids.shape[1], seed=seed)
    made = module.select(q, k, is_causal, segment_ids=ids)
    out = module(q, k, v, is_causal, segment_ids=ids)
    exact = block_sparse_attention(
        *(x.double() for x in (q, k, v)), made.layout, segment_ids=ids, block_bias=made.bias, backend="reference"
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(module(q, k, v, is_causal, segment_ids=7 - ids), out)
    assert torch.equal(module(q, k, v, is_causal, segment_ids=(ids.int(), ids)), out)


@pytest.mark.parametrize("query_block", [1, 4])
def test_causal_rows_pick_within_their_document_and_spend_their_budget_there(query_block):
    ids = runs(18, 22, 3, 21)
    module = small_gate(query_block_size=query_block, base_sparsity=0.5)
    q, k, _ = attention_inputs(64)
    made = module.select(q, k, True, segment_ids=ids)
    room = module._room((64, 64), True, q.device, 4)
    first = torch.arange(0, 64, query_block)
    begin = torch.tensor([0, 18, 40, 43]).repeat_interleave(torch.tensor([18, 22, 3, 21]))[first]
    shares = torch.arange(16) >= begin[:, None] // 4
    picked = selected(made.layout)
    assert not (picked & ~shares).any()
    there = (shares & (torch.arange(16) <= (first + query_block - 1)[:, None] // 4)).sum(-1)
    assert torch.equal(made.layout.counts, torch.minimum(room.budget[0], there).expand(2, 4, -1))
    assert float(made.density) == pytest.approx(float(made.layout.counts[0, 0].sum()) / room.allowed)
    other = module.select(*attention_inputs(64, seed=1)[:2], True, segment_ids=ids)
    assert not torch.equal(selected(other.layout), picked), "the gate should choose, not the positions alone"


def test_blocks_that_documents_share_are_taken_by_distance_where_the_gate_may_not_read():
    """Not causal: a query block of two documents picks the nearest blocks of either; one of one document reads."""
    ids = runs(18, 22, batch=1)
    room = make_room((40, 40), (4, 4), False, 0.4, None, lambda _: None, torch.device("cpu"))
    packed_ = read_documents(ids, (1, 40, 40), (4, 4), False, room, None)
    of_both = 4  # tokens 16 to 19
    assert not packed_.room.readable[0, 0, of_both].any()
    assert packed_.room.unread[0, 0, of_both].all()
    inside = packed_.room.readable[0, 0]
    assert inside[:4, :4].all()
    assert inside[5:, 4:].all()  # a block speaks for the document of its last token
    assert packed_.room.unread[0, 0, :4, 4].all()
    assert not inside[:4, 4:].any()
    assert not inside[5:, :4].any()
    module = small_gate(base_sparsity=0.6, num_heads=1, num_kv_heads=1, hidden_dim=8)
    for seed in range(3):
        q, k, _ = attention_inputs(40, batch=1, heads=1, kv_heads=1, seed=seed)
        picked = selected(module.select(q, k, segment_ids=ids).layout)[0, 0]
        assert picked[of_both].nonzero().flatten().tolist() == [2, 3, 4, 5]
        assert picked[:4, 4].all()


def test_padding_that_is_a_document_of_its_own_is_not_picked():
    ids = runs(20, 20)
    real = ids == 0
    module = small_gate()
    q, k, v = attention_inputs(40)
    picked = selected(module.select(q, k, segment_ids=ids, key_padding_mask=real).layout)
    assert not picked[..., 5:].any()
    out = module(q, k, v, segment_ids=ids, key_padding_mask=real)
    assert (out[:, 20:] == 0).all()


def test_decoding_the_last_queries_of_packed_documents():
    ids = runs(11, 15, 11)
    module = small_gate(query_block_size=1)
    q, k, v = attention_inputs(37)
    whole = module(q, k, v, True, segment_ids=ids)
    part = module(q[:, -9:], k, v, True, segment_ids=(ids[:, -9:], ids))
    torch.testing.assert_close(part, whole[:, -9:])


def test_true_masses_stay_in_their_document():
    ids = runs(18, 22)
    q, k, _ = attention_inputs(40)
    mass = block_mass(q, k, torch.arange(10), (4, 4), True, 8**-0.5, None, (ids, ids))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, 10))
    assert (mass[:, :, 5:, :4] == 0).all()
    module = small_gate(train=True, distill_rows=10)
    module.select(q, k, True, segment_ids=ids)
    assert module.gate_losses["distillation"] > 0


def test_bad_ids():
    q, k, v = attention_inputs(16)
    module = small_gate()
    with pytest.raises(TypeError, match=r"segment_ids \(query\): expected an integer dtype, got torch.float32"):
        module(q, k, v, segment_ids=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"segment_ids \(query\): expected \[2, 16\], got \[2, 15\]"):
        module(q, k, v, segment_ids=torch.zeros(2, 15, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"segment_ids: expected int\[batch, S\] or a \(query, key\) pair, got str"):
        module(q, k, v, segment_ids="ab1")
    with pytest.raises(TypeError, match=r"segment_ids \(key\): expected a tensor, got list"):
        module(q, k, v, segment_ids=(torch.zeros(2, 16, dtype=torch.int64), []))
    with pytest.raises(ValueError, match=r"segment_ids: expected a \(query, key\) pair for lengths \(8, 16\)"):
        module(q[:, :8], k, v, segment_ids=torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="segment_ids: expected None with cache=True"):
        small_gate(cache=True)(q, k, v, segment_ids=torch.zeros(2, 16, dtype=torch.int64))
