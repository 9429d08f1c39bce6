"""The distributed module between real processes: the result of one process, bytes as planned, failures by name."""

import math
import os
import pickle
import signal
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from bs_comm import ExchangePlan, Placement, RingMismatchError, RingPeerError
from bs_comm.testing import RankError, RankPool, owners
from bs_kernels.backends.native import NativeBackend
from bs_kernels.testing import assert_close_to_oracle, make_case
from bs_kernels.testing.strategies import cases
from bs_modules import (
    BlockSparseAdaptive,
    BlockSparseAttention,
    BlockSparseHierarchical,
    BlockSparseRingDilatedAttention,
    BlockSparseRingDilatedAttentionHilbertPostPattern,
    BlockSparseRingMultiheadDilatedAttention,
    DilatedAttention,
    DistributedSparseConfig,
    HierarchicalConfig,
    SparsePatternConfig,
)
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_patterns import BlockLayout

# A call in which one rank raises ends for the others at the deadline: an example takes a minute to fail.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
WORLDS = [1, 2, 3, 4] + [8] * bool(os.environ.get("BS_SOAK"))
ARGUMENTS = ("causal", "key_padding_mask", "segment_ids", "attn_bias", "bool_bias", "dropout", "scale", "order")
LEVELS = [{"stride": 1, "window_size": 32, "block_size": 16}, {"stride": 4, "window_size": -1, "block_size": 16}]
CONFIG = {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.4, "block_size": 16}


class Given(BlockSparseAttention):
    """Attends to a layout that was made elsewhere."""

    def __init__(self, layout, **arguments):
        super().__init__(**arguments)
        self.given = layout

    def layout(self, seq_len, is_causal=False, num_heads=None):
        assert seq_len in (self.given.seq_len, self.given.seq_len[0])
        return self.given.as_causal() if is_causal and not self.given.causal else self.given


# ---------------------------------------------------------------------- against the oracle


