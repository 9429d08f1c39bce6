"""`head_perceptron` and `block_scores` of the native core and in torch against their definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from bs_kernels import block_scores, head_perceptron, scoring
from bs_kernels.backends import _native_lib
from bs_kernels.backends._native_scoring import native_perceptron, native_scores
from bs_kernels.testing import dense_block_scores, dense_perceptron

needs_native = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="no native core")
ENGINES = _native_lib.load().supported if _native_lib.missing_reason() is None else ()
sizes = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 70), st.integers(1, 40))


def perceptron(seed, size, widths, dtype=torch.float32):
    batch, heads, rows, width = size
    generator = torch.Generator().manual_seed(seed)
    widths = (width, *widths)
    x = 3 * torch.randn(batch, heads, rows, width, generator=generator, dtype=torch.float64) + 1
    weights = [torch.randn(heads, a, b, generator=generator).double() / a**0.5 for a, b in pairwise(widths)]
    biases = [torch.randn(heads, 1, b, generator=generator).double() for b in widths[1:]]
    return x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]


def pairs(seed, batch, heads, blocks, dim, rank, terms, dtype=torch.float32):
    (q_heads, kv_heads), (q_blocks, kv_blocks) = heads, blocks
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = draw(batch, kv_heads, kv_blocks, 1 if terms == "mean" else 3, dim)
    embeddings = draw(batch, q_heads, q_blocks, rank), draw(batch, kv_heads, kv_blocks, rank)
    queries, distance = draw(batch, q_heads, q_blocks, 1 + seed % 2, dim), draw(q_blocks, kv_blocks).abs()
    return queries, keys, embeddings, draw(q_heads, 2), draw(q_heads), distance, dim**-0.5, terms


def near(got, plain, want, dtype=torch.float32):
    """`got` is as near to the definition as the same in torch: rounding errors are those of `dtype`."""
    assert got.shape == want.shape
    if not want.numel():
        return
    assert got.isfinite().all()
    size = 1 + want.abs().max()
    assert (got - want).abs().max() <= 4 * (plain - want).abs().max() + 16 * torch.finfo(dtype).eps * size


@needs_native
@given(st.integers(0, 2**31), sizes, st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_native_perceptrons_are_the_definition(seed, size, widths):
    x, weights, biases = perceptron(seed, size, widths)
    got = native_perceptron(x, weights, biases, 1e-5)
    assert got is not None
    assert torch.equal(head_perceptron(x, weights, biases), got)
    plain = head_perceptron(x.clone().requires_grad_(), weights, biases).detach()
    near(got, plain, dense_perceptron(x, weights, biases))


@given(st.integers(0, 2**31), sizes, st.sampled_from([torch.float64, torch.bfloat16]))
def test_watched_perceptrons_are_the_definition(seed, size, dtype):
    x, weights, biases = perceptron(seed, size, (12, 5), dtype)
    got = head_perceptron(x.clone().requires_grad_(), weights, biases).detach()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    want = dense_perceptron(x, weights, biases)
    assert got.shape == want.shape
    if want.numel():
        assert (got - want).abs().max() <= 64 * torch.finfo(dtype).eps * (1 + want.abs().max())


@needs_native
@given(
    st.integers(0, 2**31),
    st.integers(0, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    st.tuples(st.integers(1, 9), st.integers(1, 20)),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(["mean_max", "mean", "max"]),
)
def test_native_scores_are_the_definition(seed, batch, heads, blocks, dim, rank, terms):
    given_ = pairs(seed, batch, heads, blocks, dim, rank, terms)
    got = native_scores(*given_)
    assert got is not None
    assert torch.equal(block_scores(*given_), got)
    plain = block_scores(given_[0].clone().requires_grad_(), *given_[1:]).detach()
    near(got, plain, dense_block_scores(*given_))


@needs_native
@pytest.mark.parametrize("name", ENGINES)
def test_every_instruction_set(name, monkeypatch):
    """More rows and columns than are taken at a time."""
    monkeypatch.setenv("BS_KERNELS_ISA", name)
    layers = perceptron(1, (1, 2, 101, 37), (70, 33))
    plain = head_perceptron(layers[0].clone().requires_grad_(), *layers[1:]).detach()
    near(native_perceptron(*layers, 1e-5), plain, dense_perceptron(*layers))
    given_ = pairs(2, 1, (2, 1), (53, 150), 20, 9, "mean_max")
    plain = block_scores(given_[0].clone().requires_grad_(), *given_[1:]).detach()
    near(native_scores(*given_), plain, dense_block_scores(*given_))


@needs_native
def test_threads_and_other_rows_change_no_bit():
    x, weights, biases = perceptron(3, (2, 3, 100, 64), (48, 32))
    given_ = pairs(4, 2, (4, 2), (100, 140), 32, 32, "mean_max")
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append((head_perceptron(x, weights, biases), block_scores(*given_)))
    torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(head_perceptron(x[:, :, :61].contiguous(), weights, biases), found[0][0][:, :, :61])
    queries, keys, (f, g), gain, slope, distance, *rest = given_
    fewer = block_scores(
        queries[:, :, :61], keys[:, :, :70], (f[:, :, :61], g[:, :, :70]), gain, slope, distance[:61, :70], *rest
    )
    assert torch.equal(fewer, found[0][1][:, :, :61, :70])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_a_block_that_is_not_finite_stays_alone(value):
    given_ = pairs(5, 1, (2, 2), (4, 6), 8, 4, "mean_max")
    clean = block_scores(*given_)
    given_[1][0, 1, 3] = value
    odd = block_scores(*given_)
    same = torch.ones(2, 4, 6, dtype=torch.bool)
    same[1, :, 3] = False
    assert torch.equal(odd[0][same], clean[0][same])
    x, weights, biases = perceptron(6, (1, 1, 5, 8), (16, 4))
    weights[0] *= 1e30
    assert head_perceptron(x, weights, biases).isfinite().all()


def test_gradients():
    layers = perceptron(7, (1, 2, 3, 4), (5, 2), torch.float64)
    tensors = [x.requires_grad_() for x in (layers[0], *layers[1], *layers[2])]
    assert gradcheck(lambda x, a, b, c, d: head_perceptron(x, (a, b), (c, d)), tensors)
    queries, keys, (f, g), gain, slope, distance, *rest = pairs(8, 1, (2, 1), (3, 4), 3, 2, "mean_max", torch.float64)
    tensors = [x.requires_grad_() for x in (queries, keys, f, g, gain, slope, distance)]
    assert gradcheck(lambda q, k, f, g, a, b, d: block_scores(q, k, (f, g), a, b, d, *rest), tensors)


def test_they_compile():
    layers, given_ = perceptron(9, (1, 2, 7, 8), (16, 4)), pairs(10, 1, (2, 1), (5, 6), 8, 4, "max")
    for function, arguments in ((head_perceptron, layers), (block_scores, given_)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@needs_native
def test_autograd_is_watched(monkeypatch):
    monkeypatch.setattr(scoring, "native_perceptron", lambda *_: pytest.fail("below autograd"))
    monkeypatch.setattr(scoring, "native_scores", lambda *_: pytest.fail("below autograd"))
    x, weights, biases = perceptron(11, (1, 1, 2, 3), (4,))
    head_perceptron(x, [weights[0].requires_grad_()], biases).sum().backward()
    assert weights[0].grad is not None
    given_ = pairs(12, 1, (1, 1), (2, 2), 3, 2, "mean")
    block_scores(*given_[:3], given_[3].requires_grad_(), *given_[4:]).sum().backward()
    assert given_[3].grad is not None


@pytest.mark.parametrize(
    ("at", "value", "error", "match"),
    [
        (0, [1.0], TypeError, "x: expected a floating-point tensor, got list"),
        (0, torch.ones(1, 2, 3), ValueError, r"x: expected \[B, H, N, W\]"),
        (1, [], ValueError, "weights, biases: expected one of each per layer, got 0 and 2"),
        (
            1,
            [torch.ones(2, 8, 4), torch.ones(2, 5, 4)],
            ValueError,
            r"weights\[1\]: expected \[2, 4, width\], got \[2, 5, 4\]",
        ),
        (2, [torch.ones(2, 1, 16), torch.ones(2, 4)], ValueError, r"biases\[1\]: expected \[2, 1, 4\], got \[2, 4\]"),
    ],
)
def test_bad_perceptrons(at, value, error, match):
    layers = list(perceptron(13, (1, 2, 7, 8), (16, 4)))
    if at == 1 and value:
        layers[2] = [torch.ones(2, 1, 4)] * 2
    layers[at] = value
    with pytest.raises(error, match=match):
        head_perceptron(*layers)


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, torch.ones(1, 2, 5, 8), r"queries: expected \[B, H, QB, P, D\]"),
        (1, torch.ones(1, 1, 6, 1, 8), r"keys: expected \[1, G, KB, 3, 8\], got \[1, 1, 6, 1, 8\]"),
        (1, torch.ones(1, 3, 6, 3, 8), "keys: expected a number of heads that divides 2, got 3"),
        (2, (torch.ones(1, 2, 5, 4), torch.ones(1, 1, 6, 3)), r"embeddings\[1\]: expected \[1, 1, 6, 4\]"),
        (3, torch.ones(2), r"gain: expected \[2, 2\], got \[2\]"),
        (4, torch.ones(1), r"slope: expected \[2\], got \[1\]"),
        (5, torch.ones(6, 5), r"distance: expected \[5, 6\], got \[6, 5\]"),
        (7, "median", "terms: expected one of mean_max, mean, max, got 'median'"),
    ],
)
def test_bad_pairs(at, value, match):
    given_ = list(pairs(14, 1, (2, 1), (5, 6), 8, 4, "max"))
    given_[at] = value
    with pytest.raises(ValueError, match=match):
        block_scores(*given_)


def test_tensors_elsewhere_are_refused():
    x, weights, biases = perceptron(15, (1, 2, 7, 8), (16,))
    for at, name in ((0, "weights"), (1, "biases")):
        layers = [weights, biases]
        layers[at] = [layers[at][0].to("meta")]
        with pytest.raises(ValueError, match=rf"{name}\[0\]: expected device cpu, got meta"):
            head_perceptron(x, *layers)
    given_ = pairs(16, 1, (2, 1), (5, 6), 8, 4, "max")
    for at, name in ((1, "keys"), (3, "gain"), (4, "slope"), (5, "distance")):
        with pytest.raises(ValueError, match=f"{name}: expected device cpu, got meta"):
            block_scores(*given_[:at], given_[at].to("meta"), *given_[at + 1 :])


def test_other_dtypes_are_refused():
    queries, keys, *rest = pairs(17, 1, (2, 1), (5, 6), 8, 4, "max")
    with pytest.raises(TypeError, match=r"keys: expected the floating-point dtype of queries, .*, got .*int64"):
        block_scores(queries, keys.long(), *rest)
