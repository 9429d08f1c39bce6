"""Dead and hung peers: every survivor raises the same error in time, nobody hangs, nobody gets data."""

import os
import pickle
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from bs_comm import ExchangePlan, PackedRing, RingMismatchError, RingPeerError, regroup
from bs_comm.health import Health, Report, follow
from bs_comm.testing import RankPool, ring_attention
from bs_memory import BufferPool
from bs_patterns import LocalWindow

HOP_TIMEOUT = 2.0
#: Scheduling noise of a busy machine, far above what a survivor needs after its deadline.
GRACE = 20.0


def run_until_failure(rank, world, plan, victim, at_call, at_step, stop):
    """Use the ring until it fails; the victim sends itself the signal in the callback of a chosen step."""
    x = torch.ones(1, int(plan.kv_placement.lengths[rank]), plan.kv_heads, 4)
    dist.barrier()  # The first import takes some ranks longer than the hop timeout of this test.
    pool = BufferPool()
    ring = PackedRing(plan, batch=1, head_dim=4, hop_timeout=HOP_TIMEOUT, pool=pool)
    held = pool.stats().leases
    call = 0

    def callback(arrival):
        if rank == victim and call == at_call and arrival.step == at_step:
            os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)
        return torch.ones_like(arrival.k), torch.ones_like(arrival.v)

    for call in range(at_call + 1):
        started = time.monotonic()
        try:
            if call % 2:
                ring.backward(x, x, callback)
            else:
                ring.forward(x, x, callback)
        except RingPeerError as error:
            seconds = time.monotonic() - started
            with pytest.raises(RingPeerError, match=f"rank {error.peer} failed"):
                ring.forward(x, x, callback)
            ring.close()
            # A peer that wakes up may still write into these buffers: nobody may lease them again.
            assert pool.stats().leases == held > 0
            # A thread that is still in gloo when the interpreter ends would abort the process.
            for thread in threading.enumerate():
                if thread.name == "bs-comm wait":
                    thread.join(5.0)
                    assert not thread.is_alive()
            return call, error.peer, seconds, error.phase, error.nbytes
    raise AssertionError(f"rank {rank} got data from a failed call")


def moments():
    """A few chosen moments, or 50 random ones in a soak run: (world, victim, call, step, stop)."""
    if not os.environ.get("BS_SOAK"):
        return [(2, 1, 0, 0, True), (3, 0, 1, 1, False), (4, 2, 2, 2, False), (4, 3, 1, 3, True)]
    rng = random.Random(int(os.environ.get("BS_SOAK_SEED", "0")))
    worlds = [rng.randint(2, 4) for _ in range(int(os.environ.get("BS_SIGKILLS", "50")))]
    return [(w, rng.randrange(w), rng.randrange(4), rng.randrange(w), bool(i % 2)) for i, w in enumerate(worlds)]


@pytest.mark.parametrize(("world", "victim", "at_call", "at_step", "stop"), moments())
def test_every_survivor_names_the_victim(world, victim, at_call, at_step, stop):
    """SIGKILL or SIGSTOP to one rank in the middle of a step."""
    plan = ExchangePlan.build(None, world, seq_len=64, block_size=4)
    survivors = [rank for rank in range(world) if rank != victim]
    with RankPool(world) as pool:
        pool.start(run_until_failure, plan, victim, at_call, at_step, stop)
        results = pool.collect(60, ranks=survivors)
    for call, peer, seconds, phase, _ in results:
        assert call == at_call
        assert peer == victim
        assert seconds < HOP_TIMEOUT + GRACE
        assert phase in ("forward", "backward", "commit")


def hang_before_header(rank, world, plan):
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(RingPeerError) as caught:
        PackedRing(plan, batch=1, head_dim=4, hop_timeout=HOP_TIMEOUT)
    return caught.value.peer, caught.value.phase


def test_a_rank_that_never_joins_is_named():
    plan = ExchangePlan.build(None, 3, seq_len=64, block_size=4)
    with RankPool(3) as pool:
        pool.start(hang_before_header, plan)
        assert pool.collect(60, ranks=[0, 2]) == [(1, "header")] * 2


# ---------------------------------------------------------------------- going on without it


