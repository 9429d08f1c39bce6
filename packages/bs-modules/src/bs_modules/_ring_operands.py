"""The tensors of one distributed call, what ranks tell each other of them, and a share of the heads.

Shape legend: B batch, S own query tokens, T own key tokens, N key tokens of the whole sequence, H heads, D head dim.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ._gate_noise import draw_seed
from .adaptive import BlockSparseAdaptive

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: What ranks may differ in.
_OWN = ("query tokens", "key tokens", "gate seed", "dropout seed")


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
        given: (q, k) before they were rounded to the dtype of the arithmetic, which is what a gate reads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None
    q_segments: Tensor | None
    kv_segments: Tensor | None
    bias: Tensor | None
    given: tuple[Tensor, Tensor]

    def words(
        self,
        is_causal: bool,
        dropout: float,
        gate: BlockSparseAdaptive | None,
        seeds: tuple[int, int] | None,
        is_new: bool,
    ) -> tuple[dict[str, int], list[str]]:
        """What this rank tells the others, and which of it must be alike.

        Args:
            is_causal: As in ``forward``.
            dropout: Probability.
            gate: That picks the blocks, if one does.
            seeds: (of a gate, of dropout) where they are agreed already; None draws them.
            is_new: Whether the gate's parameters were made for this call.
        """
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
            "gate": 0 if gate is None else _gate_word(gate, self.given),
            "gate is new": int(is_new),
            "dropout": struct.unpack("<q", struct.pack("<d", dropout))[0],
            **_seeds(gate is not None and gate.training, dropout > 0, q.device, seeds),
        }
        return words, [name for name in words if name not in _OWN]

    def bias_word(self) -> int:
        """A number that ranks share only if their biases, of four dimensions, are of one kind."""
        bias = self.bias
        if bias is None:
            return 0
        kind = [bias.dtype == torch.bool, bias.element_size(), bias.requires_grad and torch.is_grad_enabled()]
        kind += [bias.shape[0], bias.shape[1], bias.shape[3]]
        return _number(kind)


def _seeds(
    of_gate: bool, of_dropout: bool, device: torch.device, known: tuple[int, int] | None
) -> dict[str, int]:  # fmt: skip
    # Drawn as one process draws them, so that a seed of torch gives the same noise and drops at any world size.
    drawn = known or [int(draw_seed(device)) if wanted else 0 for wanted in (of_gate, of_dropout)]
    return dict(zip(("gate seed", "dropout seed"), drawn, strict=True))


def _gate_word(gate: BlockSparseAdaptive, given: tuple[Tensor, Tensor]) -> int:
    """A number that ranks share only if their gates are made and used alike; weights play no part."""
    grad = torch.is_grad_enabled()
    learns = [grad and x.requires_grad for x in (*given, *gate.scorer.parameters(), gate.log_temperature)]
    kind = [gate.sparse_config.to_dict(), gate.segment_lengths, gate.dilation_rates, type(gate.candidates).__name__]
    kind += [x.dtype for x in given] + [gate.training, len(gate._selections), learns]
    return _number(kind)


def _number(kind: list[Any]) -> int:
    return int.from_bytes(hashlib.sha256(repr(kind).encode()).digest()[:7], "little")


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
