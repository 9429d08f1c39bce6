"""Tokens along one dimension of a mesh, heads along the other: the result of one process."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from bs_comm import Placement, RingPeerError
from bs_comm.testing import RankPool, owners
from bs_kernels.backends.native import NativeBackend
from bs_kernels.testing import assert_close_to_oracle
from bs_kernels.testing.strategies import cases
from bs_modules import BlockSparseRingDilatedAttention
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules.testing.rings import dropout_seed_of, joined_case, one_step, run_case, whole_tensors
from bs_patterns import BlockLayout

# A call in which one rank raises ends for the others at the deadline: an example takes a minute to fail.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
ARGUMENTS = ("causal", "key_padding_mask", "segment_ids", "attn_bias", "bool_bias", "dropout", "scale", "order")
CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.4, "block_size": 16}


@settings(phases=NO_SHRINKING)
@given(
    st.data(), cases(arguments=ARGUMENTS),
    st.sampled_from([(2, 2), (1, 2), (1, 4), (2, 1), (4, 1)]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_call_over_any_mesh_is_the_whole_call(ranks, data, case, mesh, number):
    """Masks, biases, dropout, GQA, empty rows and shards."""
    columns = mesh[1]
    if "dropout_p" in case.arguments:
        case.arguments["dropout_seed"] = dropout_seed_of(number)
    if case.k.shape[2] % columns:  # heads that the columns can share
        bias = case.arguments.get("attn_bias")
        if bias is not None and bias.shape[1] > 1:
            case.arguments["attn_bias"] = bias.repeat(1, columns, 1, 1)
        case = replace(
            case, q=case.q.repeat(1, 1, columns, 1), k=case.k.repeat(1, 1, columns, 1),
            v=case.v.repeat(1, 1, columns, 1), dout=case.dout.repeat(1, 1, columns, 1),
            dlse=case.dlse.repeat(1, columns, 1),
        )  # fmt: skip
        if case.layout.heads > 1:
            case = replace(case, layout=BlockLayout.stack_heads([case.layout] * columns))
    layout = case.layout
    places = [
        Placement.contiguous(tokens, mesh[0], block_size=block)
        for tokens, block in zip(layout.seq_len, layout.block_size, strict=True)
    ]
    config = {}
    if layout.seq_len[0] == layout.seq_len[1]:
        places = [data.draw(owners(layout.seq_len[0], math.lcm(*layout.block_size), mesh[0]))] * 2
        config["placement"] = places[0]
    results = ranks.run(run_case, case, *places, number, config, mesh, world_size=math.prod(mesh))
    by_query = "attn_bias" in case.arguments and case.arguments["attn_bias"].shape[2] > 1

    def joined(i, pieces):
        if i == 5 and not by_query:
            return sum(pieces)
        return torch.cat(pieces, 2 if i in (1, 5) else 1)

    rows = [
        [joined(i, pieces) for i, pieces in enumerate(zip(*results[r : r + columns], strict=True))]
        for r in range(0, len(results), columns)
    ]
    assert_close_to_oracle(case, joined_case(case, *places, rows))


def on_a_mesh(rank, world):
    module = Distributed(sparse_config=CONFIG, group=init_device_mesh("cpu", (2, 2)))
    assert (module.world_size, module.rank) == (4, rank)
    assert module.group.ndim == 2
    result = one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)
    x = torch.zeros(1, 51, 3, 8)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, shared by 2 ranks, got 3"):
        module(x, x, x)
    assert torch.equal(module.positions(203), module.shard(torch.arange(203), dim=0))
    return result


def test_tokens_and_heads_on_a_mesh_of_two_by_two(ranks):
    results = ranks.run(on_a_mesh, world_size=4)
    whole = one_step(BlockSparseRingDilatedAttention(sparse_config=CONFIG), whole_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r in results], 1), want)


def fail_and_go_on(rank, world, victims, at_backward):
    """The victims die in a kernel; the others raise, regroup, and redo the step."""
    module = Distributed(
        sparse_config=CONFIG, distributed_config={"hop_timeout": 3.0}, group=init_device_mesh("cpu", (2, 2))
    )
    dist.barrier()
    if rank in victims:
        name = "backward" if at_backward else "forward"
        setattr(NativeBackend, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RingPeerError) as caught:
        one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)
    left = module.regroup(caught.value, patience=0.5)
    other = Distributed(sparse_config=CONFIG, group=left.group)
    assert (other.world_size, other.rank) == (module.world_size, module.rank) == (left.world_size, left.rank)
    redone = one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)
    return left.old_ranks, module._heads(), redone


def fresh_step(rank, world, mesh):
    group = None if mesh is None else init_device_mesh("cpu", mesh)
    module = Distributed(sparse_config=CONFIG, group=group)
    return one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)


@pytest.mark.parametrize(
    ("victims", "at_backward", "shape"),
    [([3], True, None), ([0], False, None), ([0, 2], False, (1, 2))],
    ids=["one ring of three", "the first rank", "a row of two"],
)
def test_the_ranks_left_of_a_mesh_redo_the_step(ranks, victims, at_backward, shape):
    left = [rank for rank in range(4) if rank not in victims]
    with RankPool(4) as pool:
        pool.start(fail_and_go_on, victims, at_backward)
        results = pool.collect(60, ranks=left)
    fresh = ranks.run(fresh_step, shape, world_size=len(left))
    for new_rank, (old_ranks, heads, redone) in enumerate(results):
        assert old_ranks == tuple(left)
        assert heads[1] == (1 if shape is None else shape[1])
        assert all(torch.equal(a, b) for a, b in zip(redone, fresh[new_rank], strict=True))