def seed_of(number):
    """The dropout seed that a module draws after ``torch.manual_seed(number)``."""
    torch.manual_seed(number)
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def run_case(rank, world, case, place, kv_place, number, config, mesh=None):
    """This rank's share of a case's results; with a mesh, ranks of a row share heads."""
    a = case.arguments
    native = case.q.dtype != torch.float64
    inside = Given(
        case.layout, dropout=a.get("dropout_p", 0.0), scale=a.get("scale"), order=a.get("order", "auto"),
        backend="native" if native else "auto",
    )  # fmt: skip
    group = None if mesh is None else init_device_mesh("cpu", mesh)
    module = Distributed(attention=inside, distributed_config=config, group=group)
    rank, column, columns = (rank, 0, 1) if mesh is None else (rank // mesh[1], rank % mesh[1], mesh[1])

    def cut(place, x, dim=1):
        return place.shard(x, rank, dim=dim).tensor_split(columns, dim)[column]

    operands = ((place, case.q), (kv_place, case.k), (kv_place, case.v))
    leaves = [cut(p, x).clone().requires_grad_() for p, x in operands]
    masks = {}
    if "key_padding_mask" in a:
        masks["key_padding_mask"] = cut(kv_place, a["key_padding_mask"])
    if "segment_ids" in a:
        masks["segment_ids"] = tuple(cut(p, x) for p, x in zip((place, kv_place), a["segment_ids"], strict=True))
    if "attn_bias" in a:
        bias = a["attn_bias"]
        bias = cut(place, bias, 2).clone() if bias.shape[2] > 1 else bias.clone()
        masks["attn_bias"] = bias.requires_grad_(bias.is_floating_point())
        leaves += [bias] if bias.is_floating_point() else []
    torch.manual_seed(number + rank)  # the first rank's counts
    out, lse = module(*leaves[:3], bool(a.get("causal") or case.layout.causal), **masks, return_lse=True)
    dout, dlse = cut(place, case.dout), cut(place, case.dlse, 2)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(lse.detach() == -math.inf, 0, lse) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def gathered(case, place, kv_place, results):
    """Results of the whole sequence from those of all ranks."""
    parts = list(zip(*results, strict=True))
    got = {
        name: p.unshard(list(parts[i]), dim=dim)
        for i, (name, p, dim) in enumerate(
            (("out", place, 1), ("lse", place, 2), ("q", place, 1), ("k", kv_place, 1), ("v", kv_place, 1))
        )
    }
    if len(parts) > 5:
        is_cut = case.arguments["attn_bias"].shape[2] > 1
        got["attn_bias"] = place.unshard(list(parts[5]), dim=2) if is_cut else sum(parts[5])
    return got


@settings(phases=NO_SHRINKING)
@given(st.data(), cases(arguments=ARGUMENTS), st.integers(1, WORLDS[-1]), st.integers(0, 2**31))
def test_any_call_over_any_ring_is_the_whole_call(ranks, data, case, world, number):
    """Masks, biases, dropout, GQA, empty rows and shards, any owner per block, forward and backward."""
    layout = case.layout
    if "dropout_p" in case.arguments:
        case.arguments["dropout_seed"] = seed_of(number)
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
    assert_close_to_oracle(case, gathered(case, place, kv_place, results))


@settings(phases=NO_SHRINKING)
@given(
    st.data(), cases(arguments=("causal", "key_padding_mask", "segment_ids", "scale", "order")),
    st.sampled_from([(2, 2), (1, 2), (1, 4), (2, 1), (4, 1)]),
)  # fmt: skip
def test_any_call_over_any_mesh_is_the_whole_call(ranks, data, case, mesh):
    """Tokens along one dimension, heads along the other."""
    columns = mesh[1]
    if case.k.shape[2] % columns:  # heads that the columns can share
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
    results = ranks.run(run_case, case, *places, 0, config, mesh, world_size=math.prod(mesh))
    dims = (1, 2, 1, 1, 1)
    rows = [
        [torch.cat(pieces, dim) for dim, pieces in zip(dims, zip(*results[r : r + columns], strict=True), strict=True)]
        for r in range(0, len(results), columns)
    ]
    assert_close_to_oracle(case, gathered(case, *places, rows))


def on_a_mesh(rank, world):
    module = Distributed(sparse_config=CONFIG, group=init_device_mesh("cpu", (2, 2)))
    assert (module.world_size, module.rank) == (4, rank)
    result = step(module, [module.shard(x, True) for x in full_tensors()], is_causal=True)
    x = torch.zeros(1, 51, 3, 8)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, shared by 2 ranks, got 3"):
        module(x, x, x)
    module.dropout = 0.1
    with pytest.raises(ValueError, match="dropout: not supported over a two-dimensional mesh"):
        module(*[torch.zeros(1, 51, 2, 8)] * 3)
    with pytest.raises(ValueError, match="group: a two-dimensional mesh cannot be regrouped"):
        module.regroup(RingPeerError(0, 0, 0, "forward", ""))
    assert torch.equal(module.positions(203), module.shard(torch.arange(203), dim=0))
    return result


def test_tokens_and_heads_on_a_mesh_of_two_by_two(ranks):
    results = ranks.run(on_a_mesh, world_size=4)
    whole = step(BlockSparseRingDilatedAttention(sparse_config=CONFIG), full_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r in results], 1), want)


# ---------------------------------------------------------------------- the module as it is used


