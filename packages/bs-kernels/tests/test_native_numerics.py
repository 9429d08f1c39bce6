"""The native backend against dense attention in double precision: forward and gradients, on every instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bs_kernels import LayoutPlan, TokenMask
from bs_kernels.backends import _native_lib
from bs_kernels.backends.base import Call, Needs
from bs_kernels.backends.native import NativeBackend
from bs_kernels.backends.reference import ReferenceBackend
from bs_kernels.testing import check_against_oracle, make_batched_layout, make_case
from bs_patterns import BlockLayout

pytestmark = pytest.mark.skipif(_native_lib.missing_reason() is not None, reason="the native core is not built")

ISA = () if _native_lib.missing_reason() else _native_lib.load().supported
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN_MASK = TokenMask()
NATIVE, REFERENCE = NativeBackend(), ReferenceBackend()


@dataclass(frozen=True)
class Case:
    """One problem, small enough for a dense oracle; `call` makes its tensors in a dtype."""

    batch: int
    kv_heads: int
    group: int
    seq_len: tuple[int, int]
    dims: tuple[int, int]
    block_size: tuple[int, int]
    density: float
    per_head: bool = False
    mask: TokenMask = PLAIN_MASK
    padding: bool = False
    segments: bool = False
    sinks: bool = False
    block_bias: tuple[bool, bool] | None = None  # per batch element, per head
    attn_bias: tuple[str, tuple[bool, bool, bool, bool]] | None = None  # bool or float, and which dims do not broadcast
    dropout: float = 0.0
    pages: str = ""  # "own": every block its page, "shared": several blocks read one
    logits: float = 1.0
    seed: int = 0

    def call(self, dtype: torch.dtype) -> Call:
        rng, draw = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        heads, (q_len, kv_len), (dim, v_dim) = self.kv_heads * self.group, self.seq_len, self.dims
        blocks = tuple(-(-length // size) for length, size in zip(self.seq_len, self.block_size, strict=True))
        active = rng.random((heads if self.per_head else 1, *blocks)) < self.density
        layout = BlockLayout.from_dense(active, block_size=self.block_size, seq_len=self.seq_len)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=draw) * scale).to(dtype)

        def ids(length: int) -> Tensor:
            return torch.randint(0, 3, (self.batch, length), generator=draw).sort(1).values.to(torch.int32)

        call = Call(
            q=normal(self.batch, q_len, heads, dim, scale=self.logits),
            k=normal(self.batch, kv_len, self.kv_heads, dim),
            v=normal(self.batch, kv_len, self.kv_heads, v_dim),
            plan=LayoutPlan.build(layout, self.mask),
            scale=dim**-0.5,
            key_padding_mask=torch.rand(self.batch, kv_len, generator=draw) < 0.8 if self.padding else None,
            q_segments=ids(q_len) if self.segments else None,
            kv_segments=ids(kv_len) if self.segments else None,
            sinks=torch.randn(heads, generator=draw) if self.sinks else None,
            block_bias=self._bias(int(layout.nnz), draw),
            attn_bias=self._attn_bias(draw),
            dropout_p=self.dropout,
            dropout_seed=torch.tensor(self.seed * 0x9E3779B97F4A7C15 % 2**63 - 2**62) if self.dropout else None,
            first_batch=self.seed % 3,
            first_head=self.seed % 5,
        )
        return paged(call, rng, shared=self.pages == "shared") if self.pages else call

    def _attn_bias(self, draw: torch.Generator) -> Tensor | None:
        if self.attn_bias is None:
            return None
        kind, whole = self.attn_bias
        sizes = (self.batch, self.kv_heads * self.group, *self.seq_len)
        bias = torch.randn(*(n if keep else 1 for n, keep in zip(sizes, whole, strict=True)), generator=draw)
        return bias > -0.5 if kind == "bool" else bias

    def _bias(self, entries: int, draw: torch.Generator) -> Tensor | None:
        if self.block_bias is None:
            return None
        batch, heads = self.block_bias
        return torch.randn(
            self.batch if batch else 1, self.kv_heads * self.group if heads else 1, entries, generator=draw
        )


def paged(call: Call, rng: np.random.Generator, *, shared: bool) -> Call:
    """The same call on random pages, some unread, with rubbish in the table where nothing is active."""
    plan, block = call.plan, call.plan.block_size[1]
    blocks = call.q.shape[0] * plan.kv_blocks
    pages = max(1, blocks // 2 if shared else blocks + 2)
    table = rng.integers(0, pages, blocks) if shared else rng.permutation(pages)[:blocks]
    table = torch.from_numpy(table.reshape(call.q.shape[0], plan.kv_blocks)).to(torch.int32)
    active = (plan.col_end > plan.col_begin).any(1).expand(table.shape)
    draw = torch.Generator().manual_seed(int(rng.integers(2**31)))
    pools = (torch.randn(pages, block, *x.shape[2:], generator=draw).to(x.dtype) for x in (call.k, call.v))
    k, v = pools
    return replace(call, k=k, v=v, page_table=table.where(active, 10**6))


def token_pages(call: Call) -> tuple[Tensor, Tensor]:
    """Page and offset of every key, 0 where nothing reads it."""
    assert call.page_table is not None
    block = torch.arange(call.plan.seq_len[1]) // call.plan.block_size[1]
    page = call.page_table.to(torch.int64)[:, block]
    offset = torch.arange(call.plan.seq_len[1]) % call.plan.block_size[1]
    return page.where(page < call.k.shape[0], 0), offset.expand(page.shape)


def without_pages(call: Call) -> Call:
    if call.page_table is None:
        return call
    where = token_pages(call)
    return replace(call, k=call.k[where], v=call.v[where], page_table=None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    causal = draw(st.booleans())
    window = draw(st.none() | st.tuples(st.integers(0, 60), st.just(0) if causal else st.integers(0, 60)))
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        seq_len=(draw(st.integers(1, 200)), draw(st.integers(1, 260))),
        dims=(draw(st.integers(1, 130)), draw(st.integers(1, 130))),
        block_size=(draw(st.integers(1, 200)), draw(st.integers(16, 512))),
        density=draw(st.sampled_from((0.0, 0.2, 0.6, 1.0))),
        per_head=draw(st.booleans()),
        mask=TokenMask(causal, window),
        padding=draw(st.booleans()),
        segments=draw(st.booleans()),
        sinks=draw(st.booleans()),
        attn_bias=draw(st.none() | st.tuples(st.sampled_from(("bool", "float")), st.tuples(*[st.booleans()] * 4))),
        block_bias=draw(st.none() | st.tuples(st.booleans(), st.booleans())),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.1, 0.7))),
        pages=draw(st.sampled_from(("", "", "own", "shared"))),
        logits=draw(st.sampled_from((1.0, 1.0, 30.0))),
        seed=draw(st.integers(0, 2**16)),
    )


def doubled(call: Call) -> Call:
    sinks = None if call.sinks is None else call.sinks.double()
    bias = None if call.block_bias is None else call.block_bias.double()
    attn_bias = call.attn_bias
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        attn_bias = attn_bias.double()
    return replace(
        call, q=call.q.double(), k=call.k.double(), v=call.v.double(), sinks=sinks, block_bias=bias, attn_bias=attn_bias
    )


def backward_inputs(call: Call, dout: Tensor) -> tuple[Tensor, Tensor]:
    """LSE and delta in double precision, with a gradient through LSE in delta."""
    out, lse = REFERENCE.forward(doubled(call), torch.float64)
    dlse = torch.linspace(-1, 1, lse.numel()).view(lse.shape)
    return lse, ((dout.double() * out).sum(-1).transpose(1, 2) - dlse).masked_fill(lse == -torch.inf, 0).contiguous()


class Dense:
    """Dense attention that rounds its probabilities and their gradients to the inputs' dtype, as dense kernels do.

    Attributes:
        values: out, dq, dk, dv.
        sizes: of each, the largest sum of the absolute values of its terms: what rounding terms is relative to.
        sums: the same with |dS| before its two parts cancel: what the errors of sums are relative to.
        bias_sizes: the same for the gradients of attn_bias and of block_bias (bounded by the sum over all pairs).
    """

    def __init__(self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor) -> None:
        exact, group, dtype = doubled(without_pages(call)), call.q.shape[2] // call.k.shape[2], call.q.dtype
        heads = (exact.q, *(x.repeat_interleave(group, 2) for x in (exact.k, exact.v)), dout.double())
        q, k, v, do = (x.transpose(1, 2) for x in heads)
        # Attention over one-hot values is the matrix of probabilities.
        unit = torch.eye(call.plan.seq_len[1], dtype=torch.float64)[None, :, None].expand(*exact.k.shape[:3], -1)
        one_hot = replace(exact, v=unit)
        dropped = REFERENCE.forward(one_hot, torch.float64)[0].transpose(1, 2)
        p = REFERENCE.forward(replace(one_hot, dropout_p=0.0), torch.float64)[0].transpose(1, 2)
        dp = do @ v.mT
        ds = (dropped * dp - p * delta[..., None]) * call.scale
        size = dropped * (do.abs() @ v.abs().mT) + p * delta.abs()[..., None]
        self.bias_sizes = {"block_bias": size.sum().item()}
        if call.attn_bias is not None:
            self.bias_sizes["attn_bias"] = size.sum_to_size(call.attn_bias.shape).max().item()

        def gradients(p: Tensor, ds: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
            of_keys = (x.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for x in (ds.mT @ q, p.mT @ do))
            return [x.transpose(1, 2) for x in (p @ v, ds @ k)] + [to_pages(x, call) for x in of_keys]

        self.values = gradients(dropped.to(dtype).double(), ds.to(dtype).double(), q, k, v, do)
        self.sizes, self.sums = (
            [x.max().item() if x.numel() else 0.0 for x in gradients(*(x.abs() for x in (dropped, of, q, k, v, do)))]
            for of in (ds, size * call.scale)
        )


def to_pages(gradient: Tensor, call: Call) -> Tensor:
    """[B, Sk, Hkv, X] summed into the pages of a call."""
    if call.page_table is None:
        return gradient
    pages = gradient.new_zeros(*call.k.shape[:3], gradient.shape[-1])
    return pages.index_put_(token_pages(call), gradient, accumulate=True)


def check(name: str, got: Tensor, dense: Tensor, exact: Tensor, band: float) -> None:
    """Error ≤ 2 × that of the dense computation, plus a band for rounding."""
    if exact.numel() == 0:
        return
    worst = (got.double() - exact).abs().max().item()
    limit = 2 * (dense.double() - exact).abs().max().item() + band
    assert worst <= limit, f"{name}: error {worst:.3g}, limit {limit:.3g}"


def run_and_check(case: Case, dtype: torch.dtype, isas: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.call(dtype)
    exact_out, exact_lse = REFERENCE.forward(doubled(call), torch.float64)
    dout = torch.randn(exact_out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    lse, delta = backward_inputs(call, dout)
    float_bias = call.attn_bias is not None and call.attn_bias.dtype != torch.bool
    needs = Needs(attn_bias=float_bias, block_bias=call.block_bias is not None)
    exact = REFERENCE.backward(doubled(call), dout, lse, delta, needs, torch.float64)
    dense = Dense(call, dout, lse, delta)

    empty = exact_lse == -torch.inf
    logit = exact_lse[~empty].abs().max().item() if not empty.all() else 0.0
    # A score near `logit` is known to eps · logit in the accumulation dtype: the relative error of its probability.
    known = 8 * torch.finfo(torch.float32).eps * (4 + logit)
    unit = known + torch.finfo(dtype).eps / 2
    bands = [
        torch.finfo(dtype).eps / 2 * size + known * (1 + of) for size, of in zip(dense.sizes, dense.sums, strict=True)
    ]
    for isa in isas:
        monkeypatch.setenv("BS_KERNELS_ISA", isa)
        out, got_lse = NATIVE.forward(call, torch.float32)
        got = NATIVE.backward(call, dout, lse.float(), delta.float(), needs, torch.float32)
        assert torch.equal(got_lse == -torch.inf, empty)
        check("lse", got_lse[~empty], exact_lse[~empty], exact_lse[~empty], known)
        names = ("out", "dq", "dk", "dv")
        for name, *values in zip(names, (out, *got[:3]), dense.values, (exact_out, *exact[:3]), bands, strict=True):
            check(name, *values)
        for name in ("attn_bias", "block_bias"):
            # Sums of dS, not single elements: their size is that of everything that reaches them.
            if getattr(needs, name):
                gradient, wanted = getattr(got, name), getattr(exact, name)
                assert gradient.shape == getattr(call, name).shape
                check(f"d{name}", gradient, wanted, wanted, unit * dense.bias_sizes[name] + known)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("isa", ISA)
def test_agrees_with_the_oracle(isa: str, dtype: torch.dtype) -> None:
    @given(cases())
    def holds(case: Case) -> None:
        with pytest.MonkeyPatch.context() as patch:
            run_and_check(case, dtype, (isa,), patch)

    holds()


PLAIN = Case(batch=2, kv_heads=2, group=2, seq_len=(150, 170), dims=(64, 48), block_size=(64, 64), density=0.6)
EDGES = {
    "one token": replace(PLAIN, seq_len=(1, 1), density=1.0),
    "decode": replace(PLAIN, seq_len=(1, 400), block_size=(1, 64), mask=TokenMask(causal=True)),
    "one block": replace(PLAIN, seq_len=(512, 512), block_size=(512, 512), density=1.0, batch=1, group=1),
    "nothing active": replace(PLAIN, density=0.0),
    "nothing active, sinks": replace(PLAIN, density=0.0, sinks=True),
    "small key blocks": replace(PLAIN, block_size=(16, 16)),
    "odd key blocks": replace(PLAIN, block_size=(7, 17), mask=TokenMask(causal=True)),
    "single queries": replace(PLAIN, block_size=(1, 32), seq_len=(40, 170)),
    "head dim 1": replace(PLAIN, dims=(1, 1)),
    "head dim 256": replace(PLAIN, dims=(256, 250), batch=1),
    "odd dims": replace(PLAIN, dims=(37, 19)),
    "causal": replace(PLAIN, mask=TokenMask(causal=True), density=1.0),
    "queries before every key": replace(PLAIN, seq_len=(170, 60), mask=TokenMask(causal=True), density=1.0),
    "narrow window": replace(PLAIN, mask=TokenMask(window=(0, 0)), density=1.0),
    "causal window": replace(PLAIN, mask=TokenMask(causal=True, window=(30, 0)), density=1.0, block_size=(48, 80)),
    "padding": replace(PLAIN, padding=True),
    "packed documents": replace(PLAIN, segments=True, mask=TokenMask(causal=True), seq_len=(170, 170), density=1.0),
    "per head": replace(PLAIN, per_head=True),
    "block bias": replace(PLAIN, block_bias=(True, True), per_head=True),
    "shared block bias": replace(PLAIN, block_bias=(False, False), sinks=True, mask=TokenMask(causal=True)),
    "mask of pairs": replace(PLAIN, attn_bias=("bool", (True, True, True, True))),
    "bias of keys": replace(PLAIN, attn_bias=("float", (False, False, False, True)), mask=TokenMask(causal=True)),
    "logits of 1e4": replace(PLAIN, logits=1e4),
    "dropout": replace(PLAIN, dropout=0.3),
    "dropout of a causal window": replace(
        PLAIN, dropout=0.5, mask=TokenMask(causal=True, window=(30, 0)), density=1.0, block_size=(48, 80), sinks=True
    ),
    "dropout of nothing": replace(PLAIN, dropout=1e-12),
    "dropout of nearly all": replace(PLAIN, dropout=0.999),
    "dropout, odd keys": replace(PLAIN, dropout=0.2, block_size=(7, 17), per_head=True),
    "one key a query": Case(
        1, 1, 1, (159, 22), (3, 52), (1, 16), 0.2, mask=TokenMask(causal=True, window=(0, 0)), dropout=0.7, seed=207
    ),
    "pages": replace(PLAIN, pages="own", padding=True),
    "shared pages": replace(PLAIN, pages="shared", per_head=True, density=0.3),
    "shared pages, causal": replace(PLAIN, pages="shared", mask=TokenMask(causal=True), block_size=(16, 16)),
    "shared pages, dropout and biases": replace(
        PLAIN,
        pages="shared",
        dropout=0.2,
        block_bias=(True, True),
        attn_bias=("float", (False, True, True, True)),
        segments=True,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run_and_check(EDGES[name], dtype, ISA, monkeypatch)


@pytest.mark.parametrize("whole", list(product((False, True), repeat=4)), ids=str)
def test_gradient_of_every_broadcast_of_a_bias(
    whole: tuple[bool, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PLAIN, attn_bias=("float", whole), seq_len=(45, 91), dims=(16, 12), density=0.7)
    cases = (
        replace(small, mask=TokenMask(causal=True), block_size=(64, 32)),
        replace(small, dropout=0.4, pages="shared", block_size=(9, 33), per_head=True),
    )
    for case, dtype in product(cases, DTYPES):
        run_and_check(case, dtype, ISA, monkeypatch)


def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The split and the stretch of the core's calls from now on, to be set."""
    run, chosen = _native_lib.NativeCore.run, [0, 0]

    def run_chosen(self: _native_lib.NativeCore, name: str, args: _native_lib.CoreCall) -> None:
        args.split, args.stretch = chosen
        run(self, name, args)

    monkeypatch.setattr(_native_lib.NativeCore, "run", run_chosen)
    return chosen


