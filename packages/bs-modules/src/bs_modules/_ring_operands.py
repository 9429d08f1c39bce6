"""The tensors of one distributed call, what ranks tell each other of them, and a share of the heads.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads, D head dim.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from bs_patterns import BlockLayout

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: What ranks may differ in.
_OWN = ("query tokens", "key tokens", "dropout seed")


@dataclass(frozen=True)
class Operands:
    """What a rank brings to a call.

    Attributes:
        q: ``[B, S, H, D]``.
        k: ``[B, T, G, D]``.
        v: ``[B, T, G, E]``.
        key_padding: bool[B, T], or None.
        q_segments: int[B, S], or None.
        kv_segments: int[B, T], or None.
        bias: Broadcastable to ``[B, H, S, N]``, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None
    q_segments: Tensor | None
    kv_segments: Tensor | None
    bias: Tensor | None

    def words(self, is_causal: bool, dropout: float) -> tuple[dict[str, int], list[str]]:
        """What this rank tells the others, and which of it must be alike."""
        q, k, v = self.q, self.k, self.v
        ids = self.kv_segments
        words = {
            "query tokens": q.shape[1],
            "key tokens": k.shape[1],
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": k.shape[3],
            "value_dim": v.shape[3],
            "dtype": _DTYPES.index(q.dtype),
            "is_causal": int(is_causal),
            "key_padding_mask": int(self.key_padding is not None),
            "segment_ids": 0 if ids is None else ids.element_size(),
            "gradients": int(torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))),
            "dropout": struct.unpack("<q", struct.pack("<d", dropout))[0],
            # Drawn as one process draws it, so that a seed of torch gives the same drops at any world size.
            "dropout seed": int(torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)) if dropout else 0,
        }
        return words, [name for name in words if name not in _OWN]


def share_of_heads(layout: BlockLayout, rank: int, ranks: int) -> BlockLayout:
    """The layout of the rank-th of as many equal runs of heads."""
    if ranks == 1 or layout.heads == 1:
        return layout
    first, stop = (layout.heads * r // ranks for r in (rank, rank + 1))
    indptr = layout.indptr[first:stop]
    begin, end = int(indptr[0, 0]), int(indptr[-1, -1])
    return BlockLayout(
        layout.block_size, layout.seq_len, indptr - begin, layout.indices[begin:end], layout.causal
    )  # fmt: skip
