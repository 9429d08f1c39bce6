"""What the `flash` backend tells flash-attn and torch's GPU kernels, and what it makes of their answers.

None of them runs on a CPU. In their place stand functions with the parameters of the real ones, as released, computed
in plain torch: an argument under another name, in another layout or in another unit does not pass.
"""

import inspect
import re
import sys

import numpy as np
import pytest
import torch

from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention
from bs_kernels.backends import _flash_kernels, _flash_packages, flash
from bs_kernels.backends._flash_kernels import TORCH_KERNELS, Asked, Operands
from bs_kernels.backends._flash_packages import PACKAGE_KERNELS
from bs_kernels.backends._flash_segments import Segments, Variable
from bs_kernels.backends.base import Problem
from bs_kernels.testing import check_against_oracle, make_case, make_layout
from bs_kernels.testing._flash_standins import (
    Recorder,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    kernel_backward,
    kernel_forward,
)
from bs_patterns import BlockLayout

FA3, FA4, FA2 = PACKAGE_KERNELS
CUDNN, FLASH, EFFICIENT = TORCH_KERNELS["cuda"]

RELEASES = [
    pytest.param(FA2, flash_attn_2, "2.6.0", id="2 (2.6.0)"),
    pytest.param(FA2, flash_attn_2, "2.8.3", id="2 (2.8.3)"),
    pytest.param(FA3, flash_attn_3, "2025-01", id="3 (January 2025)"),
    pytest.param(FA3, flash_attn_3, "2026-03", id="3 (March 2026)"),
    pytest.param(FA4, flash_attn_4, "beta 5", id="4 (beta 5)"),
    pytest.param(FA4, flash_attn_4, "beta 27", id="4 (beta 27)"),
]


@pytest.fixture
def only(monkeypatch):
    """Lets one kernel, and no other, compute calls on this machine."""

    def use(kernel):
        monkeypatch.setattr(flash, "_able", lambda asked: ((kernel,), ()))

    return use


@pytest.fixture
def installed(monkeypatch, only):
    def use(kernel, package, release):
        recorder = Recorder()
        for name, module in package(release, recorder).items():
            monkeypatch.setitem(sys.modules, name, module)
        only(kernel)
        return recorder

    return use


def dense(seq_len, block_size=(4, 8), **options):
    lengths = (seq_len, seq_len) if isinstance(seq_len, int) else seq_len
    return make_layout(np.random.default_rng(0), seq_len=lengths, block_size=block_size, density=2.0, **options)


def half_case(layout, dtype=torch.bfloat16, **options):
    sizes = {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 20, "value_dim": 12}
    return make_case(layout, dtype=dtype, **sizes, **options)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [3] + [7] * 20 + [2] * 3])


def packed_case(**options):
    case = half_case(dense(24), **options)
    case.arguments["segment_ids"] = DOCUMENTS
    return case


def diagonal(causal=False):
    blocks = np.zeros((1, 6, 3), np.bool_)
    blocks[0, :2, 0] = blocks[0, 2:, 1:] = True
    layout = BlockLayout.from_dense(blocks, block_size=(4, 8), seq_len=24)
    return layout.as_causal() if causal else layout


CASES = {
    "full": lambda: half_case(dense((20, 30))),
    "causal": lambda: half_case(dense(24), causal=True, dtype=torch.float16),
    "causal, more keys": lambda: half_case(dense((20, 30)), causal=True),
    "causal, more queries": lambda: half_case(dense((30, 20)), causal=True),
    "window": lambda: half_case(dense(24), window=(5, 2)),
    "left window": lambda: half_case(dense(24), window=(5, None)),
    "causal window": lambda: half_case(dense(24), causal=True, window=4),
    "documents": packed_case,
    "causal documents": lambda: packed_case(causal=True),
    "documents, window": lambda: packed_case(causal=True, window=3),
    "documents of other lengths": lambda: half_case(dense((20, 30)), segment_ids=True),
    "padding": lambda: half_case(dense(24), key_padding_mask=True),
    "diagonal layout": lambda: half_case(diagonal()),
    "causal diagonal layout": lambda: half_case(diagonal(causal=True)),
    "sinks": lambda: packed_case(causal=True, sinks=True),
    "negative scale": lambda: half_case(dense(24), scale=-0.7),
}


