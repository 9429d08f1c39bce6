"""Keeping NaN and infinities where they belong, around kernels that multiply masked values by a weight of zero.

A dense kernel works on tiles. In a tile that the band cuts, a masked key has weight 0, and 0 · NaN reaches every query
of the tile, before the key as well as after it. So rubbish is taken out of what a kernel is given, and the rows that
the band lets it reach are set to NaN in what it gives back. Without a band every query of a segment sees every key, and
nothing has to be done; on a CPU nothing is done either where there is no rubbish.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ._flash_kernels import Kernel, Operands

__all__ = ["contained_backward", "contained_forward"]

_NAN, _POS_INF = float("nan"), float("inf")


def contained_forward(kernel: Kernel, x: Operands) -> tuple[Tensor, Tensor]:
    """`Kernel.forward`, rubbish in k and v reaching no query but those that attend to it."""
    if not x.segments.banded or _all_finite(x.k, x.v):
        return kernel.forward(x)
    in_k, in_v = _rubbish(x.k), _rubbish(x.v)
    out, lse = kernel.forward(replace(x, k=_clean(x.k), v=_clean(x.v)))
    by_k, by_either = (_rows_reached(x, bad) for bad in (in_k, in_k | in_v))
    return out.masked_fill(by_either.unsqueeze(-1), _NAN), lse.masked_fill(by_k.transpose(-1, -2), _NAN)


def contained_backward(
    kernel: Kernel, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernel.backward`, likewise: rubbish in a query's row reaches its own keys only."""
    if not x.segments.banded or (_all_finite(x.q, x.k, x.v, dout, delta) and not bool(lse.isnan().any())):
        return kernel.backward(x, dout, out, lse, delta)
    by_row = (lse.isnan() | ~delta.isfinite()).transpose(-1, -2)
    bad_rows = _rubbish(x.q) | _rubbish(dout) | by_row | _rows_reached(x, _rubbish(x.k) | _rubbish(x.v))
    rows = bad_rows.transpose(-1, -2)
    dq, dk, dv = kernel.backward(
        replace(x, q=_clean(x.q), k=_clean(x.k), v=_clean(x.v)),
        _clean(dout),
        _clean(out),
        lse.masked_fill(rows, _POS_INF).contiguous(),
        delta.masked_fill(rows, 0.0).contiguous(),
    )
    keys = _keys_reached(x, bad_rows).unsqueeze(-1)
    return dq.masked_fill(bad_rows.unsqueeze(-1), _NAN), dk.masked_fill(keys, _NAN), dv.masked_fill(keys, _NAN)


def _all_finite(*tensors: Tensor) -> bool:
    """Whether there is no rubbish, where looking costs no synchronisation."""
    return tensors[0].device.type == "cpu" and all(bool(x.isfinite().all()) for x in tensors)


def _rubbish(x: Tensor) -> Tensor:
    """bool[…, tokens, heads]; rows with a value that is not finite."""
    return ~x.isfinite().all(-1)


def _clean(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _rows_reached(x: Operands, bad: Tensor) -> Tensor:
    """bool[…, queries, Hq]; queries that attend to a key which is ``bad`` [..., keys, Hkv]."""
    return _any_between(bad, *x.segments.key_ranges).repeat_interleave(x.group, -1)


def _keys_reached(x: Operands, bad: Tensor) -> Tensor:
    """bool[…, keys, Hkv]; keys that a query attends to which is ``bad`` [..., queries, Hq]."""
    return _any_between(bad.unflatten(-1, (-1, x.group)).any(-1), *x.segments.query_ranges)


def _any_between(bad: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """Whether any of ``bad[…, first[n] : stop[n], :]`` is set, for every n."""
    counted = F.pad(bad.to(torch.int32).cumsum(-2), (0, 0, 1, 0))
    first, stop = first.to(bad.device), stop.to(bad.device)
    return counted.index_select(-2, stop) > counted.index_select(-2, first)