def full_tensors(tokens=203, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, tokens, h, dim, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def step(module, tensors, **arguments):
    """(out, dq, dk, dv) of one step."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = module(*leaves, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))


def ring_step(rank, world, attention, config, dtype):
    """A causal step of this rank, the bytes it sent forward and in all, and how often the native kernels ran."""
    module = Distributed(attention=attention, distributed_config=config)
    shards = [module.shard(x, True) for x in full_tensors(dtype=dtype)]
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
        result = step(module, shards, is_causal=True)
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
    q, k, v, dout = full_tensors(dtype=dtype)
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
    whole = step(attention, full_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        got = torch.cat([result[i] for result, *_ in results], 1)
        torch.testing.assert_close(got, want)


def dropped(rank, world, number):
    module = Distributed(sparse_config=CONFIG, dropout=0.4)
    torch.manual_seed(number + rank)
    return step(module, [module.shard(x) for x in full_tensors()])


def test_the_same_entries_are_dropped_at_any_world_size(ranks):
    results = {world: ranks.run(dropped, 5, world_size=world) for world in WORLDS}
    for i in range(4):
        whole = results[1][0][i]
        for world in WORLDS[1:]:
            torch.testing.assert_close(torch.cat([r[i] for r in results[world]], 1), whole)
    torch.manual_seed(5)
    alone = step(BlockSparseRingDilatedAttention(sparse_config=CONFIG, dropout=0.4), full_tensors())
    assert all(torch.equal(a, b) for a, b in zip(alone, results[1][0], strict=True))


def uneven(rank, world, cuts):
    module = Distributed(sparse_config=CONFIG)
    return step(module, [x[:, cuts[rank] : cuts[rank + 1]] for x in full_tensors()], is_causal=True)


@pytest.mark.parametrize("cuts", [[0, 16, 160, 203], [0, 0, 96, 203], [0, 203, 203, 203]], ids=str)
def test_contiguous_shards_of_any_block_aligned_length(ranks, cuts):
    results = ranks.run(uneven, cuts, world_size=3)
    whole = step(BlockSparseRingDilatedAttention(sparse_config=CONFIG), full_tensors(), is_causal=True)
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r in results], 1), want)


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
    q, k, v, _ = (module.shard(x) for x in full_tensors())
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


def narrow_wire(rank, world, wire):
    module = Distributed(sparse_config=CONFIG, distributed_config={"wire_dtype": wire})
    shards = [module.shard(x, True) for x in full_tensors()]
    out = module(*shards[:3], is_causal=True)
    return out, int(module.sent_bytes()["kv"].sum()), module._last_plan.traffic(16, batch=2, kv_itemsize=2)


def test_a_narrow_wire_halves_the_bytes_and_rounds_what_travels(ranks):
    results = ranks.run(narrow_wire, "bfloat16", world_size=2)
    q, k, v, _ = full_tensors()
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
    out = step(module, [module.shard(x, True) for x in full_tensors()], is_causal=True)[0]
    return changed, held.work_imbalance, plan.work_imbalance, out, module.positions(203, True)


def test_a_placement_is_held_while_the_layout_changes(ranks):
    results = ranks.run(rebalanced, world_size=3)
    assert all(changed and after < before for changed, before, after, *_ in results)
    config = {"pattern_type": "global_local", "window_size": 200, "global_tokens": 100, "block_size": 16}
    whole = BlockSparseRingDilatedAttention(sparse_config=config)(*full_tensors()[:3], is_causal=True)
    for *_, out, positions in results:
        torch.testing.assert_close(out, whole[:, positions])
    with pytest.raises(ValueError, match="placement: expected 'cost_balanced' to rebalance, got 'contiguous'"):
        Distributed().rebalance(0, 64)


LONGNET = ([32, 96, 400], [1, 2, 4])


def longnet(rank, world, cuts, combine, causal, extra, dtype):
    """A step of exact LongNet over the ring: (lse, out, gradients), and the bytes sent."""
    inside = DilatedAttention(*LONGNET, combine=combine, dropout=0.3 if extra == "wide" else 0.0)
    module = Distributed(attention=inside)
    here = slice(cuts[rank], cuts[rank + 1])
    q, k, v, dout = (x[:, here] for x in full_tensors(dtype=dtype))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    masks = {}
    if extra == "wide":
        bias = torch.linspace(-1, 1, 4 * 203 * 203, dtype=dtype).view(1, 4, 203, 203)[:, :, here].clone()
        masks = {
            "key_padding_mask": (torch.arange(203) % 7 != 3).expand(2, -1)[:, here],
            "segment_ids": (torch.arange(203) // 120).expand(2, -1)[:, here],
            "attn_bias": bias.requires_grad_(),
        }
        leaves.append(bias)
    torch.manual_seed(9 + rank)
    out, lse = module(*leaves[:3], causal, return_lse=True, **masks)
    finite = torch.where(lse == -math.inf, 0, lse)
    loss = (out * dout.to(out.dtype)).sum() + finite.square().sum() / 8
    sent = int(module.sent_bytes()["kv"].sum())
    return [lse.detach(), out.detach(), *torch.autograd.grad(loss, leaves)], sent


@pytest.mark.parametrize("combine", ["softmax", "longnet", "union"])
@pytest.mark.parametrize(
    ("cuts", "causal", "extra"),
    [
        ([0, 64, 203], True, ""), ([0, 96, 100, 203], False, "wide"), ([0, 203, 203], False, ""),
    ],
    ids=["causal", "masks, bias, dropout", "an empty shard"],
)  # fmt: skip
def test_longnet_over_the_ring_is_longnet(ranks, combine, cuts, causal, extra):
    world = len(cuts) - 1
    results = ranks.run(longnet, cuts, combine, causal, extra, torch.float64, world_size=world)
    whole, _ = ranks.run(longnet, [0, 203], combine, causal, extra, torch.float64, world_size=1)[0]
    for i, want in enumerate(whole):
        dim = {0: 2, 5: 2}.get(i, 1)
        torch.testing.assert_close(torch.cat([r[i] for r, _ in results], dim), want, rtol=1e-10, atol=1e-12)


def test_longnet_moves_what_its_segments_need_and_rounds_once(ranks):
    results = ranks.run(longnet, [0, 64, 203], "softmax", True, "", torch.bfloat16, world_size=2)
    exact, _ = ranks.run(longnet, [0, 203], "softmax", True, "", torch.float64, world_size=1)[0]
    alone, _ = ranks.run(longnet, [0, 203], "softmax", True, "", torch.bfloat16, world_size=1)[0]
    for i, want in enumerate(exact):
        got = torch.cat([r[i] for r, _ in results], 2 if i == 0 else 1).double()
        band = torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (alone[i].double() - want).abs().max() + band
    # Causal, one segment of 400: the second rank reads the first one's 64 tokens, the first nothing.
    assert [sent for _, sent in results] == [2 * 2 * 64 * 2 * 16 * 2, 0]


def test_longnet_stays_where_its_segments_are(ranks):
    module = Distributed(attention=DilatedAttention([64], [2]))
    assert module.exchange_plan(256, True).rows.sum() == 0
    said = ranks.run(longnet_refused, world_size=2)
    assert (
        said
        == [
            ["placement: expected 'contiguous' for a DilatedAttention, got 'zigzag'", said[0][1]],
        ]
        * 2
    )
    assert said[0][1].startswith("sparse_config: expected None for a DilatedAttention over several ranks")


def longnet_refused(rank, world):
    x, said = torch.zeros(1, 64, 2, 8), []
    for inside, config in (({}, {"placement": "zigzag"}), ({"sparse_config": {"sparsity_ratio": 0.5}}, {})):
        with pytest.raises(ValueError) as caught:
            Distributed(attention=DilatedAttention([64], [2], **inside), distributed_config=config)(x, x, x)
        said.append(str(caught.value))
    return said


def gated(rank, world, gate, samples):
    """A gate's layout over the ring, taken when it is time."""
    module = Distributed(attention=gate, distributed_config={"pattern_update_interval": 5})
    whole = full_tensors()
    shards = [x.tensor_split([112], 1)[rank] for x in whole]
    assert not module.update_pattern(3, gate, samples)
    assert module.update_pattern(5, gate, samples)
    return step(module, shards), module.attention.layout(203, False, 4).digest


def test_the_layout_that_a_gate_picks(ranks):
    gate = BlockSparseAdaptive(sparse_config={"base_sparsity": 0.6, "block_size": 16}, num_heads=4, head_dim=16)
    samples = [full_tensors(heads=4, kv_heads=4)[:2]]
    gate.select(*samples[0])  # makes the scorer's parameters
    results = ranks.run(gated, gate, samples, world_size=2)
    frozen = gate.freeze(samples)
    assert {digest for _, digest in results} == {frozen.layout(203, False, 4).digest}
    whole = step(frozen, full_tensors())
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r, _ in results], 1), want)


