"""The fused functions, the model, the optimizer and what is measured about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bs_modules import create_block_sparse_attention
from bs_modules.lm.fused import fuse_qkv, norm_rotate, rms_norm, rotary_table, swiglu
from bs_modules.lm.measure import attention_share, peak_memory, validate, validation_windows
from bs_modules.lm.model import ByteModel, DenseAttention, ModelConfig
from bs_modules.lm.optimizer import Muon, orthogonalize
from bs_modules.lm.train import Trainer
from bs_modules.testing import tiny_corpus, tiny_settings


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_projections(x, qkv, heads):
    """Projection, QK-norm and RoPE as the textbook has them."""
    half = qkv.shape[1] // heads // 2
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * 10_000.0 ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turn = torch.polar(torch.ones(()).double(), angle)[None, :, None]
    q, k, v = ((x @ weight.mT).unflatten(-1, (heads, -1)) for weight in qkv)
    out = []
    for y in (q, k):
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        turned = torch.complex(y[..., :half], y[..., half:]) * turn
        out.append(torch.cat([turned.real, turned.imag], -1))
    return (*out, v)


def test_the_fused_projection_is_rope_after_rms_norm():
    x, qkv = normal(2, 9, 24), normal(3, 24, 24, seed=1)
    table = rotary_table(torch.arange(9), 3, 8, torch.float64)
    got = norm_rotate(x @ fuse_qkv(qkv, 3).mT, *table, 3)
    for a, b in zip(got, plain_projections(x, qkv, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.is_contiguous()


def test_gradients_of_the_fused_functions():
    # Inputs of size one, so that the 1e-6 that the backward leaves out stays below gradcheck's tolerance.
    torch.autograd.gradcheck(rms_norm, normal(2, 5, 8).requires_grad_(), atol=1e-4)
    torch.autograd.gradcheck(swiglu, normal(2, 5, 8).requires_grad_())
    table = rotary_table(torch.arange(5), 2, 4, torch.float64)
    torch.autograd.gradcheck(lambda x: norm_rotate(x, *table, 2), normal(1, 5, 24).requires_grad_(), atol=1e-4)


def test_swiglu_and_rms_norm_by_definition():
    x = normal(2, 3, 8)
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :4]) * x[..., 4:])
    torch.testing.assert_close(rms_norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.isfinite(rms_norm(torch.zeros(1, 2, 4))).all()


def model_of(attention="base", *, seed=0, dtype=torch.float32, trained=True):
    def make(layer):
        if attention == "dense":
            return DenseAttention()
        return create_block_sparse_attention("base", sparsity_ratio=0.5 if attention == "base" else 1.0, block_size=8)

    model = ByteModel(ModelConfig(32, 2, 16), make, compute_dtype=dtype, seed=seed)
    if trained:  # output projections start at zero; give every weight something to say
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_dense_and_full_density_attention_are_the_same_model():
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model_of("full")(tokens), model_of("dense")(tokens))


@pytest.mark.parametrize("attention", ["base", "dense"])
def test_no_byte_sees_a_later_one(attention):
    model = model_of(attention)
    tokens = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 40:] = 7
    torch.testing.assert_close(model(tokens)[:, :40], model(changed)[:, :40])
    assert not torch.allclose(model(tokens)[:, 40:], model(changed)[:, 40:])


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = model_of(seed=3, trained=False)
    torch.manual_seed(2)
    second = model_of(seed=3, trained=False)
    other = model_of(seed=4, trained=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding, other.embedding)


def test_every_parameter_is_optimised_once_and_gets_a_gradient():
    model = model_of()
    groups = model.parameter_groups()
    listed = [p for group in groups for p in group]
    assert len(listed) == len(set(map(id, listed)))
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    tokens = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in listed)


def test_bf16_stays_near_fp32():
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    exact, half = model_of().loss(tokens, targets), model_of(dtype=torch.bfloat16).loss(tokens, targets)
    # A few bf16 roundings of scores of size one, averaged over 64 bytes.
    assert abs(exact - half) < 16 * torch.finfo(torch.bfloat16).eps


def test_model_sizes_are_checked():
    with pytest.raises(ValueError, match="head_dim: expected an even divisor of width=32, got 5"):
        ModelConfig(32, 1, 5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 20), (2, 20, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrices = normal(*shape, dtype=torch.float32)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The singular vectors stay: the result is the polar factor up to those values.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = u.mT @ orthogonalize(matrices) @ v.mT
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4


def test_orthogonalize_agrees_with_torch_muon():
    weight = torch.nn.Parameter(torch.zeros(8, 20))
    weight.grad = normal(8, 20, dtype=torch.float32)
    ours = torch.nn.Parameter(torch.zeros(1, 8, 20))
    ours.grad = weight.grad.clone()[None]
    reference = torch.optim.Muon(
        [weight], lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    own = Muon([ours], [], [], matrix_lr=0.1)
    for _ in range(3):
        reference.step()
        own.step(1.0)
    # torch's iteration runs in bf16.
    assert (ours[0] - weight).norm() <= 8 * torch.finfo(torch.bfloat16).eps * weight.norm()


def test_adamw_part_agrees_with_torch_adam():
    ours, theirs = (torch.nn.Parameter(normal(5, 4, dtype=torch.float32)) for _ in range(2))
    own = Muon([], [ours], [], embedding_lr=0.01)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    for seed in range(4):
        ours.grad = normal(5, 4, seed=seed, dtype=torch.float32)
        theirs.grad = ours.grad.clone()
        own.step(1.0)
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_optimizer_state_round_trips():
    def steps(optimizer, parameters, seeds):
        for seed in seeds:
            for i, p in enumerate(parameters):
                p.grad = normal(*p.shape, seed=10 * seed + i, dtype=torch.float32)
            optimizer.step(0.5)

    def fresh():
        parameters = [torch.nn.Parameter(torch.ones(*s)) for s in ((2, 6, 4), (4, 6), (5, 3), (3,))]
        return Muon(parameters[:2], parameters[2:3], parameters[3:]), parameters

    whole, expected = fresh()
    steps(whole, expected, range(6))
    first, parameters = fresh()
    steps(first, parameters, range(3))
    second, restored = fresh()
    second.load_state_tensors({n: t.clone() for n, t in first.state_tensors().items()}, first.steps)
    for p, q in zip(restored, parameters, strict=True):
        p.data.copy_(q)
    steps(second, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(restored, expected, strict=True))


def test_validation_by_position_is_the_mean_loss():
    model = model_of()
    text = tiny_corpus(4501).train
    windows = validation_windows(text, 1500, 10_000)
    assert len(windows) == 3
    found = validate(model, windows, torch.device("cpu"))
    losses = [
        model.loss(torch.from_numpy(w[None, :-1].copy()), torch.from_numpy(w[None, 1:].copy()), reduction="none")
        for w in windows
    ]
    bits = [x[0].detach() / math.log(2) for x in losses]
    assert found.bits_per_byte == pytest.approx(torch.cat(bits).mean().item(), rel=1e-5)
    assert found.scored == len(text) - 1
    assert found.by_position == {
        "0–1K": pytest.approx(torch.cat([x[:1024] for x in bits]).mean().item(), rel=1e-5),
        "1K–4K": pytest.approx(torch.cat([x[1024:] for x in bits]).mean().item(), rel=1e-5),
    }


def test_a_short_context_sees_at_least_half_of_itself():
    model, text = model_of("dense"), tiny_corpus(400).train[:301]
    found = validate(model, [text], torch.device("cpu"), context=20)
    assert found.scored == 300

    def bits_at(position, start):
        piece = torch.from_numpy(text[start : position + 2].astype(np.int64))
        scores = model(piece[None, :-1])[0, -1]
        return F.cross_entropy(scores, piece[-1]).item() / math.log(2)

    # Position p ≥ 20 is scored with the window of 20 that starts at the multiple of 10 it belongs to.
    expected = [bits_at(p, 0 if p < 20 else (p - 10) // 10 * 10) for p in range(300)]
    assert found.bits_per_byte == pytest.approx(sum(expected) / 300, rel=1e-4)


def test_attention_share_is_a_share_and_leaves_the_model_alone():
    model = model_of()
    kinds = [type(block.attention) for block in model.blocks]
    tokens = torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(0))

    def step():
        model.loss(tokens, tokens).backward()

    share = attention_share(model, step)
    assert 0 < share < 1
    gradient = model.embedding.grad.clone()
    assert [type(block.attention) for block in model.blocks] == kinds
    model.zero_grad()
    for _ in range(3):
        step()
    assert torch.equal(model.embedding.grad, gradient)


def test_a_probe_step_leaves_the_weights_alone():
    trainer = Trainer(tiny_settings(), tiny_corpus())
    trainer.train_step(1.0)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.probe_step()
    assert trainer.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_peak_memory_counts_bytes():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.numel()
