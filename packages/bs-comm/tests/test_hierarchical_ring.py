"""The ring in two stages between real processes: attention, bytes, kept arrivals, failures."""

import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_comm import ExchangePlan, HierarchicalPlan, HierarchicalRing, PackedRing, RingPeerError
from bs_comm.testing import RankPool, dense_attention, plan_cases, ring_attention
from bs_patterns import GlobalLocal


def tensors(plan, q_heads, dtype=torch.float64):
    """The full q, k, v, dout of a plan, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    shapes = zip((0, 1, 1, 0), (q_heads, plan.kv_heads, plan.kv_heads, q_heads), (4, 4, 3, 3), strict=True)
    return [torch.randn(2, plan.seq_len[side], heads, dim, generator=g, dtype=dtype) for side, heads, dim in shapes]


def shards(plan, rank, full):
    places = (plan.placement, plan.kv_placement, plan.kv_placement, plan.placement)
    return [place.shard(x, rank) for place, x in zip(places, full, strict=True)]


def attend(rank, world, staged, q_heads):
    """This rank's results, and the rows that each stage's ring sent forward (a row is 7 elements of 8 bytes, twice)."""
    with HierarchicalRing(staged, batch=2, head_dim=4, value_head_dim=3, dtype=torch.float64) as ring:
        got = ring_attention(ring, *shards(staged.direct, rank, tensors(staged.direct, q_heads)))
        sent = []
        for stage in (ring.across, ring.within):
            assert (stage.sent_bytes["kv"] == 2 * stage.traffic.forward[rank]).all(), "forward, and again in backward"
            assert (stage.sent_bytes["grad"] == stage.traffic.backward[rank]).all()
            sent.append(int(stage.traffic.forward[rank].sum()) // (7 * 8 * 2))
    return got, sent


@settings(deadline=None)
@given(plan_cases(max_world=4), st.integers(1, 3))
def test_attention_over_two_stages_is_attention(ranks, case, size):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    staged = HierarchicalPlan.build(plan, size)
    q_heads = layout.heads if layout.heads > 1 else 2 * kv_heads
    results = ranks.run(attend, staged, q_heads, world_size=plan.world_size)
    q, k, v, dout = tensors(plan, q_heads)
    wanted = dense_attention(q, k, v, layout, dout)
    places = (place, place, kv_place, kv_place)
    for where, parts, want in zip(places, zip(*(got for got, _ in results), strict=True), wanted, strict=True):
        torch.testing.assert_close(where.unshard(list(parts)), want, rtol=1e-12, atol=1e-13)
    across, within = (sum(sent[i] for _, sent in results) for i in (0, 1))
    assert across == staged.across.rows.sum()
    if plan.seq_len[1] % plan.block_size[1] == 0:
        assert within == staged.within.rows.sum()
    else:  # a short last block is passed on in full size
        assert within >= staged.within.rows.sum()


def keeps(rank, world, staged):
    plan = staged.direct
    _, k, v, _ = shards(plan, rank, tensors(plan, 2, torch.float32))
    seen = []

    def share(arrival):
        seen.append((arrival.step, arrival.peer, arrival.kv_start.tolist()))
        return arrival.k * (rank + 1), arrival.v * (rank + 2)

    with HierarchicalRing(staged, batch=2, head_dim=4, value_head_dim=3) as ring:
        assert ring.forward(k, v, share) is None
        kept = ring.forward(k, v, lambda arrival: None, keep=True)
        steps = [step for step, _, _ in seen]
        assert steps == sorted(set(steps))
        again = ring.backward(k, v, share)
        before = [stage.sent_bytes["kv"].sum() for stage in (ring.across, ring.within)]
        home = ring.backward(k, v, share, kept=kept)
        assert [stage.sent_bytes["kv"].sum() for stage in (ring.across, ring.within)] == before
    assert all(torch.equal(a, b) for a, b in zip(again, home, strict=True)), "the same bits, kept or fetched again"
    with PackedRing(plan, batch=2, head_dim=4, value_head_dim=3) as ring:
        direct = ring.backward(k, v, share)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(direct, home, strict=True))


def test_kept_arrivals_save_the_second_transfer(ranks):
    layout = GlobalLocal(global_tokens=8, window_size=16).layout(59, block_size=4, causal=True)
    ranks.run(keeps, HierarchicalPlan.build(ExchangePlan.build(layout, 4, "zigzag", 2), 2), world_size=4)


def test_dense_rings_too(ranks):
    dense = ExchangePlan.build(None, 4, "zigzag", 2, seq_len=37, block_size=4, causal=True)
    staged = HierarchicalPlan.build(dense, 2)
    results = ranks.run(attend, staged, 2, world_size=4)
    q, k, v, dout = tensors(dense, 2)
    full = GlobalLocal(global_tokens=37, window_size=37).layout(37, block_size=4, causal=True)
    wanted = dense_attention(q, k, v, full, dout)
    for parts, want in zip(zip(*(got for got, _ in results), strict=True), wanted, strict=True):
        torch.testing.assert_close(dense.placement.unshard(list(parts)), want, rtol=1e-12, atol=1e-13)


def die(rank, world, staged, victim, in_second):
    x = torch.ones(1, int(staged.direct.kv_placement.lengths[rank]), 1, 4)
    ring = HierarchicalRing(staged, batch=1, head_dim=4, hop_timeout=10)

    def callback(arrival):
        if rank == victim and (arrival.step > staged.across.num_steps) == in_second:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RingPeerError) as caught:
        ring.forward(x, x, callback)
    ring.close()
    return caught.value.peer


@pytest.mark.parametrize("in_second", [False, True], ids=["first stage", "second stage"])
def test_every_survivor_names_a_rank_that_dies(in_second):
    staged = HierarchicalPlan.build(ExchangePlan.build(None, 4, seq_len=32, block_size=4), 2)
    with RankPool(4) as pool:
        pool.start(die, staged, 1, in_second)
        assert pool.collect(60, ranks=[0, 2, 3]) == [1, 1, 1]


def test_misuse_is_told():
    plan = ExchangePlan.build(None, 1, seq_len=8, block_size=4)
    with pytest.raises(TypeError, match="plan: expected a HierarchicalPlan, got ExchangePlan"):
        HierarchicalRing(plan, batch=1, head_dim=4)
    ring = HierarchicalRing(HierarchicalPlan.build(plan, 2), batch=1, head_dim=4)
    x = torch.zeros(1, 8, 1, 4)
    with pytest.raises(TypeError, match=r"on_arrival: expected \(dk, dv\)"):
        ring.backward(x, x, lambda arrival: None)
    with pytest.raises(ValueError, match="k: expected shape"):
        ring.forward(x[:, :4], x, lambda arrival: None)