# ---------------------------------------------------------------------- precision, checkpoints, multihead


def half_inside(rank, world, how):
    module = Distributed(sparse_config=CONFIG, mixed_precision=how == "mixed")
    shards = [module.shard(x, True) for x in full_tensors()]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        leaves = [x.clone().requires_grad_() for x in shards[:3]]
        out, lse = module(*leaves, is_causal=True, return_lse=True)
    grads = torch.autograd.grad(out, leaves, shards[3].to(out.dtype))
    return out.dtype, lse.dtype, {g.dtype for g in grads}, out.detach().float()


@pytest.mark.parametrize("how", ["mixed", "autocast"])
def test_half_precision_inside(ranks, how):
    results = ranks.run(half_inside, how, world_size=2)
    half = BlockSparseRingDilatedAttention(sparse_config=CONFIG)
    whole = half(*(x.bfloat16() for x in full_tensors()[:3]), is_causal=True).float()
    outer = torch.float32 if how == "mixed" else torch.bfloat16
    assert all(r[:3] == (outer, torch.float32, {torch.float32}) for r in results)
    torch.testing.assert_close(torch.cat([r[3] for r in results], 1), whole, rtol=2 * 2**-8, atol=2**-8)


def checkpointed(rank, world):
    from torch.utils.checkpoint import checkpoint

    module = Distributed(sparse_config=CONFIG, dropout=0.3)
    shards = [module.shard(x) for x in full_tensors()]
    found = []
    for wrap in (lambda *a: module(*a), lambda *a: checkpoint(module, *a, use_reentrant=False)):
        torch.manual_seed(3 + rank)
        found.append(step(wrap, shards))
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


