"""The Triton kernels against the float64 oracle: on a GPU where there is one, else in Triton's interpreter.

Without a GPU this module runs under ``TRITON_INTERPRET=1``, which must be set before Triton is first imported:
`test_triton_interpreted` starts it in a process of its own.
"""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention, merge_attention, partial_forward
from bs_kernels._arguments import make_call
from bs_kernels._recovery import _cut, _pieces
from bs_kernels.backends.base import Needs
from bs_kernels.dispatch import get_backend
from bs_kernels.testing import (
    assert_close_to_oracle,
    check_against_oracle,
    evaluate,
    make_batched_layout,
    make_case,
    make_layout,
    make_pages,
)
from bs_kernels.testing.strategies import cases
from bs_patterns import BlockLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_triton_interpreted runs this module in the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from bs_kernels.backends.triton import launch  # noqa: E402  # after the two skips
from bs_kernels.backends.triton.arguments import packed_heads  # noqa: E402
from bs_kernels.backends.triton.config import Config, Target  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = get_backend("triton")


def moved(x):
    """``x`` on the device, whatever it is."""
    if isinstance(x, (torch.Tensor, LayoutPlan)):
        return x.to(DEVICE)
    if isinstance(x, tuple):
        return tuple(moved(y) for y in x)
    if hasattr(x, "counts"):
        return replace(x, indices=x.indices.to(DEVICE), counts=x.counts.to(DEVICE))
    return x


def attention(q, k, v, layout, *, return_lse, **arguments):
    arguments = {name: moved(x) for name, x in arguments.items()}
    results = block_sparse_attention(
        moved(q), moved(k), moved(v), moved(layout), return_lse=return_lse, backend="triton", **arguments
    )
    return tuple(x.cpu() for x in results)


def layout_of(seq_len, block_size, *, heads=1, density=0.6, seed=0, **more):
    return make_layout(
        np.random.default_rng(seed), seq_len=seq_len, block_size=block_size, heads=heads, density=density, **more
    )


@settings(max_examples=4)  # the interpreter takes about seconds per case
@given(
    case=cases(
        arguments=(
            "causal",
            "window",
            "key_padding_mask",
            "segment_ids",
            "bool_bias",
            "block_bias",
            "sinks",
            "dropout",
            "scale",
            "order",
            "batched",
        ),
        dtypes=DTYPES,
        query_blocks=(8, 16),
        key_blocks=(7, 16),
        max_tokens=20,
        head_dims=(3, 16),
    )
)
def test_any_call_matches_the_oracle(case):
    check_against_oracle(case, attention)


PLAIN = {"seq_len": (24, 37), "block_size": (16, 16)}
ARGUMENTS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (11, 0)},
    "two-sided window": {"window": (5, 9)},
    "padding": {"key_padding_mask": True},
    "segments": {"segment_ids": True, "causal": True},
    "block bias": {"block_bias": True},
    "sinks": {"sinks": True, "causal": True},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 2**63 + 12345},
    "negative scale": {"scale": -0.7},
    "no scale": {"scale": 0.0, "causal": True},
    "hilbert": {"order": "hilbert"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_alone(name):
    layout = layout_of(**PLAIN)
    dtype = DTYPES[list(ARGUMENTS).index(name) % 3]
    batch = 2 if name in ("padding", "segments", "dropout") else 1
    case = make_case(layout, batch=batch, head_dim=20, value_dim=16, dtype=dtype, **ARGUMENTS[name])
    check_against_oracle(case, attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256), (33, 1)], ids=str)
def test_head_dims(dims, dtype):
    layout = layout_of((33, 40), (32, 32), density=0.7)
    case = make_case(
        layout, batch=1, q_heads=1, kv_heads=1, head_dim=dims[0], value_dim=dims[1], dtype=dtype, causal=True
    )
    check_against_oracle(case, attention)


