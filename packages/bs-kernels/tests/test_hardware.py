"""Facts about devices, and the order of backends that follows from them; no GPU is needed."""

import subprocess
import sys
from importlib import invalidate_caches

import numpy as np
import pytest
import torch

from bs_kernels import explain_backends
from bs_kernels._arguments import make_call
from bs_kernels.backends import _native_lib
from bs_kernels.dispatch import BACKENDS, choose
from bs_kernels.hardware import Facts, find_facts, rank_backends
from bs_kernels.op import problem_of
from bs_kernels.testing import make_case, make_layout

H200 = Facts("cuda", "NVIDIA H200", (9, 0), torch_kernels=frozenset({"flash", "cudnn"}), packages=frozenset({"triton"}))
MI300X = Facts("cuda", "AMD Instinct MI300X", arch="gfx942")


@pytest.mark.parametrize(
    ("facts", "known"),
    [
        (Facts("cuda", "NVIDIA H100 80GB HBM3", (9, 0)), "Hopper (H100, H200)"),
        (H200, "Hopper (H100, H200)"),
        (Facts("cuda", "NVIDIA B200", (10, 0)), "Blackwell (B200, GB200)"),
        (MI300X, "CDNA 3 (MI300A, MI300X, MI325X)"),
        (Facts("cuda", "something else", (99, 0)), ""),
        (Facts("cpu"), ""),
    ],
    ids=lambda x: x.name if isinstance(x, Facts) else "",
)
def test_devices_are_known_by_name(facts, known):
    assert facts.generation == known
    assert known in str(facts)


@pytest.mark.parametrize("facts", [Facts("cpu"), H200, MI300X, Facts("mps")], ids=lambda f: f.name or f.device)
def test_every_backend_has_one_place(facts):
    ranked = rank_backends(facts)
    assert sorted(r.name for r in ranked) == sorted(b.name for b in BACKENDS)
    assert all(r.why for r in ranked)
    assert ranked[-1].name == "reference" or facts.device == "mps"


def test_orders():
    order = {f.device: [r.name for r in rank_backends(f) if r.automatic] for f in (Facts("cpu"), H200, Facts("xpu"))}
    assert order["cpu"] == ["native", "flash", "torch", "reference"]
    assert order["cuda"][:2] == ["triton", "flash"]
    assert order["xpu"][0] == "torch"
    assert "Hopper" in rank_backends(H200)[0].why
    assert "no dense kernel found" in rank_backends(MI300X)[1].why
    assert rank_backends(Facts("cpu", native_missing="no compiler"))[0].why == "no compiler"


@pytest.mark.parametrize(
    ("capability", "packages", "first"),
    [
        ((9, 0), {"flash_attn", "flash_attn_interface", "flash_attn.cute"}, "FlashAttention 3"),
        ((9, 0), {"flash_attn", "flash_attn.cute"}, "FlashAttention 4"),
        ((10, 0), {"flash_attn", "flash_attn_interface", "flash_attn.cute"}, "FlashAttention 4"),
        ((8, 0), {"flash_attn", "flash_attn_interface", "flash_attn.cute"}, "FlashAttention 2"),
        ((9, 0), set(), "torch's cudnn kernel"),
        ((8, 0), {"flash_attn_interface"}, "torch's flash kernel"),
        ((7, 5), {"flash_attn"}, "no dense kernel found"),
    ],
)
def test_the_dense_kernel_of_each_generation(capability, packages, first):
    facts = Facts("cuda", capability=capability, packages=frozenset(packages), torch_kernels=H200.torch_kernels)
    assert rank_backends(facts)[1].why.startswith(first)


def test_dense_layouts_leave_the_core_where_it_has_no_vector_instructions():
    first = {isa: rank_backends(Facts("cpu", native_isa=isa))[0].name for isa in ("portable", "avx2", "avx512")}
    assert first == {"portable": "flash", "avx2": "native", "avx512": "native"}


def test_facts_of_this_machine():
    facts = find_facts("cpu")
    assert facts.capability is None
    assert (facts.native_isa is None) == (facts.native_missing is not None)
    if facts.native_isa is not None:
        assert facts.native_isa in _native_lib.ISA_NAMES
    assert "packages:" in str(facts)


def test_packages_are_looked_up_not_imported(tmp_path, monkeypatch):
    for name in ("flash_attn", "flash_attn/cute"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    packages = find_facts("cpu").packages
    assert "flash_attn.cute" in packages
    assert not packages & {"flash_attn", "flash_attn_interface"}  # FlashAttention 4 by itself
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    invalidate_caches()
    assert "flash_attn" in find_facts("cpu").packages
    assert "flash_attn" not in sys.modules


def test_neither_facts_nor_calls_load_anything():
    code = (
        "import sys, torch, bs_kernels\nfrom bs_kernels.hardware import find_facts\nfind_facts('cpu')\n"
        "from bs_patterns import LocalWindow\nlayout = LocalWindow(32).layout(64, block_size=16)\n"
        "q = torch.randn(1, 64, 2, 16, requires_grad=True)\n"
        "bs_kernels.explain_backends(q, q, q, layout)\n"
        "bs_kernels.block_sparse_attention(q, q, q, layout).sum().backward()\n"
        "print([n for n in ('triton', 'flash_attn', 'flash_attn_interface') if n in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_explain_backends_prints_the_facts_and_the_order():
    case = make_case(make_layout(np.random.default_rng(0), seq_len=(16, 16), block_size=(4, 4)))
    table = explain_backends(case.q, case.k, case.v, case.layout)
    assert [report.name for report in table] == [ranked.name for ranked in rank_backends(Facts("cpu"))]
    assert str(table).splitlines()[0] == f"on {find_facts('cpu')}"
    chosen = next(report for report in table if report.selected)
    assert chosen.why == next(r.why for r in rank_backends(find_facts("cpu")) if r.name == chosen.name)
    assert chosen.why in str(table)


def test_what_runs_only_when_named_is_not_chosen(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case(make_layout(np.random.default_rng(0), seq_len=(16, 16), block_size=(4, 4)), dtype=torch.float64)
    call = make_call(case.q, case.k, case.v, case.layout)
    assert choose("auto", problem_of(call, [0, 0, 0]), call).name == "torch"
