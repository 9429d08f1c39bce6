"""What a backend is: the protocol, and the values that it is called with.

Shape legend: B batch, Hq query heads, Hkv key/value heads, Sq, Sk tokens, D head dim, Dv value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..plan import LayoutPlan

__all__ = ["Backend", "Call", "Detailed", "Gradients", "Inspecting", "Needs", "Problem"]


@dataclass(frozen=True)
class Problem:
    """All that a backend may base its refusal on; no tensor data, so it can be asked under tracing.

    Attributes:
        device: "cpu", "cuda", …
        dtype: of q, k and v.
        batch, q_heads, kv_heads, head_dim, value_dim: sizes.
        seq_len: ``(Sq, Sk)`` of the layout.
        block_size: ``(query, key)`` tokens per block.
        layout_heads, layout_batch: H and L of the plan.
        dense_offset: of the plan: None where it is not dense attention under its token mask.
        causal, window: whether the positional mask has these rules.
        key_padding, segments, attn_bias, block_bias, sinks, dropout, paged: which arguments were given. ``attn_bias``
            is None, "bool" or "float".
        attn_bias_grad, block_bias_grad: whether these need gradients.
        backward: whether a gradient will be asked for.
        deterministic: whether the same bits are required from run to run.
    """

    device: str
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    seq_len: tuple[int, int]
    block_size: tuple[int, int]
    layout_heads: int = 1
    layout_batch: int = 1
    dense_offset: int | None = None
    causal: bool = False
    window: bool = False
    key_padding: bool = False
    segments: bool = False
    attn_bias: str | None = None
    block_bias: bool = False
    sinks: bool = False
    dropout: bool = False
    paged: bool = False
    attn_bias_grad: bool = False
    block_bias_grad: bool = False
    backward: bool = False
    deterministic: bool = True


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors of one call, checked: every backend computes the same function of them.

    ``softmax over kept keys j of row i of scale · q_i · k_j + attn_bias_ij + block_bias_(block of ij)``, with one more
    logit ``sinks[h]`` in the denominator. A pair is kept iff its block is in the plan and it passes the positional
    mask, ``key_padding_mask``, equality of segment ids, and a boolean ``attn_bias``.

    Tensors may have any strides except where stated; a backend that wants contiguous inputs copies.

    Attributes:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D], or [pages, block, Hkv, D] with ``page_table``.
        v: [B, Sk, Hkv, Dv], or [pages, block, Hkv, Dv] with ``page_table``.
        plan: on the tensors' device; ``plan.batch`` in {1, B}, ``plan.heads`` in {1, Hq}.
        scale: multiplies q·k.
        key_padding_mask: bool[B, Sk], True = a real token.
        q_segments, kv_segments: int32 [B, Sq] and [B, Sk]; a pair is kept iff they are equal. Both or neither.
        attn_bias: 4-D, each dim 1 or that of [B, Hq, Sq, Sk]; bool (True = attend) or floating.
        block_bias: floating [1 or B, 1 or Hq, layout_nnz]; slot s of the plan reads column ``plan.entries[s]``.
        sinks: floating [Hq].
        page_table: int32[B, KB]; the page of each key block. Entries of blocks that are not active may be anything.
        dropout_p: in [0, 1). Zero means none.
        dropout_seed: int64[] scalar tensor, or None without dropout.
        deterministic: the same bits are required from run to run.
        first_batch, first_head: indices of the first batch element and query head where this call is a piece of a
            larger one. Dropout counts from them; nothing else reads them.
        whole: the call that this one is a piece of, where memory ran out for all of it. What a backend chooses by how
            much work there is it chooses by the whole, so that pieces have the same bits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: LayoutPlan
    scale: float
    key_padding_mask: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    attn_bias: Tensor | None = None
    block_bias: Tensor | None = None
    sinks: Tensor | None = None
    page_table: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    deterministic: bool = True
    first_batch: int = 0
    first_head: int = 0
    whole: Call | None = None

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32: the dtype of LSE and of every sum."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def nothing(self, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and LSE where no query has a key: 0 and −∞."""
        batch, len_q, heads, _ = self.q.shape
        out = self.q.new_zeros((batch, len_q, heads, self.v.shape[3]), dtype=out_dtype)
        return out, self.q.new_full((batch, heads, len_q), float("-inf"), dtype=self.accumulate_dtype)

    def no_gradients(self, grad_dtype: torch.dtype, needs: Needs | None = None) -> Gradients:
        """Gradients where no query has a key: of q, k and v, and of the biases in ``needs``."""
        attn, block = needs or (False, False)
        wide = self.accumulate_dtype
        return Gradients(
            *(_zeros(x, grad_dtype) for x in (self.q, self.k, self.v)),
            attn_bias=_zeros(self.attn_bias, wide) if attn and self.attn_bias is not None else None,
            block_bias=_zeros(self.block_bias, wide) if block and self.block_bias is not None else None,
        )


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)


