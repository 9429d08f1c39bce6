"""The exchange in two stages against sets of tuples, and its times worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_comm import CostModel, ExchangePlan, HierarchicalPlan, PackedRing, hierarchical_transfer, step_time
from bs_comm.testing import all_transfers, model_matchings_hold, model_needs, plan_cases
from bs_patterns import BlockLayout


@given(plan_cases(max_world=7), st.integers(1, 4))
def test_every_reader_gets_what_it_needs_once_and_every_node_fetches_it_once(case, size):
    layout, place, kv_place, kv_heads = case
    direct = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    staged = HierarchicalPlan.build(direct, size)
    across, within = all_transfers(staged.across), all_transfers(staged.within)
    needs = model_needs(layout, place, kv_place, kv_heads)
    got = [(r, h, b) for _, r, h, b in across + within]
    assert sorted(got) == sorted((r, h, b) for _, r, h, b in needs), "each need is met once, and nothing else moves"
    crossings = [(r // size, h, b) for _, r, h, b in across]
    assert len(crossings) == len(set(crossings))
    assert all(s // size != r // size for s, r, _, _ in across)
    assert all(s // size == r // size for s, r, _, _ in within)
    owner = {(h, b): s for s, _, h, b in needs}
    assert all(owner[h, b] == s for s, _, h, b in across)
    fetched = {(r, h, b) for _, r, h, b in across}
    assert all(owner[h, b] == s or (s, h, b) in fetched for s, _, h, b in within), "senders have what they send"
    assert model_matchings_hold(staged.across)
    assert model_matchings_hold(staged.within)
    rows = direct.node_rows(size)
    assert staged.across.rows.sum() == rows.across_once
    assert staged.across.rows.sum() + staged.within.rows.sum() == direct.rows.sum()
    for stage in (staged.across, staged.within):
        assert (stage.needed_rows == stage.rows.sum(0)).all()
        assert sorted(all_transfers(stage.T)) == sorted((r, s, h, b) for s, r, h, b in all_transfers(stage))


def test_readers_of_a_node_take_turns():
    """Two nodes of three ranks; the second node's ranks all read all 12 blocks of rank 0."""
    mask = np.zeros((72, 72), bool)
    mask[36:, :12] = True
    plan = ExchangePlan.build(BlockLayout.from_dense(mask, block_size=1, seq_len=72), 6)
    staged = HierarchicalPlan.build(plan, 3)
    assert staged.across.rows[0].tolist() == [0, 0, 0, 4, 4, 4]
    assert (staged.within.rows[3:, 3:] == 4 * (1 - np.eye(3))).all()
    assert staged.num_steps == 3 + 2
    assert plan.rows[0].tolist() == [0, 0, 0, 12, 12, 12]


def test_times_by_hand():
    """Four ranks in two nodes, all read all; a row of K and V is 4 bytes."""
    plan = ExchangePlan.build(None, 4, seq_len=16, block_size=2)
    model = CostModel(bandwidth=8, latency=0.5, flops=1.0, ranks_per_node=2, node_bandwidth=1, node_latency=2.0)
    staged = HierarchicalPlan.build(plan, 2)
    # Each rank fetches one of the two blocks of each outside rank, then trades own 4 rows and fetched 4 rows.
    across, within = 2 * (2 + 2 * 4 / 1), 0.5 + 8 * 4 / 8
    (forward,) = hierarchical_transfer(staged, model, 1, backward=False)
    assert forward == pytest.approx(across + within)
    direct = step_time(plan, model, 1, backward=False).forward.transfer_seconds
    assert direct == pytest.approx(0.5 + 4 * 4 / 8 + 2 * (2 + 4 * 4 / 1))
    both = hierarchical_transfer(staged, model, 1)
    assert both[0] == forward
    assert both[1] > both[0]


def test_one_node_and_nodes_of_one_rank_are_the_direct_exchange():
    plan = ExchangePlan.build(None, 4, seq_len=16, block_size=2)
    one, single = HierarchicalPlan.build(plan, 4), HierarchicalPlan.build(plan, 1)
    assert one.across.num_steps == single.within.num_steps == 0
    assert (one.within.rows == plan.rows).all()
    assert (single.across.rows == plan.rows).all()
    assert HierarchicalPlan.build(ExchangePlan.build(None, 1, seq_len=8), 8).num_steps == 0


def test_misuse_is_told():
    plan = ExchangePlan.build(None, 4, seq_len=16, block_size=2)
    staged = HierarchicalPlan.build(plan, 2)
    for stage in (staged.across, staged.within):
        with pytest.raises(ValueError, match="plan: expected a direct forward ExchangePlan"):
            PackedRing(stage, batch=1, head_dim=4)
        with pytest.raises(ValueError, match="plan: expected a direct forward plan"):
            HierarchicalPlan.build(stage, 2)
    with pytest.raises(ValueError, match="plan: expected a direct forward plan"):
        HierarchicalPlan.build(plan.T, 2)
    with pytest.raises(TypeError, match="plan: expected an ExchangePlan, got int"):
        HierarchicalPlan.build(4, 2)
    with pytest.raises(ValueError, match="ranks_per_node: expected an integer ≥ 1, got 0"):
        HierarchicalPlan.build(plan, 0)
    with pytest.raises(ValueError, match="model: expected 2 ranks per node, got None"):
        hierarchical_transfer(staged, CostModel(1.0, 0.0, 1.0), 4)
