"""torch.compile: one graph, at most two compilations for any number of layouts; the operators' registrations."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels._arguments import make_call
from bs_kernels.op import operands_of
from bs_kernels.testing import make_batched_layout, make_case, make_layout, make_pages

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_ten_layouts_compile_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(q, k, v, plan):
        out, lse = block_sparse_attention(q * 2, k, v, plan, return_lse=True)
        return (out**2).sum() + torch.where(lse == -torch.inf, 0, lse).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    generator = np.random.default_rng(0)
    for density in np.linspace(0.1, 0.9, 10):
        layout = make_layout(generator, seq_len=(64, 64), block_size=(8, 8), density=density, causal=True)
        plan = LayoutPlan.build(layout)
        case = make_case(layout, batch=2, q_heads=4, kv_heads=2, head_dim=16)
        leaves = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))
        got, want = (f(*leaves, plan) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["everything", "dropout", "batched", "paged", "autocast"])
def test_compiled_equals_eager(kind):
    generator = np.random.default_rng(1)
    sizes = {"seq_len": (24, 30), "block_size": (8, 8), "density": 0.6}
    common = {"batch": 2, "q_heads": 2, "kv_heads": 2, "head_dim": 8}
    if kind == "batched":
        case = make_case(make_batched_layout(generator, batch=2, **sizes), **common, block_bias=True)
    else:
        extra = {"attn_bias": True, "block_bias": True, "sinks": True, "segment_ids": True, "key_padding_mask": True}
        case = make_case(make_layout(generator, **sizes), **common, **(extra if kind == "everything" else {}))
    if kind == "dropout":
        case.arguments.update(dropout_p=0.5, dropout_seed=3)
    if kind == "paged":
        case = make_pages(case)
    plan = LayoutPlan.build(case.layout, TokenMask(window=(9, 9)))

    def attend(q, k, v, plan, arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return block_sparse_attention(q, k, v, plan, **arguments)

    leaves = {name: x.nan_to_num(0).requires_grad_() for name, x in case.leaves.items()}
    case = case.with_leaves(leaves)
    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(case.q, case.k, case.v, plan, case.arguments)
        found.append((out, *torch.autograd.grad(out.float().sum(), list(leaves.values()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batched_plan_is_built_inside_the_graph():
    generator = np.random.default_rng(2)
    layout = make_batched_layout(generator, batch=2, heads=2, seq_len=(32, 32), block_size=(8, 8))
    case = make_case(layout, batch=2, q_heads=2, kv_heads=2)

    def attend(q, k, v, indices, counts):
        layout = BatchedLayout(indices, counts, 8, 32, causal=True)
        return block_sparse_attention(q, k, v, layout)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = (case.q, case.k, case.v, layout.indices, layout.counts)
    torch.testing.assert_close(compiled(*arguments), attend(*arguments))


def test_inductor():
    layout = make_layout(np.random.default_rng(3), seq_len=(32, 32), block_size=(8, 8), density=0.5, causal=True)
    case, plan = make_case(layout), LayoutPlan.build(layout)
    compiled = torch.compile(lambda q, k, v, plan: block_sparse_attention(q, k, v, plan) + 1, fullgraph=True)
    try:
        got = compiled(case.q, case.k, case.v, plan)
    except torch._inductor.exc.InductorError as error:
        if "InvalidCxxCompiler" in str(error) or "No working C++ compiler" in str(error):
            pytest.skip("inductor has no C++ compiler here")
        raise
    torch.testing.assert_close(got, block_sparse_attention(case.q, case.k, case.v, plan) + 1)


def leaf(x):
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


# opcheck clones the inputs and then looks at the clones' .grad, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_operators_pass_opcheck(kind):
    layout = make_layout(np.random.default_rng(4), seq_len=(20, 20), block_size=(8, 8), density=0.6)
    extra = {"attn_bias": True, "block_bias": True, "sinks": True, "dropout_p": 0.2, "dropout_seed": 1}
    case = make_case(layout, **(extra if kind == "everything" else {}))
    case = case.with_leaves({name: x.requires_grad_() for name, x in case.leaves.items()})
    call = make_call(case.q, case.k, case.v, layout, **case.arguments)
    biased = int(kind == "everything")
    flags = [1, biased, biased]
    operands = tuple(leaf(x) for x in operands_of(call))
    torch.library.opcheck(
        torch.ops.bs_kernels.attention.default,
        (*operands, leaf(call.sinks), False, flags, "torch"),
        test_utils=CHECKS,
    )
    lse, delta = torch.zeros(1, 2, 20), torch.zeros(1, 2, 20)
    torch.library.opcheck(
        torch.ops.bs_kernels.attention_backward.default,
        (case.dout, lse, delta, *operands, False, flags, "torch"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_shapes_under_fake_tensors():
    from torch._subclasses import FakeTensorMode

    layout = make_layout(np.random.default_rng(4), seq_len=(20, 20), block_size=(8, 8))
    plan = LayoutPlan.build(layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 20, 4, 16, dtype=torch.bfloat16)
        k = torch.empty(2, 20, 2, 16, dtype=torch.bfloat16)
        out, lse = block_sparse_attention(q, k, torch.empty(2, 20, 2, 24, dtype=torch.bfloat16), plan, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 20, 4, 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 20), torch.float32)


class Attend(torch.nn.Module):
    def forward(self, q, k, v, layout):
        return block_sparse_attention(q, k, v, layout)


@pytest.mark.parametrize("kind", ["plan", "batched"])
def test_export_takes_layouts_as_arguments(kind):
    sizes = {"seq_len": (24, 24), "block_size": (8, 8)}
    if kind == "batched":
        layout = make_batched_layout(np.random.default_rng(3), batch=1, **sizes)
    else:
        layout = LayoutPlan.build(make_layout(np.random.default_rng(3), **sizes))
    x = torch.randn(1, 24, 2, 8)
    exported = torch.export.export(Attend(), (x, x, x, layout)).module()
    torch.testing.assert_close(exported(x, x, x, layout), Attend()(x, x, x, layout))
