"""Errors that name the argument, what was expected and what came; nothing is ignored."""

import re

import numpy as np
import pytest
import torch

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention, explain_backends, merge_attention
from bs_kernels.dispatch import BACKENDS, get_backend
from bs_kernels.testing import make_layout

LAYOUT = make_layout(np.random.default_rng(0), seq_len=(24, 30), block_size=(8, 8), density=0.6)
CAUSAL = make_layout(np.random.default_rng(0), seq_len=(24, 30), block_size=(8, 8), density=0.6, causal=True)
NNZ = LAYOUT.nnz


def call(**changes):
    arguments = {
        "q": torch.zeros(2, 24, 4, 8),
        "k": torch.zeros(2, 30, 2, 8),
        "v": torch.zeros(2, 30, 2, 8),
        "layout": LAYOUT,
    }
    arguments |= changes
    return block_sparse_attention(**arguments)


BAD = [
    ({"q": np.zeros((2, 24, 4, 8))}, TypeError, "q: expected a tensor, got ndarray"),
    ({"q": torch.zeros(24, 4, 8)}, ValueError, "q: expected [batch, seq, heads, head_dim], got shape [24, 4, 8]"),
    ({"q": torch.zeros(2, 24, 4, 8, dtype=torch.int64)}, TypeError, "q: expected a floating dtype, got torch.int64"),
    ({"q": torch.zeros(2, 24, 4, 8).to(torch.float8_e5m2)}, TypeError, "q: expected float16, bfloat16"),
    ({"k": torch.zeros(2, 30, 2, 8, dtype=torch.float64)}, TypeError, "k: expected torch.float32 (that of q), got"),
    ({"k": torch.zeros(2, 30, 3, 8), "v": torch.zeros(2, 30, 3, 8)}, ValueError, "q: expected a number of heads that"),
    ({"k": torch.zeros(2, 30, 0, 8), "v": torch.zeros(2, 30, 0, 8)}, ValueError, "q: expected a number of heads that"),
    ({"k": torch.zeros(2, 30, 2, 6)}, ValueError, "k: expected head dim 8 (that of q), got 6"),
    ({"k": torch.zeros(1, 30, 2, 8), "v": torch.zeros(1, 30, 2, 8)}, ValueError, "k: expected batch 2"),
    ({"v": torch.zeros(2, 29, 2, 8)}, ValueError, "v: expected the batch, seq, heads of k"),
    ({"k": torch.zeros(2, 30, 2, 8, device="meta")}, ValueError, "k: expected device cpu (that of q), got meta"),
    ({"q": torch.zeros(2, 25, 4, 8)}, ValueError, "layout: expected a query length of 25 (that of q), got 24"),
    ({"k": torch.zeros(2, 31, 2, 8), "v": torch.zeros(2, 31, 2, 8)}, ValueError, "layout: expected a key length of 31"),
    ({"layout": np.ones((3, 4))}, TypeError, "layout: expected a BlockLayout, LayoutPlan or BatchedLayout"),
    (
        {"layout": make_layout(np.random.default_rng(0), seq_len=(24, 30), block_size=(8, 8), heads=3)},
        ValueError,
        "layout: expected 1 or 4 heads",
    ),
    ({"causal": 1}, TypeError, "causal: expected True, False or None, got 1"),
    ({"layout": CAUSAL, "causal": False}, ValueError, "causal: expected True or None for a causal layout, got False"),
    ({"window": 4}, ValueError, "window: expected (left, right) for attention that is not causal, got 4"),
    ({"window": 0, "causal": True}, ValueError, "window: expected at least 1 key"),
    ({"window": (1, 2, 3)}, TypeError, "window: expected (left, right)"),
    ({"window": (1.5, 2)}, TypeError, "window: expected left to be an int or None, got 1.5"),
    ({"window": (1, -3)}, ValueError, "window: expected right ≥ 0, or −1 for unbounded, got -3"),
    ({"window": True}, TypeError, "window: expected"),
    ({"key_padding_mask": torch.zeros(2, 30)}, TypeError, "key_padding_mask: expected bool (True = a real token)"),
    ({"key_padding_mask": torch.ones(2, 24, dtype=torch.bool)}, ValueError, "key_padding_mask: expected [batch, Sk]"),
    ({"key_padding_mask": [[True]]}, TypeError, "key_padding_mask: expected a tensor, got list"),
    ({"segment_ids": torch.zeros(2, 24, dtype=torch.int64)}, ValueError, "segment_ids: expected a (query, key) pair"),
    ({"segment_ids": (torch.zeros(2, 24), torch.zeros(2, 30))}, TypeError, "segment_ids (query): expected an integer"),
    (
        {"segment_ids": (torch.zeros(2, 24).int(), torch.zeros(2, 24).int())},
        ValueError,
        "segment_ids (key): expected [2, 30]",
    ),
    (
        {"segment_ids": (torch.full((2, 24), 2**40), torch.zeros(2, 30).int())},
        ValueError,
        "segment_ids (query): expected ids that fit int32",
    ),
    ({"segment_ids": 3}, TypeError, "segment_ids: expected int[batch, S]"),
    ({"attn_bias": torch.zeros(24, 31)}, ValueError, "attn_bias: expected a shape that broadcasts to [2, 4, 24, 30]"),
    ({"attn_bias": torch.zeros(1, 2, 4, 24, 30)}, ValueError, "attn_bias: expected a shape that broadcasts"),
    ({"attn_bias": torch.zeros(24, 30, dtype=torch.int64)}, TypeError, "attn_bias: expected bool (True = attend)"),
    ({"block_bias": torch.zeros(NNZ + 1)}, ValueError, "block_bias: expected [nnz], [Hq, nnz] or [B, Hq, nnz]"),
    ({"block_bias": torch.zeros(3, NNZ)}, ValueError, "block_bias: expected [nnz]"),
    ({"block_bias": torch.zeros(NNZ).int()}, TypeError, "block_bias: expected a floating dtype"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks: expected one logit per query head, [4], got [2]"),
    ({"sinks": torch.zeros(4).int()}, TypeError, "sinks: expected a floating dtype"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a number in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a number in [0, 1)"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a number in [0, 1)"),
    ({"dropout_seed": 3}, ValueError, "dropout_seed: expected None without dropout, got 3"),
    ({"dropout_p": 0.5, "dropout_seed": 0.5}, TypeError, "dropout_seed: expected an int or an int64 scalar tensor"),
    ({"dropout_p": 0.5, "dropout_seed": 2**64}, ValueError, "dropout_seed: expected 64 bits"),
    ({"dropout_p": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.int64)}, TypeError, "dropout_seed: expected"),
    ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"order": "spiral"}, ValueError, "order: expected one of auto, row"),
    ({"order": 3}, TypeError, "order: expected a name or an int64 array, got int"),
    ({"order": np.zeros(NNZ, np.int64)}, ValueError, "order: expected each of the"),
    ({"deterministic": 1}, TypeError, "deterministic: expected a bool, got 1"),
    ({"return_lse": 1}, TypeError, "return_lse: expected a bool, got 1"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of auto, "),
    ({"backend": None}, TypeError, "backend: expected a string, got NoneType"),
    ({"page_table": torch.zeros(2, 4).int()}, ValueError, "k: expected pages of 8 tokens"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD, ids=[f"{next(iter(b[0]))}-{n}" for n, b in enumerate(BAD)]
)
def test_bad_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"page_table": torch.zeros(2, 4)}, TypeError, "page_table: expected int32 or int64"),
        ({"page_table": torch.zeros(2, 3).int()}, ValueError, "page_table: expected [batch, key blocks] = [2, 4]"),
        (
            {"page_table": torch.full((2, 4), 5).int()},
            ValueError,
            "page_table: expected pages in [0, 5) for active blocks",
        ),
        ({"page_table": [[0]]}, TypeError, "page_table: expected a tensor, got list"),
    ],
    ids=["dtype", "shape", "range", "type"],
)
def test_bad_page_table(changes, error, message):
    pages = torch.zeros(5, 8, 2, 8)
    with pytest.raises(error, match=re.escape(message)):
        call(k=pages, v=pages, **changes)


