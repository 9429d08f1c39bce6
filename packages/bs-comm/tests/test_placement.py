"""Placements: every token once, equal shares, aligned cuts, and the way there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_comm import Placement
from bs_comm.testing import layouts, owners
from bs_patterns import BlockLayout

RULES = ["contiguous", "zigzag", "stripe"]


@st.composite
def cases(draw):
    block = draw(st.integers(1, 5))
    return draw(owners(draw(st.integers(1, 60)), block, draw(st.integers(1, 7))))


@given(cases())
def test_every_token_has_one_place(place):
    tokens = np.concatenate([place.positions(r) for r in range(place.world_size)])
    assert sorted(tokens.tolist()) == list(range(place.seq_len))
    assert [len(place.positions(r)) for r in range(place.world_size)] == place.lengths.tolist()
    for rank in range(place.world_size):
        positions = place.positions(rank)
        assert (np.diff(positions) > 0).all()
        assert (place.owner[positions // place.block_size] == rank).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("blocks", [1, 2, 7, 15, 16, 17, 40])
def test_rules_share_blocks_evenly(rule, world, blocks):
    place = getattr(Placement, rule)(blocks * 4 - 1, world, block_size=4)
    counts = np.bincount(place.owner, minlength=world)
    assert counts.max() - counts.min() <= 1


def test_rules_by_hand():
    def owner(rule, blocks, world):
        return getattr(Placement, rule)(blocks, world, block_size=1).owner.tolist()

    assert owner("contiguous", 7, 3) == [0, 0, 0, 1, 1, 2, 2]
    assert owner("zigzag", 8, 2) == [0, 0, 1, 1, 1, 1, 0, 0]
    assert owner("stripe", 7, 3) == [0, 1, 2, 0, 1, 2, 0]


@given(cases(), st.booleans())
def test_unshard_undoes_shard(place, tensors):
    full = np.arange(2 * place.seq_len * 3).reshape(2, place.seq_len, 3)
    full = torch.from_numpy(full) if tensors else full
    shards = [place.shard(full, r) for r in range(place.world_size)]
    for rank, shard in enumerate(shards):
        assert (np.asarray(shard) == np.asarray(full)[:, place.positions(rank)]).all()
    back = place.unshard(shards)
    assert type(back) is type(full)
    assert (np.asarray(back) == np.asarray(full)).all()


def test_shard_along_another_dim_and_from_the_end():
    place = Placement.stripe(10, 2, block_size=2)
    x = torch.arange(10)
    assert place.shard(x, 1, dim=0).tolist() == [2, 3, 6, 7]
    assert place.shard(x.expand(3, 10), 0, dim=-1)[2].tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize("rule", RULES)
def test_gradients_flow_through_shard_and_unshard(rule):
    place = getattr(Placement, rule)(13, 3, block_size=2)
    x = torch.randn(1, 13, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 13, 2, dtype=torch.float64)
    (place.unshard([place.shard(x, r) for r in range(3)]) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_from_lengths_takes_uneven_and_empty_shards():
    place = Placement.from_lengths([8, 0, 4, 5], block_size=4)
    assert place.owner.tolist() == [0, 0, 2, 3, 3]
    assert place.lengths.tolist() == [8, 0, 4, 5]
    assert Placement.from_lengths([5, 0], block_size=4).lengths.tolist() == [5, 0]


@pytest.mark.parametrize("lengths", [[6, 10], [8, 3, 5], [2, 0, 14]])
def test_from_lengths_refuses_cuts_inside_a_block(lengths):
    with pytest.raises(ValueError, match=r"lengths: expected cuts at multiples of block_size 4, got a cut at token"):
        Placement.from_lengths(lengths, block_size=4)


def test_alignment_to_other_block_sizes():
    place = Placement.contiguous(24, 2, block_size=4)
    assert place.owner_of_blocks(2).tolist() == [0] * 6 + [1] * 6
    assert place.blocks(1, block_size=6).tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"expected cuts at multiples of block_size 8, got 1 of 1 cuts elsewhere, the "
                                         r"first at token 12"):  # fmt: skip
        place.check_aligned(8)


@given(layouts(square=True), st.integers(1, 6))
def test_cost_balanced_is_even_and_no_worse_than_the_rules(layout, world):
    place = Placement.cost_balanced(layout, world)
    block = place.block_size
    counts = np.bincount(place.owner, minlength=world)
    assert counts.max() - counts.min() <= 1

    work = np.zeros(len(place.owner), np.int64)
    for _, i, _ in np.argwhere(layout.to_dense()):
        start = i * layout.block_size[0]
        work[start // block] += min(layout.block_size[0], layout.seq_len[0] - start)

    def busiest(owner):
        return np.bincount(owner, work, world).max()

    limit = 1.05 * work.sum() / world
    rules = [getattr(Placement, rule)(layout.seq_len[0], world, block_size=block).owner for rule in RULES]
    assert busiest(place.owner) <= max(limit, min(busiest(owner) for owner in rules))
    assert place == Placement.cost_balanced(layout, world)


def test_cost_balanced_evens_out_what_the_rules_leave_skewed():
    blocks = 64
    rows = np.random.default_rng(0).random((blocks, blocks)) < np.linspace(0, 1, blocks)[:, None] ** 3
    layout = BlockLayout.from_dense(rows, block_size=4, seq_len=4 * blocks)
    work = rows.sum(1)

    def imbalance(place):
        return np.bincount(place.owner, work, 4).max() / work.sum() * 4

    assert imbalance(Placement.contiguous(256, 4, block_size=4)) > 2
    assert imbalance(Placement.zigzag(256, 4, block_size=4)) > 1.5
    assert imbalance(Placement.cost_balanced(layout, 4)) < 1.05


def test_cost_balanced_finds_keys_far_from_their_queries():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 8))
    layout = BlockLayout.from_dense(labels[:, None] == labels, block_size=4, seq_len=128)
    place = Placement.cost_balanced(layout, 4)
    same = {(int(a), int(b)) for a, b in zip(labels, place.owner, strict=True)}
    assert len(same) == 4, "each cluster of blocks that read one another is on one rank"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Placement.contiguous(0, 2), ValueError, "seq_len: expected an integer ≥ 1, got 0"),
        (lambda: Placement.zigzag(8, 0), ValueError, "world_size: expected an integer ≥ 1, got 0"),
        (lambda: Placement.stripe(8, 2, block_size=2.0), TypeError, "block_size: expected an integer ≥ 1, got 2.0"),
        (lambda: Placement.from_lengths([0, 0]), ValueError, "lengths: expected at least one token"),
        (lambda: Placement.from_lengths([-1, 65]), ValueError, r"lengths\[0\]: expected an integer ≥ 0, got -1"),
        (lambda: Placement.from_owner([0, 2], 8, 2, block_size=4), ValueError, r"owner: expected ranks in \[0, 1\]"),
        (lambda: Placement.from_owner([0], 8, 2, block_size=4), ValueError, "owner: expected one rank for each of 2"),
        (lambda: Placement.from_owner([0.0, 1.0], 8, 2, block_size=4), TypeError, "owner: expected integers"),
        (lambda: Placement.contiguous(8, 2).positions(2), ValueError, r"rank: expected an integer in \[0, 1\], got 2"),
        (lambda: Placement.contiguous(8, 2).shard(np.ones((1, 9)), 0), ValueError, "x: expected 8 tokens along dim 1"),
        (lambda: Placement.contiguous(8, 2).shard(np.ones(8), 0), ValueError, r"dim: expected an integer in \[-1, 0\]"),
        (lambda: Placement.contiguous(8, 2).unshard([np.ones((1, 8))]), ValueError, "shards: expected 2"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_cost_balanced_refuses_two_lengths():
    layout = BlockLayout.from_dense(np.ones((1, 2, 3), bool), block_size=4, seq_len=(8, 12))
    with pytest.raises(ValueError, match="layout: expected the same number of query and key tokens"):
        Placement.cost_balanced(layout, 2)


def test_value_semantics():
    a = Placement.contiguous(12, 3, block_size=4)
    b = Placement.stripe(12, 3, block_size=4)
    assert a == b
    assert hash(a) == hash(b)
    assert a != Placement.contiguous(11, 3, block_size=4)
    with pytest.raises(ValueError, match="read-only"):
        a.owner[0] = 1
