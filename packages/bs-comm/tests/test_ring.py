"""The ring between real processes: what arrives, what comes home, how many bytes, and attention over it."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_comm import ExchangePlan, PackedRing, Placement, RingMismatchError, RingPeerError, RollCall
from bs_comm.testing import RankError, dense_attention, plan_cases, ring_attention
from bs_memory import BufferPool
from bs_patterns import BlockLayout, GlobalLocal, LocalWindow

WORLDS = [1, 2, 3, 4]


def tensors(plan, batch, dims, q_heads, dtype, seed=0):
    """The full q, k, v, dout of a plan, the same on every rank."""
    g = torch.Generator().manual_seed(seed)
    len_q, len_k = plan.seq_len

    def draw(tokens, heads, width):
        return torch.randn(batch, tokens, heads, width, generator=g, dtype=torch.float64).to(dtype)

    q, k = draw(len_q, q_heads, dims[0]), draw(len_k, plan.kv_heads, dims[0])
    return q, k, draw(len_k, plan.kv_heads, dims[1]), draw(len_q, q_heads, dims[1])


# ---------------------------------------------------------------------- what arrives, what comes home


def check_arrivals(rank, world, plan, batch, dims):
    """Forward delivers exactly the rows the plan names; backward sums exactly the shares of those who read them."""
    _, k, v, _ = tensors(plan, batch, dims, plan.kv_heads, torch.float32)
    place, block = plan.kv_placement, plan.block_size[1]
    mine = [place.shard(x, rank).contiguous() for x in (k, v)]
    seen = []

    def expected(arrival, full):
        tokens = np.concatenate([np.arange(b * block, min((b + 1) * block, plan.seq_len[1])) for b in arrival.blocks])
        want = full[:, tokens].clone()
        if arrival.step:
            heads, blocks = plan.transfer(arrival.peer, rank)
            needed = np.zeros((len(tokens), plan.kv_heads), bool)
            for h, b in zip(heads, blocks, strict=True):
                needed[tokens // block == b, h] = True
            want[:, torch.from_numpy(~needed)] = 0
        return tokens, want

    def check(arrival):
        seen.append(arrival.step)
        assert arrival.kv_start.tolist() == (arrival.blocks * block).tolist()
        for got, full in ((arrival.k, k), (arrival.v, v)):
            assert torch.equal(got, expected(arrival, full)[1])

    def share(arrival):
        """A share that says who read which (token, head), to be summed at the owner."""
        tokens, _ = expected(arrival, k)
        base = torch.from_numpy(tokens + 1.0).view(1, -1, 1, 1).float() * (10.0 ** (rank + 1))
        return base.expand_as(arrival.k).clone(), -base.expand_as(arrival.v).clone()

    with PackedRing(plan, batch=batch, head_dim=dims[0], value_head_dim=dims[1]) as ring:
        ring.forward(*mine, check)
        assert len(seen) == len(set(seen))
        sent = ring.sent_bytes["kv"]
        assert (sent == ring.traffic.forward[rank]).all()
        assert (ring.received_bytes["kv"] == ring.traffic.forward[:, rank]).all()
        assert not ring.sent_bytes["grad"].any()
        dk, dv = ring.backward(*mine, share)
        assert (ring.sent_bytes["kv"] == 2 * sent).all()
        assert (ring.sent_bytes["grad"] == ring.traffic.backward[rank]).all()
        assert (ring.received_bytes["grad"] == ring.traffic.backward[:, rank]).all()
        kept = ring.forward(*mine, check, keep=True)
        before = ring.sent_bytes["kv"]
        again = ring.backward(*mine, share, kept=kept)
        assert (ring.sent_bytes["kv"] == before).all()
        assert torch.equal(again[0], dk)
        assert torch.equal(again[1], dv)
        assert ring.forward(*mine, check) is None
    want = torch.zeros(place.seq_len, plan.kv_heads)
    for peer in range(world):
        if peer != rank:
            for h, b in zip(*plan.transfer(rank, peer), strict=True):
                tokens = torch.arange(b * block, min((b + 1) * block, place.seq_len))
                want[tokens, h] += (tokens + 1.0) * 10.0 ** (peer + 1)
    positions = torch.from_numpy(place.positions(rank))
    if 0 in seen:
        want[positions] += (positions[:, None] + 1.0) * 10.0 ** (rank + 1)
    want = want[positions][None, :, :, None]
    # Not torch.testing.assert_close, whose first call imports half of torch in every rank.
    assert torch.allclose(dk, want.expand_as(dk), rtol=1e-6, atol=0)
    assert torch.allclose(dv, -want.expand_as(dv), rtol=1e-6, atol=0)
    return ring.traffic.forward_bound, int(sent.sum())


@settings(deadline=None)
@given(plan_cases(max_world=4), st.integers(1, 2), st.sampled_from([(4, 4), (3, 5)]))
def test_everything_arrives_and_comes_home(ranks, case, batch, dims):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    results = ranks.run(check_arrivals, plan, batch, dims, world_size=plan.world_size)
    assert sum(sent for _, sent in results) == results[0][0], "bytes sent are the direct-exchange lower bound"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "stripe"])
@pytest.mark.parametrize("world", WORLDS)  # last, so that it changes least often: every change makes a new group
def test_dense_rings(ranks, world, placement, causal):
    plan = ExchangePlan.build(None, world, placement, 2, seq_len=37, block_size=4, causal=causal)
    ranks.run(check_arrivals, plan, 2, (4, 4), world_size=world)


# ---------------------------------------------------------------------- attention


def attend(rank, world, plan, batch, dims, q_heads, dtype, wire_dtype=None):
    q, k, v, dout = tensors(plan, batch, dims, q_heads, dtype)
    cut, cut_kv = plan.placement.shard, plan.kv_placement.shard
    with PackedRing(
        plan, batch=batch, head_dim=dims[0], value_head_dim=dims[1], dtype=dtype, wire_dtype=wire_dtype
    ) as ring:
        return ring_attention(ring, cut(q, rank), cut_kv(k, rank), cut_kv(v, rank), cut(dout, rank))


def gathered(plan, results):
    places = (plan.placement, plan.placement, plan.kv_placement, plan.kv_placement)
    return [place.unshard(list(parts)) for place, parts in zip(places, zip(*results, strict=True), strict=True)]


@settings(deadline=None)
@given(plan_cases(max_world=4))
def test_attention_over_the_ring_is_attention(ranks, case):
    layout, place, kv_place, kv_heads = case
    plan = ExchangePlan.build(layout, place.world_size, (place, kv_place), kv_heads)
    q_heads = layout.heads if layout.heads > 1 else 2 * kv_heads
    full = tensors(plan, 2, (4, 3), q_heads, torch.float64)
    results = ranks.run(attend, plan, 2, (4, 3), q_heads, torch.float64, world_size=plan.world_size)
    wanted = dense_attention(*full[:3], layout, full[3])
    for got, want in zip(gathered(plan, results), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "stripe", "cost_balanced"])
@pytest.mark.parametrize("world", WORLDS)
def test_float32_shards_are_as_good_as_one_process(ranks, world, placement):
    layout = GlobalLocal(global_tokens=8, window_size=48).layout(203, block_size=16, causal=True)
    plan = ExchangePlan.build(layout, world, placement, 2)
    full = tensors(plan, 1, (16, 16), 4, torch.float32)
    exact = dense_attention(*full[:3], layout, full[3])
    got = gathered(plan, ranks.run(attend, plan, 1, (16, 16), 4, torch.float32, world_size=world))
    one = gathered(
        one_plan := ExchangePlan.build(layout, 1, kv_heads=2),
        ranks.run(attend, one_plan, 1, (16, 16), 4, torch.float32, world_size=1),
    )
    for ring, alone, want in zip(got, one, exact, strict=True):
        band = torch.finfo(torch.float32).eps * want.abs().max()
        assert (ring - want).abs().max() <= 2 * (alone - want).abs().max() + band


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["whole blocks", "some heads"])
def test_a_narrow_wire_rounds_what_travels_once(ranks, wire, shared):
    """Own keys stay as they are; the others are off by at most one rounding to the wire's dtype."""
    layout = LocalWindow(24).layout(61, block_size=8)
    if not shared:
        layout = BlockLayout.stack_heads([layout, LocalWindow(48).layout(61, block_size=8)])
    plan = ExchangePlan.build(layout, 2, kv_heads=2)
    results = ranks.run(narrow_wire, plan, wire, world_size=2)
    itemsize, scales = wire.itemsize, 8 if wire.itemsize == 1 else 0
    assert sum(sent for sent, _ in results) == plan.rows.sum() * (12 * itemsize + scales)
    for _, arrivals in results:
        assert [step for step, _, _ in arrivals] == [0, 1]
        for step, got, want in arrivals:
            if step == 0:
                assert torch.equal(got, want)
                continue
            # Half a unit in the last place of the element, or of the smallest normal one (float8: of the scaled row).
            info = torch.finfo(wire)
            scale = want.abs().amax(-1, keepdim=True) / info.max if wire.itemsize == 1 else torch.ones(())
            bound = 0.5 * info.eps * torch.maximum(want.abs(), scale * info.tiny)
            error = (got - want).abs()
            assert (error <= bound * (1 + 1e-6)).all()
            assert error.max() > 0