def redo_after_failure(rank, world, layout, victim, stop):
    """Fail in the middle of a step, regroup, and redo the step from the full tensors over those who are left."""
    plan = ExchangePlan.build(layout, world, "zigzag", 2)
    full = step_tensors(layout)
    dist.barrier()
    ring = PackedRing(plan, batch=1, head_dim=4, hop_timeout=HOP_TIMEOUT)

    def fail(arrival):
        if rank == victim and arrival.step == 1:
            os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)

    with pytest.raises(RingPeerError) as caught:
        ring.forward(*(plan.placement.shard(x, rank) for x in full[1:3]), fail)
    left = regroup(caught.value)
    return left.old_ranks, left.rank, fresh_step(left.rank, left.world_size, layout, left.group)


def step_tensors(layout):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(1, layout.seq_len[0], heads, 4, generator=g) for heads in (4, 2, 2, 4)]


def fresh_step(rank, world, layout, group=None):
    plan = ExchangePlan.build(layout, world, "zigzag", 2)
    with PackedRing(plan, batch=1, head_dim=4, group=group) as ring:
        return ring_attention(ring, *(plan.placement.shard(x, rank) for x in step_tensors(layout)))


@pytest.mark.parametrize(("world", "victim", "stop"), [(4, 1, False), (3, 2, True), (2, 1, False)])
def test_the_redone_step_is_a_fresh_one(ranks, world, victim, stop):
    layout = LocalWindow(40).layout(101, block_size=8, causal=True)
    left = [rank for rank in range(world) if rank != victim]
    with RankPool(world) as pool:
        pool.start(redo_after_failure, layout, victim, stop)
        redone = pool.collect(60, ranks=left)
    fresh = ranks.run(fresh_step, layout, world_size=world - 1)
    for new_rank, (old_ranks, rank, result) in enumerate(redone):
        assert old_ranks == tuple(left)
        assert rank == new_rank
        assert all(torch.equal(a, b) for a, b in zip(result, fresh[rank], strict=True))


def test_regroup_wants_the_error():
    with pytest.raises(TypeError, match="error: expected the RingPeerError that was raised, got int"):
        regroup(3)


# ---------------------------------------------------------------------- who is to blame


def report(peer, step=1):
    return Report(peer, step, 8, "forward", "waiting")


@pytest.mark.parametrize(
    ("start", "reports", "peer"),
    [
        (0, {0: report(1)}, 1),
        (0, {0: report(1), 1: report(2)}, 2),
        (0, {0: report(1), 1: report(2), 2: report(3), 4: report(3)}, 3),
        (4, {0: report(1), 1: report(2), 2: report(3), 4: report(3)}, 3),
        (0, {0: report(1), 1: report(1)}, 1),
        (0, {0: report(1), 1: report(0)}, 1),
    ],
    ids=["direct", "chain", "long chain", "its side branch", "own fault", "circle"],
)
def test_the_trail_of_waits_leads_to_the_culprit(start, reports, peer):
    assert follow(reports[start], start, reports).peer == peer


class DeadStore:
    """A store whose host is gone."""

    def __getattr__(self, name):
        raise ConnectionError("gone")


class StuckStore:
    """A store whose host is stopped: calls do not return (here: for longer than anyone waits)."""

    def __init__(self, release):
        self.release = release

    def __getattr__(self, name):
        return lambda *args: self.release.wait(30)


def test_a_dead_store_leaves_each_rank_its_own_judgement():
    health = Health(DeadStore(), "p", 0, 3)
    assert not health.failure_seen()
    assert health.conclude(report(2), 0.5) == report(2)
    health.close()


def test_a_stuck_store_holds_nobody_up():
    release = threading.Event()
    health = Health(StuckStore(release), "p", 0, 3)
    started = time.monotonic()
    assert not health.failure_seen()
    assert not health.failure_seen()
    assert health.conclude(report(2), 0.1) == report(2)
    assert time.monotonic() - started < 25
    release.set()
    health.close()


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RingPeerError(3, 2, 100, "backward", "gone")))
    assert (error.peer, error.step, error.nbytes, error.phase, error.detail) == (3, 2, 100, "backward", "gone")
    assert "rank 3" in str(error)
    assert "100 bytes" in str(error)
    assert pickle.loads(pickle.dumps(RingMismatchError({"digest": [1]}))).fields == {"digest": [1]}