# ---------------------------------------------------------------------- alone


def test_without_a_group_it_is_the_attention_inside(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = Distributed(sparse_config=CONFIG, dropout=0.2)
    q, k, v, _ = full_tensors()
    torch.manual_seed(0)
    got = module(q, k, v, is_causal=True, return_lse=True)
    torch.manual_seed(0)
    want = module.attention(q, k, v, is_causal=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (module.world_size, module.rank) == (1, 0)
    assert torch.equal(module.positions(203), torch.arange(203))
    stats = module.get_pattern_stats()
    assert stats["seq_len"] == 203
    assert stats["world_size"] == 1


def test_a_launcher_without_a_group_is_an_error_at_the_call(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    module = Distributed(sparse_config=CONFIG)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 4.*init_process_group"):
        module(*full_tensors()[:3])


def test_attributes_are_those_of_the_attention_inside():
    module = Distributed(sparse_config=SparsePatternConfig(sparsity_ratio=0.3), dropout=0.1)
    module.dropout = 0.25
    module.sparse_config.sparsity_ratio = 0.5
    assert module.attention.dropout == 0.25
    assert module.layout(1024).density == pytest.approx(0.5, abs=0.06)
    levels = Distributed(sparse_config=HierarchicalConfig())
    assert isinstance(levels.attention, BlockSparseHierarchical)


def test_copies():
    module = Distributed(sparse_config=CONFIG)
    q, k, v, _ = full_tensors()
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copy(q, k, v), module(q, k, v))
        copy.sparse_config.sparsity_ratio = 0.9
        assert module.sparse_config.sparsity_ratio == 0.4
    assert module.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attention": 3}, TypeError, "attention: expected a BlockSparseAttention, got int"),
        ({"attention": BlockSparseRingDilatedAttention(), "dropout": 0.1}, ValueError, "dropout: has no effect beside"),
        ({"attention": Distributed()}, ValueError, "does not communicate itself"),
        ({"distributed_config": 3}, TypeError, "distributed_config: expected a DistributedSparseConfig or a mapping"),
        ({"distributed_config": {"placment": "zigzag"}}, ValueError, "did you mean 'placement'"),
        ({"group": 3}, TypeError, "group: expected a process group or a DeviceMesh, got int"),
        ({"use_memory_pool": 1}, TypeError, "use_memory_pool: expected a bool, got 1"),
    ],
)
def test_what_it_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        Distributed(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("placement", "zigzg", ValueError, "did you mean 'zigzag'"),
        ("placement", 3, TypeError, "placement: expected one of"),
        ("hop_timeout", 0, ValueError, "hop_timeout: expected seconds > 0, got 0"),
        ("hop_timeout", "1", TypeError, "hop_timeout: expected seconds > 0"),
        ("wire_dtype", "int8", ValueError, "wire_dtype: expected one of bfloat16"),
        ("compression_ratio", 1.5, ValueError, r"compression_ratio: expected a number in \(0, 1\], got 1.5"),
        ("compression_ratio", 0.5, ValueError, "compression_ratio: has no effect without"),
        ("pattern_update_interval", 0, ValueError, "pattern_update_interval: expected an integer ≥ 1, got 0"),
        ("load_balance_interval", True, TypeError, "load_balance_interval: expected an integer"),
        ("enable_gradient_compression", 1, TypeError, "enable_gradient_compression: expected"),
        ("keep_kv", 1, TypeError, "keep_kv: expected"),
    ],
)
def test_config_refuses(field, value, error, words):
    with pytest.raises(error, match=words):
        DistributedSparseConfig(**{field: value})


