"""A live gate over real processes: the picks, results and gradients of one process, at any world size."""

import math
import os
import signal
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from bs_comm import Placement, RingMismatchError, RingPeerError
from bs_comm.testing import RankPool, owners
from bs_modules import BlockSparseAdaptive, BlockSparseRingMultiheadDilatedAttention
from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules.testing.rings import one_step, whole_tensors

TOKENS, HEADS, KV_HEADS, DIM = 203, 4, 2, 8
CONFIG = {"base_sparsity": 0.6, "block_size": 16, "hidden_dim": 16}


@dataclass
class Case:
    """One step of a gate, in one process or over ranks."""

    gate: dict = field(default_factory=dict)
    module: dict = field(default_factory=dict)
    spread: dict = field(default_factory=dict)
    is_causal: bool = True
    train: bool = True
    padding: bool = False
    bias: bool = False
    documents: bool = False
    queries: int = TOKENS
    dtype: torch.dtype = torch.float64


CASES = {
    "evaluation": Case(train=False, spread={"placement": "stripe"}),
    "training": Case(spread={"keep_kv": True}),
    "both ways, padding": Case(is_causal=False, padding=True, spread={"placement": "zigzag"}),
    "soft, shared heads": Case(gate={"gate": "soft", "share_across_heads": True, "pooling": "max"}, padding=True),
    "learned density": Case(gate={"learn_density": True, "max_density": 0.9}, is_causal=False),
    "every query by itself": Case(gate={"query_block_size": 1, "pooling": "mean"}),
    "wide query blocks": Case(gate={"query_block_size": 32}, spread={"placement": "zigzag"}),
    "distillation, dropout": Case(gate={"distill_rows": 5}, module={"dropout": 0.3}, padding=True),
    "shared distillation": Case(gate={"distill_rows": 9, "share_across_heads": True}, is_causal=False),
    "bias, balanced": Case(bias=True, spread={"placement": "cost_balanced"}),
    "documents": Case(documents=True, padding=True, spread={"placement": "zigzag"}),
    "documents both ways": Case(gate={"distill_rows": 4, "learn_density": True}, is_causal=False, documents=True),
    "mixed precision": Case(module={"mixed_precision": True}, dtype=torch.float32),
    "segments": Case(module={"segment_lengths": [64, 256], "dilation_rates": [1, 2]}),
    "more keys than queries": Case(queries=101),
}


def make(case, seed=5):
    torch.manual_seed(seed)
    gate = BlockSparseAdaptive(
        sparse_config=CONFIG | case.gate, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, **case.module
    )
    with torch.no_grad():  # perceptrons that have learned something
        for p in gate.scorer.parameters():
            p.add_(torch.randn(p.shape) / 8)
    return gate.train(case.train)


def tensors(case):
    g = torch.Generator().manual_seed(1)

    def draw(tokens, heads):
        return torch.randn(2, tokens, heads, DIM, generator=g, dtype=torch.float64).to(case.dtype)

    q, k, v = draw(case.queries, HEADS), draw(TOKENS, KV_HEADS), draw(TOKENS, KV_HEADS)
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[1, 40:90] = padding[0, -9:] = False
    bias = torch.randn(1, HEADS, case.queries, TOKENS, generator=g, dtype=torch.float64).to(case.dtype)
    return q, k, v, draw(case.queries, HEADS), padding, bias


