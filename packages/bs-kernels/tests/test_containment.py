"""NaN and infinities reach only queries that have an active block containing them; empty rows stay clean."""

import numpy as np
import pytest
import torch

from bs_kernels import block_sparse_attention, explain_backends
from bs_kernels.dispatch import BACKENDS
from bs_kernels.testing import block_entries, evaluate, make_case, make_layout
from bs_patterns import BlockLayout

BLOCK = 8


def sparse(heads=1, **options):
    layout = make_layout(
        np.random.default_rng(1), seq_len=(60, 70), block_size=(BLOCK, BLOCK), heads=heads, density=0.25
    )
    return make_case(layout, q_heads=4, kv_heads=2, head_dim=16, **options)


def dense():
    """Causal, for kernels that know nothing of blocks: what is masked is in the same tile as what is not."""
    layout = make_layout(np.random.default_rng(1), seq_len=(60, 60), block_size=(BLOCK, BLOCK), density=2.0)
    return make_case(layout, q_heads=4, kv_heads=2, head_dim=16, causal=True)


CASES = {"one layout": sparse, "a layout per head": lambda: sparse(heads=4), "dense and causal": dense}


def can_run(case, name):
    q = case.q.clone().requires_grad_()  # with a backward
    table = explain_backends(q, case.k, case.v, case.layout, **case.arguments)
    return next(report.supported for report in table if report.name == name)


#: What can run here; backends for other devices have their own tests.
RUNS = [(name, what) for name in (b.name for b in BACKENDS) for what, make in CASES.items() if can_run(make(), name)]


def test_every_kind_of_case_runs_somewhere():
    assert {what for _, what in RUNS} == set(CASES)
    assert {"torch", "reference", "flash"} <= {name for name, _ in RUNS}


@pytest.mark.parametrize(("name", "what"), RUNS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_rubbish_stays_in_its_blocks(name, what, value, where):
    case = CASES[what]()
    layout, (len_q, len_k) = case.layout, case.layout.seq_len
    clean = evaluate(case, block_sparse_attention, backend=name)
    token = 37
    getattr(case, where)[0, token, 0] = value
    got = evaluate(case, block_sparse_attention, backend=name)
    active = (block_entries(layout) >= 0)[0].expand(4, -1, -1)  # [Hq, Sq, Sk]
    if case.arguments.get("causal"):
        blocks = torch.arange(len_k) // BLOCK <= torch.arange(len_q)[:, None] // BLOCK
        active = active & blocks
    in_block = torch.arange(len_q if where in ("q", "dout") else len_k) // BLOCK == token // BLOCK
    # Key/value head 0 serves query heads 0 and 1; a query token of head 0 only that head.
    hit_heads = torch.tensor([True, where in ("k", "v"), False, False])
    if where in ("k", "v"):
        queries = active[..., in_block].any(-1) & hit_heads[:, None]
    else:
        queries = torch.zeros(4, len_q, dtype=torch.bool)
        queries[0, token] = True
    # A key is reached through the blocks of the queries that are.
    padded = torch.nn.functional.pad(queries, (0, -len_q % BLOCK)).unflatten(1, (-1, BLOCK)).any(-1)
    blocks = padded.repeat_interleave(BLOCK, 1)[:, :len_q]
    keys = (active & blocks[..., None]).any(1).unflatten(0, (2, 2)).any(1)  # [Hkv, Sk]
    untouched = {
        "out": ~queries.T[None],
        "lse": ~queries[None],
        "q": ~queries.T[None],
        "k": ~keys.T[None],
        "v": ~keys.T[None],
    }
    for key, safe in untouched.items():
        safe = safe.expand(got[key].shape[: safe.ndim])
        assert torch.equal(got[key][safe], clean[key][safe]), key


def with_an_empty_row():
    layout = make_layout(np.random.default_rng(2), seq_len=(40, 40), block_size=(BLOCK, BLOCK), density=0.3)
    blocks = layout.to_dense()
    blocks[0, 2] = False
    return make_case(BlockLayout.from_dense(blocks, block_size=BLOCK, seq_len=40), head_dim=16)


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if can_run(with_an_empty_row(), b.name)])
def test_empty_rows_beside_rubbish(name):
    case = with_an_empty_row()
    case.k[:], case.v[:] = torch.nan, torch.inf
    got = evaluate(case, block_sparse_attention, backend=name)
    rows = slice(2 * BLOCK, 3 * BLOCK)
    assert (got["out"][:, rows] == 0).all()
    assert (got["lse"][:, :, rows] == -torch.inf).all()
    assert (got["q"][:, rows] == 0).all()
