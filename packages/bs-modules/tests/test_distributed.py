"""The distributed module between real processes: the result of one process, forward and backward, bytes as planned."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bs_comm import ExchangePlan, Placement
from bs_comm.testing import owners
from bs_kernels.backends.native import NativeBackend
from bs_kernels.testing import assert_close_to_oracle, make_case
from bs_kernels.testing.strategies import cases
from bs_modules import (
    BlockSparseHierarchical,
    BlockSparseRingDilatedAttention,
    BlockSparseRingDilatedAttentionHilbertPostPattern,
    BlockSparseRingMultiheadDilatedAttention,
)
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules.testing.rings import dropout_seed_of, joined_case, one_step, run_case, whole_tensors

# A call in which one rank raises ends for the others at the deadline: an example takes a minute to fail.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
WORLDS = [1, 2, 3, 4] + [8] * bool(os.environ.get("BS_SOAK"))
ARGUMENTS = ("causal", "key_padding_mask", "segment_ids", "attn_bias", "bool_bias", "dropout", "scale", "order")
LEVELS = [{"stride": 1, "window_size": 32, "block_size": 16}, {"stride": 4, "window_size": -1, "block_size": 16}]
CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.4, "block_size": 16}


@settings(phases=NO_SHRINKING)
@given(st.data(), cases(arguments=ARGUMENTS), st.integers(1, WORLDS[-1]), st.integers(0, 2**31))
def test_any_call_over_any_ring_is_the_whole_call(ranks, data, case, world, number):
    """Masks, biases, dropout, GQA, empty rows and shards, any owner per block, forward and backward."""
    layout = case.layout
    if "dropout_p" in case.arguments:
        case.arguments["dropout_seed"] = dropout_seed_of(number)
    config = {"keep_kv": data.draw(st.booleans(), label="keep_kv")}
    if layout.seq_len[0] == layout.seq_len[1]:
        place = kv_place = data.draw(owners(layout.seq_len[0], math.lcm(*layout.block_size), world))
        config["placement"] = place
    else:
        place, kv_place = (
            Placement.contiguous(tokens, world, block_size=block)
            for tokens, block in zip(layout.seq_len, layout.block_size, strict=True)
        )
    results = ranks.run(run_case, case, place, kv_place, number, config, world_size=world)
    assert_close_to_oracle(case, joined_case(case, place, kv_place, results))


def ring_step(rank, world, attention, config, dtype):
    """A causal step of this rank, the bytes it sent forward and in all, and how often the native kernels ran."""
    module = Distributed(attention=attention, distributed_config=config)
    shards = [module.shard(x, True) for x in whole_tensors(dtype=dtype)]
    calls = {"forward": 0, "backward": 0}

    def counted(name, real):
        def run(self, *args, **kwargs):
            calls[name] += 1
            return real(self, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(NativeBackend, name, counted(name, getattr(NativeBackend, name)))
        with torch.no_grad():
            before = module.sent_bytes()
            first = module(*shards[:3], is_causal=True)
        forward = {name: sent - before.get(name, 0) for name, sent in module.sent_bytes().items()}
        result = one_step(module, shards, is_causal=True)
    assert torch.equal(first, result[0])
    both = {name: sent - before.get(name, 0) for name, sent in module.sent_bytes().items()}
    return result, forward, both, calls


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "stripe", "cost_balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_are_those_of_the_single_process_and_bytes_those_of_the_plan(ranks, world, placement, dtype):
    attention = BlockSparseRingDilatedAttention(sparse_config=CONFIG)
    results = ranks.run(ring_step, attention, {"placement": placement}, dtype, world_size=world)
    layout = attention.layout(203, True, 4)
    case = make_case(layout, batch=2, q_heads=4, kv_heads=2, head_dim=16, dtype=dtype)
    q, k, v, dout = whole_tensors(dtype=dtype)
    case = type(case)(q, k, v, layout, dout, torch.zeros_like(case.dlse))
    module = Distributed(attention=attention, distributed_config={"placement": placement})
    place = module._placements.of(placement, layout, world)[0]
    parts = zip(*(result for result, *_ in results), strict=True)
    assert_close_to_oracle(
        case, dict(zip(("out", "q", "k", "v"), (place.unshard(list(x)) for x in parts), strict=True))
    )
    plan = ExchangePlan.build(layout, world, place, 2)
    traffic = plan.traffic(16, batch=2, kv_itemsize=dtype.itemsize)
    for rank, (_, forward, both, calls) in enumerate(results):
        if world > 1:
            assert (forward["kv"] == traffic.forward[rank]).all()
            assert not forward["grad"].any()
            assert (both["kv"] == 3 * traffic.forward[rank]).all(), "forward twice, and again in backward"
            assert (both["grad"] == traffic.backward[rank]).all()
        arrivals = 1 + int((plan.rows[:, rank] > 0).sum())
        assert calls == {"forward": 2 * arrivals, "backward": arrivals}, "every part ran on the native backend"
    if world > 1:
        assert sum(int(both["grad"].sum()) for _, _, both, _ in results) == traffic.backward_bound
        assert sum(int(forward["kv"].sum()) for _, forward, _, _ in results) == traffic.forward_bound


@pytest.mark.parametrize(
    "attention",
    [
        BlockSparseHierarchical(sparse_config={"sparsity_ratio": 0.5, "level_configs": LEVELS}),
        BlockSparseRingDilatedAttentionHilbertPostPattern(sparse_config=CONFIG),
        BlockSparseRingDilatedAttention([64, 256], [1, 2], CONFIG),
    ],
    ids=["hierarchical", "hilbert", "segments"],
)
def test_any_attention_goes_inside(ranks, attention):
    results = ranks.run(ring_step, attention, {}, torch.float32, world_size=3)
    whole = one_step(attention, whole_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        got = torch.cat([result[i] for result, *_ in results], 1)
        torch.testing.assert_close(got, want)


def dropped(rank, world, number):
    module = Distributed(sparse_config=CONFIG, dropout=0.4)
    torch.manual_seed(number + rank)
    return one_step(module, [module.shard(x) for x in whole_tensors()])


def test_the_same_entries_are_dropped_at_any_world_size(ranks):
    results = {world: ranks.run(dropped, 5, world_size=world) for world in WORLDS}
    for i in range(4):
        whole = results[1][0][i]
        for world in WORLDS[1:]:
            torch.testing.assert_close(torch.cat([r[i] for r in results[world]], 1), whole)
    torch.manual_seed(5)
    alone = one_step(BlockSparseRingDilatedAttention(sparse_config=CONFIG, dropout=0.4), whole_tensors())
    assert all(torch.equal(a, b) for a, b in zip(alone, results[1][0], strict=True))


def uneven(rank, world, cuts):
    module = Distributed(sparse_config=CONFIG)
    return one_step(module, [x[:, cuts[rank] : cuts[rank + 1]] for x in whole_tensors()], is_causal=True)


@pytest.mark.parametrize("cuts", [[0, 16, 160, 203], [0, 0, 96, 203], [0, 203, 203, 203]], ids=str)
def test_contiguous_shards_of_any_block_aligned_length(ranks, cuts):
    results = ranks.run(uneven, cuts, world_size=3)
    whole = one_step(BlockSparseRingDilatedAttention(sparse_config=CONFIG), whole_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r in results], 1), want)


def narrow_wire(rank, world, wire):
    module = Distributed(sparse_config=CONFIG, distributed_config={"wire_dtype": wire})
    shards = [module.shard(x, True) for x in whole_tensors()]
    out = module(*shards[:3], is_causal=True)
    return out, int(module.sent_bytes()["kv"].sum()), module._last_plan.traffic(16, batch=2, kv_itemsize=2)


def test_a_narrow_wire_halves_the_bytes_and_rounds_what_travels(ranks):
    results = ranks.run(narrow_wire, "bfloat16", world_size=2)
    q, k, v, _ = whole_tensors()
    attention = BlockSparseRingDilatedAttention(sparse_config=CONFIG)
    whole = attention(q, k, v, is_causal=True)
    rounded = attention(q, k.bfloat16().float(), v.bfloat16().float(), is_causal=True)
    got = torch.cat([out for out, *_ in results], 1)
    assert sum(sent for _, sent, _ in results) == results[0][2].forward_bound > 0
    first = results[0][0].shape[1]
    torch.testing.assert_close(got[:, :first], whole[:, :first])  # reads nothing from afar
    error = (got[:, first:] - whole[:, first:]).abs().max()
    assert 0 < error <= 2 * (rounded - whole).abs().max()


def rebalanced(rank, world):
    """A layout that changes under a placement: held until it is time, then cut anew."""
    config = {"pattern_type": "global_local", "window_size": 32, "global_tokens": 16, "block_size": 16}
    module = Distributed(
        sparse_config=config, distributed_config={"placement": "cost_balanced", "load_balance_interval": 10}
    )
    first = module.positions(203, True)
    assert not module.rebalance(10, 203, True), "the layout is the one that the placement was made for"
    module.sparse_config.window_size = 200
    module.sparse_config.global_tokens = 100
    assert torch.equal(module.positions(203, True), first)
    held = module.exchange_plan(203, True)
    assert not module.rebalance(15, 203, True)
    changed = module.rebalance(20, 203, True)
    plan = module.exchange_plan(203, True)
    out = one_step(module, [module.shard(x, True) for x in whole_tensors()], is_causal=True)[0]
    return changed, held.work_imbalance, plan.work_imbalance, out, module.positions(203, True)


def test_a_placement_is_held_while_the_layout_changes(ranks):
    results = ranks.run(rebalanced, world_size=3)
    assert all(changed and after < before for changed, before, after, *_ in results)
    config = {"pattern_type": "global_local", "window_size": 200, "global_tokens": 100, "block_size": 16}
    whole = BlockSparseRingDilatedAttention(sparse_config=config)(*whole_tensors()[:3], is_causal=True)
    for *_, out, positions in results:
        torch.testing.assert_close(out, whole[:, positions])
    with pytest.raises(ValueError, match="placement: expected 'cost_balanced' to rebalance, got 'contiguous'"):
        Distributed().rebalance(0, 64)


def half_inside(rank, world, how):
    module = Distributed(sparse_config=CONFIG, mixed_precision=how == "mixed")
    shards = [module.shard(x, True) for x in whole_tensors()]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        leaves = [x.clone().requires_grad_() for x in shards[:3]]
        out, lse = module(*leaves, is_causal=True, return_lse=True)
    grads = torch.autograd.grad(out, leaves, shards[3].to(out.dtype))
    return out.dtype, lse.dtype, {g.dtype for g in grads}, out.detach().float()


@pytest.mark.parametrize("how", ["mixed", "autocast"])
def test_half_precision_inside(ranks, how):
    results = ranks.run(half_inside, how, world_size=2)
    half = BlockSparseRingDilatedAttention(sparse_config=CONFIG)
    whole = half(*(x.bfloat16() for x in whole_tensors()[:3]), is_causal=True).float()
    outer = torch.float32 if how == "mixed" else torch.bfloat16
    assert all(r[:3] == (outer, torch.float32, {torch.float32}) for r in results)
    torch.testing.assert_close(torch.cat([r[3] for r in results], 1), whole, rtol=2 * 2**-8, atol=2**-8)


def checkpointed(rank, world):
    from torch.utils.checkpoint import checkpoint

    module = Distributed(sparse_config=CONFIG, dropout=0.3)
    shards = [module.shard(x) for x in whole_tensors()]
    found = []
    for wrap in (lambda *a: module(*a), lambda *a: checkpoint(module, *a, use_reentrant=False)):
        torch.manual_seed(3 + rank)
        found.append(one_step(wrap, shards))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_activation_checkpointing_repeats_the_call(ranks):
    assert ranks.run(checkpointed, world_size=2) == [True, True]


def multihead(rank, world, state, x, options):
    torch.manual_seed(0)
    inside = Distributed(sparse_config=CONFIG)
    module = BlockSparseRingMultiheadDilatedAttention(32, 4, batch_first=True, attention=inside, **options)
    module.load_state_dict(state)
    mine = inside.shard(x, True)
    padding = torch.zeros(mine.shape[:2], dtype=torch.bool)
    padding[:, ::5] = True
    if world > 1:
        with pytest.raises(ValueError, match="need_weights: expected False"):
            module(mine, mine, mine)
    out, weights = module(mine, mine, mine, key_padding_mask=padding, need_weights=False, is_causal=True)
    out.square().sum().backward()
    for p in module.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if world > 1:
            dist.all_reduce(p.grad)
    assert weights is None
    return out.detach(), {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "appended keys"])
def test_multihead_around_it(ranks, options):
    torch.manual_seed(1)
    state = BlockSparseRingMultiheadDilatedAttention(32, 4, **options).state_dict()
    x = torch.randn(2, 160, 32)
    alone = ranks.run(multihead, state, x, options, world_size=1)[0]
    results = ranks.run(multihead, state, x, options, world_size=2)
    torch.testing.assert_close(torch.cat([out for out, _ in results], 1), alone[0])
    for name, grad in alone[1].items():
        torch.testing.assert_close(results[0][1][name], grad, rtol=1e-4, atol=1e-5)
        assert torch.equal(results[0][1][name], results[1][1][name])


def with_ddp(rank, world):
    module = Distributed(
        sparse_config=CONFIG, distributed_config={"enable_gradient_compression": True, "compression_ratio": 1.0}
    )
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    state = module.register_comm_hook(model)
    model(torch.ones(1, 8)).sum().backward()
    return state.compression_ratio, state.payload_bytes > 0


@pytest.mark.filterwarnings("ignore:compression_ratio")
def test_the_comm_hook_compresses_as_configured(ranks):
    assert ranks.run(with_ddp, world_size=2) == [(1.0, True)] * 2
    with pytest.raises(ValueError, match="enable_gradient_compression: expected True"):
        Distributed().register_comm_hook(None)
