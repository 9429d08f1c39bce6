"""Ranks that disagree, cut wrongly, fail or die: the others are told which, in time, and can go on."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bs_comm import RingMismatchError, RingPeerError
from bs_comm.testing import RankError, RankPool
from bs_kernels.backends.native import NativeBackend
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules.testing.rings import one_step, whole_tensors

CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.4, "block_size": 16}


def wrong_cut(rank, world, placement):
    module = Distributed(sparse_config=CONFIG, distributed_config={"placement": placement})
    x = torch.zeros(1, (30, 34)[rank], 2, 8)
    with pytest.raises(ValueError, match=r"expected shards .* got \[30, 34\]"):
        module(x, x, x)
    # Nothing was poisoned: the next call works.
    return module(*[module.shard(torch.zeros(1, 64, 2, 8))] * 3).shape[1]


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_a_cut_inside_a_block_is_refused_on_every_rank(ranks, placement):
    assert ranks.run(wrong_cut, placement, world_size=2) == [32, 32]


def disagree(rank, world, case):
    module = Distributed(sparse_config=CONFIG)
    q, k, v, _ = (module.shard(x) for x in whole_tensors())
    causal, more = False, {}
    if rank == 1:
        if case == "is_causal":
            causal = True
        elif case == "batch":
            q, k, v = q[:1], k[:1], v[:1]
        elif case == "dropout":
            module.dropout = 0.1
        elif case == "dtype":
            q, k, v = q.double(), k.double(), v.double()
        else:
            more["key_padding_mask"] = torch.ones(k.shape[:2], dtype=torch.bool)
    with pytest.raises(RingMismatchError) as caught:
        module(q, k, v, causal, **more)
    return caught.value.fields


@pytest.mark.parametrize("case", ["is_causal", "batch", "dropout", "dtype", "key_padding_mask"])
def test_ranks_that_disagree_are_told_what_differs(ranks, case):
    assert ranks.run(disagree, case, world_size=3) == [{case: [1]}] * 3


def fail_and_go_on(rank, world, victim, at_backward, stop):
    """The victim dies in a kernel; the others raise, regroup, and redo the step."""
    module = Distributed(sparse_config=CONFIG, distributed_config={"hop_timeout": 3.0})
    dist.barrier()
    if rank == victim:
        name = "backward" if at_backward else "forward"
        kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)  # noqa: E731
        setattr(NativeBackend, name, kill)
    with pytest.raises(RingPeerError) as caught:
        one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)
    with pytest.raises(RingPeerError):  # the group stays failed
        module(*(module.shard(x, True) for x in whole_tensors()[:3]))
    left = module.regroup(caught.value)
    assert module.world_size == left.world_size == world - 1
    redone = one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)
    return caught.value.peer, left.old_ranks, redone


def fresh_step(rank, world):
    module = Distributed(sparse_config=CONFIG)
    return one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)


def moments():
    """A few chosen moments, or random ones in a soak run: (world, victim, in the backward pass, stopped not killed)."""
    if not os.environ.get("BS_SOAK"):
        return [(4, 2, True, False), (3, 0, False, True), (2, 1, True, False)]
    rng = np.random.default_rng(int(os.environ.get("BS_SOAK_SEED", "0")))
    worlds = rng.integers(2, 5, int(os.environ.get("BS_SIGKILLS", "50")) // 5)
    return [(int(w), int(rng.integers(w)), bool(rng.integers(2)), bool(i % 2)) for i, w in enumerate(worlds)]


@pytest.mark.parametrize(("world", "victim", "at_backward", "stop"), moments())
def test_a_dead_rank_is_named_and_the_step_redone_without_it(ranks, world, victim, at_backward, stop):
    left = [rank for rank in range(world) if rank != victim]
    with RankPool(world) as pool:
        pool.start(fail_and_go_on, victim, at_backward, stop)
        results = pool.collect(60, ranks=left)
    fresh = ranks.run(fresh_step, world_size=world - 1)
    for new_rank, (peer, old_ranks, redone) in enumerate(results):
        assert peer == victim
        assert old_ranks == tuple(left)
        assert all(torch.equal(a, b) for a, b in zip(redone, fresh[new_rank], strict=True))


def late_error(rank, world):
    """One rank fails by itself, in its kernel: the others hear of it."""
    module = Distributed(sparse_config=CONFIG, distributed_config={"hop_timeout": 20.0})
    dist.barrier()
    if rank == 1:
        NativeBackend.forward = lambda *a, **k: 1 / 0
    module(*(module.shard(x, True) for x in whole_tensors()[:3]), is_causal=True)


def test_an_error_on_one_rank_reaches_the_others():
    with RankPool(3) as pool, pytest.raises(RankError) as caught:
        pool.run(late_error)
    errors = caught.value.errors
    assert isinstance(errors[1], ZeroDivisionError)
    assert all(isinstance(errors[r], RingPeerError) and errors[r].peer == 1 for r in (0, 2))
