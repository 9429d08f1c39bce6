"""The kernels compile for Ampere, Hopper and MI300X. Needs no GPU, only the assemblers that Triton brings along."""

import os

import numpy as np
import pytest
import torch

from bs_kernels._arguments import make_call
from bs_kernels.testing import make_case, make_layout, make_pages

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bs_kernels.backends.triton import launch  # after the two skips
from bs_kernels.backends.triton.ahead import TARGETS, compile_for, missing_tool
from bs_kernels.backends.triton.config import candidates

EVERYTHING = {
    "window": (100, 9),
    "key_padding_mask": True,
    "segment_ids": True,
    "attn_bias": True,
    "block_bias": True,
    "sinks": True,
    "dropout_p": 0.1,
    "dropout_seed": 1,
}


def launches(target, kernels, *, dim, dtype, block=128, paged=False, q_heads=4, **arguments):
    layout = make_layout(np.random.default_rng(0), seq_len=(512, 512), block_size=(block, block), density=0.5)
    case = make_case(layout, q_heads=q_heads, kv_heads=2, head_dim=dim, dtype=dtype, **arguments)
    case = make_pages(case) if paged else case
    call = make_call(case.q, case.k, case.v, layout, **case.arguments)
    rows = torch.empty(1, q_heads, 512)
    made = {
        "forward": lambda c: launch.forward_launch(call, case.dout, rows, c),
        "rows": lambda c: launch.rows_launch(
            call, case.dout, rows, rows, case.q, None if call.block_bias is None else torch.empty(1, q_heads, 4, 9), c
        ),
        "atomic": lambda c: launch.columns_launch(call, case.dout, rows, rows, rows, case.k, case.v, c),
        "columns": lambda c: launch.columns_launch(call, case.dout, rows, rows, None, case.k, case.v, c),
    }
    for kernel in kernels:
        config = next(candidates(TARGETS[target][1], launch._shape(call, kernel)))
        yield kernel, made[kernel](config)


ALL = ("forward", "rows", "columns")
CASES = {
    "Hopper, bf16": ("sm90", ALL, {"dim": 128, "dtype": torch.bfloat16, "causal": True}),
    "Hopper, everything": ("sm90", ALL, {"dim": 64, "dtype": torch.float16, "block": 64, **EVERYTHING}),
    "Hopper, pages": ("sm90", ("forward",), {"dim": 80, "dtype": torch.bfloat16, "block": 32, "paged": True}),
    "Hopper, any order": ("sm90", ("atomic",), {"dim": 128, "dtype": torch.bfloat16, "causal": True}),
    "Ampere, fp16": ("sm80", ALL, {"dim": 64, "dtype": torch.float16, "causal": True}),
    "Ampere, fp32": ("sm80", ("forward",), {"dim": 32, "dtype": torch.float32, "block": 16}),
    "MI300X, bf16": ("gfx942", ("forward", "columns"), {"dim": 64, "dtype": torch.bfloat16, "causal": True}),
    "MI300X, everything": ("gfx942", ("rows",), {"dim": 64, "dtype": torch.float16, "block": 32, **EVERYTHING}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_compile(name):
    target, kernels, arguments = CASES[name]
    if reason := missing_tool(target):
        pytest.skip(reason)
    for kernel, made in launches(target, kernels, **arguments):
        compiled = compile_for(made, target)
        assert compiled.shared_memory <= TARGETS[target][1].shared_memory, kernel
        if arguments.get("causal") and compiled.stack is not None:  # training does not live on spilled registers
            assert compiled.stack <= 256, (kernel, made.config, compiled.stack)
        if target == "sm90" and arguments["dim"] == 128:
            assert "wgmma.mma_async" in compiled.assembly, kernel
