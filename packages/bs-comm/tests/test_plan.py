"""The exchange plan against the obvious model: sets of tuples."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_comm import ExchangePlan, Placement
from bs_comm.testing import all_transfers, layouts, model_matchings_hold, model_needs, model_work, plan_cases
from bs_patterns import BlockLayout


def tokens_of(plan, block):
    return min(plan.block_size[1], plan.seq_len[1] - block * plan.block_size[1])


@given(plan_cases())
def test_every_need_is_met_exactly_once(case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    needs = model_needs(layout, place, kv_place, kv_heads)
    found = all_transfers(plan)
    assert len(found) == len(set(found))
    assert set(found) == needs
    for rank in range(plan.world_size):
        mine = sorted((h, b) for _, r, h, b in needs if r == rank)
        assert list(zip(*(x.tolist() for x in plan.needs(rank)), strict=True)) == mine


@given(plan_cases())
def test_bytes_are_the_direct_exchange_lower_bound(case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    needs = model_needs(layout, place, kv_place, kv_heads)
    rows = np.zeros_like(plan.rows)
    for s, r, _, block in needs:
        rows[s, r] += tokens_of(plan, block)
    assert (plan.rows == rows).all()
    assert (plan.needed_rows == rows.sum(0)).all()
    traffic = plan.traffic(8, 5, batch=3, kv_itemsize=2, grad_itemsize=4)
    assert (traffic.forward == rows * 13 * 3 * 2).all()
    assert (traffic.backward == rows.T * 13 * 3 * 4).all()
    assert traffic.forward.sum() == traffic.forward_bound
    assert traffic.backward.sum() == traffic.backward_bound


@given(plan_cases())
def test_work_is_what_the_active_blocks_cost(case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    work = model_work(layout, place, kv_place)
    assert (plan.work == work).all()
    assert (plan.rank_work == work.sum(0)).all()
    if work.sum():
        assert plan.work_imbalance == pytest.approx(work.sum(0).max() / work.sum(0).mean())


@given(plan_cases(max_world=9))
def test_matchings_are_matchings_and_as_few_as_can_be(case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    assert model_matchings_hold(plan)
    busy = plan.rows > 0
    assert plan.num_steps == max(busy.sum(0).max(), busy.sum(1).max())


@given(plan_cases())
def test_the_transposed_plan_takes_everything_home(case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    home = plan.T
    assert home.T is plan
    assert set(all_transfers(home)) == {(r, s, h, b) for s, r, h, b in all_transfers(plan)}
    assert model_matchings_hold(home)
    assert (home.step == plan.step.T).all()
    assert home.digest != plan.digest
    assert (home.traffic(4).backward == plan.traffic(4).backward).all()
    for rank in range(plan.world_size):
        assert all((a == b).all() for a, b in zip(home.needs(rank), plan.needs(rank), strict=True))


@given(plan_cases(), st.integers(1, 4))
def test_rows_within_and_across_nodes(case, ranks_per_node):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    within, across, once = 0, 0, set()
    for s, r, head, block in model_needs(layout, place, kv_place, kv_heads):
        if s // ranks_per_node == r // ranks_per_node:
            within += tokens_of(plan, block)
        else:
            across += tokens_of(plan, block)
            once.add((r // ranks_per_node, head, block))
    got = plan.node_rows(ranks_per_node)
    assert (got.within, got.across) == (within, across)
    assert got.across_once == sum(tokens_of(plan, block) for _, _, block in once)
    assert plan.T.node_rows(ranks_per_node) == got


@given(layouts(square=True), st.integers(1, 5), st.sampled_from(["contiguous", "zigzag", "stripe", "cost_balanced"]))
def test_placements_by_name(layout, world, name):
    plan = ExchangePlan.build(layout, world, name)
    assert plan.placement.name == name
    assert set(all_transfers(plan)) == model_needs(layout, plan.placement, plan.placement, layout.shape[0])


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(1, 5), st.data()
)  # fmt: skip
def test_a_dense_ring_is_the_plan_of_the_full_layout(len_q, len_k, block, causal, world, data):
    places = tuple(
        getattr(Placement, data.draw(st.sampled_from(["contiguous", "zigzag", "stripe"])))(n, world, block_size=block)
        for n in (len_q, len_k)
    )
    dense = ExchangePlan.build(None, world, places, 2, seq_len=(len_q, len_k), block_size=block, causal=causal)
    shape = (1, -(-len_q // block), -(-len_k // block))
    full = BlockLayout.from_dense(np.ones(shape, bool), block_size=block, seq_len=(len_q, len_k), causal=causal)
    sparse = ExchangePlan.build(full, world, places, 2)
    assert all_transfers(dense) == all_transfers(sparse)
    assert (dense.rows == sparse.rows).all()
    assert (dense.needed_rows == sparse.needed_rows).all()
    assert (dense.work == sparse.work).all()
    assert (dense.step == sparse.step).all()
    if not causal and places[0].lengths.all():
        assert dense.rows.sum() == dense.dense_rows


def test_heads_that_share_a_kv_head_fetch_a_block_once():
    mask = np.zeros((4, 2, 2), bool)
    mask[:, 0, 1] = [True, True, False, False]
    layout = BlockLayout.from_dense(mask, block_size=4, seq_len=8)
    assert all_transfers(ExchangePlan.build(layout, 2, kv_heads=2)) == [(1, 0, 0, 1)]
    assert all_transfers(ExchangePlan.build(layout, 2, kv_heads=4)) == [(1, 0, 0, 1), (1, 0, 1, 1)]


def test_pairs_without_traffic_cost_no_step():
    """Ranks 0 and 1 read two ranks on, rank 3 reads the one before: shifts 1 and 2 are used, 3 is not."""
    blocks = BlockLayout.from_coo(0, [0, 1, 3], [2, 3, 2], block_size=4, seq_len=16)
    plan = ExchangePlan.build(blocks, 4)
    assert [plan.matching(s).tolist() for s in (1, 2)] == [[[2, 3]], [[2, 0], [3, 1]]]
    assert ExchangePlan.build(BlockLayout.from_coo(0, [0, 1], [0, 1], block_size=4, seq_len=8), 2).num_steps == 0


def test_colouring_beats_the_ring_where_shifts_differ():
    """A permutation with many different shifts fits into one step."""
    reads = [3, 2, 0, 1, 6, 7, 4, 5]
    plan = ExchangePlan.build(BlockLayout.from_coo(0, range(8), reads, block_size=2, seq_len=16), 8)
    assert plan.num_steps == 1
    assert plan.matching(1).tolist() == sorted([s, r] for r, s in enumerate(reads))


def test_digest_is_stable_and_tells_plans_apart():
    layout = BlockLayout.from_coo(0, [0, 1, 2, 3], [3, 0, 1, 2], block_size=4, seq_len=16)
    plans = [
        ExchangePlan.build(layout, 2),
        ExchangePlan.build(layout, 4),
        ExchangePlan.build(layout, 2, "stripe"),
        ExchangePlan.build(layout, 2, kv_heads=2),
        ExchangePlan.build(layout.as_causal(), 2),
        ExchangePlan.build(None, 2, seq_len=16, block_size=4),
        ExchangePlan.build(None, 2, seq_len=16, block_size=4, causal=True),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert plans[0] == ExchangePlan.build(layout, 2)
    code = (
        "from bs_comm import ExchangePlan; from bs_patterns import BlockLayout\n"
        "layout = BlockLayout.from_coo(0, [0, 1, 2, 3], [3, 0, 1, 2], block_size=4, seq_len=16)\n"
        "print(ExchangePlan.build(layout, 2).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == plans[0].digest


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: ExchangePlan.build(f, 0), ValueError, "world_size: expected an integer ≥ 1, got 0"),
        (lambda f: ExchangePlan.build(f, 2, "diagonal"), ValueError, "placement: expected one of contiguous, zigzag"),
        (lambda f: ExchangePlan.build(f, 2, 3), TypeError, "placement: expected a name, a Placement or"),
        (lambda f: ExchangePlan.build(f, 2, Placement.contiguous(16, 3, block_size=4)), ValueError, "for 2 ranks"),
        (lambda f: ExchangePlan.build(f, 2, Placement.contiguous(12, 2, block_size=4)), ValueError, "16 query tokens"),
        (
            lambda f: ExchangePlan.build(f, 2, Placement.stripe(16, 2, block_size=2)),
            ValueError,
            "expected cuts at mult",
        ),
        (lambda f: ExchangePlan.build(f, 2, kv_heads=3), ValueError, "kv_heads: expected a divisor of the layout's 4"),
        (lambda f: ExchangePlan.build(f, 2, seq_len=16), ValueError, "seq_len: expected None, because the layout"),
        (lambda f: ExchangePlan.build(f, 2, block_size=4), ValueError, "block_size: expected None, because the layout"),
        (lambda f: ExchangePlan.build(f, 2, causal=True), ValueError, "causal: expected None, because the layout"),
        (lambda f: ExchangePlan.build(None, 2), ValueError, "seq_len: expected the number of tokens"),
        (lambda f: ExchangePlan.build(None, 2, "cost_balanced", seq_len=8), ValueError, "cost_balanced.* layout"),
        (lambda f: ExchangePlan.build(None, 2, seq_len=(8, 9)), ValueError, r"expected a \(query, key\) pair"),
        (lambda f: ExchangePlan.build(np.ones(3), 2), TypeError, "layout: expected a BlockLayout or None, got ndarray"),
        (lambda f: ExchangePlan.build(f, 2).matching(0), ValueError, "step: expected an integer in"),
        (lambda f: ExchangePlan.build(f, 2).transfer(0, 2), ValueError, "receiver: expected an integer in"),
        (lambda f: ExchangePlan.build(f, 2).traffic(0), ValueError, "head_dim: expected an integer ≥ 1, got 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    mask = np.ones((4, 4, 4), bool)
    with pytest.raises(error, match=message):
        call(BlockLayout.from_dense(mask, block_size=4, seq_len=16))


def test_a_million_tokens_over_sixty_four_ranks():
    blocks, world = 2**14, 64
    row = np.repeat(np.arange(blocks), 9)
    column = np.clip(row - np.tile(np.arange(9), blocks), 0, None)
    layout = BlockLayout.from_coo(0, row, column, block_size=64, seq_len=2**20, causal=True)
    plan = ExchangePlan.build(layout, world, "contiguous", 8)
    # A window of 8 blocks back: each rank but the first reads 8 blocks of the one before, and nothing else.
    assert plan.num_steps == 1
    assert plan.rows.sum() == (world - 1) * 8 * 64 * 8