def test_a_plan_brings_its_own_mask_and_order():
    plan = LayoutPlan.build(LAYOUT, TokenMask(causal=True, window=(5, 0)), order="row")
    call(layout=plan)
    call(layout=plan, causal=True, window=(5, 0), order="row")
    call(layout=plan, window=6)
    for changes, message in (
        ({"causal": False}, "causal: expected None or True (the plan's), got False"),
        ({"window": (4, 0)}, "window: expected None or (5, 0) (the plan's), got (4, 0)"),
        ({"order": "hilbert"}, "order: expected 'auto' or 'row' (the plan's), got 'hilbert'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(layout=plan, **changes)
    with pytest.raises(ValueError, match="layout: expected a plan on cpu"):
        call(layout=plan.to("meta"))


def test_bad_batched_layouts():
    indices, counts = torch.zeros(3, 1, 3, 2, dtype=torch.int64), torch.ones(3, 1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="layout: expected batch 1 or 2"):
        call(layout=BatchedLayout(indices, counts, 8, (24, 30)))
    fits = BatchedLayout(indices[:2], counts[:2], 8, (24, 30))
    call(layout=fits)
    with pytest.raises(ValueError, match="block_bias: expected the indices' shape"):
        call(layout=fits, block_bias=torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="order: expected 'auto' or 'longest_first' for a BatchedLayout"):
        call(layout=fits, order="hilbert")
    with pytest.raises(ValueError, match="each key block once"):
        call(layout=BatchedLayout(indices[:2], counts[:2] * 2, 8, (24, 30)))


class Refusing:
    name = "refusing"

    def not_supported_reasons(self, problem):
        return ["it refuses everything", "always"]


def test_an_explicit_backend_never_falls_back(monkeypatch):
    from bs_kernels import dispatch

    monkeypatch.setitem(dispatch._BY_NAME, "refusing", Refusing())
    with pytest.raises(ValueError, match="'refusing' cannot compute this: it refuses everything; always"):
        call(backend="refusing")


def test_auto_skips_what_cannot(monkeypatch):
    from bs_kernels import dispatch

    monkeypatch.setattr(dispatch, "BACKENDS", (Refusing(), get_backend("reference")))
    dispatch.select.cache_clear()
    try:
        table = explain_backends(torch.zeros(2, 24, 4, 8), torch.zeros(2, 30, 2, 8), torch.zeros(2, 30, 2, 8), LAYOUT)
        assert table.selected == "reference"
        assert table[0].reasons == ("it refuses everything", "always")
        assert not table[0].supported
        assert "refusing   cannot: it refuses everything; always" in str(table)
    finally:
        dispatch.select.cache_clear()


def test_explain_backends_lists_all():
    table = explain_backends(torch.zeros(2, 24, 4, 8), torch.zeros(2, 30, 2, 8), torch.zeros(2, 30, 2, 8), LAYOUT)
    assert [report.name for report in table][: len(BACKENDS)] == [backend.name for backend in BACKENDS]
    assert sum(report.selected for report in table) == 1
    assert {"native", "torch", "reference", "triton", "flex", "flash"} <= {report.name for report in table}
    with pytest.raises(ValueError, match="layout: expected a query length"):
        explain_backends(torch.zeros(2, 25, 4, 8), torch.zeros(2, 30, 2, 8), torch.zeros(2, 30, 2, 8), LAYOUT)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, "parts: expected at least one"),
        (torch.zeros(2), TypeError, "parts: expected a sequence"),
        ([torch.zeros(2)], TypeError, "parts[0]: expected a pair of tensors"),
        ([(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2))], ValueError, "parts[0]: expected floating out [B, S, H, D]"),
        ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))], ValueError, "parts[0]: expected lse of shape [1, 3, 2]"),
        (
            [(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)), (torch.zeros(1, 2, 3, 5), torch.zeros(1, 3, 2))],
            ValueError,
            "parts[1]: expected out of shape [1, 2, 3, 4], got [1, 2, 3, 5]",
        ),
    ],
    ids=["none", "tensor", "no pair", "rank", "lse", "shapes"],
)
def test_bad_merges(parts, error, message):
    with pytest.raises(error, match=re.escape(message)):
        merge_attention(parts)
