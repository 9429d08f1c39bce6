"""A case: inputs of `block_sparse_attention`, the cotangents of its results, and how to evaluate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ..batched import BatchedLayout
from ..plan import LayoutPlan

__all__ = ["Case", "evaluate"]

#: Arguments that a gradient can flow to.
DIFFERENTIABLE = ("attn_bias", "block_bias", "sinks")


@dataclass(frozen=True, eq=False)
class Case:
    """One call of `block_sparse_attention` with what a backward pass needs.

    Attributes:
        q, k, v: the operands; k and v may be pages, with ``page_table`` among the arguments.
        layout: a `BlockLayout` or a `BatchedLayout`.
        arguments: keyword arguments of the call, but for ``backend`` and ``return_lse``.
        dout: [B, Sq, Hq, Dv]; cotangent of the output.
        dlse: [B, Hq, Sq]; cotangent of the LSE, used where it is finite.
        plan: passed instead of the layout where given.
        q_positions, kv_positions: int64[Sq] and [Sk]; absolute positions of the tokens where the plan has its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout | BatchedLayout
    dout: Tensor
    dlse: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)
    plan: LayoutPlan | None = None
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every floating tensor that a gradient can flow to."""
        named = {"q": self.q, "k": self.k, "v": self.v} | {n: self.arguments.get(n) for n in DIFFERENTIABLE}
        return {name: x for name, x in named.items() if isinstance(x, Tensor) and x.is_floating_point()}

    def with_leaves(self, leaves: dict[str, Tensor]) -> Case:
        """The case with other tensors in place of `leaves`."""
        arguments = {name: leaves.get(name, value) for name, value in self.arguments.items()}
        return replace(self, q=leaves["q"], k=leaves["k"], v=leaves["v"], arguments=arguments)

    def __repr__(self) -> str:
        given = {
            name: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else x
            for name, x in self.arguments.items()
        }
        shapes = ", ".join(f"{name}={list(x.shape)}" for name, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return f"Case({shapes}, dtype={self.q.dtype}, layout={self.layout!r}, arguments={given})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would print every element


def evaluate(case: Case, function: Callable[..., tuple[Tensor, Tensor]], **extra: Any) -> dict[str, Tensor]:
    """Run a function forward and backward on a case.

    Args:
        case: the case.
        function: called like `block_sparse_attention` with ``return_lse=True``.
        extra: further keyword arguments, ``backend`` for example.

    Returns:
        "out", "lse" and, under the names of `Case.leaves`, the gradients of ``Σ out · dout + Σ lse · dlse``.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.leaves.items()}
    fresh = case.with_leaves(leaves)
    what = fresh.layout if fresh.plan is None else fresh.plan
    out, lse = function(fresh.q, fresh.k, fresh.v, what, return_lse=True, **fresh.arguments, **extra)
    finite = torch.where(lse.detach() == float("-inf"), 0, lse)
    loss = (out * case.dout.to(out.dtype)).sum() + (finite * case.dlse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach()} | found
