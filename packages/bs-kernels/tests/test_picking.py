"""`best_blocks` of the native core and in torch against its definition, and lists of batched layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, batched, best_blocks, picking
from bs_kernels.backends import _native_lib
from bs_kernels.backends._native_picks import native_best_blocks, native_lists
from bs_kernels.plan import TENSOR_FIELDS
from bs_kernels.testing import dense_best_blocks

needs_native = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="no native core")
shapes = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 150))
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1e-42, -1e-42, 2.0**-149]


def make(seed, shape, slots, dtype=torch.float32):
    """Scores with ties, infinities, both zeros, denormals and NaN, and counts with some out of range."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape)
    if seed % 3:  # ties, and numbers of every size
        scores = np.round(scores * 2) * 10.0 ** generator.integers(-40, 30, shape[-1:])
    odd = generator.random(shape) < 0.2 * (seed % 2)
    scores = np.where(odd, generator.choice(SPECIAL, shape), scores)
    counts = generator.integers(-1, slots + 2, shape[:3])
    return torch.from_numpy(scores).to(dtype), torch.from_numpy(counts)


@needs_native
@given(st.integers(0, 2**31), shapes, st.integers(0, 60), st.sampled_from(["portable", "avx2", None]))
def test_native_picks_are_the_definition(seed, shape, slots, isa):
    scores, counts = make(seed, shape, slots)
    with pytest.MonkeyPatch.context() as patch:
        if isa in _native_lib.load().supported:
            patch.setenv("BS_KERNELS_ISA", isa)
        got = native_best_blocks(scores, counts, slots)
        assert torch.equal(best_blocks(scores, counts, slots), got)
    assert torch.equal(got, dense_best_blocks(scores, counts, slots))


@given(st.integers(0, 2**31), shapes, st.integers(0, 60), st.sampled_from([torch.float32, torch.float64]))
def test_picks_without_the_core_are_the_definition(seed, shape, slots, dtype):
    scores, counts = make(seed, shape, slots, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picking, "native_best_blocks", lambda *_: None)
        assert torch.equal(best_blocks(scores, counts, slots), dense_best_blocks(scores, counts, slots))


def test_picks_do_not_depend_on_threads():
    scores, counts = make(7, (2, 3, 70, 333), 40)
    threads, made = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        made.append(best_blocks(scores, counts, 40))
    torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scores": [[1.0]]}, TypeError, "scores: expected a floating-point tensor, got list"),
        ({"scores": torch.ones(1, 2, 3, 4).long()}, TypeError, "scores: .*int64"),
        ({"scores": torch.ones(2, 3, 4)}, ValueError, r"scores: expected \[B, H, QB, KB\]"),
        ({"scores": torch.ones(1, 2, 3, 0)}, ValueError, "at least one key block"),
        ({"counts": torch.ones(1, 2, 3)}, TypeError, "counts: expected int32 or int64, got torch.float32"),
        ({"counts": torch.ones(1, 2, 4).long()}, ValueError, r"counts: expected \[1, 2, 3\], got \[1, 2, 4\]"),
        ({"counts": torch.ones(1, 2, 3, device="meta").long()}, ValueError, "counts: expected device cpu, got meta"),
        ({"slots": 2.0}, TypeError, "slots: expected an integer, got 2.0"),
        ({"slots": True}, TypeError, "slots: expected an integer"),
        ({"slots": -1}, ValueError, "slots: expected at least 0, got -1"),
    ],
)
def test_bad_input(changes, error, match):
    given_ = {"scores": torch.ones(1, 2, 3, 4), "counts": torch.ones(1, 2, 3).long(), "slots": 2}
    with pytest.raises(error, match=match):
        best_blocks(**given_ | changes)


def test_compiles_whole():
    scores, counts = make(4, (1, 2, 9, 12), 5)
    compiled = torch.compile(best_blocks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, counts, 5), best_blocks(scores, counts, 5))


masks = st.sampled_from([TokenMask(), TokenMask(causal=True), TokenMask(True, (9, 0)), TokenMask(False, (3, 11))])


@needs_native
@given(st.integers(0, 2**31), masks, st.integers(0, 2), st.integers(1, 3), st.integers(1, 60), st.integers(1, 60))
def test_native_lists_are_those_of_tensor_operations(seed, mask, batch, heads, len_q, len_kv):
    """Slot by slot, those that no row uses included."""
    generator = np.random.default_rng(seed)
    rows, columns, slots = -(-len_q // 4), -(-len_kv // 6), int(generator.integers(0, 13))
    order = generator.random((batch, heads, rows, max(columns, slots))).argsort(-1)[..., :slots]
    fits = (order < columns).cumprod(-1).sum(-1)  # how many may be used; the rest is out of range
    counts = np.minimum(generator.integers(0, slots + 1, fits.shape), fits)
    order = np.where(np.arange(slots) < counts[..., None], order, order - generator.integers(0, 99))
    if seed % 2:
        order = np.where(np.arange(slots) < counts[..., None], order, 2**31 - 1)
        order.sort(-1)
    dtype = (torch.int32, torch.int64)[seed % 2]
    layout = BatchedLayout(torch.from_numpy(order).to(dtype), torch.from_numpy(counts), (4, 6), (len_q, len_kv))
    native = LayoutPlan.build(layout, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "native_lists", lambda *_: None)
        plain = LayoutPlan.build(layout, mask)
    for name in TENSOR_FIELDS:
        got, want = getattr(native, name), getattr(plain, name)
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize(
    ("indices", "count", "match"),
    [
        ([0, 1, 1], 3, "each key block once"),
        ([1, 0, 1], 3, "each key block once"),
        ([0, 2, 1], 2, r"key blocks in \[0, 2\), got 2"),
        ([-1, 1, 0], 1, "got -1"),
        ([0, 1, 2], 4, r"counts: expected values in \[0, 3\]"),
        ([0, 1, 2], -1, "counts: expected"),
    ],
)
def test_layouts_that_are_not_valid(monkeypatch, native, indices, count, match):
    if not native:
        monkeypatch.setattr(batched, "native_lists", lambda *_: None)
    layout = BatchedLayout(torch.tensor([[[indices, [0, 1, 9]]]]), torch.tensor([[[count, 2]]]), (4, 4), (8, 8))
    with pytest.raises(ValueError, match=match):
        LayoutPlan.build(layout)


@needs_native
def test_rows_that_repeat_a_block_write_nowhere_else():
    """The core sees that something is wrong; what it wrote until then lies inside the lists."""
    plan = LayoutPlan.build(BatchedLayout(torch.zeros(1, 1, 2, 1).long(), torch.ones(1, 1, 2).long(), (4, 4), (8, 8)))
    geometry = {name: getattr(plan, name) for name in ("q_bounds", "kv_bounds", "q_start", "kv_start")}
    made = native_lists(torch.zeros(1, 1, 2, 6).long(), torch.full((1, 1, 2), 6), geometry, (-99, 99))
    assert made is not None
    lists, is_valid = made
    assert not is_valid
    assert lists["col_order"].tolist() == [0, 1]
    assert lists["t_slots"].tolist() == list(range(12))


@needs_native
def test_lists_of_many_heads_do_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(2, 4, 64, 64, generator=generator).argsort(-1)[..., :40]
    layout = BatchedLayout(indices, torch.full((2, 4, 64), 37), (16, 16), (1024, 1024), causal=True)
    threads, plans = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        plans.append(LayoutPlan.build(layout))
    torch.set_num_threads(threads)
    for one, other in zip(plans[0].tensors, plans[1].tensors, strict=True):
        assert torch.equal(one, other)