def contiguous_padding(case):
    """Padding at the ends only: what is left is one run of keys."""
    if "key_padding_mask" in case.arguments:
        case.arguments["key_padding_mask"] = torch.arange(24) < torch.tensor([[17], [24]])
    return case


@pytest.mark.parametrize(("kernel", "package", "release"), RELEASES)
@pytest.mark.parametrize("what", CASES)
def test_packages_compute_it(installed, kernel, package, release, what):
    recorder = installed(kernel, package, release)
    check_against_oracle(contiguous_padding(CASES[what]()), backend="flash")
    assert len(recorder.calls) == 2  # one forward, one backward
    variable = any(word in what for word in ("documents", "padding", "diagonal", "sinks"))
    for name, given in recorder.calls:
        assert (given.get("cu_seqlens_q") is not None) == variable
        assert ("varlen" in name) == (variable and kernel is FA2)


@pytest.mark.parametrize(("kernel", "package", "release"), RELEASES)
def test_grouped_heads_are_not_copied(installed, kernel, package, release):
    recorder = installed(kernel, package, release)
    case = half_case(dense(24))
    block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash")
    ((_, given),) = recorder.calls
    assert given["q"].shape == (2, 24, 4, 24)  # 20 columns, to a multiple of 8
    assert given["k"].shape == given["v"].shape == (2, 24, 2, 24)
    assert given["softmax_scale"] == pytest.approx(20**-0.5)


