"""The cost model against schedules worked out by hand, and against bounds that no schedule can beat."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_comm import CostModel, ExchangePlan, hiding_bandwidth, scaling_curve, step_time
from bs_comm.testing import plan_cases
from bs_patterns import BlockLayout

FAST = 1e30


def everyone_reads_all(world, block=4):
    blocks = np.ones((world, world), bool)
    return ExchangePlan.build(BlockLayout.from_dense(blocks, block_size=block, seq_len=world * block), world)


def test_one_rank_is_arithmetic_alone():
    plan = ExchangePlan.build(None, 1, seq_len=64, block_size=16, kv_heads=2)
    time = step_time(plan, CostModel(bandwidth=1.0, latency=1.0, flops=1e6), 8, 4, q_heads=6, batch=3)
    scores = 64 * 64 * 6 * 3
    assert time.forward.seconds == pytest.approx(scores * 2 * (8 + 4) / 1e6)
    assert time.backward.seconds == pytest.approx(scores * 2 * (3 * 8 + 2 * 4) / 1e6)
    assert time.is_hidden
    assert time.exposed_seconds == 0


def test_two_ranks_by_hand():
    """16 scores per block at 4·D FLOPs: 1 s each at 128 FLOP/s; 4 rows of 4 elements of 2 bytes travel."""
    plan = everyone_reads_all(2)
    compute = 16 * 2 * (2 + 2) / 128
    wire = 4 * 4 * 2
    fetch = 0.25 + wire / 8
    model = CostModel(bandwidth=8, latency=0.25, flops=128)
    forward = step_time(plan, model, 2, backward=False).forward
    assert forward.seconds == pytest.approx(max(compute, fetch) + compute)
    assert forward.compute_seconds == pytest.approx(2 * compute)
    assert forward.transfer_seconds == pytest.approx(fetch)
    assert forward.hidden_share == pytest.approx(1 - (fetch - compute) / fetch)

    both = step_time(plan, model, 2)
    home = 0.25 + 2 * wire / 8
    assert both.backward.seconds == pytest.approx(max(2.5 * compute, fetch) + 2.5 * compute + home)
    kept = step_time(plan, model, 2, keep_kv=True)
    assert kept.backward.seconds == pytest.approx(5 * compute + home)


def test_third_transfer_waits_for_a_buffer():
    """With two buffers the transfer of step 3 starts when step 1 is computed, however fast the link is."""
    plan = everyone_reads_all(4)
    model = CostModel(bandwidth=FAST, latency=10.0, flops=16 * 4)
    compute = 16 * 2 * 2 / 64
    # Arrivals at 10 and 20; step 1 is computed at 10 + c, by when the link is busy with step 2 until 20.
    assert step_time(plan, model, 1, backward=False).seconds == pytest.approx(30 + compute)
    slow = dataclasses.replace(model, flops=16 * 4 / 100)
    # Compute bound: 100 c per block; the third arrival waits for the first buffer and hides all the same.
    assert step_time(plan, slow, 1, backward=False).seconds == pytest.approx(4 * 100 * compute)


def test_links_between_nodes_are_their_own():
    plan = everyone_reads_all(4)
    near = CostModel(bandwidth=64, latency=0.0, flops=FAST)
    far = dataclasses.replace(near, ranks_per_node=2, node_bandwidth=16)
    wire = 4 * 2 * 2
    assert step_time(plan, near, 1, backward=False).seconds == pytest.approx(3 * wire / 64)
    # Each rank has one partner in its node and two outside.
    assert step_time(plan, far, 1, backward=False).seconds == pytest.approx(wire / 64 + 2 * wire / 16)
    one_node = dataclasses.replace(far, ranks_per_node=4)
    assert step_time(plan, one_node, 1, backward=False) == step_time(plan, near, 1, backward=False)


MODELS = st.builds(
    CostModel, bandwidth=st.floats(1, 1e6), latency=st.sampled_from([0.0, 1e-3, 1.0]), flops=st.floats(10, 1e6)
)


@given(plan_cases(), MODELS, st.booleans())
def test_no_schedule_beats_the_bounds(case, model, keep_kv):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    heads = layout.shape[0] if layout.shape[0] > 1 else kv_heads
    time = step_time(plan, model, 3, 5, q_heads=heads, keep_kv=keep_kv)
    traffic = plan.traffic(3, 5)
    per_head = 1 if layout.shape[0] > 1 else heads
    for phase, flops, moved in (
        (time.forward, 2 * (3 + 5), [traffic.forward]),
        (time.backward, 2 * (9 + 10), [traffic.backward] if keep_kv else [traffic.forward, traffic.backward]),
    ):
        busiest = plan.rank_work.max() * per_head * flops / model.flops
        assert phase.compute_seconds == pytest.approx(busiest)
        assert phase.seconds >= phase.compute_seconds * (1 - 1e-12)
        assert phase.seconds >= phase.transfer_seconds * (1 - 1e-12)
        for axis in (0, 1):
            link = sum((m / model.bandwidth + (m > 0) * model.latency).sum(axis) for m in moved)
            assert phase.transfer_seconds >= link.max() * (1 - 1e-12)
        assert 0 <= phase.hidden_share <= 1


@given(plan_cases(), MODELS, st.floats(1, 10))
def test_a_better_machine_is_never_slower(case, model, factor):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    base = step_time(plan, model, 4).seconds
    for change in (
        {"bandwidth": model.bandwidth * factor},
        {"latency": model.latency / factor},
        {"flops": model.flops * factor},
    ):
        assert step_time(plan, dataclasses.replace(model, **change), 4).seconds <= base * (1 + 1e-12)


def test_hiding_bandwidth_is_where_hiding_starts():
    plan = everyone_reads_all(4, block=64)
    model = CostModel(bandwidth=1.0, latency=0.0, flops=1e6)
    least = hiding_bandwidth(plan, model, 8, backward=False)
    at = dataclasses.replace(model, bandwidth=least)
    assert step_time(plan, at, 8, backward=False).is_hidden
    assert not step_time(plan, dataclasses.replace(at, bandwidth=least * 0.99), 8, backward=False).is_hidden
    # One block of 64 × 64 scores hides the transfer of one block: 2 · 2 bytes · 8 · 64 rows.
    compute = 64 * 64 * 4 * 8 / 1e6
    assert least == pytest.approx(64 * 16 * 2 / compute, rel=0.05)


def test_hiding_bandwidth_at_the_ends():
    model = CostModel(bandwidth=1.0, latency=1.0, flops=FAST)
    assert hiding_bandwidth(everyone_reads_all(2), model, 1) == math.inf
    alone = ExchangePlan.build(None, 1, seq_len=8, block_size=4)
    assert hiding_bandwidth(alone, model, 1) == 0.0


def test_scaling_curve_starts_at_one_and_loses_to_latency():
    def plan_of(world):
        return ExchangePlan.build(None, world, seq_len=1024, block_size=16, kv_heads=2)

    model = CostModel(bandwidth=1e9, latency=1e-4, flops=1e9)
    curve = scaling_curve(plan_of, [1, 2, 4, 8, 64], model, 16)
    assert [p.world_size for p in curve] == [1, 2, 4, 8, 64]
    assert curve[0].speedup == curve[0].efficiency == 1
    assert curve[1].speedup == pytest.approx(2, rel=0.02)
    assert curve[-1].efficiency < 0.95
    ideal = scaling_curve(plan_of, [1, 2, 4, 8, 64], CostModel(FAST, 0.0, 1e9), 16)
    assert [p.efficiency for p in ideal] == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, m: CostModel(0, 0, 1), ValueError, "bandwidth: expected a finite number > 0, got 0.0"),
        (lambda p, m: CostModel(1, -1, 1), ValueError, "latency: expected a finite number ≥ 0, got -1.0"),
        (lambda p, m: CostModel(1, 0, "fast"), TypeError, "flops: expected a finite number > 0, got 'fast'"),
        (lambda p, m: CostModel(1, 0, 1, node_latency=1.0), ValueError, "node_latency: expected None without"),
        (lambda p, m: step_time(p.T, m, 4), ValueError, "plan: expected a forward plan, got a transposed one"),
        (lambda p, m: step_time(p, m, 4, q_heads=3), ValueError, "q_heads: expected the layout's 2 heads, got 3"),
        (lambda p, m: step_time(p, m, 4, backward=False, keep_kv=True), ValueError, "keep_kv: expected False without"),
        (lambda p, m: step_time(p, m, 4, batch=0), ValueError, "batch: expected an integer ≥ 1, got 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    plan = ExchangePlan.build(BlockLayout.from_dense(np.ones((2, 2, 2), bool), block_size=4, seq_len=8), 2)
    with pytest.raises(error, match=message):
        call(plan, CostModel(1.0, 0.0, 1.0))


def test_query_heads_are_a_multiple_of_kv_heads():
    plan = ExchangePlan.build(None, 2, seq_len=8, block_size=4, kv_heads=2)
    with pytest.raises(ValueError, match="q_heads: expected a multiple of 2 kv heads, got 3"):
        step_time(plan, CostModel(1.0, 0.0, 1.0), 4, q_heads=3)
