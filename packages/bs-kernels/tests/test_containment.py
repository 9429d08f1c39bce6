"""NaN and infinities reach only queries that have an active block containing them; empty rows stay clean."""

import numpy as np
import pytest
import torch

from bs_kernels import block_sparse_attention, explain_backends
from bs_kernels.dispatch import BACKENDS
from bs_kernels.testing import block_entries, evaluate, make_case, make_layout

NAMES = [backend.name for backend in BACKENDS]
BLOCK = 8


def supported(case, name):
    q = case.q.clone().requires_grad_()  # with a backward
    table = explain_backends(q, case.k, case.v, case.layout, **case.arguments)
    return next(report.supported for report in table if report.name == name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("heads", [1, 4])
def test_rubbish_stays_in_its_blocks(name, value, where, heads):
    layout = make_layout(
        np.random.default_rng(1), seq_len=(60, 70), block_size=(BLOCK, BLOCK), heads=heads, density=0.25
    )
    case = make_case(layout, q_heads=4, kv_heads=2, head_dim=16)
    if not supported(case, name):
        pytest.skip(f"{name} cannot run here")
    clean = evaluate(case, block_sparse_attention, backend=name)
    token = 37
    getattr(case, where)[0, token, 0] = value
    got = evaluate(case, block_sparse_attention, backend=name)
    active = (block_entries(layout) >= 0)[0].expand(4, -1, -1)  # [Hq, Sq, Sk]
    in_block = torch.arange(60 if where in ("q", "dout") else 70) // BLOCK == token // BLOCK
    # Key/value head 0 serves query heads 0 and 1; a query token of head 0 only that head.
    hit_heads = torch.tensor([True, where in ("k", "v"), False, False])
    if where in ("k", "v"):
        queries = active[..., in_block].any(-1) & hit_heads[:, None]
    else:
        queries = torch.zeros(4, 60, dtype=torch.bool)
        queries[0, token] = True
    # A key is reached through the blocks of the queries that are.
    blocks = queries.unflatten(1, (-1, BLOCK)) if not 60 % BLOCK else None
    padded = torch.nn.functional.pad(queries, (0, -60 % BLOCK)).unflatten(1, (-1, BLOCK)).any(-1)
    blocks = padded.repeat_interleave(BLOCK, 1)[:, :60]
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


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_beside_rubbish(name):
    layout = make_layout(np.random.default_rng(2), seq_len=(40, 40), block_size=(BLOCK, BLOCK), density=0.3)
    dense = layout.to_dense()
    dense[0, 2] = False
    from bs_patterns import BlockLayout

    layout = BlockLayout.from_dense(dense, block_size=BLOCK, seq_len=40)
    case = make_case(layout, head_dim=16)
    if not supported(case, name):
        pytest.skip(f"{name} cannot run here")
    case.k[:], case.v[:] = torch.nan, torch.inf
    got = evaluate(case, block_sparse_attention, backend=name)
    rows = slice(2 * BLOCK, 3 * BLOCK)
    assert (got["out"][:, rows] == 0).all()
    assert (got["lse"][:, :, rows] == -torch.inf).all()
    assert (got["q"][:, rows] == 0).all()
