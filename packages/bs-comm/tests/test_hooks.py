"""Gradient compression between real processes: what is sent, what is kept, and that training still arrives."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bs_comm import TopKState, compress_gradients, topk_hook


def problem(rank, seed=0):
    """A model, the same on all ranks, and this rank's half of a regression problem."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(256, 16, generator=g)
    y = torch.sin(x @ torch.randn(16, 4, generator=g) / 4)
    return model, x[rank::2], y[rank::2]


def train(rank, world, method, arguments, steps=300):
    model, x, y = problem(rank)
    # Several buckets, so that their regrouping after the first step is part of the test.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    state = None
    if method is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = compress_gradients(ddp, method, **arguments)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
    loss = nn.functional.mse_loss(model(x), y).detach()
    dist.all_reduce(loss)
    counters = None
    if isinstance(state, TopKState):
        counters = (state.payload_bytes, state.dense_bytes, state.wire_bytes, state.all_reduce_bytes)
    return float(loss) / world, torch.cat([p.detach().flatten() for p in model.parameters()]), counters


#: Accepted excess over the uncompressed loss after the same number of steps.
MARGIN = {"topk": 1.02, "powersgd": 1.02, "bf16": 1.002, "fp16": 1.002}


@pytest.fixture(scope="module")
def plain(ranks):
    """Training without compression."""
    start = ranks.run(train, None, {}, 0, world_size=2)
    trained = ranks.run(train, None, {}, world_size=2)
    assert trained[0][0] < 0.5 * start[0][0], "the problem is learned at all"
    return trained


@pytest.mark.parametrize("method", list(MARGIN))
def test_training_reaches_the_uncompressed_loss(ranks, plain, method):
    squeezed = ranks.run(train, method, {}, world_size=2)
    assert squeezed[0][0] <= MARGIN[method] * plain[0][0]
    assert torch.equal(squeezed[0][1], squeezed[1][1]), "all ranks have the same weights"
    assert not torch.equal(squeezed[0][1], plain[0][1]), "the hook did something"


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5])
def test_payload_keeps_to_the_ratio(ranks, ratio):
    for _, _, counters in ranks.run(train, "topk", {"compression_ratio": ratio}, 5, world_size=2):
        payload, dense, wire, all_reduce = counters
        assert 0 < payload <= ratio * dense
        assert wire == payload, "one other rank"
        assert all_reduce == dense


def one_step(rank, world, ratio, feedback):
    """Two steps on a constant gradient, by hand: what arrives in each."""
    weight = nn.Parameter(torch.zeros(8))
    module = nn.Module()
    module.weight = weight
    module.forward = lambda scale: (weight * scale).sum()
    ddp = DistributedDataParallel(module)
    state = TopKState(ratio, error_feedback=feedback)
    ddp.register_comm_hook(state, topk_hook)
    gradient = torch.tensor([8.0, 1, 2, 3, 4, 5, 6, 7]) if rank == 0 else torch.tensor([1.0, 8, 7, 6, 5, 4, 3, 2])
    seen = []
    for _ in range(2):
        weight.grad = None
        ddp(gradient).backward()
        seen.append(weight.grad.tolist())
    return seen


def test_the_largest_go_first_and_the_rest_is_kept(ranks):
    # 8 float32 values: a ratio of 0.5 pays for two values and two indices.
    for first, second in ranks.run(one_step, 0.5, True, world_size=2):
        # Rank 0 sends entries 0 and 7 (8, 7), rank 1 entries 1 and 2 (8, 7); then the doubled next ones.
        assert first == [4, 4, 3.5, 0, 0, 0, 0, 3.5]
        assert second == [0, 0, 0, 6, 5, 5, 6, 0]
    for first, second in ranks.run(one_step, 0.5, False, world_size=2):
        assert first == second == [4, 4, 3.5, 0, 0, 0, 0, 3.5]


def overflow(rank, world):
    """A gradient that overflows in more entries than a step sends, as in mixed precision, and then a finite one."""
    weight = nn.Parameter(torch.zeros(8))
    module = nn.Module()
    module.weight = weight
    module.forward = lambda scale: (weight * scale).sum()
    ddp = DistributedDataParallel(module)
    compress_gradients(ddp, "topk", compression_ratio=0.5)
    seen = []
    for scale in (torch.full((8,), torch.inf), torch.ones(8)):
        weight.grad = None
        ddp(scale).backward()
        seen.append(weight.grad)
    return seen


def test_an_overflow_is_seen_once(ranks):
    for first, second in ranks.run(overflow, world_size=2):
        assert not torch.isfinite(first).all()
        assert second.count_nonzero() == 2
        assert torch.isfinite(second).all()


def small_steps(rank, world, steps):
    """A bucket whose share of the ratio pays for less than one entry a step: what has arrived after each step."""
    weight = nn.Parameter(torch.zeros(5))
    module = nn.Module()
    module.weight = weight
    module.forward = lambda: (weight * torch.arange(1.0, 6.0)).sum()
    ddp = DistributedDataParallel(module)
    state = compress_gradients(ddp, "topk", compression_ratio=0.1)
    total, seen = torch.zeros(5), []
    for _ in range(steps):
        weight.grad = None
        ddp().backward()
        total += weight.grad
        assert state.payload_bytes <= 0.1 * state.dense_bytes
        seen.append(state.payload_bytes // 8)
    return total.tolist(), seen


def test_a_bucket_too_small_for_its_ratio_sends_every_few_steps(ranks):
    for total, sent in ranks.run(small_steps, 16, world_size=2):
        # 5 float32 values are 20 bytes, of which 2 may go: an entry of 8 bytes every fourth step.
        assert sent == [(step + 1) // 4 for step in range(16)]
        # The largest of what is kept goes first: entry 4 after 4 steps, 3 after 8, 4 again after 12, 2 after 16.
        assert total == [0, 0, 16 * 3, 8 * 4, 12 * 5]


def warns(rank, world):
    model, x, y = problem(rank % 2)
    ddp = DistributedDataParallel(model)
    compress_gradients(ddp, "topk", compression_ratio=0.8)
    loss = nn.functional.mse_loss(ddp(x), y)
    with pytest.warns(UserWarning, match=r"top-k saves bytes only below a ratio of 0.5 here"):
        loss.backward()


def test_a_ratio_that_costs_more_than_all_reduce_is_told(ranks):
    ranks.run(warns, world_size=4)


def misuse(rank, world):
    model, _, _ = problem(rank)
    ddp = DistributedDataParallel(model)
    for error, message, arguments in (
        (ValueError, "method: expected one of topk, powersgd, bf16, fp16, got 'zip'", {"method": "zip"}),
        (ValueError, r"compression_ratio: expected a number in \(0, 1\], got 1.5", {"compression_ratio": 1.5}),
        (ValueError, "compression_ratio: expected a finite number > 0", {"compression_ratio": 0}),
        (ValueError, "compression_ratio: expected the default", {"method": "bf16", "compression_ratio": 0.2}),
        (ValueError, "rank: expected the default", {"rank": 2}),
    ):
        with pytest.raises(error, match=message):
            compress_gradients(ddp, **arguments)


def test_misuse_is_told(ranks):
    ranks.run(misuse, world_size=2)
    with pytest.raises(TypeError, match="model: expected a DistributedDataParallel, got Linear"):
        compress_gradients(nn.Linear(2, 2))