def test_config_there_and_back():
    config = DistributedSparseConfig(
        True, 0.2, placement="zigzag", hop_timeout=5, wire_dtype=torch.bfloat16, keep_kv=True
    )
    assert DistributedSparseConfig.from_dict(config.to_dict()) == config
    assert DistributedSparseConfig.from_toml(config.to_toml()) == config
    assert config.replace(placement="stripe").placement == "stripe"
    assert DistributedSparseConfig() == DistributedSparseConfig(
        enable_gradient_compression=False,
        compression_ratio=0.1,
        pattern_update_interval=100,
        load_balance_interval=1000,
    )
    with pytest.raises(TypeError, match="placement: expected a name"):
        DistributedSparseConfig(placement=Placement.zigzag(64, 2)).to_dict()


# ---------------------------------------------------------------------- a rank dies


def fail_and_go_on(rank, world, victim, at_backward, stop):
    """The victim dies in a kernel; the others raise, regroup, and redo the step."""
    module = Distributed(sparse_config=CONFIG, distributed_config={"hop_timeout": 3.0})
    dist.barrier()
    if rank == victim:
        name = "backward" if at_backward else "forward"
        kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)  # noqa: E731
        setattr(NativeBackend, name, kill)
    with pytest.raises(RingPeerError) as caught:
        step(module, [module.shard(x, True) for x in full_tensors()], is_causal=True)
    with pytest.raises(RingPeerError):  # the group stays failed
        module(*(module.shard(x, True) for x in full_tensors()[:3]))
    left = module.regroup(caught.value)
    assert module.world_size == left.world_size == world - 1
    redone = step(module, [module.shard(x, True) for x in full_tensors()], is_causal=True)
    return caught.value.peer, left.old_ranks, redone


def fresh_step(rank, world):
    module = Distributed(sparse_config=CONFIG)
    return step(module, [module.shard(x, True) for x in full_tensors()], is_causal=True)


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
    module(*(module.shard(x, True) for x in full_tensors()[:3]), is_causal=True)


def test_an_error_on_one_rank_reaches_the_others():
    with RankPool(3) as pool, pytest.raises(RankError) as caught:
        pool.run(late_error)
    errors = caught.value.errors
    assert isinstance(errors[1], ZeroDivisionError)
    assert all(isinstance(errors[r], RingPeerError) and errors[r].peer == 1 for r in (0, 2))
