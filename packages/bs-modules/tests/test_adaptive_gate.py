"""The parts of a learned gate: budgets, pooling, scores, selection, losses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bs_modules._gate_losses import block_mass, distillation_loss
from bs_modules._gate_noise import random_words
from bs_modules._gate_room import _fill, make_room
from bs_modules._gate_scorer import ImportanceScorer, pool_queries, pool_real_blocks
from bs_modules._gate_select import logits_of, noisy, select_blocks
from bs_patterns import BlockLayout, LocalWindow

CPU = torch.device("cpu")


def room_of(lengths, blocks=(4, 4), causal=True, density=0.4, most=None, candidates=lambda lengths: None, **more):
    return make_room(lengths, blocks, causal, density, most, candidates, CPU, **more)


def scored(seed, batch, heads, room, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, *room.readable.shape[1:], generator=generator, dtype=dtype)


sizes = st.sampled_from([(1, 4), (4, 4), (3, 5), (8, 4), (1, 1)])
windows = st.sampled_from([None, 1, 5, 16])
budgets = st.sampled_from(["even", "share"])


@given(
    length=st.integers(1, 90),
    blocks=sizes,
    causal=st.booleans(),
    density=st.floats(0.01, 1.0),
    window=windows,
    rule=budgets,
)
def test_budgets_meet_the_density_within_one_half(length, blocks, causal, density, window, rule):
    room = room_of((length, length), blocks, causal, density, window_size=window, row_budget=rule)
    allowed = BlockLayout.from_dense(
        np.ones((1, *room.readable.shape[1:]), bool) & (room.readable | room.kept).numpy(),
        block_size=blocks,
        seq_len=(length, length),
        causal=causal,
    )
    assert allowed.density == 1
    assert allowed.nnz == room.allowed
    rows = room.budget.shape[1]
    least = int(room.least.sum())
    total = int(room.budget.sum())
    assert abs(total - max(density * room.allowed, least)) <= 0.5 + 1e-6
    if (
        blocks[0] <= blocks[1] and window is None
    ):  # the rule that fixed patterns keep, for at most two kept blocks in a row
        assert abs(total - max(density * room.allowed, rows)) <= rows
    assert (room.budget >= room.least).all()
    assert (room.budget <= (room.readable | room.kept).sum(-1)).all()
    assert room.met == pytest.approx(total / room.allowed)


@given(length=st.integers(2, 70), blocks=sizes, window=windows)
def test_readable_blocks_end_before_the_rows_first_position(length, blocks, window):
    room = room_of((length, length), blocks, window_size=window)
    first = torch.arange(room.readable.shape[1]) * blocks[0]
    last_key = ((torch.arange(room.readable.shape[2]) + 1) * blocks[1]).clamp(max=length) - 1
    assert not (room.readable[0] & (last_key >= first[:, None])).any()
    assert not (room.readable & room.kept).any()
    own = first // blocks[1]
    assert room.kept[0, torch.arange(len(first)), own].all()  # the diagonal is always there


@given(length=st.integers(1, 60), blocks=sizes, causal=st.booleans(), window=st.integers(1, 30))
def test_a_window_is_kept_and_the_rest_is_as_it_was(length, blocks, causal, window):
    near = LocalWindow(window).layout(length, block_size=blocks, causal=causal).to_dense()[0]
    without, room = (room_of((length, length), blocks, causal, window_size=size) for size in (None, window))
    assert torch.equal(room.kept[0], without.kept[0] | torch.from_numpy(near))
    assert torch.equal(room.kept | room.readable, without.kept | without.readable)


@given(
    queries=st.integers(1, 40),
    length=st.integers(1, 40),
    blocks=st.sampled_from([(1, 4), (4, 4)]),
    window=windows,
    rule=budgets,
)
def test_decoding_takes_the_budgets_of_its_positions(queries, length, blocks, window, rule):
    queries = min(queries, length)
    whole, part = (room_of((n, length), blocks, window_size=window, row_budget=rule) for n in (length, queries))
    start = length - queries
    if blocks[0] == 1 or start % blocks[0] == 0:
        rows = slice(start // blocks[0], None)
        for name in ("readable", "kept", "budget", "least"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, rows]), name
    assert (part.budget >= part.least).all()
    assert (part.budget <= (part.readable | part.kept).sum(-1)).all()


def test_more_queries_than_keys_leave_rows_without_blocks():
    room = room_of((12, 5), (4, 4))
    assert room.budget.tolist()[0][0] == 0
    assert room.budget.sum() > 0


def test_candidates_restrict_and_warn_when_they_are_too_few():
    narrow = lambda lengths: LocalWindow(8).layout(lengths, block_size=(4, 4), causal=True)  # noqa: E731
    with pytest.warns(UserWarning, match="candidates: only"):
        room = room_of((64, 64), density=0.9, candidates=narrow)
    assert torch.equal(room.readable[0] | room.kept[0], torch.from_numpy(narrow((64, 64)).to_dense()[0]) | room.kept[0])
    assert torch.equal(room.budget, (room.readable | room.kept).sum(-1))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=30),
    st.floats(0, 300),
    st.booleans(),
)
def test_fill_meets_its_target_between_its_bounds(rows, target, even):
    least = np.array([low for low, _ in rows])
    have = least + np.array([more for _, more in rows])
    made = _fill(target, least, have, even)
    assert ((least <= made) & (made <= have)).all()
    assert abs(made.sum() - min(max(target, least.sum()), have.sum())) <= 0.5 + 1e-6
    free = (least < made) & (made < have)
    rates = made[free] if even else made[free] / have[free]
    assert not free.any() or rates.max() - rates.min() <= (1 if even else 2 / have[free].min())


@given(length=st.integers(1, 30), block=st.integers(1, 6), padded=st.booleans())
def test_pooled_keys_are_mean_and_extremes_of_real_tokens(length, block, padded):
    generator = torch.Generator().manual_seed(length * 7 + block)
    k = torch.randn(2, length, 3, 4, generator=generator, dtype=torch.float64)
    real = torch.rand(2, length, generator=generator) < 0.6 if padded else None
    pooled = pool_real_blocks(k, block, real, 3)
    assert pooled.shape == (2, 3, -(-length // block), 3, 4)
    for b in range(2):
        for j in range(pooled.shape[2]):
            inside = torch.arange(length) // block == j
            keys = k[b, inside & (True if real is None else real[b])]
            wanted = [keys.mean(0), keys.amax(0), keys.amin(0)] if len(keys) else [torch.zeros(3, 4).double()] * 3
            for part, want in zip(pooled[b, :, j].unbind(1), wanted, strict=True):
                torch.testing.assert_close(part, want)


@given(length=st.integers(1, 30), block=st.integers(1, 6))
def test_a_causal_query_summary_is_that_of_the_queries_ending_at_its_first(length, block):
    q = torch.randn(1, length, 2, 4, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    pooled = pool_queries(q, block, True, 2)
    for i in range(-(-length // block)):
        window = q[0, max(0, i * block - block + 1) : i * block + 1]
        torch.testing.assert_close(pooled[0, :, i, 0], window.mean(0))
        if block > 1:
            torch.testing.assert_close(pooled[0, :, i, 1], window.amax(0))


@pytest.mark.parametrize("pooling", ["mean_max", "mean", "max"])
def test_fresh_scores_are_the_documented_similarities(pooling):
    torch.manual_seed(0)
    scorer = ImportanceScorer(4, 8, num_kv_heads=2, pooling=pooling, query_block_size=1, hidden_dim=16).double()
    q, k = torch.randn(2, 12, 4, 8).double(), torch.randn(2, 12, 2, 8).double()
    scores = scorer(q, k, 4, True, torch.zeros(12, 3))
    tiles = k.repeat_interleave(2, 2).unflatten(1, (3, 4)).transpose(1, 3)  # [B, H, 4, 3, D]
    queries = q.transpose(1, 2)
    mean = torch.einsum("bhqd,bhjd->bhqj", queries, tiles.mean(2))
    bound = torch.einsum("bhqd,bhjd->bhqj", queries.relu(), tiles.amax(2))
    bound -= torch.einsum("bhqd,bhjd->bhqj", (-queries).relu(), tiles.amin(2))
    wanted = (mean if pooling != "max" else 0) + (bound if pooling != "mean" else 0)
    torch.testing.assert_close(scores, 8**-0.5 * wanted)
    every = torch.einsum("bhqd,bhtjd->bhqtj", queries, tiles)
    assert (bound >= every.amax(3) - 1e-9).all()  # it bounds every product in the block


def test_the_learned_correction_and_the_distance_take_part():
    torch.manual_seed(0)
    scorer = ImportanceScorer(2, 8, hidden_dim=16, query_block_size=4).double()
    q = torch.randn(1, 16, 2, 8).double()
    distance = torch.rand(4, 4).double()
    before = scorer(q, q, 4, False, distance)
    with torch.no_grad():
        scorer.slope.fill_(2.0)
        torch.testing.assert_close(scorer(q, q, 4, False, distance), before + 2 * distance)
        scorer.slope.zero_()
        torch.nn.init.normal_(scorer.get_parameter("q_weight_1"))
        assert not torch.allclose(scorer(q, q, 4, False, distance), before)


def test_lazy_parameters_take_their_shapes_from_inputs_or_a_state_dict():
    lazy, eager = ImportanceScorer(hidden_dim=8), ImportanceScorer(4, 8, num_kv_heads=2, hidden_dim=8)
    lazy.load_state_dict(eager.state_dict())
    for name, parameter in eager.named_parameters():
        assert torch.equal(lazy.get_parameter(name), parameter)
    other = ImportanceScorer(hidden_dim=8)
    other(torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8), 64, False, torch.zeros(1, 1))
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in eager.named_parameters()}
    with pytest.raises(ValueError, match=r"q, k: expected .* \(4, 2, 8\) as the scorer was made for, got \(4, 4, 8\)"):
        other(torch.randn(1, 64, 4, 8), torch.randn(1, 64, 4, 8), 64, False, torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ImportanceScorer(2, 8, hidden_dim=8).load_state_dict(eager.state_dict())


def choose(logits, room, blocks, lengths, causal, **more):
    return select_blocks(
        logits, room, blocks, lengths, causal, **{"soft": True, "learn_density": False, "dead": None, **more}
    )


@given(seed=st.integers(0, 2**31), length=st.integers(1, 40), blocks=sizes, causal=st.booleans())
def test_every_row_takes_its_best_blocks(seed, length, blocks, causal):
    room = room_of((length, length), blocks, causal)
    scores = scored(seed, 2, 3, room)
    logits = logits_of(scores, room, torch.ones(()), None)
    made = choose(logits, room, blocks, (length, length), causal)
    made.layout.validate()
    assert torch.equal(made.layout.counts, room.budget.expand(2, 3, -1))
    for b, h, i in np.ndindex(2, 3, logits.shape[2]):
        count = int(room.budget[0, i])
        kept = set(room.kept[0, i].nonzero().flatten().tolist())
        rest = logits[b, h, i].masked_fill(~room.readable[0, i], -math.inf).sort(descending=True).indices.tolist()
        assert set(made.layout.indices[b, h, i, :count].tolist()) == kept | set(rest[: count - len(kept)])
    assert float(made.density) == pytest.approx(room.met)


def test_gates_are_sigmoids_of_the_distance_to_the_cut():
    room = room_of((16, 16), (1, 4), False, 0.5)
    logits = torch.tensor([3.0, -1.0, 2.0, 0.0]).double().expand(1, 1, 16, 4)
    made = choose(logits, room, (1, 4), (16, 16), False)
    cut = (2.0 + 0.0) / 2
    wanted = F.logsigmoid(torch.tensor([3.0 - cut, 2.0 - cut]).double())
    assert made.layout.indices[0, 0, 0].tolist() == [0, 2]
    torch.testing.assert_close(made.bias[0, 0, 0], wanted)
    straight = choose(logits.clone().requires_grad_(), room, (1, 4), (16, 16), False, soft=False)
    assert (straight.bias == 0).all()
    assert straight.bias.requires_grad
    assert choose(logits, room, (1, 4), (16, 16), False, soft=False).bias is None


def test_gradients_of_the_gates_by_finite_differences():
    room = room_of((24, 24), (4, 4), True, 0.5)
    scores = scored(3, 1, 2, room).requires_grad_()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def gates(scores, temperature):
        return choose(logits_of(scores, room, temperature, None), room, (4, 4), (24, 24), True).bias

    assert torch.autograd.gradcheck(gates, (scores, temperature))
    gradient = torch.autograd.grad(gates(scores, temperature).sum(), scores)[0]
    used = choose(logits_of(scores, room, temperature, None), room, (4, 4), (24, 24), True).layout
    first_left = (gradient != 0).sum() - (gates(scores, temperature) != 0).sum()
    assert first_left > 0, "the best block that a row leaves should feel the cut too"
    assert used.indices.shape[-1] == room.slots


def test_numbers_that_are_not_finite_stay_in_their_block():
    room = room_of((32, 32), (4, 4), True, 0.5)
    scores = scored(0, 1, 1, room)
    clean = choose(logits_of(scores, room, torch.ones(()), None), room, (4, 4), (32, 32), True)
    scores[..., 3] = float("nan")
    made = choose(logits_of(scores, room, torch.ones(()), None), room, (4, 4), (32, 32), True)
    made.layout.validate()
    assert torch.isfinite(made.bias).all()
    assert torch.equal(made.layout.indices[:, :, :4], clean.layout.indices[:, :, :4])  # rows that do not read it
    for i in range(4, 8):  # it comes last where it can be read
        taken = made.layout.indices[0, 0, i, : room.budget[0, i]].tolist()
        assert 3 not in taken or set(taken) >= set(range(i))


def test_dead_blocks_come_last():
    room = room_of((16, 16), (4, 4), False, 0.5)
    logits = logits_of(torch.tensor([9.0, 1.0, 0.0, 2.0]).expand(1, 1, 4, 4), room, torch.ones(()), None)
    dead = torch.tensor([[True, False, False, False]])
    made = choose(logits, room, (4, 4), (16, 16), False, dead=dead)
    assert made.layout.indices[0, 0, 0, :2].tolist() == [1, 3]


def test_a_learned_density_follows_its_threshold_between_its_bounds():
    room = room_of((256, 256), (4, 4), False, 0.2, most=0.5)
    scores = scored(1, 2, 1, room)
    met = []
    for threshold in (5.0, 1.0, 0.5, -5.0):
        logits = logits_of(scores, room, torch.ones(()), torch.tensor([threshold]).double())
        made = choose(logits, room, (4, 4), (256, 256), False, learn_density=True)
        made.layout.validate()
        assert (made.layout.counts >= room.least).all()
        assert (made.layout.counts <= room.most).all()
        met.append(float(made.density))
    assert met == sorted(met)
    assert met[0] == pytest.approx(float(room.least.sum()) / room.allowed)
    assert met[-1] == pytest.approx(0.5, abs=1e-3)
    assert met[1] == pytest.approx(0.16, abs=0.03)  # a normal score passes 1 with probability 0.159


def test_noise_has_the_law_it_should():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3)
    best = noisy(logits, False, 1).argmax(-1)
    share = torch.stack([(best == j).double().mean() for j in range(3)])
    wanted = logits[0].softmax(-1).double()
    assert (share - wanted).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    passed = (noisy(logits, True, 2) > 0).double().mean(0)
    assert (passed - logits[0].sigmoid()).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_noise_belongs_to_the_position():
    logits = torch.zeros(2, 3, 7, 5)
    whole, rows = noisy(logits, False, 3), torch.tensor([4, 1, 6])
    assert torch.equal(noisy(logits[:, :, rows], False, torch.tensor(3), rows, 7), whole[:, :, rows])
    assert whole.unique().numel() == whole.numel()
    assert not torch.equal(noisy(logits, False, 4), whole)
    # The published outputs of SplitMix64 for seed 1234567.
    words = [int(word) % 2**64 for word in random_words(torch.arange(3), 1234567)]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(1, 4), (4, 4), (3, 5)])
def test_block_mass_is_that_of_dense_attention(causal, blocks):
    torch.manual_seed(0)
    q, k = torch.randn(2, 22, 4, 8), torch.randn(2, 22, 2, 8)
    real = torch.ones(2, 22, dtype=torch.bool)
    real[1, 15:] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 8**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(22, 22).triu(1).bool(), -math.inf)
    weights = scores.masked_fill(~real[:, None, None], -math.inf).softmax(-1)
    rows, columns = -(-22 // blocks[0]), -(-22 // blocks[1])
    wanted = torch.zeros(2, 4, rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weights[:, :, i * blocks[0] : (i + 1) * blocks[0], j * blocks[1] : (j + 1) * blocks[1]]
            wanted[:, :, i, j] = part.sum(-1).mean(-1)
    made = block_mass(q, k, torch.arange(rows), blocks, causal, 8**-0.5, real)
    torch.testing.assert_close(made, wanted)


def test_distillation_is_zero_at_the_masses_and_has_the_right_gradient():
    torch.manual_seed(0)
    q, k = torch.randn(1, 32, 2, 8).double(), torch.randn(1, 32, 2, 8).double()
    room = room_of((32, 32), (4, 4), True)
    mass = block_mass(q, k, torch.arange(8), (4, 4), True, 8**-0.5).double()
    logits = mass.log().masked_fill(~room.readable, -math.inf)
    exact = distillation_loss(logits, mass, room.readable)
    assert abs(float(exact)) < 1e-6
    other = torch.where(room.readable, torch.randn_like(logits), -math.inf).requires_grad_()
    loss = distillation_loss(other, mass, room.readable)
    assert loss > 0.01
    gradient = torch.autograd.grad(loss, other)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[room.readable.expand_as(gradient)] != 0).any()
    assert (gradient[~room.readable.expand_as(gradient)] == 0).all()