SMALL_TILES = Config(16, 16, 4, 1), Config(16, 32, 4, 1)
BLOCKS = {
    **{f"{q}x{k}": ((q, k), None) for q, k in ((1, 16), (7, 5), (48, 24), (64, 80), (128, 128), (16, 100), (200, 33))},
    "48x24 in 16x16": ((48, 24), SMALL_TILES[0]),
    "64x80 in 16x32": ((64, 80), SMALL_TILES[1]),
    "33x64 in 16x32": ((33, 64), SMALL_TILES[1]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_sizes_and_tiles(name, monkeypatch):
    """Blocks larger than a tile, smaller than one, and not a multiple of it."""
    block_size, tile = BLOCKS[name]
    if tile is not None:
        monkeypatch.setattr(launch, "candidates", lambda target, shape: iter([tile]))
    length = {1: (5, 37), 7: (20, 23), 48: (50, 50)}.get(block_size[0], (70, 90))
    layout = layout_of(length, block_size, density=0.7)
    case = make_case(layout, q_heads=1, kv_heads=1, head_dim=16, causal=True, block_bias=True, sinks=True)
    check_against_oracle(case, attention)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["shared", "per head", "per batch", "per batch and head"])
def test_grouped_heads_and_layouts(kind, group):
    heads = 2 * group
    sizes = {"seq_len": (20, 36), "block_size": (16, 16), "heads": heads if "head" in kind else 1, "density": 0.6}
    generator = np.random.default_rng(7)
    layout = make_batched_layout(generator, batch=2, **sizes) if "batch" in kind else make_layout(generator, **sizes)
    dropout = {"dropout_p": 0.2, "dropout_seed": 3}
    case = make_case(layout, batch=2, q_heads=heads, kv_heads=2, head_dim=16, causal=True, block_bias=True, **dropout)
    check_against_oracle(case, attention)


@pytest.mark.parametrize("leading", [(), (1, 1), (2,), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per head"])
def test_shapes_of_block_bias(heads, leading):
    layout = layout_of((20, 33), (16, 16), heads=heads)
    bias = torch.randn(*leading, layout.nnz, generator=torch.Generator().manual_seed(0))
    case = make_case(layout, batch=2, q_heads=2, kv_heads=1, head_dim=16, block_bias=bias)
    check_against_oracle(case, attention)


def test_many_rows_are_scheduled_in_chunks(monkeypatch):
    """More lists than a chunk holds, a short last chunk, tiles and shared key heads."""
    monkeypatch.setattr(launch.arguments, "CHUNK", 3)
    layout = layout_of((70, 40), (16, 8), density=0.4)
    check_against_oracle(make_case(layout, batch=2, q_heads=2, kv_heads=1, head_dim=16), attention)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("sinks", [None, True])
def test_empty_and_full_layouts(density, sinks):
    layout = layout_of((20, 35), (16, 16), heads=2, density=density)
    got = check_against_oracle(make_case(layout, head_dim=16, sinks=sinks), attention)
    if density == 0:
        assert all((x == 0).all() for name, x in got.items() if name not in ("lse", "sinks"))
        assert sinks or (got["lse"] == -torch.inf).all()


@pytest.mark.parametrize("spread", [30.0, 100.0])
def test_extreme_logits(spread):
    case = make_case(layout_of((20, 40), (16, 16)), q_heads=1, head_dim=16, spread=spread)
    got = check_against_oracle(case, attention)
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


@pytest.mark.parametrize("shape", [(2, 2, 24, 37), (1, 2, 24, 37), (1, 2, 1, 37), (1, 1, 24, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_bias(kind, shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    case = make_case(layout_of(**PLAIN), batch=2, attn_bias=bias > -0.5 if kind == "bool" else bias)
    check_against_oracle(case, attention)


@pytest.mark.parametrize(("leading", "heads"), [((1, 1), 1), ((1, 1), 2), ((2, 1), 2), ((2, 2), 1)], ids=str)
def test_the_gradient_of_attn_bias_meets_everything_else(leading, heads):
    """Tiles smaller than blocks, short blocks, and rules that make scores −inf; both orders of heads and batch."""
    bias = torch.randn(*leading, 24, 37, generator=torch.Generator().manual_seed(0))
    rest = {"key_padding_mask": True, "block_bias": True, "dropout_p": 0.2, "dropout_seed": 5, "sinks": True}
    layout = layout_of((24, 37), (16, 24), heads=heads)
    case = make_case(layout, batch=2, q_heads=2, kv_heads=1, attn_bias=bias, causal=True, **rest)
    check_against_oracle(case, attention)


def test_an_attn_bias_may_mask():
    """−inf, also for whole rows: no gradient, and no NaN."""
    bias = torch.randn(1, 2, 24, 37, generator=torch.Generator().manual_seed(0))
    bias[..., 3], bias[..., 5, :] = -torch.inf, -torch.inf
    case = make_case(layout_of(**PLAIN), batch=2)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (case.q, case.k, case.v, bias)]
        out = block_sparse_attention(*inputs[:3], case.layout, attn_bias=inputs[3], backend=backend)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_batched_attn_bias():
    layout = make_batched_layout(np.random.default_rng(7), batch=2, heads=2, seq_len=(20, 36), block_size=(16, 16))
    bias = torch.randn(1, 1, 20, 36, generator=torch.Generator().manual_seed(0))
    check_against_oracle(make_case(layout, batch=2, q_heads=2, kv_heads=1, attn_bias=bias), attention)


@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per head"])
def test_paged_keys_and_values(heads):
    layout = layout_of((20, 52), (16, 16), heads=heads)
    case = make_pages(make_case(layout, batch=2, causal=True, head_dim=16, key_padding_mask=True))
    check_against_oracle(case, attention)


def test_pages_that_several_blocks_share():
    """Gradients add up; entries of blocks that are not active may be anything."""
    mask = np.array([[[1, 1, 0, 1], [1, 0, 0, 1]]], bool)
    layout = BlockLayout.from_dense(mask, block_size=16, seq_len=(20, 60))
    table = torch.tensor([[2, 0, -7, 1], [2, 2, 10**6, 0]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 20, 2, 16), (3, 16, 1, 16), (3, 16, 1, 8))
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [torch.randn(s, generator=generator.manual_seed(1)).to(DEVICE, dtype).requires_grad_() for s in shapes]
        out = block_sparse_attention(*inputs, layout, page_table=table.to(DEVICE), backend=backend)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


# -- decoding ----------------------------------------------------------------------------------------------------------


def decode(group, *, q_len=1, heads=1, **arguments):
    """A few queries at the end of a cache."""
    layout = layout_of((q_len, 90), (16, 16), heads=heads, density=0.8)
    dropout = {"dropout_p": 0.2, "dropout_seed": 11}
    return make_case(layout, batch=2, q_heads=2 * group, kv_heads=2, head_dim=16, causal=True, **dropout, **arguments)


@pytest.mark.parametrize(("group", "q_len", "packed"), [(4, 1, 4), (3, 5, 3), (6, 20, 3), (32, 1, 16)])
def test_heads_share_a_tile_of_short_blocks(group, q_len, packed):
    bias = torch.randn(1, 2 * group, q_len, 90, generator=torch.Generator().manual_seed(0))
    case = decode(group, q_len=q_len, sinks=True, segment_ids=True, block_bias=True, attn_bias=bias)
    call = make_call(case.q, case.k, case.v, case.layout, causal=True)
    assert packed_heads(call, "forward") == packed
    assert_forward(case)


def assert_forward(case):
    """The output and LSE alone: gradients come from kernels that pack and cut nothing."""

    def forward(*operands, **arguments):
        with torch.no_grad():
            out, lse = attention(*operands, **arguments)
        zero = sum((x * 0).sum() for x in operands[:3])  # the oracle differentiates
        return out + zero.to(out.dtype), lse

    got = evaluate(case, forward)
    assert_close_to_oracle(case, {name: got[name] for name in ("out", "lse")})


@pytest.mark.parametrize(("splits", "heads"), [(2, 4), (3, 1), (8, 4)])
def test_rows_in_pieces(splits, heads, monkeypatch):
    """Few, uneven and empty pieces; whole and masked slots in all of them."""
    merged = []
    merge = launch.merge_launch
    monkeypatch.setattr(launch, "pieces", lambda *_: splits)
    monkeypatch.setattr(launch, "merge_launch", lambda *given: merged.append(given[0].shape[0]) or merge(*given))
    assert_forward(decode(2, q_len=20, heads=heads, sinks=True, key_padding_mask=True))
    assert merged == [splits]


def test_parts_of_a_call_are_cut_like_all_of_it(monkeypatch):
    """When memory runs out for a call, the same bits come from calls over some of its heads."""
    target = replace(Target.of(torch.device(DEVICE)), processors=16)
    monkeypatch.setattr(launch.Target, "of", lambda device: target)
    monkeypatch.setattr("bs_kernels.backends.triton.config._LEAST_STEPS", 1)
    case = decode(2, heads=4)
    call = make_call(moved(case.q), moved(case.k), moved(case.v), case.layout, causal=True)
    config = next(launch.candidates(target, launch.arguments.shape_of(call, "forward")))
    whole, _ = TRITON.forward(call, torch.float32)
    for start in range(4):
        for piece in _pieces(call, start, start + 1):
            part = _cut(call, piece)
            assert launch._splits(part, config) != launch._splits(call, config) > 1
            out, _ = TRITON.forward(part, torch.float32)
            assert torch.equal(out, whole[piece.batch, :, piece.q_heads])


def test_queries_without_keys_in_pieces(monkeypatch):
    monkeypatch.setattr(launch, "pieces", lambda *_: 2)
    case = make_case(layout_of((20, 35), (16, 16), heads=2, density=0.0), head_dim=16)
    out, lse = attention(case.q, case.k, case.v, case.layout, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# -- tensor descriptors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "paged"), [(16, False), (24, False), (24, True), (33, False)])
def test_descriptors_give_the_same_bits(dim, paged, monkeypatch):
    """Where strides are not multiples of 16 bytes, or blocks need their ends masked, pointers are used."""
    made = []
    view_of = launch.view_of
    monkeypatch.setattr(launch, "view_of", lambda *given: made.append(view_of(*given)) or made[-1])
    case = make_case(layout_of((40, 52), (32, 16), heads=2, density=0.7), q_heads=2, head_dim=dim, causal=True)
    case = make_pages(case) if paged else case
    found = []
    for descriptors in (False, True):
        config = Config(16, 16, 4, 1, descriptors=descriptors)
        monkeypatch.setattr(launch, "candidates", lambda target, shape, config=config: iter([config]))
        found.append(evaluate(case, attention))
    assert len(made) == 12
    assert all(view is None for view in made[:6])
    assert all((view is None) == (dim == 33) for view in made[6:])
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


def test_absolute_positions():
    """Blocks at positions of their own, as a zigzag placement has them; dropout and the causal mask follow."""
    layout = BlockLayout.from_dense(np.ones((1, 3, 3), bool), block_size=16, seq_len=(40, 48))
    q_start, kv_start, lengths = (32, 0, 96), (16, 64, 0), (16, 16, 8)
    plan = LayoutPlan.build(layout, TokenMask(causal=True), q_start=np.array(q_start), kv_start=np.array(kv_start))
    case = make_case(layout, head_dim=16, causal=True, dropout_p=0.25, dropout_seed=9)
    case = replace(
        case,
        plan=plan,
        q_positions=torch.cat([torch.arange(s, s + n) for s, n in zip(q_start, lengths, strict=True)]),
        kv_positions=torch.cat([torch.arange(s, s + 16) for s in kv_start]),
    )
    check_against_oracle(case, lambda *operands, causal, **rest: attention(*operands, **rest))


def test_blocks_of_uneven_length():
    """Every block may be short: equal to the same mask on a layout of single tokens."""
    q_bounds, kv_bounds = np.array([0, 16, 19, 35]), np.array([0, 5, 21, 37])
    mask = np.array([[[1, 1, 0], [0, 1, 1], [1, 1, 1]]], bool)
    uneven = BlockLayout.from_dense(mask, block_size=16, seq_len=(35, 37))
    plan = LayoutPlan.build(uneven, TokenMask(causal=True), q_bounds=q_bounds, kv_bounds=kv_bounds)
    fine = mask.repeat(np.diff(q_bounds), 1).repeat(np.diff(kv_bounds), 2)
    tokens = BlockLayout.from_dense(fine, block_size=1, seq_len=(35, 37))
    case = make_case(tokens, head_dim=16, causal=True)
    got = evaluate(replace(case, plan=plan, arguments={}), attention)
    assert_close_to_oracle(case, got)


def test_partial_results_are_float32_and_whole():
    layout = layout_of((32, 64), (16, 16), density=1.0)
    case = make_case(layout, head_dim=16, dtype=torch.bfloat16)
    half = BlockLayout.from_dense(np.ones((1, 2, 2), bool), block_size=16, seq_len=32)
    parts = [
        partial_forward(moved(case.q), moved(k), moved(v), half, backend="triton")
        for k, v in zip(case.k.split(32, 1), case.v.split(32, 1), strict=True)
    ]
    assert all(out.dtype == torch.float32 for out, _ in parts)
    out, lse = merge_attention(parts)
    want, want_lse = attention(case.q, case.k, case.v, layout, return_lse=True)
    torch.testing.assert_close(out.cpu(), want.float(), rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(lse.cpu(), want_lse)


def test_same_bits_again():
    case = make_case(layout_of((24, 40), (16, 16), heads=2), q_heads=2, kv_heads=1, head_dim=16, block_bias=True)
    first, second = (evaluate(case, attention) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_strides_and_empty_batches():
    layout = layout_of((20, 20), (16, 16), density=1.0)
    case = make_case(layout, batch=2, q_heads=2, kv_heads=2, head_dim=16)
    views = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x[:1].expand(2, -1, -1, -1),
    )
    for view in views:
        q, k, v = (view(x) for x in (case.q, case.k, case.v))
        got = attention(q, k, v, layout, return_lse=True)
        want = attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, return_lse=True)
        assert torch.equal(got[0], want[0])
    none = torch.zeros(0, 20, 2, 16, requires_grad=True)
    out, lse = attention(none, none, none, layout, return_lse=True)
    assert out.shape == (0, 20, 2, 16)
    assert lse.shape == (0, 2, 20)
    out.sum().backward()


@pytest.mark.parametrize("block_size", [(16, 16), (48, 24)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gradients_in_any_order(block_size, spread, monkeypatch):
    """``deterministic=False``: one pass; keys beyond the end of a short block add nothing, whatever the LSE."""
    monkeypatch.setattr(launch, "rows_launch", None)
    arguments = {"dropout_p": 0.2, "dropout_seed": 4} if spread == 1 else {"causal": True}
    case = make_case(layout_of((40, 53), block_size), head_dim=16, spread=spread, dtype=torch.float32, **arguments)
    check_against_oracle(case, partial(attention, deterministic=False))


def test_dropout_drops_the_same_entries_as_the_reference():
    """Values of one-hot vectors spell the kept probabilities out."""
    layout = layout_of((24, 16), (16, 16), density=1.0)
    q = torch.zeros(2, 24, 2, 16)
    v = torch.eye(16)[None, :, None].expand(2, 16, 2, 16).contiguous()
    arguments = {"dropout_p": 0.4, "dropout_seed": -5, "return_lse": True}
    got, _ = attention(q, q[:, :16], v, layout, **arguments)
    want, _ = block_sparse_attention(q, q[:, :16], v, layout, backend="reference", **arguments)
    assert torch.equal(got == 0, want == 0)
    assert 0.2 < float((got == 0).float().mean()) < 0.6


def test_devices_with_less_get_less(monkeypatch):
    """A configuration that a device lacks the resources for is passed over, once and for all."""
    tried = []
    run = launch.Launch.run

    def starved(self):
        tried.append(self.config)
        if self.config.tile_n > 16:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        run(self)

    monkeypatch.setattr(launch.Launch, "run", starved)
    monkeypatch.setattr(launch, "_refused", {})
    case = make_case(layout_of((40, 70), (16, 64)), head_dim=16)
    check_against_oracle(case, attention)
    first = len(tried)
    check_against_oracle(case, attention)
    assert first > 3
    assert len(tried) - first == 3
    monkeypatch.setattr(launch, "candidates", lambda target, shape: iter([Config(16, 64, 4, 1)]))
    with pytest.raises(RuntimeError, match="found no configuration of forward float32 dim=16 block=32x64"):
        attention(case.q, case.k, case.v, case.layout, return_lse=True)


def test_gradients_of_blocks_alone():
    """`Backend.backward` with and without the gradient of ``block_bias``."""
    case = make_case(layout_of(**PLAIN), block_bias=True)
    arguments = {name: moved(x) for name, x in case.arguments.items()}
    call = make_call(moved(case.q), moved(case.k), moved(case.v), case.layout, **arguments)
    out, lse = TRITON.forward(call, torch.float32)
    delta = (moved(case.dout) * out).sum(-1).transpose(1, 2).contiguous()
    without = TRITON.backward(call, moved(case.dout), lse, delta, Needs(), torch.float32)
    both = TRITON.backward(call, moved(case.dout), lse, delta, Needs(block_bias=True), torch.float32)
    assert without.block_bias is None
    assert both.block_bias is not None
    assert all(torch.equal(a, b) for a, b in zip(without[:3], both[:3], strict=True))
