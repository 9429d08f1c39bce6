"""Plans of layouts that live on a device are made there: nothing is copied from the host and nothing waits for it.

Meta tensors have no data, so an operator that has to look at some raises; a mode catches copies between devices.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask
from bs_kernels.backends.triton.lists import column_lists, row_lists
from bs_kernels.testing import make_batched_layout, make_layout

MASKS = {
    "plain": TokenMask(),
    "causal": TokenMask(causal=True),
    "window": TokenMask(window=(20, 5)),
}


class OnOneDevice(TorchDispatchMode):
    """Raises where an operator reads or writes anywhere else."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operators = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.device.type != self.device:
                raise AssertionError(f"{func} touches {x.device}")
        self.operators += 1
        return result


def on_meta(layout):
    return BatchedLayout(
        layout.indices.to("meta"), layout.counts.to("meta"), layout.block_size, layout.seq_len, layout.causal
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [1, 4])
def test_a_batched_plan_needs_no_host(mask, heads):
    layout = make_batched_layout(
        np.random.default_rng(0), batch=2, heads=heads, seq_len=(100, 130), block_size=(16, 32)
    )
    there = on_meta(layout)
    with OnOneDevice("meta") as mode:
        plan = LayoutPlan.build(there, MASKS[mask], "meta", q_start=7)
        row_lists(plan, masked_ends=False)
        column_lists(plan, 2, masked_ends=True)
    assert mode.operators > 50
    want = LayoutPlan.build(layout, MASKS[mask], q_start=7)
    assert [x.shape for x in plan.tensors] == [x.shape for x in want.tensors]


@pytest.mark.parametrize(("batch", "heads"), [(slice(1, 2), slice(0, 4)), (slice(0, 2), slice(2, 4))], ids=str)
def test_a_part_of_a_plan_needs_no_host(batch, heads):
    layout = make_batched_layout(np.random.default_rng(1), batch=2, heads=4, seq_len=(100, 130), block_size=(16, 32))
    there = on_meta(layout)
    with OnOneDevice("meta") as mode:
        there = LayoutPlan.build(there, device="meta").select(batch, heads)
    assert mode.operators > 50
    whole = LayoutPlan.build(layout)
    part = whole.select(batch, heads)
    assert [x.shape for x in there.tensors] == [x.shape for x in part.tensors]
    for name, blocks in (("row_order", whole.q_blocks), ("col_order", whole.kv_blocks)):
        inside = np.zeros((2, 4, blocks), bool)
        inside[batch, heads] = True
        numbers = np.where(inside.ravel(), inside.ravel().cumsum() - 1, -1)[getattr(whole, name).numpy()]
        assert getattr(part, name).tolist() == numbers[numbers >= 0].tolist(), name


def test_the_watcher_sees_the_host():
    with pytest.raises(AssertionError, match="touches cpu"), OnOneDevice("meta"):
        torch.from_numpy(np.zeros(3)).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device="meta").nonzero()


@pytest.mark.parametrize("starts", [{}, {"q_start": -3, "kv_start": 50}], ids=["default", "given"])
def test_geometry_is_that_of_a_plain_layout(starts):
    sizes = {"seq_len": (100, 130), "block_size": (16, 32)}
    batched = LayoutPlan.build(make_batched_layout(np.random.default_rng(0), batch=1, **sizes), **starts)
    plain = LayoutPlan.build(make_layout(np.random.default_rng(0), **sizes), **starts)
    for name in ("q_bounds", "kv_bounds", "q_start", "kv_start"):
        assert torch.equal(getattr(batched, name), getattr(plain, name)), name
        assert getattr(batched, name).dtype == torch.int32


def brute_force(begin, end, masked):
    order = list(range(len(masked)))
    middle = []
    for first, last in zip(begin.flatten().tolist(), end.flatten().tolist(), strict=True):
        slots = list(range(first, last))
        whole = [slot for slot in slots if not masked[slot]]
        order[first:last] = whole + [slot for slot in slots if masked[slot]]
        middle.append(first + len(whole))
    return order, middle


@pytest.mark.parametrize("kind", ["plain", "per head", "batched", "one head of many"])
@pytest.mark.parametrize("masked_ends", [False, True])
def test_whole_blocks_come_first(kind, masked_ends):
    generator = np.random.default_rng(3)
    sizes = {"seq_len": (100, 120), "block_size": (16, 16), "density": 0.5, "heads": 1 if kind == "plain" else 4}
    make = (lambda: make_batched_layout(generator, batch=2, **sizes)) if kind == "batched" else None
    plan = LayoutPlan.build(make() if make else make_layout(generator, **sizes), TokenMask(window=(30, 20)))
    if kind == "one head of many":
        plan = plan.select(slice(None), slice(2, 3))
    lists = row_lists(plan, masked_ends=masked_ends)
    short = plan.kv_bounds.diff() != 16
    masked = plan.partial.bool() | short[plan.indices.long()] | masked_ends
    order, middle = brute_force(plan.row_begin, plan.row_end, masked.tolist())
    assert lists.middle.flatten().tolist() == middle
    for begin, end in zip(plan.row_begin.flatten().tolist(), plan.row_end.flatten().tolist(), strict=True):
        here = order[begin:end]
        assert lists.blocks[begin:end].tolist() == plan.indices[here].tolist()
        assert lists.entries[begin:end].tolist() == plan.entries[here].tolist()
        assert torch.equal(lists.starts[begin:end], plan.kv_bounds[plan.indices[here].long()])
    columns = column_lists(plan, 1, masked_ends=masked_ends)
    short = plan.q_bounds.diff() != 16
    masked = plan.partial.bool()[plan.t_slots.long()] | short[plan.t_rows.long()] | masked_ends
    order, middle = brute_force(plan.col_begin, plan.col_end, masked.tolist())
    assert columns.middle.flatten().tolist() == middle
    for begin, end in zip(plan.col_begin.flatten().tolist(), plan.col_end.flatten().tolist(), strict=True):
        here = order[begin:end]
        assert columns.rows[begin:end].tolist() == plan.t_rows[here].tolist()
        assert columns.entries[begin:end].tolist() == plan.entries[plan.t_slots.long()][here].tolist()


def test_columns_of_key_heads_are_ordered_like_the_plan():
    """A key head's column ranks where the first of its query heads' columns does, and each is there once."""
    generator = np.random.default_rng(5)
    layout = make_layout(generator, seq_len=(160, 160), block_size=(16, 16), heads=6, density=0.4)
    plan = LayoutPlan.build(layout)
    order = column_lists(plan, 3, masked_ends=False).order.tolist()
    assert sorted(order) == list(range(2 * plan.kv_blocks))
    rank = {column: at for at, column in enumerate(plan.col_order.tolist())}
    best = [
        min(rank[(kv_head * 3 + g) * plan.kv_blocks + j] for g in range(3))
        for kv_head, j in (divmod(column, plan.kv_blocks) for column in order)
    ]
    assert best == sorted(best)
