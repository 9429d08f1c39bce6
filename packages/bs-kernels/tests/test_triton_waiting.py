"""A whole step over a layout that lives on a device asks the device for nothing.

Like `test_triton_oracle`, on a GPU or in Triton's interpreter, where `test_triton_interpreted` runs it.
"""

import os

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention, op
from bs_kernels.testing import make_batched_layout, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_triton_interpreted runs this module in the interpreter", allow_module_level=True)
pytest.importorskip("triton")


class NoWaiting(TorchDispatchMode):
    """Raises where an operator needs a number from a device, or has a shape that depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.overloadpacket._qualified_op_name.split("::")
        self.seen.add(name)
        if space == "bs_kernels":  # look into it: below autograd a mode is off
            with self:
                return getattr(op, f"_{name}")(*args, **(kwargs or {}))
        by_mask = name.startswith("index") and isinstance(args[1], (list, tuple))
        by_mask = by_mask and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.WAITS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_step_over_a_layout_of_the_device_does_not_wait(deterministic):
    """Plan, forward and backward: what a CUDA graph can capture."""
    layout = make_batched_layout(np.random.default_rng(7), batch=2, heads=2, seq_len=(20, 36), block_size=(16, 16))
    bias = torch.randn(2, 1, 20, 36, generator=torch.Generator().manual_seed(0))
    rest = {"block_bias": True, "attn_bias": bias} if deterministic else {}
    case = make_case(layout, batch=2, q_heads=2, kv_heads=1, head_dim=16, causal=True, sinks=True, **rest)
    leaves = [x.to(DEVICE).requires_grad_() for x in (case.q, case.k, case.v)]
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.arguments.items()}
    lists = layout.indices.to(DEVICE), layout.counts.to(DEVICE)
    layout = BatchedLayout(*lists, layout.block_size, layout.seq_len, layout.causal)
    with NoWaiting() as mode:
        plan = LayoutPlan.build(layout, TokenMask(given.pop("causal")), DEVICE)
        out = block_sparse_attention(*leaves, plan, backend="triton", deterministic=deterministic, **given)
        torch.autograd.grad(out.sum(), leaves)
    assert {"attention", "attention_backward"} <= mode.seen
    assert len(mode.seen) > 20
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(3, device=DEVICE).sum().item()
