"""Autograd for real: numerical gradients, double backward, autocast, checkpointing, hooks on what is saved."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from bs_kernels import LayoutPlan, block_sparse_attention
from bs_kernels.testing import evaluate, make_batched_layout, make_case, make_layout, make_pages

EVERYTHING = {
    "attn_bias": True,
    "block_bias": True,
    "sinks": True,
    "key_padding_mask": True,
    "dropout_p": 0.3,
    "dropout_seed": 11,
    "window": (7, 9),
}


def small_case(kind):
    generator = np.random.default_rng(0)
    sizes = {"seq_len": (11, 14), "block_size": (4, 5), "density": 0.6}
    heads = {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 3, "value_dim": 2, "dtype": torch.float64}
    if kind == "batched":
        layout = make_batched_layout(generator, batch=2, heads=4, **sizes)
        return make_case(layout, **heads, block_bias=True, sinks=True)
    layout = make_layout(generator, heads=4 if kind == "per_head" else 1, **sizes)
    if kind == "paged":
        return make_pages(make_case(layout, **heads))
    return make_case(layout, **heads, **(EVERYTHING if kind in ("everything", "per_head") else {}))


def as_function(case, **extra):
    """A function of the leaves of a case, and the leaves."""
    names, values = zip(*case.leaves.items(), strict=True)
    rows, columns = case.q.shape[:3], case.v.shape[3]

    def function(*leaves):
        fresh = case.with_leaves(dict(zip(names, leaves, strict=True)))
        out, lse = block_sparse_attention(
            fresh.q, fresh.k, fresh.v, fresh.layout, return_lse=True, **fresh.arguments, **extra
        )
        assert out.shape == (*rows, columns)
        return out, torch.where(lse == -torch.inf, 0, lse)

    return function, tuple(x.detach().clone().nan_to_num(0).requires_grad_() for x in values)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["plain", "everything", "per_head", "batched", "paged"])
def test_gradcheck(kind, name):
    function, leaves = as_function(small_case(kind), backend=name)
    assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["plain", "everything", "per_head", "batched", "paged"])
def test_gradgradcheck(kind, name):
    function, leaves = as_function(small_case(kind), backend=name)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_double_backward_in_float32_matches_float64():
    layout = make_layout(np.random.default_rng(1), seq_len=(40, 40), block_size=(8, 8), density=0.4)
    case = make_case(layout, dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
        out = block_sparse_attention(q, k, v, layout)
        first = torch.autograd.grad((out * case.dout.to(dtype)).sum(), (q, k, v), create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), (q, k, v)))
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4 * wide.abs().max().item())


@pytest.mark.parametrize("only", ["out", "lse"])
def test_gradient_through_one_output_only(only):
    function, leaves = as_function(small_case("everything"))
    out, lse = function(*leaves)
    gradients = torch.autograd.grad((out if only == "out" else lse).sum(), leaves, allow_unused=True)
    by_name = dict(zip(small_case("everything").leaves, gradients, strict=True))
    assert by_name["q"].abs().max() > 0
    assert (by_name["v"].abs().max() > 0) == (only == "out")


def test_only_what_requires_gradients_gets_them():
    case = small_case("everything")
    k = case.k.clone().requires_grad_()
    out = block_sparse_attention(case.q, k, case.v, case.layout, **case.arguments)
    out.sum().backward()
    assert k.grad is not None
    assert case.q.grad is None
    assert not block_sparse_attention(case.q, case.k, case.v, case.layout).requires_grad
    with torch.no_grad():
        assert not block_sparse_attention(case.q, k, case.v, case.layout).requires_grad


def test_saved_tensors_notice_in_place_changes():
    case = small_case("plain")
    q = case.q.clone().requires_grad_()
    twice = q * 2
    out = block_sparse_attention(twice, case.k, case.v, case.layout)
    twice.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
@pytest.mark.parametrize("kind", ["shared", "batched", "paged"])
def test_an_empty_batch_has_empty_results_and_zero_gradients(kind, name):
    sizes = {"seq_len": (11, 14), "block_size": (4, 5)}
    make = make_batched_layout if kind == "batched" else make_layout
    layout = make(np.random.default_rng(0), **sizes, **({"batch": 0} if kind == "batched" else {}))
    case = make_case(layout, batch=0, attn_bias=True, block_bias=True, sinks=True)
    if kind == "paged":
        pages = torch.ones(3, 5, 1, 8)
        case = replace(case, k=pages, v=pages, arguments={"page_table": torch.zeros(0, 3, dtype=torch.int32)})
    found = evaluate(case, block_sparse_attention, backend=name)
    assert found.pop("out").shape == (0, 11, 2, 8)
    assert found.pop("lse").shape == (0, 2, 11)
    for key, leaf in case.leaves.items():
        assert torch.equal(found[key], torch.zeros_like(leaf)), key


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own first use of forward mode
def test_forward_mode_is_refused():
    case = small_case("plain")

    def attend(q):
        return block_sparse_attention(q, case.k, case.v, case.layout)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (case.q,), (case.q,))
    with forward_ad.dual_level():
        assert torch.equal(attend(case.q), attend(case.q.clone()))  # nothing dual: as ever
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            attend(forward_ad.make_dual(case.q, case.q))


def test_batched_gradients_are_refused():
    function, leaves = as_function(small_case("plain"))
    out, _ = function(*leaves)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(out, leaves, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layout = make_layout(np.random.default_rng(2), seq_len=(40, 40), block_size=(8, 8), density=0.5)
    case = make_case(layout, sinks=True)

    def attend(q, k, v):
        torch.manual_seed(3)
        return block_sparse_attention(q, k, v, layout, dropout_p=0.5, sinks=case.arguments["sinks"])

    found = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant)):
        leaves = tuple(x.clone().requires_grad_() for x in (case.q, case.k, case.v))
        out = wrap(attend, *leaves)
        out.backward(case.dout)
        found.append((out, *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_restores_the_drawn_seed():
    layout = make_layout(np.random.default_rng(2), seq_len=(40, 40), block_size=(8, 8), density=0.5)
    case = make_case(layout)

    def attend(q):
        return block_sparse_attention(q, case.k, case.v, layout, dropout_p=0.5)

    found = []
    for use in (False, True):
        torch.manual_seed(7)
        q = case.q.clone().requires_grad_()
        out = checkpoint(attend, q, use_reentrant=False) if use else attend(q)
        found.append((out, *torch.autograd.grad(out, q, case.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast():
    layout = make_layout(np.random.default_rng(2), seq_len=(40, 40), block_size=(8, 8), density=0.5)
    case = make_case(layout, head_dim=16)
    leaves = tuple(x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = block_sparse_attention(*leaves, layout, return_lse=True)
        mixed = block_sparse_attention(leaves[0].bfloat16(), leaves[1], leaves[2], layout)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, mixed)
    by_hand = block_sparse_attention(*(x.bfloat16() for x in leaves), layout)
    assert torch.equal(out, by_hand)
    out.sum().backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.dtype == torch.float32
    wide = tuple(x.double() for x in leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(*wide, layout).dtype == torch.float64


def test_a_plan_made_under_no_grad_or_inference_mode_serves_training():
    layout = make_layout(np.random.default_rng(5), seq_len=(24, 24), block_size=(8, 8), density=0.7)
    case = make_case(layout)
    with torch.inference_mode():
        before = block_sparse_attention(case.q, case.k, case.v, layout)
    q = case.q.clone().requires_grad_()
    out = block_sparse_attention(q, case.k, case.v, layout)
    out.sum().backward()
    assert torch.equal(out.detach(), before)


def test_same_bits_from_run_to_run():
    layout = make_layout(np.random.default_rng(6), seq_len=(130, 130), block_size=(16, 16), heads=4, density=0.3)
    case = make_case(layout, q_heads=4, kv_heads=2, head_dim=16, attn_bias=True, block_bias=True, sinks=True)
    function, leaves = as_function(case, backend="torch")
    runs = [function(*leaves) for _ in range(2)]
    gradients = [torch.autograd.grad(out.sum() + lse.sum(), leaves) for out, lse in runs]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert LayoutPlan.build(layout) is LayoutPlan.build(layout)
