"""Roll calls between real processes: everyone's numbers and tensors, in time or not at all."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_comm import RingPeerError, RollCall
from bs_comm.testing import RankPool

DTYPES = [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16]


def numbered(rank, length, shape, dtype):
    """A tensor, every other element of a larger one, that tells ranks, rows and columns apart as far as it can."""
    count = length * torch.Size(shape).numel()
    made = (torch.arange(count) * 7 + rank * 3).remainder(5).to(dtype).view(length, *shape)
    return torch.stack((made, made), dim=-1)[..., 0]


def call(rank, world, lengths, shape, dtype):
    roll = RollCall()
    assert (roll.rank, roll.world_size) == (rank, world)
    words = roll.words([rank, -(2**62) + rank, 7])
    assert words.tolist() == [[r, -(2**62) + r, 7] for r in range(world)]
    got = roll.tensors(numbered(rank, lengths[rank], shape, dtype), lengths)
    assert all(torch.equal(x, numbered(r, lengths[r], shape, dtype)) for r, x in enumerate(got))
    parts = [numbered(10 * rank + to, lengths[to], shape, dtype) for to in range(world)]
    back = roll.swap(parts, [(lengths[rank], *shape)] * world)
    assert all(torch.equal(x, numbered(10 * r + rank, lengths[rank], shape, dtype)) for r, x in enumerate(back))
    sent = [lengths[to] * torch.Size(shape).numel() * dtype.itemsize * (to != rank) for to in range(world)]
    assert roll.sent_bytes.tolist() == sent
    roll.close()
    return True


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4), st.sampled_from([(), (3,), (2, 5)]), st.sampled_from(DTYPES)
)
def test_everybody_hears_everybody(ranks, lengths, shape, dtype):
    """Lengths that differ, empty ones included."""
    assert all(ranks.run(call, lengths, shape, dtype, world_size=len(lengths)))


def test_alone():
    roll = RollCall()
    assert roll.words([1, 2]).tolist() == [[1, 2]]
    x = torch.arange(3)
    assert torch.equal(roll.tensors(x, [3])[0], x)
    assert torch.equal(roll.swap([x], [(3,)])[0], x)
    with pytest.raises(ValueError, match=r"x: expected 4 rows, as lengths says, got shape \(3,\)"):
        roll.tensors(x, [4])
    with pytest.raises(ValueError, match="hop_timeout: expected a finite number > 0"):
        RollCall(hop_timeout=0)
    roll.close()
    with pytest.raises(RuntimeError, match=r"words, tensors: expected an open roll call, got a closed one"):
        roll.words([1])
    with pytest.raises(RuntimeError, match="swap: expected an open roll call"):
        roll.swap([x], [(3,)])


def silent(rank, world, victim, stop, what):
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)
    roll = RollCall(hop_timeout=2.0)
    x = torch.zeros(2)
    act = {"words": lambda: roll.words([1]), "swap": lambda: roll.swap([x] * world, [(2,)] * world)}
    with pytest.raises(RingPeerError) as caught:
        act[what]()
    with pytest.raises(RingPeerError, match=f"rank {caught.value.peer} failed"):
        roll.words([1])
    return caught.value.peer


@pytest.mark.parametrize(("stop", "what"), [(True, "words"), (False, "swap")])
def test_a_silent_rank_is_named(stop, what):
    with RankPool(3) as pool:
        pool.start(silent, 1, stop, what)
        assert pool.collect(60, ranks=[0, 2]) == [1, 1]


def told(rank, world):
    roll = RollCall(hop_timeout=30.0)
    error = RingPeerError(2, 1, 8, "forward", "gone")
    if rank == 0:
        roll.report(error)
    with pytest.raises(RingPeerError) as caught:
        roll.words([1])
    return caught.value.peer


def test_a_failure_met_elsewhere_is_passed_on():
    """Nobody waits for the deadline of a rank that has told of a failure."""
    with RankPool(2) as pool:
        assert pool.run(told, timeout=25) == [2, 2]
