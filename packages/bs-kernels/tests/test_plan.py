"""Plans: lists that say what the layout says, masks that prune and classify, positions, orders, caching."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask
from bs_kernels.testing import make_batched_layout, make_layout
from bs_patterns import BlockLayout


def entries_of(plan):
    """{(l, h, i): [(j, partial, entry), …]} from the rows, and the same from the columns."""
    rows, columns = {}, {}
    for at in np.ndindex(*plan.row_begin.shape):
        begin, end = int(plan.row_begin[at]), int(plan.row_end[at])
        rows[at] = [(int(plan.indices[s]), int(plan.partial[s]), int(plan.entries[s])) for s in range(begin, end)]
    for at in np.ndindex(*plan.col_begin.shape):
        for t in range(int(plan.col_begin[at]), int(plan.col_end[at])):
            slot, row = int(plan.t_slots[t]), (*at[:2], int(plan.t_rows[t]))
            assert int(plan.indices[slot]) == at[2]
            columns.setdefault(row, []).append((at[2], int(plan.partial[slot]), int(plan.entries[slot])))
    return rows, {row: columns.get(row, []) for row in rows}


def expected(dense, entry, mask, plan):
    """What the lists must hold, from dense positions."""
    q_pos, k_pos = (
        [np.arange(first, first + length) for first, length in zip(start.tolist(), bounds.diff().tolist(), strict=True)]
        for start, bounds in ((plan.q_start, plan.q_bounds), (plan.kv_start, plan.kv_bounds))
    )
    lo, hi = mask.band
    out = {}
    for at in np.ndindex(*dense.shape[:3]):
        row = []
        for j in np.flatnonzero(dense[at]):
            distance = k_pos[j] - q_pos[at[2]][:, None]
            kept = (distance >= lo) & (distance <= hi)
            if kept.any():
                row.append((int(j), int(not kept.all()), int(entry[at][j])))
        out[at] = row
    return out


masks = st.builds(
    TokenMask,
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)),
)


@given(st.integers(0, 2**32 - 1), masks, st.sampled_from((1, 3)), st.integers(1, 40), st.integers(1, 40))
def test_lists_match_the_layout(seed, mask, heads, len_q, len_kv):
    generator = np.random.default_rng(seed)
    layout = make_layout(generator, seq_len=(len_q, len_kv), block_size=(4, 6), heads=heads)
    shift = {"q_start": int(generator.integers(-30, 30)), "kv_start": int(generator.integers(-30, 30))}
    plan = LayoutPlan.build(layout, mask, **shift if seed % 2 else {})
    entry = np.full(layout.shape, -1)
    entry[layout.to_dense()] = np.arange(layout.nnz)
    want = expected(layout.to_dense()[None], entry[None], mask, plan)
    rows, columns = entries_of(plan)
    assert rows == want
    assert {row: sorted(found) for row, found in columns.items()} == want
    assert int(plan.q_start[0]) == (shift["q_start"] if seed % 2 else len_kv - len_q)
    assert_orders(plan)


@given(st.integers(0, 2**32 - 1), masks, st.sampled_from((1, 2)), st.integers(1, 30), st.integers(1, 30))
def test_batched_lists_match_the_layout(seed, mask, heads, len_q, len_kv):
    generator = np.random.default_rng(seed)
    sizes = {"seq_len": (len_q, len_kv), "block_size": (4, 6), "heads": heads}
    layout = make_batched_layout(generator, batch=2, **sizes)
    plan = LayoutPlan.build(layout, mask)
    dense, entry = np.zeros(layout.shape, bool), np.full(layout.shape, -1)
    flat = np.arange(layout.indices.numel()).reshape(layout.indices.shape)
    for at in np.ndindex(*layout.shape[:3]):
        used = layout.indices[at].numpy()[: int(layout.counts[at])]
        dense[at][used], entry[at][used] = True, flat[at][: len(used)]
    want = expected(dense, entry, mask, plan)
    rows, columns = entries_of(plan)
    assert rows == want
    assert {row: sorted(found) for row, found in columns.items()} == want
    assert_orders(plan)


def assert_orders(plan):
    for order, begin, end in (
        (plan.row_order, plan.row_begin, plan.row_end),
        (plan.col_order, plan.col_begin, plan.col_end),
    ):
        counts = (end - begin).flatten()
        assert sorted(order.tolist()) == list(range(counts.numel()))
        in_order = counts[order.long()]
        assert (in_order[1:] <= in_order[:-1]).all()


def test_dtypes_and_devices():
    plan = LayoutPlan.build(make_layout(np.random.default_rng(0), seq_len=(20, 20), block_size=(4, 4)))
    for name, tensor in zip(plan_fields(), plan.tensors, strict=True):
        assert tensor.dtype == (torch.uint8 if name == "partial" else torch.int32), name
        assert tensor.is_contiguous()
    assert plan.to("meta").device.type == "meta"
    assert plan.nbytes == sum(t.numel() * t.element_size() for t in plan.tensors)


def plan_fields():
    from bs_kernels.plan import TENSOR_FIELDS

    return TENSOR_FIELDS


@pytest.mark.parametrize("order", ["hilbert", "morton", "row", "longest_first"])
def test_named_orders(order):
    layout = make_layout(np.random.default_rng(1), seq_len=(64, 64), block_size=(4, 4), heads=2, density=0.4)
    plan = LayoutPlan.build(layout, order=order)
    assert plan.order == order
    reference, _ = entries_of(LayoutPlan.build(layout))
    rows, columns = entries_of(plan)
    assert {row: sorted(found) for row, found in rows.items()} == reference
    assert {row: sorted(found) for row, found in columns.items()} == reference
    if order in ("hilbert", "morton"):
        import bs_patterns

        visit = getattr(bs_patterns, f"{order}_order")(layout)
        rank = {int(entry): at for at, entry in enumerate(visit)}
        for found in rows.values():
            ranks = [rank[entry] for _, _, entry in found]
            assert ranks == sorted(ranks)
        first = [min((rank[e] for _, _, e in rows[0, h, i]), default=np.inf) for h in range(2) for i in range(16)]
        in_order = [first[r] for r in plan.row_order.tolist()]
        assert in_order == sorted(in_order)


def test_a_custom_order_must_be_a_permutation():
    layout = make_layout(np.random.default_rng(1), seq_len=(16, 16), block_size=(4, 4))
    LayoutPlan.build(layout, order=np.arange(layout.nnz)[::-1].copy())
    with pytest.raises(ValueError, match="order: expected each of the"):
        LayoutPlan.build(layout, order=np.zeros(layout.nnz, np.int64))
    with pytest.raises(ValueError, match="order: expected int64"):
        LayoutPlan.build(layout, order=np.arange(layout.nnz + 1))
    with pytest.raises(ValueError, match="order: expected one of"):
        LayoutPlan.build(layout, order="random")


def test_irregular_blocks():
    """Compacted blocks: a short one in the middle, each with its own position."""
    layout = BlockLayout.from_dense(np.ones((1, 2, 3), bool), block_size=4, seq_len=(8, 10))
    plan = LayoutPlan.build(
        layout, TokenMask(causal=True), q_start=[20, 40], kv_start=[0, 36, 21], kv_bounds=[0, 4, 6, 10]
    )
    rows, _ = entries_of(plan)
    assert rows == {(0, 0, 0): [(0, 0, 0), (2, 1, 2)], (0, 0, 1): [(0, 0, 3), (1, 0, 4), (2, 0, 5)]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_start": [1, 2, 3]}, "q_start: expected shape"),
        ({"q_start": [0.5, 1.5]}, "q_start: expected integers"),
        ({"kv_start": 2**31}, "kv_start: expected a position within"),
        ({"q_bounds": [0, 5, 8]}, "q_bounds: expected offsets from 0 to 8 in steps of at most 4"),
        ({"kv_bounds": [0, 4, 7]}, "kv_bounds: expected offsets"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_geometry(arguments, message):
    layout = BlockLayout.from_dense(np.ones((1, 2, 2), bool), block_size=4, seq_len=8)
    with pytest.raises((ValueError, TypeError), match=message):
        LayoutPlan.build(layout, **arguments)


def test_causal_layout_needs_a_causal_mask():
    layout = make_layout(np.random.default_rng(0), seq_len=(8, 8), block_size=(4, 4), causal=True)
    assert LayoutPlan.build(layout).token_mask == TokenMask(causal=True)
    with pytest.raises(ValueError, match="causal: expected True or None"):
        LayoutPlan.build(layout, TokenMask())
    with pytest.raises(TypeError, match="layout: expected"):
        LayoutPlan.build(np.eye(3))


def test_equal_content_is_built_once():
    first, second = (make_layout(np.random.default_rng(7), seq_len=(32, 32), block_size=(4, 4)) for _ in range(2))
    assert first is not second
    plan = LayoutPlan.build(first)
    assert LayoutPlan.build(second) is plan
    assert LayoutPlan.build(first, TokenMask(causal=True)) is not plan
    assert LayoutPlan.build(first, q_start=3) is not plan
    assert LayoutPlan.build(first, order="row") is not plan
    digests = {LayoutPlan.build(first, **kw).digest for kw in ({}, {"q_start": 3}, {"order": "row"}, {"q_start": 0})}
    assert len(digests) == 3  # a start of 0 is the default spelled out


def test_plans_are_pytrees():
    plan = LayoutPlan.build(make_layout(np.random.default_rng(0), seq_len=(16, 16), block_size=(4, 4)))
    leaves, spec = pytree.tree_flatten(plan)
    again = pytree.tree_unflatten(leaves, spec)
    assert all(a is b for a, b in zip(again.tensors, plan.tensors, strict=True))
    assert (again.block_size, again.seq_len, again.digest) == (plan.block_size, plan.seq_len, plan.digest)
    assert "LayoutPlan(batch=1" in repr(copy.copy(plan))


def test_select_is_the_plan_of_those_heads():
    layout = make_batched_layout(np.random.default_rng(3), batch=3, heads=4, seq_len=(24, 24), block_size=(4, 4))
    plan = LayoutPlan.build(layout)
    part = plan.select(slice(1, 3), slice(2, 4))
    want, _ = entries_of(plan)
    rows, columns = entries_of(part)
    assert rows == {(b - 1, h - 2, i): found for (b, h, i), found in want.items() if b >= 1 and h >= 2}
    assert {row: sorted(found) for row, found in columns.items()} == rows
    assert_orders(part)


def batched(**changes):
    fields = {
        "indices": torch.zeros(1, 1, 2, 1, dtype=torch.int64),
        "counts": torch.ones(1, 1, 2, dtype=torch.int64),
        "block_size": 4,
        "seq_len": 8,
    }
    return BatchedLayout(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.zeros(1, 1, 2, 1)}, TypeError, "indices: expected int32 or int64"),
        ({"indices": [[0]]}, TypeError, "indices: expected a tensor"),
        ({"indices": torch.zeros(1, 1, 3, 1, dtype=torch.int64)}, ValueError, "indices: expected \\[B, H, 2, K\\]"),
        ({"counts": torch.ones(1, 2, dtype=torch.int64)}, ValueError, "counts: expected 3 dimensions"),
        ({"counts": torch.ones(1, 2, 2, dtype=torch.int64)}, ValueError, "counts: expected \\[1, 1, 2\\]"),
        ({"block_size": 0}, ValueError, "block_size: expected positive"),
        ({"seq_len": "8"}, TypeError, "seq_len: expected an int or a pair"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_batched_layouts(changes, error, message):
    with pytest.raises(error, match=message):
        batched(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.full((1, 1, 2, 1), 2)}, "indices: expected key blocks in \\[0, 2\\), got 2"),
        ({"counts": torch.full((1, 1, 2), 2)}, "counts: expected values in \\[0, 1\\]"),
        (
            {"indices": torch.zeros(1, 1, 2, 2, dtype=torch.int64), "counts": torch.full((1, 1, 2), 2)},
            "each key block once",
        ),
    ],
    ids=["range", "count", "repeat"],
)
def test_batched_layout_contents_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        batched(**changes).validate()