def narrow_wire(rank, world, plan, wire):
    """Bytes sent, and (step, got, want) of the rows that are read, K and V side by side."""
    _, k, v, _ = tensors(plan, 1, (6, 6), 2, torch.float32)
    cut = plan.kv_placement.shard
    arrivals = []

    def check(arrival):
        tokens = torch.cat([torch.arange(b * 8, min(b * 8 + 8, 61)) for b in arrival.blocks])
        both = torch.cat((arrival.k, arrival.v))
        here = both.abs().amax(-1) > 0
        arrivals.append((arrival.step, both[here], torch.cat((k[:, tokens], v[:, tokens]))[here]))

    with PackedRing(plan, batch=1, head_dim=6, wire_dtype=wire) as ring:
        ring.forward(cut(k, rank), cut(v, rank), check)
        assert ring.traffic.forward[rank].sum() == ring.sent_bytes["kv"].sum()
        return int(ring.sent_bytes["kv"].sum()), arrivals


# ---------------------------------------------------------------------- buffers, threads, shapes


def leases_and_returns(rank, world, plan):
    pool = BufferPool(poison=True)
    x = torch.ones(1, int(plan.kv_placement.lengths[rank]), plan.kv_heads, 8)
    ring = PackedRing(plan, batch=1, head_dim=8, pool=pool)
    held = pool.stats().leases
    for _ in range(3):
        ring.forward(x, x, lambda arrival: None)
        ring.backward(x, x, lambda arrival: (torch.ones_like(arrival.k), torch.ones_like(arrival.v)))
    during = pool.stats().leases
    ring.close()
    ring.close()
    return held, during, pool.stats().leases


