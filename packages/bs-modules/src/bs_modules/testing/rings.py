"""Modules over the ranks of `bs_comm.testing.RankPool`: inputs of a whole sequence, one step, cases for the oracle.

Needs hypothesis, as `bs_kernels.testing` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bs_comm import Placement
from bs_kernels.testing import Case
from bs_patterns import BlockLayout

from ..attention import BlockSparseAttention
from ..distributed import BlockSparseRingDistributedDilatedAttention


class GivenLayout(BlockSparseAttention):
    """Attends to a layout that was made elsewhere."""

    def __init__(self, layout: BlockLayout, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.given = layout

    def layout(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """The one given, whose lengths are the only ones it knows."""
        assert seq_len in (self.given.seq_len, self.given.seq_len[0])
        return self.given.as_causal() if is_causal and not self.given.causal else self.given


def whole_tensors(
    tokens: int = 203, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """(q, k, v, dout) of two whole sequences, the same on every rank."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, tokens, h, dim, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def one_step(module: Any, tensors: list[Tensor], **arguments: Any) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of a forward and a backward."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = module(*leaves, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))


def dropout_seed_of(number: int) -> int:
    """The dropout seed that a module draws after ``torch.manual_seed(number)``."""
    torch.manual_seed(number)
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def run_case(
    rank: int,
    world: int,
    case: Case,
    place: Placement,
    kv_place: Placement,
    number: int,
    config: dict[str, Any],
    mesh: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """This rank's share of a case's results; with a mesh, ranks of a row share heads.

    Args:
        rank: This rank.
        world: Ranks.
        case: Of `bs_kernels.testing`.
        place: Of the queries.
        kv_place: Of the keys.
        number: Seeds torch before the call.
        config: Of the module.
        mesh: Its shape; None for a ring.

    Returns:
        Own (out, lse, dq, dk, dv) and, with a float ``attn_bias``, its gradient.
    """
    a = case.arguments
    native = case.q.dtype != torch.float64
    assert isinstance(case.layout, BlockLayout)
    inside = GivenLayout(
        case.layout, dropout=a.get("dropout_p", 0.0), scale=a.get("scale"), order=a.get("order", "auto"),
        backend="native" if native else "auto",
    )  # fmt: skip
    group = None if mesh is None else init_device_mesh("cpu", mesh)
    module = BlockSparseRingDistributedDilatedAttention(attention=inside, distributed_config=config, group=group)
    first, column, columns = (rank, 0, 1) if mesh is None else (rank // mesh[1], rank % mesh[1], mesh[1])

    def cut(place: Placement, x: Tensor, dim: int = 1) -> Tensor:
        return place.shard(x, first, dim=dim).tensor_split(columns, dim)[column]

    operands = ((place, case.q), (kv_place, case.k), (kv_place, case.v))
    leaves = [cut(p, x).clone().requires_grad_() for p, x in operands]
    masks: dict[str, Any] = {}
    if "key_padding_mask" in a:
        masks["key_padding_mask"] = cut(kv_place, a["key_padding_mask"])
    if "segment_ids" in a:
        masks["segment_ids"] = tuple(cut(p, x) for p, x in zip((place, kv_place), a["segment_ids"], strict=True))
    if "attn_bias" in a:
        bias = a["attn_bias"]
        bias = cut(place, bias, 2).clone() if bias.shape[2] > 1 else bias.clone()
        masks["attn_bias"] = bias.requires_grad_(bias.is_floating_point())
        leaves += [bias] if bias.is_floating_point() else []
    torch.manual_seed(number + rank)  # the first rank's counts
    out, lse = module(*leaves[:3], bool(a.get("causal") or case.layout.causal), **masks, return_lse=True)
    dout, dlse = cut(place, case.dout), cut(place, case.dlse, 2)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(lse.detach() == -math.inf, 0, lse) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def joined_case(case: Case, place: Placement, kv_place: Placement, results: list[Any]) -> dict[str, Tensor]:
    """Results of the whole sequence from those of `run_case` on all ranks of a ring."""
    parts = list(zip(*results, strict=True))
    sides = (("out", place, 1), ("lse", place, 2), ("q", place, 1), ("k", kv_place, 1), ("v", kv_place, 1))
    got = {name: p.unshard(list(parts[i]), dim=dim) for i, (name, p, dim) in enumerate(sides)}
    if len(parts) > 5:
        is_cut = case.arguments["attn_bias"].shape[2] > 1
        got["attn_bias"] = place.unshard(list(parts[5]), dim=2) if is_cut else sum(parts[5])
    return got
