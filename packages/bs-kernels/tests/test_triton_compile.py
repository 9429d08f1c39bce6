"""The kernels compile for Ampere, Hopper and MI300X. Needs no GPU, only the assemblers that Triton brings along."""

import os
from dataclasses import replace

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
from bs_kernels.backends.triton.arguments import shape_of
from bs_kernels.backends.triton.config import Target, candidates

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


def launches(target, kernels, *, dim, dtype, block=128, pages=None, q_heads=4, q_len=512, change=None, **arguments):
    layout = make_layout(np.random.default_rng(0), seq_len=(q_len, 512), block_size=(block, block), density=0.5)
    case = make_case(layout, q_heads=q_heads, kv_heads=2, head_dim=dim, dtype=dtype, **arguments)
    case = make_pages(case) if pages else case
    call = make_call(case.q, case.k, case.v, layout, **case.arguments)
    call = replace(call, page_table=call.page_table.to(pages)) if pages else call
    batch = case.q.shape[0]
    rows, sums = torch.empty(batch, q_heads, q_len), torch.empty(1, q_heads, 4, 9)
    sums = None if call.block_bias is None else sums
    given = call, case.dout, rows, rows
    pieces = torch.empty(8, *case.dout.shape), torch.empty(8, *rows.shape)
    made = {
        "forward": lambda c: launch.forward_launch(call, case.dout, rows, c),
        "pieces": lambda c: launch.forward_launch(call, *pieces, c),
        "merge": lambda c: launch.merge_launch(*pieces, case.dout, rows),
        "rows": lambda c: launch.rows_launch(*given, case.q, sums, c),
        "atomic": lambda c: launch.columns_launch(*given, rows, case.k, case.v, c),
        "columns": lambda c: launch.columns_launch(*given, None, case.k, case.v, c),
        "bias": lambda c: launch.bias_launch(*given, torch.empty(1, 1, q_len, 512), c),
    }
    of = {"pieces": "forward", "merge": "forward", "bias": "rows"}
    for kernel in kernels:
        config = next(candidates(TARGETS[target][1], shape_of(call, of.get(kernel, kernel))))
        yield kernel, made[kernel](replace(config, **(change or {})))


ALL = ("forward", "rows", "columns")
CASES = {
    "Hopper, bf16": ("sm90", ALL, {"dim": 128, "dtype": torch.bfloat16, "causal": True}),
    "Hopper, everything": ("sm90", ALL, {"dim": 64, "dtype": torch.float16, "block": 64, **EVERYTHING}),
    "Hopper, pages": (
        "sm90",
        ("forward", "columns"),
        {"dim": 80, "dtype": torch.bfloat16, "block": 32, "pages": torch.int32},
    ),
    "Hopper, decoding": (
        "sm90",
        ("pieces", "merge"),
        {"dim": 128, "dtype": torch.bfloat16, "q_heads": 8, "q_len": 1, "pages": torch.int32, "sinks": True},
    ),
    "Hopper, any order": ("sm90", ("atomic",), {"dim": 128, "dtype": torch.bfloat16, "causal": True}),
    "Ampere, a bias for every pair": ("sm80", ("bias",), {"dim": 64, "dtype": torch.bfloat16, "attn_bias": True}),
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
        if target == "sm90" and arguments["dim"] == 128 and arguments.get("q_len") != 1:
            assert "wgmma.mma_async" in compiled.assembly, kernel
            assert "cp.async.bulk.tensor" not in compiled.assembly, kernel  # nothing has measured it to be faster


@pytest.mark.parametrize(
    ("kernel", "pages"), [("forward", None), ("rows", None), ("columns", None), ("forward", torch.int64)]
)
def test_descriptors_use_the_copy_engine(kernel, pages, monkeypatch):
    if reason := missing_tool("sm90"):
        pytest.skip(reason)
    monkeypatch.setattr(Target, "of", lambda device: TARGETS["sm90"][1])
    change = {"descriptors": True}
    given = {"causal": True, "pages": pages, "change": change}
    ((_, made),) = launches("sm90", (kernel,), dim=128, dtype=torch.bfloat16, **given)
    compiled = compile_for(made, "sm90")
    assert compiled.shared_memory <= TARGETS["sm90"][1].shared_memory
    assert "cp.async.bulk.tensor" in compiled.assembly
    assert "wgmma.mma_async" in compiled.assembly


@pytest.mark.parametrize(("target", "given"), [("sm90", True), ("sm80", False), ("gfx942", False)])
def test_only_hopper_is_given_descriptors(target, given, monkeypatch):
    monkeypatch.setattr(Target, "of", lambda device: TARGETS[target][1])
    sizes = {"dim": 128, "dtype": torch.bfloat16, "change": {"descriptors": True}}
    for kernel, made in launches(target, ("forward", "rows", "columns"), **sizes):
        views = [made.arguments[name] for name in made.arguments if name.endswith("_view")]
        assert [view is not None for view in views] == [given, given], kernel