class Needs(NamedTuple):
    """Which gradients are wanted. q, k and v always come together; the rest cost extra."""

    attn_bias: bool = False
    block_bias: bool = False


class Gradients(NamedTuple):
    """What `Backend.backward` returns.

    Attributes:
        q, k, v: shaped like the inputs, in ``grad_dtype``.
        attn_bias: shaped like the call's, in the accumulation dtype, or None when not needed.
        block_bias: shaped like the call's, in the accumulation dtype, or None when not needed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attn_bias: Tensor | None = None
    block_bias: Tensor | None = None


class Backend(Protocol):
    """One implementation of block-sparse attention."""

    @property
    def name(self) -> str:
        """How users name it."""
        ...

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot compute ``problem``; empty if it can. Each reason is one clause, no full stop."""
        ...

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the output and the log-sum-exp.

        Args:
            call: the inputs. ``call.sinks`` enter the denominator and the LSE.
            out_dtype: dtype of the output (the inputs', or the accumulation dtype for partial results).

        Returns:
            ``out`` [B, Sq, Hq, Dv] contiguous in ``out_dtype`` and ``lse`` [B, Hq, Sq] contiguous in the accumulation
            dtype. A query without keys: 0 and −inf (the sink's logit when there are sinks).
        """
        ...

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """Compute the gradients from a saved LSE.

        With ``P_ij = exp(s_ij − lse_i)`` (0 where lse_i = −inf) and ``dP_ij = keep_ij / (1 − p) · dout_i · v_j``,
        ``dS_ij = P_ij (dP_ij − delta_i)``; the caller has put the gradient that arrives through LSE into ``delta``, and
        computes the gradient of ``sinks`` itself (−Σ exp(sink − lse) · delta), so a backend needs no sinks here.

        Args:
            call: the inputs of the forward.
            dout: [B, Sq, Hq, Dv], any strides, any floating dtype.
            lse: [B, Hq, Sq] contiguous, accumulation dtype; of the whole softmax, which may have more keys than this
                call (rings).
            delta: [B, Hq, Sq] contiguous, accumulation dtype; Σ_d dout · out − d lse.
            needs: which of the optional gradients to compute.
            grad_dtype: dtype of the gradients of q, k and v.

        Returns:
            The gradients.
        """
        ...


@runtime_checkable
class Inspecting(Protocol):
    """A backend whose answer depends on more than the problem: on positions, on segment ids."""

    def refusals(self, call: Call, backward: bool) -> list[str]:
        """Why it cannot compute ``call``, which it says nothing against as a problem; empty if it can.

        Asked of a backend that is about to be taken, with the tensors at hand. It may wait for the device.
        """
        ...


@runtime_checkable
class Detailed(Protocol):
    """A backend that has more to say about how it would compute a problem."""

    def detail(self, problem: Problem) -> str:
        """One line on how ``problem``, which the backend can compute, would run."""
        ...