def run(module, gate, case, q, k, v, dout, padding, bias, at=None, rank=0):
    """Everything that a step gives: (output, gradients of q, k, v and the bias, of parameters; losses of the gate)."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    masks = {"key_padding_mask": padding} if case.padding else {}
    if case.documents:
        ids = torch.bucketize(torch.arange(TOKENS), torch.tensor([30, 61, 64, 150])).expand(2, -1)
        masks["segment_ids"] = ids if at is None else ids[:, at]
    if case.bias:
        masks["attn_bias"] = bias.clone().requires_grad_()
        leaves.append(masks["attn_bias"])
    torch.manual_seed(7 + rank)  # the first rank's counts
    out = module(*leaves[:3], case.is_causal, **masks)
    loss = (out * dout).sum()
    for name in gate.gate_losses:
        loss = loss + 50 * gate.gate_losses[name]
    loss.backward()
    none = torch.zeros(())
    grads = {name: none if p.grad is None else p.grad for name, p in gate.named_parameters()}
    losses = {name: float(loss.detach()) for name, loss in gate.gate_losses.items()}
    return [out.detach(), *(x.grad for x in leaves)], grads, losses


def over_ranks(rank, world, names, cuts=None, mesh=None, wrap=False):
    found = {}
    for name in names:
        case = CASES[name]
        gate = make(case)
        config = {"hop_timeout": 20.0} | ({} if cuts else case.spread)
        group = None if mesh is None else init_device_mesh("cpu", mesh)
        module = Distributed(attention=gate, distributed_config=config, group=group).train(case.train)
        q, k, v, dout, padding, bias = tensors(case)
        at = None
        if cuts:
            at = slice(cuts[rank], cuts[rank + 1])
            q, k, v, dout, padding = (x[:, cuts[rank] : cuts[rank + 1]] for x in (q, k, v, dout, padding))
        elif case.queries == TOKENS:
            at = module.positions(TOKENS, case.is_causal)
            q, k, v, dout, padding, bias = (
                *(x[:, at] for x in (q, k, v, dout, padding)), bias[:, :, at]
            )  # fmt: skip
        else:
            here = [(case.queries * r // world // 16 * 16, TOKENS * r // world // 16 * 16) for r in (rank, rank + 1)]
            if rank == world - 1:
                here[1] = (case.queries, TOKENS)
            queries, keys = (slice(a, b) for a, b in zip(*here, strict=True))
            q, dout, bias = q[:, queries], dout[:, queries], bias[:, :, queries]
            k, v, padding = (x[:, keys] for x in (k, v, padding))
        if wrap:
            dout = dout * world  # it averages
            module = DistributedDataParallel(module)
        made = run(module, gate, case, q, k, v, dout, padding, bias, at, rank)
        module = getattr(module, "module", module)
        stats = module.get_pattern_stats(TOKENS) if case.queries == TOKENS else {}
        digest = module._last_plan.layout.digest if world > 1 else ""
        found[name] = (*made, stats.get("density"), digest, None if cuts else module.positions(TOKENS, case.is_causal))
    return found


def check(name, results, cuts=None, columns=1):
    case = CASES[name]
    gate = make(case)
    whole, grads, losses = run(gate, gate, case, *tensors(case))
    own = [result[name] for result in results]
    for column in range(columns):
        assert len({digest for *_, digest, _ in own[column::columns]}) == 1, "every rank of a ring has the same plan"
    for i, want in enumerate(whole):
        dim = 2 if i == 4 else 1
        got = torch.cat([r[0][i] for r in own], dim)
        if cuts is None and case.queries == TOKENS:
            got = got.index_select(dim, torch.cat([at for *_, at in own]).argsort())
        # The masses that distillation follows are those of fp32.
        rtol, atol = (1e-4, 1e-7) if "distillation" in losses else (1e-9, 1e-11)
        if case.dtype == torch.float32:  # bfloat16 inside
            rtol, atol = 2**-6, 2**-7 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    for parameter, want in grads.items():
        got = sum(r[1][parameter] for r in own)
        rtol, slack = (2**-6, 2**-6) if case.dtype == torch.float32 else (1e-4, 1e-6)
        torch.testing.assert_close(got, want, rtol=rtol, atol=max(1e-6, slack * float(want.abs().max())))
    for kind, want in losses.items():
        assert sum(r[2][kind] for r in own) == pytest.approx(want, rel=1e-5)
    if case.train:
        assert any(bool((grad != 0).any()) for grad in grads.values()), "the gate learns"
    if case.queries == TOKENS:
        assert all(r[3] == pytest.approx(gate.get_pattern_stats(TOKENS)["density"]) for r in own)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_step_is_that_of_one_process(ranks, world):
    names = list(CASES)[{2: slice(None), 3: slice(0, None, 2), 4: slice(1, None, 2)}[world]]
    results = ranks.run(over_ranks, names, world_size=world)
    for name in names:
        check(name, results)


def test_a_step_over_a_mesh_is_that_of_one_process(ranks):
    names = [
        "both ways, padding",
        "soft, shared heads",
        "learned density",
        "distillation, dropout",
        "bias, balanced",
        "documents",
    ]
    results = ranks.run(over_ranks, names, None, (2, 2), world_size=4)
    for name in names:
        check(name, results, columns=2)


def test_under_ddp(ranks):
    """Every rank ends with the whole gradient of the scorer, even one without tokens."""
    shares = ranks.run(over_ranks, ["training"], [0, 0, 203], world_size=2)
    averaged = ranks.run(over_ranks, ["training"], [0, 0, 203], None, True, world_size=2)
    for result in averaged:
        for name, grad in result["training"][1].items():
            total = sum(share["training"][1][name] for share in shares)
            torch.testing.assert_close(grad, total, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cuts", [[0, 0, 96, 203], [0, 16, 203, 203]], ids=str)
def test_shards_of_any_length_even_none(ranks, cuts):
    names = [
        "training",
        "both ways, padding",
        "every query by itself",
        "learned density",
        "distillation, dropout",
        "documents",
    ]
    results = ranks.run(over_ranks, names, cuts, world_size=3)
    for name in names:
        check(name, results, cuts)


def spread_by_hand(rank, world):
    """Lazy parameters, single precision, caching, calibration, disagreement; what early outputs owe to late tokens."""
    case = Case(dtype=torch.float32)
    q, k, v, *_ = tensors(case)
    torch.manual_seed(3 + rank)
    lazy = Distributed(attention=BlockSparseAdaptive(sparse_config=CONFIG), distributed_config={"hop_timeout": 20.0})
    shards = [lazy.shard(x, True) for x in (q, k, v)]
    lazy(*shards, is_causal=True)
    drawn = [p.detach().clone() for p in lazy.attention.scorer.parameters()]

    gate = make(case).eval()
    module = Distributed(attention=gate, distributed_config={"hop_timeout": 20.0}).eval()
    q2, k2, v2 = (torch.cat((x[:, :150], torch.randn_like(x[:, 150:])), 1) for x in (q, k, v))
    with torch.no_grad(), gate.calibrating():
        out = module(*shards, is_causal=True)
        other = module(*(module.shard(x, True) for x in (q2, k2, v2)), is_causal=True)
    traffic = module._last_plan.traffic(DIM, batch=1, kv_itemsize=4)
    assert (module.sent_bytes()["kv"] == traffic.forward[rank]).all()
    assert traffic.forward.sum() == traffic.forward_bound > 0
    frozen = gate.freeze().layout(TOKENS, True, HEADS).digest
    early = module.positions(TOKENS, True) < 150
    assert torch.equal(out[:, early], other[:, early]), "later tokens change no bit"

    gate.cache = True
    first = module(*shards, is_causal=True)
    picks, plan = dict(gate._selections), module._last_plan
    again = module(shards[0].roll(1, 0), *shards[1:], is_causal=True)
    assert gate._selections == picks
    assert module._last_plan is plan
    assert again.shape == first.shape
    gate.cache = False

    with pytest.raises(ValueError, match="layout: expected an input"):
        module.exchange_plan(TOKENS, True)
    module.distributed_config.placement = "cost_balanced"
    whole = gate(q, k, v, True)
    for step in (1, 1000):
        changed = module.rebalance(step, TOKENS, True)
        assert step == 1000 or not changed
        balanced, at = [module.shard(x, True) for x in (q, k, v)], module.positions(TOKENS, True)
        torch.testing.assert_close(module(*balanced, is_causal=True), whole[:, at])
    module.distributed_config.placement = "contiguous"

    gate.sparse_config.base_sparsity = 0.5 + 0.1 * (rank == 1)
    with pytest.raises(RingMismatchError) as caught:
        module(*shards, is_causal=True)
    assert caught.value.fields == {"gate": [1]}
    return drawn, out, frozen


def test_lazy_cached_calibrated_and_without_a_leak(ranks):
    results = ranks.run(spread_by_hand, world_size=3)
    case = Case(dtype=torch.float32, train=False)
    q, k, v, *_ = tensors(case)
    torch.manual_seed(3)
    lazy = BlockSparseAdaptive(sparse_config=CONFIG)
    lazy.select(q, k, True)
    for drawn, _, digest in results:
        assert all(torch.equal(a, b) for a, b in zip(drawn, lazy.scorer.parameters(), strict=True))
        assert digest == results[0][2]
    gate = make(case)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([out for _, out, _ in results], 1), gate(q, k, v, is_causal=True))


@st.composite
def gates(draw):
    """(config, module arguments, lengths, heads, flags): any gate that the ring may meet."""
    size, query_size = draw(st.sampled_from([3, 8])), draw(st.sampled_from([None, 1, 4]))
    config = {"base_sparsity": draw(st.sampled_from([0.3, 0.7])), "block_size": size, "query_block_size": query_size}
    config["hidden_dim"], config["num_layers"] = 4, draw(st.integers(1, 2))
    config["pooling"] = draw(st.sampled_from(["mean_max", "mean", "max"]))
    config["gate"] = draw(st.sampled_from(["straight_through", "soft"]))
    for name in ("share_across_heads", "learn_density"):
        config[name] = draw(st.booleans())
    flags = {name: draw(st.booleans()) for name in ("causal", "train", "padding", "documents", "keep_kv")}
    return config, draw(st.integers(1, 60)), draw(st.integers(1, 2)), flags


def any_gate(rank, world, drawn, place):
    config, tokens, groups, flags = drawn
    torch.manual_seed(2)
    gate = BlockSparseAdaptive(
        sparse_config=config, num_heads=2 * groups, num_kv_heads=groups, head_dim=4, dropout=0.2
    )  # fmt: skip
    with torch.no_grad():
        for p in gate.scorer.parameters():
            p.add_(torch.randn(p.shape) / 4)
    module = Distributed(
        attention=gate, distributed_config={"placement": place, "hop_timeout": 20.0, "keep_kv": flags["keep_kv"]}
    ).train(flags["train"])
    g = torch.Generator().manual_seed(tokens)
    at = place.positions(rank)
    q, k, v, dout = (
        torch.randn(2, tokens, n * groups, 4, generator=g, dtype=torch.float64)[:, at] for n in (2, 1, 1, 2)
    )
    masks = {"key_padding_mask": (torch.rand(2, tokens, generator=g) < 0.7)[:, at]} if flags["padding"] else {}
    if flags["documents"]:
        masks["segment_ids"] = (torch.rand(2, tokens, generator=g) < 0.1).cumsum(1)[:, at]
    torch.manual_seed(11 + rank)
    made = one_step(module, [q, k, v, dout], is_causal=flags["causal"], **masks)
    torch.manual_seed(11 + rank)
    module(q.requires_grad_(), k, v, flags["causal"], **masks).sum().backward()
    return made, [torch.zeros(()) if p.grad is None else p.grad for p in gate.parameters()]


@settings(phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data(), gates(), st.integers(2, 4))
def test_any_gate_over_any_ring_is_the_gate_of_one_process(ranks, data, drawn, world):
    config, tokens, *_ = drawn
    block = math.lcm(config["block_size"], config["query_block_size"] or config["block_size"])
    place = data.draw(owners(tokens, block, world))
    results = ranks.run(any_gate, drawn, place, world_size=world)
    whole, grads = any_gate(0, 1, drawn, Placement.contiguous(tokens, 1, block_size=block))
    for got, want in zip(zip(*(made for made, _ in results), strict=True), whole, strict=True):
        torch.testing.assert_close(place.unshard(list(got)), want, rtol=1e-8, atol=1e-10)
    for got, want in zip(zip(*(shares for _, shares in results), strict=True), grads, strict=True):
        torch.testing.assert_close(sum(got), want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))


def dies_while_picking(rank, world):
    """One rank dies between the pooled keys and the picks; the others raise, regroup, and redo the step."""
    case = Case(dtype=torch.float32)
    gate, (q, k, v, dout, *_) = make(case), tensors(case)
    module = Distributed(attention=gate, distributed_config={"hop_timeout": 5.0})
    dist.barrier()
    if rank == 1:
        gate.scorer.score = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RingPeerError) as caught:
        one_step(module, [module.shard(x, True) for x in (q, k, v, dout)], is_causal=True)
    assert caught.value.peer == 1
    left = module.regroup(caught.value)
    torch.manual_seed(4)
    redone = one_step(module, [module.shard(x, True) for x in (q, k, v, dout)], is_causal=True)
    return left.old_ranks, redone


def fresh_step(rank, world):
    case = Case(dtype=torch.float32)
    module = Distributed(attention=make(case))
    torch.manual_seed(4)
    q, k, v, dout, *_ = tensors(case)
    return one_step(module, [module.shard(x, True) for x in (q, k, v, dout)], is_causal=True)


def test_a_rank_that_dies_while_it_picks(ranks):
    with RankPool(3) as pool:
        pool.start(dies_while_picking)
        results = pool.collect(60, ranks=[0, 2])
    for (old_ranks, redone), fresh in zip(results, ranks.run(fresh_step, world_size=2), strict=True):
        assert old_ranks == (0, 2)
        assert all(torch.equal(a, b) for a, b in zip(redone, fresh, strict=True))


def projections(attention=None):
    gate = BlockSparseAdaptive(sparse_config=CONFIG, num_heads=HEADS, head_dim=DIM)
    inside = gate if attention is None else attention(attention=gate)
    return BlockSparseRingMultiheadDilatedAttention(HEADS * DIM, HEADS, batch_first=True, attention=inside).eval()


def projected(rank, world, state, x):
    module = projections(Distributed)
    module.load_state_dict(state)
    mine = module.attention.shard(x, True)
    return module(mine, mine, mine, need_weights=False, is_causal=True)[0].detach()


def test_multihead_around_a_live_gate(ranks):
    x, alone = torch.randn(2, TOKENS, HEADS * DIM), projections()
    state = {name.replace("attention.", "attention.attention."): value for name, value in alone.state_dict().items()}
    results = ranks.run(projected, state, x, world_size=2)
    want, _ = alone(x, x, x, need_weights=False, is_causal=True)
    torch.testing.assert_close(torch.cat(results, 1), want)


def gated(rank, world, gate, samples):
    """A gate's layout over the ring, taken when it is time."""
    module = Distributed(attention=gate, distributed_config={"pattern_update_interval": 5})
    whole = whole_tensors()
    shards = [x.tensor_split([112], 1)[rank] for x in whole]
    assert not module.update_pattern(3, gate, samples)
    assert module.update_pattern(5, gate, samples)
    return one_step(module, shards), module.attention.layout(203, False, 4).digest


def test_the_layout_that_a_gate_picks(ranks):
    gate = BlockSparseAdaptive(sparse_config={"base_sparsity": 0.6, "block_size": 16}, num_heads=4, head_dim=16)
    samples = [whole_tensors(heads=4, kv_heads=4)[:2]]
    gate.select(*samples[0])  # makes the scorer's parameters
    results = ranks.run(gated, gate, samples, world_size=2)
    frozen = gate.freeze(samples)
    assert {digest for _, digest in results} == {frozen.layout(203, False, 4).digest}
    whole = one_step(frozen, whole_tensors())
    for i, want in enumerate(whole):
        torch.testing.assert_close(torch.cat([r[i] for r, _ in results], 1), want)