@pytest.mark.parametrize("variable", [False, True], ids=["dense", "documents"])
@pytest.mark.parametrize("cut", [np.s_[..., :16], np.s_[..., 3:19], np.s_[..., ::2]], ids=["rows", "offset", "columns"])
def test_any_strides(installed, cut, variable):
    installed(FA2, flash_attn_2, "2.8.3")
    wide = [torch.randn(2, 24, 2, 35).bfloat16() for _ in range(3)]
    wide = [x[..., :32] if cut == np.s_[..., ::2] else x for x in wide]
    leaves = [x[cut].requires_grad_() for x in wide]
    ids = {"segment_ids": DOCUMENTS} if variable else {}
    found = []
    for operands in (leaves, [x.detach().contiguous().requires_grad_() for x in leaves]):
        out = block_sparse_attention(*operands, dense(24), backend="flash", **ids)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), operands)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("kernel", "package", "release"), RELEASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_are_asked_for(installed, kernel, package, release, deterministic):
    recorder = installed(kernel, package, release)
    q = torch.randn(1, 24, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    block_sparse_attention(q, q, q, dense(24), backend="flash", deterministic=deterministic).sum().backward()
    assert recorder.calls[1][1]["deterministic"] is deterministic


@pytest.mark.parametrize(("kernel", "package", "release"), RELEASES)
def test_a_gradient_through_the_lse_alone(installed, kernel, package, release):
    """δ is then no Σ dout · out of any output."""
    installed(kernel, package, release)
    grads = []
    for name in ("flash", "reference"):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 24, 2, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3))
        _, lse = block_sparse_attention(q, k, v, dense(24), causal=True, return_lse=True, backend=name)
        grads.append(torch.autograd.grad(lse.square().sum(), (q, k)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


def test_parameters_of_a_custom_op_are_those_of_what_it_wraps():
    """FlashAttention 2.7 and later are wrapped by `torch.library.custom_op`."""

    @torch.library.custom_op("bs_kernels_test::wrapped", mutates_args=())
    def wrapped(q: torch.Tensor, window_size_left: int) -> torch.Tensor:
        return q.clone()

    assert "window_size" not in _flash_packages.parameters(wrapped)
    assert {"q", "window_size_left"} == _flash_packages.parameters(wrapped)


def test_another_layout_of_the_lse_is_an_error(installed, monkeypatch):
    installed(FA2, flash_attn_2, "2.8.3")
    module = sys.modules["flash_attn.flash_attn_interface"]
    inner = module._flash_attn_forward

    def forward(*args, window_size_left, window_size_right, **options):
        sides = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        out, lse, *rest = inner(*args, **sides, **options)
        return out, lse.transpose(1, 2), *rest

    monkeypatch.setattr(module, "_flash_attn_forward", forward)
    case = half_case(dense(24))
    with pytest.raises(RuntimeError, match=r"FlashAttention 2: expected an output .* this release is not one"):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash")


@pytest.mark.parametrize(
    ("kernel", "package", "release", "function", "without", "reason"),
    [
        (FA3, flash_attn_3, "2025-01", "_flash_attn_forward", "cu_seqlens_q", "older than January 2025"),
        (FA4, flash_attn_4, "beta 5", "_flash_attn_bwd", "dlse", "takes no gradient of the LSE"),
    ],
)
def test_old_releases_are_refused(installed, kernel, package, release, function, without, reason):
    recorder = installed(kernel, package, release)
    module = sys.modules[kernel.module]
    known = [p for p in inspect.signature(getattr(module, function)).parameters if p != without]
    setattr(module, function, recorder.function(function, ", ".join(known), dict))
    case = half_case(dense(24))
    with pytest.raises(ValueError, match=reason):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash")


def test_a_package_that_cannot_be_imported_is_refused(only, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    only(FA3)
    case = half_case(dense(24))
    with pytest.raises(ValueError, match="FlashAttention 3 is installed but cannot be used: ModuleNotFoundError"):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash")


# -- which one ---------------------------------------------------------------------------------------------------------


def asked(**changes):
    given = {"device": "cuda", "dtype": torch.bfloat16, "width": 64, "backward": False, "deterministic": True}
    return Asked(**(given | changes))


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        ((8, 0), ["FlashAttention 2", "torch's flash kernel"]),
        ((9, 0), ["FlashAttention 3", "FlashAttention 4", "FlashAttention 2", "torch's cuDNN kernel"]),
        ((10, 0), ["FlashAttention 4", "FlashAttention 2", "torch's cuDNN kernel"]),
        ((12, 0), ["FlashAttention 2", "torch's cuDNN kernel"]),
        ((7, 5), ["torch's memory-efficient kernel"]),
    ],
)
def test_the_order_on_each_generation(monkeypatch, capability, first):
    monkeypatch.setattr(_flash_packages, "importable", lambda module: True)
    for module in (_flash_kernels, _flash_packages):
        monkeypatch.setattr(module, "on_amd", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    able, _ = flash._able.__wrapped__(asked(capability=capability))
    assert [kernel.name for kernel in able][: len(first)] == first
    assert able[-1] is EFFICIENT


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        (FA2, {"capability": (7, 5)}, "needs compute capability 8.0"),
        (FA2, {"dtype": torch.float32}, "float16 and bfloat16, not float32"),
        (FA2, {"width": 264}, "head dims up to 256, not 264"),
        (FA2, {"width": 256, "backward": True}, "head dims up to 256, less 2 with a backward, not 256"),
        (FA3, {"capability": (8, 0)}, r"for compute capability 9 \(Hopper\)"),
        (FA3, {"width": 200, "backward": True}, "no deterministic backward for head dims above 192"),
        (FA4, {"capability": (12, 0)}, "for compute capabilities 9, 10 and 11"),
        (FA4, {"capability": (10, 0), "width": 160}, "head dims up to 128 and 256 on 10.0, not 160"),
        (CUDNN, {"capability": (8, 0)}, "from compute capability 9.0 on"),
        (FLASH, {"capability": (7, 5)}, "needs compute capability 8.0"),
        (FLASH, {"backward": True}, r"the same bits backward \(deterministic=False allows it\)"),
        (EFFICIENT, {"dtype": torch.float64}, "float32, not float64"),
    ],
)
def test_reasons(monkeypatch, kernel, changes, reason):
    monkeypatch.setattr(_flash_packages, "importable", lambda module: True)
    fine = {"capability": (9, 0), "deterministic": False, "backward": True} if kernel in (CUDNN, FLASH) else {}
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert kernel.reasons(asked(**fine)) == []
    found = kernel.reasons(asked(**changes))
    assert len(found) == 1
    assert re.search(reason, found[0]), found