BITS = {
    "plain": {},
    "dropout": {"dropout": 0.3, "block_bias": (True, True)},
    "bias of pairs": {"attn_bias": ("float", (False, False, True, True))},
    "bias of keys": {"attn_bias": ("float", (True, False, False, True)), "pages": "own"},
    "one bias": {"attn_bias": ("float", (False, False, False, False)), "pages": "shared"},
}


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("more", BITS.values(), ids=BITS)
def test_bits_do_not_depend_on_threads_split_or_stretch(
    more: dict[str, Any], isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BS_KERNELS_ISA", isa)
    size = (333, 401) if not more else (75, 140)
    case = replace(PLAIN, seq_len=size, dims=(48, 40), per_head=True, padding=True, sinks=True, group=3, **more)
    call = case.call(dtype)
    dout = torch.randn(*call.q.shape[:3], 40).to(dtype)
    lse, delta = (x.float() for x in backward_inputs(call, dout))
    needs = Needs(attn_bias=call.attn_bias is not None, block_bias=call.block_bias is not None)
    walk = walks(monkeypatch)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for walk[:] in ((0, 0), (1, 1), (1, 150), (2, 0)):
                gradients = NATIVE.backward(call, dout, lse, delta, needs, torch.float32)
                results.append((*NATIVE.forward(call, dtype), *(x for x in gradients if x is not None)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_rows_out_of_order_are_walked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that does not list its keys in order cannot be cut into stretches of keys; asked for, it is not."""
    call = replace(PLAIN, batch=1, seq_len=(80, 144), density=0.6, block_size=(16, 16)).call(torch.float32)
    active = np.random.default_rng(0).random((5, 9)) < 0.6
    layout = BlockLayout.from_dense(active, block_size=16, seq_len=(80, 144))
    call = replace(call, plan=LayoutPlan.build(layout, order=np.random.default_rng(0).permutation(layout.nnz)))
    dout = torch.randn(*call.q.shape[:3], call.v.shape[-1])
    walk = walks(monkeypatch)
    walk[:] = 1, 0
    lse, delta = (x.float() for x in backward_inputs(call, dout))
    whole = NATIVE.backward(call, dout, lse, delta, Needs(), torch.float32)[:3]
    walk[:] = 1, 1
    for a, b in zip(whole, NATIVE.backward(call, dout, lse, delta, Needs(), torch.float32)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nonfinite_inputs_stay_in_their_blocks(
    isa: str, where: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BS_KERNELS_ISA", isa)
    for dtype in DTYPES:
        call = replace(PLAIN, density=0.4, batch=1).call(dtype)
        clean, _ = NATIVE.forward(call, torch.float32)
        tensor = getattr(call, where).clone()
        tensor[0, 70, 0] = bad
        got, _ = NATIVE.forward(replace(call, **{where: tensor}), torch.float32)
        if where == "q":
            reached = torch.zeros(150, dtype=torch.bool)
            reached[70] = True
        else:
            reached = torch.tensor([1 in call.plan.indices[begin:end] for begin, end in rows_of(call.plan)])
            reached = reached.repeat_interleave(64)[:150]
        assert torch.equal(got[0, ~reached, :2], clean[0, ~reached, :2])
        assert torch.equal(got[0, :, 2:], clean[0, :, 2:])
        if bad != bad:
            assert got[0, reached, 0].isnan().all() == reached.any()


def rows_of(plan: LayoutPlan) -> list[tuple[int, int]]:
    return list(zip(plan.row_begin[0, 0].tolist(), plan.row_end[0, 0].tolist(), strict=True))


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_strided_inputs_are_read_in_place(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BS_KERNELS_ISA", isa)
    call = PLAIN.call(dtype)
    out, lse = NATIVE.forward(call, dtype)
    dout = torch.randn_like(out)
    delta = torch.randn_like(lse)
    grads = NATIVE.backward(call, dout, lse, delta, Needs(), dtype)
    heads_first = replace(call, **{n: getattr(call, n).transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"})
    dims_strided = replace(call, **{n: getattr(call, n).transpose(1, 3).contiguous().transpose(1, 3) for n in "qkv"})
    cut = replace(call, **{n: torch.cat([getattr(call, n)] * 2, -1)[..., : getattr(call, n).shape[-1]] for n in "qkv"})
    for other in (heads_first, dims_strided, cut):
        again = NATIVE.forward(other, dtype)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
        for a, b in zip(NATIVE.backward(other, dout, lse, delta, Needs(), dtype)[:3], grads[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISA)
def test_paged_keys(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BS_KERNELS_ISA", isa)
    for dtype in DTYPES:
        call = PLAIN.call(dtype)
        batch, length, heads = call.k.shape[:3]
        blocks = -(-length // 64)
        table = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(0))[: batch * blocks]
        table = table.view(batch, blocks).to(torch.int32)
        paged = {}
        for name in ("k", "v"):
            flat = getattr(call, name)
            pages = torch.full((batch * blocks + 3, 64, heads, flat.shape[-1]), torch.nan, dtype=dtype)
            for b in range(batch):
                for j in range(blocks):
                    rows = flat[b, 64 * j : 64 * (j + 1)]
                    pages[table[b, j], : rows.shape[0]] = rows
            paged[name] = pages
        got = NATIVE.forward(replace(call, **paged, page_table=table), dtype)
        for a, b in zip(got, NATIVE.forward(call, dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pages", ["", "own"], ids=["plain", "paged"])
def test_empty_batch(pages: str) -> None:
    call = replace(PLAIN, pages=pages).call(torch.float32)
    layout = make_batched_layout(np.random.default_rng(0), batch=0, seq_len=PLAIN.seq_len, block_size=PLAIN.block_size)
    batched = ("q", "page_table") if pages else ("q", "k", "v")
    none = replace(call, plan=LayoutPlan.build(layout), **{name: getattr(call, name)[:0] for name in batched})
    out, lse = NATIVE.forward(none, torch.float32)
    assert out.shape[0] == lse.shape[0] == 0
    grads = NATIVE.backward(none, out, lse, lse, Needs(), torch.float32)
    assert [g.shape for g in grads[:3]] == [none.q.shape, none.k.shape, none.v.shape]


@pytest.mark.parametrize("isa", ISA)
def test_long_sums_of_equal_terms(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding one number to a running sum again and again always rounds the same way: errors do not cancel."""
    monkeypatch.setenv("BS_KERNELS_ISA", isa)
    layout = BlockLayout.from_dense(np.ones((1, 1, 256), bool), block_size=64, seq_len=(1, 16384))
    case = make_case(layout, q_heads=1, head_dim=4)
    for x, value in ((case.q, 0.7), (case.k, 0.0), (case.v, 1.3), (case.dout, 0.7)):
        x.fill_(value)
    case.k[:, 0] = 1.1  # so that no other probability is a power of two
    check_against_oracle(case, backend="native")
