"""The tolerance rule: at most twice the error of a dense computation in the same dtype, plus a rounding band.

Both are computed from the data of the case. The band covers what any order of summation may do: per element,

    u_out · |oracle|  +  (u_op + √n · u_acc · (1 + S)) · M

with the unit roundoffs of the result, of the products' operands and of the sums, n the length of the longest sum, S the
largest sum of absolute values behind a score (an error of a score is a relative error of a probability) and M the
result's own sum of absolute values (`magnitudes`). u_op enters without S: it rounds probabilities, not scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..api import block_sparse_attention
from .case import Case, evaluate
from .oracle import dense_results, magnitudes, oracle_results

__all__ = ["assert_close_to_oracle", "check_against_oracle", "rounding_band"]


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def rounding_band(case: Case, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """The band of every result, elementwise, in float64."""
    accumulate = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    sums = magnitudes(case)
    scores = 1 + float(sums.pop("scores"))
    n = max(*case.layout.seq_len, case.q.shape[3], case.v.shape[3], 1) * max(case.q.shape[0], 1) * case.q.shape[2]
    dtypes = {name: x.dtype for name, x in case.leaves.items()} | {"out": case.q.dtype, "lse": accumulate}
    band = {}
    for name, size in sums.items():
        relative = math.sqrt(n) * _unit(accumulate) * scores
        if name != "lse":
            relative += _unit(case.q.dtype)
        finite = torch.nan_to_num(oracle[name].double(), posinf=0, neginf=0)
        smallest = torch.finfo(dtypes[name]).smallest_normal
        band[name] = _unit(dtypes[name]) * finite.abs() + relative * size + smallest
    return band


def assert_close_to_oracle(case: Case, got: dict[str, Tensor]) -> None:
    """Check results of a case against the float64 oracle under the tolerance rule.

    Args:
        case: the case.
        got: results by name, from `evaluate`; any subset of them.

    Raises:
        AssertionError: a result is off, has another shape, or is infinite or NaN where the oracle is not (or the other
            way round); says which, by how much and where.
    """
    oracle, dense = oracle_results(case), dense_results(case)
    band = rounding_band(case, oracle)
    for name, actual in got.items():
        want = oracle[name]
        assert actual.shape == want.shape, f"{name}: expected shape {list(want.shape)}, got {list(actual.shape)}"
        if not want.numel():
            continue
        actual = actual.double().cpu()
        same_infinities = torch.equal(actual.isinf(), want.isinf()) and torch.equal(actual.isnan(), want.isnan())
        assert same_infinities, f"{name}: infinities or NaNs where the oracle has none, or the other way round: {case}"
        finite = want.isfinite()
        error = torch.where(finite, (actual - want).abs(), 0)
        yardstick = torch.where(finite, (dense[name].double() - want).abs(), 0).max()
        excess = error - (2 * yardstick + band[name])
        worst = int(excess.argmax())
        assert float(excess.flatten()[worst]) <= 0, (
            f"{name}: off by {float(error.flatten()[worst]):.3g} at flat index {worst} (oracle "
            f"{float(want.flatten()[worst]):.6g}); a dense computation is off by {float(yardstick):.3g} and the "
            f"rounding band is {float(band[name].flatten()[worst]):.3g}: {case}"
        )


def check_against_oracle(case: Case, function: Callable[..., Any] | None = None, **extra: Any) -> dict[str, Tensor]:
    """Evaluate a function (default: `block_sparse_attention`) on a case and check every result; returns the results."""
    got = evaluate(case, block_sparse_attention if function is None else function, **extra)
    assert_close_to_oracle(case, got)
    return got