def test_what_is_not_installed_is_not_listed_as_a_reason():
    problem = Problem("cuda", torch.float64, 1, 1, 1, 64, 64, (8, 8), (8, 8), dense_offset=0)
    found = flash.FlashBackend().not_supported_reasons(problem)
    assert any("memory-efficient kernel computes" in reason for reason in found)
    assert not any("installed" in reason for reason in found)


def test_choosing_imports_nothing(tmp_path, monkeypatch):
    for name in ("flash_attn", "flash_attn/cute"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for kernel in PACKAGE_KERNELS:
        assert kernel.reasons(asked(capability=(9, 0))) == []
    assert not any(name in sys.modules for name in ("flash_attn", "flash_attn_interface"))


# -- torch's own GPU kernels -------------------------------------------------------------------------------------------


def bound(name, args, options):
    """Arguments of a torch operator by name, bound as its schema says."""
    schema = getattr(torch.ops.aten, name).default._schema
    parameters = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in schema.arguments
    ]
    found = inspect.Signature(parameters).bind(*args, **options)
    found.apply_defaults()
    return found.arguments


def as_package(given, **changes):
    """The same arguments under flash-attn's names."""
    names = {
        "query": "q",
        "key": "k",
        "value": "v",
        "cum_seq_q": "cu_seqlens_q",
        "cum_seq_k": "cu_seqlens_k",
        "max_q": "max_seqlen_q",
        "max_k": "max_seqlen_k",
        "is_causal": "causal",
        "scale": "softmax_scale",
        "grad_out": "dout",
        "grad_out_": "dout",
    }
    return {names.get(name, name): value for name, value in given.items()} | changes


def head_major(given, *names):
    for name in names:
        given[name] = given[name].transpose(1, 2)
    return given