def two_threads(rank, world, plans, batches):
    """Two rings with their own channels, used at the same time from two threads."""
    rings = [
        PackedRing(plan, batch=b, head_dim=4, dtype=torch.float64, channel=i)
        for i, (plan, b) in enumerate(zip(plans, batches, strict=True))
    ]
    results, errors = [[], []], []

    def work(i):
        try:
            plan = plans[i]
            q, k, v, dout = tensors(plan, batches[i], (4, 4), plan.kv_heads, torch.float64, seed=i)
            cut = plan.placement.shard
            for _ in range(10):
                results[i].append(ring_attention(rings[i], *(cut(x, rank) for x in (q, k, v, dout))))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ring in rings:
        ring.close()
    assert not errors, errors
    for runs in results:
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    return results[0][0], results[1][0]


def test_two_rings_in_two_threads_do_not_disturb_each_other(ranks):
    layouts = [LocalWindow(40).layout(96, block_size=8), LocalWindow(90).layout(120, block_size=8, causal=True)]
    plans = [ExchangePlan.build(layouts[0], 3, "stripe", 2), ExchangePlan.build(layouts[1], 3, "zigzag", 2)]
    results = ranks.run(two_threads, plans, [1, 2], world_size=3)
    for i, (plan, batch) in enumerate(zip(plans, [1, 2], strict=True)):
        full = tensors(plan, batch, (4, 4), 2, torch.float64, seed=i)
        wanted = dense_attention(*full[:3], layouts[i], full[3])
        for got, want in zip(gathered(plan, [r[i] for r in results]), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_one_rank_needs_no_process_group():
    layout = LocalWindow(24).layout(50, block_size=8, causal=True)
    plan = ExchangePlan.build(layout, 1, kv_heads=2)
    full = tensors(plan, 1, (4, 4), 2, torch.float64)
    wanted = dense_attention(*full[:3], layout, full[3])
    for got, want in zip(attend(0, 1, plan, 1, (4, 4), 2, torch.float64), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------- disagreement and misuse


def disagree(rank, world, plans, batch, dtypes):
    with pytest.raises(RingMismatchError) as caught:
        PackedRing(plans[rank], batch=batch[rank], head_dim=4, dtype=dtypes[rank])
    return caught.value.fields


@pytest.mark.parametrize(
    ("what", "plans", "batch", "dtypes", "fields"),
    [
        ("plan", (0, 0, 1), (1, 1, 1), ("f", "f", "f"), {"digest": [2]}),
        ("batch", (0, 0, 0), (1, 2, 1), ("f", "f", "f"), {"batch": [1]}),
        ("dtype", (0, 0, 0), (1, 1, 1), ("b", "f", "f"), {"dtype": [1, 2], "wire_dtype": [1, 2]}),
    ],
    ids=["plan", "batch", "dtype"],
)
def test_ranks_that_disagree_refuse_on_every_rank(ranks, what, plans, batch, dtypes, fields):
    made = [ExchangePlan.build(LocalWindow(w).layout(64, block_size=8), 3) for w in (24, 48)]
    kinds = {"f": torch.float32, "b": torch.bfloat16}
    got = ranks.run(disagree, [made[i] for i in plans], batch, [kinds[d] for d in dtypes], world_size=3)
    assert got == [fields] * 3


def other_version(rank, world, plan):
    from bs_comm import _header

    _header.WIRE_VERSION += rank == 1
    try:
        with pytest.raises(RingMismatchError, match=r"wire version differs on rank \[1\]"):
            PackedRing(plan, batch=1, head_dim=4)
    finally:
        _header.WIRE_VERSION -= rank == 1


def test_mixed_versions_are_refused(ranks):
    ranks.run(other_version, ExchangePlan.build(None, 2, seq_len=16, block_size=4), world_size=2)


def raise_in_callback(rank, world, plan):
    """Rank 1's callback fails: it raises its own error, the others a RingPeerError that names it; nobody hangs."""
    x = torch.zeros(1, int(plan.kv_placement.lengths[rank]), 1, 4)
    ring = PackedRing(plan, batch=1, head_dim=4, hop_timeout=30)

    def callback(arrival):
        if rank == 1 and arrival.step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError if rank == 1 else RingPeerError) as caught:
        ring.forward(x, x, callback)
    with pytest.raises(RingPeerError):
        ring.forward(x, x, callback)
    # What was under way may still arrive: a new ring would meet it, and gloo would abort the process.
    with pytest.raises(RingPeerError, match=r"rank 1 failed in forward.* cannot be used again"):
        PackedRing(plan, batch=1, head_dim=8, hop_timeout=30)
    with pytest.raises(RingPeerError, match="cannot be used again"):
        RollCall()
    return (1, "KeyError") if rank == 1 else (caught.value.peer, caught.value.detail.split()[0])


def test_a_failing_callback_fails_the_step_everywhere(ranks):
    plan = ExchangePlan.build(None, 3, seq_len=48, block_size=4)
    assert ranks.run(raise_in_callback, plan, world_size=3) == [(1, "KeyError")] * 3


def call_with(rank, world, plan, k, v):
    PackedRing(plan, batch=1, head_dim=4).forward(k, v, lambda arrival: None)


def wrong_on_one_rank(rank, world, plan):
    x = torch.zeros(1, int(plan.kv_placement.lengths[rank]) + (rank == 1), 1, 4)
    with pytest.raises(ValueError if rank == 1 else RingPeerError) as caught:
        PackedRing(plan, batch=1, head_dim=4, hop_timeout=30).forward(x, x, lambda arrival: None)
    return str(caught.value)


def test_a_wrong_tensor_on_one_rank_holds_nobody_up(ranks):
    first, second = ranks.run(wrong_on_one_rank, ExchangePlan.build(None, 2, seq_len=16, block_size=4), world_size=2)
    assert second.startswith("k: expected shape (1, 8, 1, 4)")
    assert "rank 1 failed in forward" in first
    assert "ValueError on this rank: k: expected shape" in first


def wrong_everywhere(rank, world, plan):
    x = torch.zeros(1, int(plan.kv_placement.lengths[rank]), 1, 4)
    with pytest.raises(ValueError, match="k: expected shape"):
        PackedRing(plan, batch=1, head_dim=4).forward(x.double(), x, print)
    PackedRing(plan, batch=1, head_dim=4).forward(x, x, lambda arrival: None)


def test_a_mistake_that_all_make_leaves_the_group_alone(ranks):
    ranks.run(wrong_everywhere, ExchangePlan.build(None, 2, seq_len=16, block_size=4), world_size=2)


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (torch.zeros(1, 16, 1, 4), torch.zeros(1, 16, 1, 5), ValueError, r"v: expected shape \(1, 16, 1, 4\)"),
        (torch.zeros(1, 15, 1, 4), torch.zeros(1, 16, 1, 4), ValueError, r"k: expected shape \(1, 16, 1, 4\)"),
        (torch.zeros(1, 16, 1, 4).double(), torch.zeros(1, 16, 1, 4), ValueError, "k: expected shape .* torch.float32"),
        ([0.0], torch.zeros(1, 16, 1, 4), TypeError, "k: expected a tensor, got list"),
    ],
)
def test_wrong_tensors_are_named(k, v, error, message):
    plan = ExchangePlan.build(None, 1, seq_len=16, block_size=4)
    with pytest.raises(error, match=message):
        call_with(0, 1, plan, k, v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch: expected an integer ≥ 1, got 0"),
        ({"dtype": torch.int32}, ValueError, "dtype: expected one of torch.float64, .* got torch.int32"),
        ({"wire_dtype": "bf16"}, TypeError, "wire_dtype: expected a torch.dtype, got 'bf16'"),
        ({"hop_timeout": 0}, ValueError, "hop_timeout: expected a finite number > 0"),
        ({"channel": -1}, ValueError, "channel: expected an integer in"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    plan = ExchangePlan.build(None, 1, seq_len=16, block_size=4)
    with pytest.raises(error, match=message):
        PackedRing(plan, **{"batch": 1, "head_dim": 4, **change})


def test_misuse_is_told():
    plan = ExchangePlan.build(None, 1, seq_len=16, block_size=4)
    with pytest.raises(ValueError, match="plan: expected a direct forward ExchangePlan"):
        PackedRing(plan.T, batch=1, head_dim=4)
    with pytest.raises(TypeError, match="plan: expected an ExchangePlan, got NoneType"):
        PackedRing(None, batch=1, head_dim=4)
    with pytest.raises(ValueError, match="group: expected one of 2 ranks, but torch"):
        PackedRing(ExchangePlan.build(None, 2, seq_len=16, block_size=4), batch=1, head_dim=4)
    x = torch.zeros(1, 16, 1, 4)
    ring = PackedRing(plan, batch=1, head_dim=4)
    with pytest.raises(TypeError, match=r"on_arrival: expected \(dk, dv\) in a backward pass, got NoneType"):
        ring.backward(x, x, lambda arrival: None)
    with pytest.raises(ValueError, match="on_arrival: expected dv of shape"):
        ring.backward(x, x, lambda arrival: (x, x[:, :3]))
    with pytest.raises(ValueError, match=r"kept: expected arrivals of steps \[\], as forward gave them, got \[1\]"):
        ring.backward(x, x, lambda arrival: (x, x), kept={1: (x, x)})
    with pytest.raises(RuntimeError, match="expected one call at a time"):
        ring.forward(x, x, lambda arrival: ring.forward(x, x, print))
    ring.close()
    with pytest.raises(RuntimeError, match="expected an open ring, got a closed one"):
        ring.forward(x, x, print)


def wrong_size(rank, world, plan):
    PackedRing(plan, batch=1, head_dim=4)


def test_a_group_of_another_size_is_refused(ranks):
    with pytest.raises(RankError, match="group: expected 3 ranks as in the plan, got a group of 2"):
        ranks.run(wrong_size, ExchangePlan.build(None, 3, seq_len=16, block_size=4), world_size=2)


def test_buffers_are_leased_once_and_given_back(ranks):
    layout = BlockLayout.from_dense(np.random.default_rng(0).random((2, 8, 8)) < 0.5, block_size=4, seq_len=31)
    plan = ExchangePlan.build(layout, 3, Placement.stripe(31, 3, block_size=4))
    for held, during, after in ranks.run(leases_and_returns, plan, world_size=3):
        assert held == during > 0
        assert after == 0