class Operators:
    """Stands in for `torch.ops.aten` where a kernel runs on GPUs only; checks what reaches it."""

    def __init__(self):
        self.calls = []

    def _flash_attention_forward(self, *args, **options):
        given = bound("_flash_attention_forward", args, options)
        self.calls.append(given)
        assert given["dropout_p"] == 0.0
        return (*kernel_forward(as_package(given), torch.inf), None, None, None)

    def _flash_attention_backward(self, *args, **options):
        given = bound("_flash_attention_backward", args, options)
        assert given["rng_state"].dtype == torch.uint64
        return kernel_backward(as_package(given), given["logsumexp"])

    def _scaled_dot_product_cudnn_attention(self, *args, **options):
        given = bound("_scaled_dot_product_cudnn_attention", args, options)
        assert given["compute_log_sumexp"]
        assert given["attn_bias"] is None
        given = head_major(as_package(given), "q", "k", "v")
        out, lse = kernel_forward(given, torch.inf)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **options):
        given = bound("_scaled_dot_product_cudnn_attention_backward", args, options)
        assert given["logsumexp"].shape[-1] == 1
        given = head_major(as_package(given, cu_seqlens_q=None), "q", "k", "v", "out", "dout")
        assert given["max_seqlen_q"] == given["q"].shape[1]
        assert given["max_seqlen_k"] == given["k"].shape[1]
        return [x.transpose(1, 2) for x in kernel_backward(given, given["logsumexp"].squeeze(-1))]

    def _scaled_dot_product_efficient_attention(self, *args, **options):
        given = bound("_scaled_dot_product_efficient_attention", args, options)
        assert given["compute_log_sumexp"]
        given = head_major(as_package(given), "q", "k", "v")
        out, lse = kernel_forward(given, torch.inf)
        return out.transpose(1, 2), torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)

    def _scaled_dot_product_efficient_attention_backward(self, *args, **options):
        given = bound("_scaled_dot_product_efficient_attention_backward", args, options)
        assert given["grad_input_mask"] == [True, True, True, False]
        given = head_major(as_package(given), "q", "k", "v", "out", "dout")
        length = given["q"].shape[1]
        lse = given["logsumexp"]
        assert lse.shape[-1] == -(-length // 32) * 32
        assert (lse[..., length:] == torch.inf).all()
        return [*(x.transpose(1, 2) for x in kernel_backward(given, lse[..., :length].contiguous())), None]


@pytest.fixture
def operators(monkeypatch, only):
    stand_in = Operators()
    monkeypatch.setattr(_flash_kernels, "aten", stand_in)
    for check in ("flash", "efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{check}_attention", lambda params: True)
    monkeypatch.setattr(_flash_kernels, "on_amd", lambda: False)
    return stand_in


@pytest.mark.parametrize("what", CASES)
def test_torch_flash_computes_it(operators, only, what):
    only(FLASH)
    check_against_oracle(contiguous_padding(CASES[what]()), backend="flash")
    assert operators.calls[0]["key"].shape[-2] == 4  # a copy per query head


@pytest.mark.parametrize(
    ("kernel", "variable"),
    [(FLASH, False), (FLASH, True), (CUDNN, False), (EFFICIENT, False)],
    ids=["flash", "flash, variable lengths", "cuDNN", "memory-efficient"],
)
def test_torchs_own_operators_take_what_they_are_given(kernel, variable):
    """The real ones, on tensors without data: schemas, types and shapes."""
    segments = Segments(*(np.zeros(1, np.int64) + n for n in (0, 0, 40, 0, 40)), sizes=(1, 40, 40), right=0)
    assert segments.whole
    q, k = (torch.empty((1, 40, heads, 64), dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    lse = torch.empty((1, 4, 40), device="meta")
    lengths = None
    if variable:
        cu = torch.empty(2, dtype=torch.int32, device="meta")
        lengths = Variable(None, None, cu, cu, 40, 40)
        q, k, lse = q[0], k[0], lse[0]
    x = Operands(q, k, k, 0.125, segments, lengths, False)
    out, found = kernel.forward(x)
    assert out.shape == q.shape
    assert found.shape == lse.shape
    dq, dk, dv = kernel.backward(x, q, q, lse, lse)
    assert dq.shape == q.shape
    assert dk.shape == dv.shape == k.shape


@pytest.mark.parametrize("what", ["full", "causal", "negative scale"])
@pytest.mark.parametrize("kernel", [CUDNN, EFFICIENT], ids=["cuDNN", "memory-efficient"])
def test_torch_dense_kernels_compute_it(operators, only, kernel, what):
    only(kernel)
    check_against_oracle(CASES[what](), backend="flash")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("documents", "has no variable lengths"),
        ("window", "it has no window"),
        ("causal, more keys", "only where queries and keys stand at the same positions"),
    ],
)
def test_torch_dense_kernels_refuse(operators, only, what, reason):
    only(EFFICIENT)
    case = CASES[what]()
    with pytest.raises(ValueError, match=reason):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash", **case.arguments)


def test_torch_is_asked_whether_it_can(operators, only, monkeypatch):
    seen = []

    def can(params):
        seen.append(params)
        return False

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can)
    only(FLASH)
    case = half_case(dense(24))
    with pytest.raises(ValueError, match="torch says that torch's flash kernel cannot run here"):
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend="flash", causal=True)
    assert seen[0].query.shape == (2, 4, 24, 24)
    assert not seen[0].is_causal  # which would mean another alignment


def test_a_plan_with_positions_of_its_own(installed):
    """A shard whose queries start later than its keys: the window moves with them."""
    recorder = installed(FA2, flash_attn_2, "2.8.3")
    layout = dense((10, 30))
    plan = LayoutPlan.build(layout, TokenMask(True, (6, 0)), q_start=25, kv_start=0)
    case = half_case(layout)
    got = block_sparse_attention(case.q, case.k, case.v, plan, backend="flash")
    want = block_sparse_attention(case.q, case.k, case.v, plan, backend="reference")
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-7)
    ((_, given),) = recorder.calls
    # The last query is at 34, the last key at 29: counted from the last key, the window is 5 further to the right.
    assert (given["window_size_left"], given["window_size_right"]) == (1, 5)
    assert not given["causal"]
