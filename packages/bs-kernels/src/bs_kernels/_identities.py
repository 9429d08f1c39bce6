"""What follows from a saved output and LSE, whatever backend made them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._plain import is_plain
from .backends.native import native_delta

__all__ = ["attention_delta", "join_sinks", "sinks_gradient"]

_NEG_INF = float("-inf")


def attention_delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None) -> Tensor:
    """``Σ_d dout · out − dlse``: what a backward pass subtracts from every dP of a query.

    Args:
        dout, out: [B, S, H, Dv]; gradient of the output, and the output.
        lse: [B, H, S]; of the whole softmax.
        dlse: [B, H, S]; gradient that arrives through the LSE, or None.

    Returns:
        [B, H, S] in the dtype of ``lse``; 0 for queries without keys.

    Source:
        Dao, Fu, Ermon, Rudra, Ré, "FlashAttention", 2022, with ∂lse/∂s = P added.
    """
    tensors = [x for x in (dout, out, lse, dlse) if x is not None]
    if is_plain(tensors) and (delta := native_delta(dout, out, lse, dlse)) is not None:
        return delta
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse.to(lse.dtype)
    return delta.masked_fill(lse == _NEG_INF, 0)


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sink logits.

    Args:
        sinks: [H].
        lse: [B, H, S]; of the whole softmax, sinks included.
        delta: [B, H, S]; from `attention_delta`.

    Returns:
        [H] in the dtype of ``sinks``: −Σ exp(sink − lse) · delta.
    """
    weight = (sinks.to(lse.dtype).view(1, -1, 1) - lse.masked_fill(lse == _NEG_INF, 0)).exp()
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let sink logits into a softmax that was computed without them.

    Args:
        out: [B, S, H, Dv].
        lse: [B, H, S].
        sinks: [H].

    Returns:
        The output, scaled by what the keys keep of the denominator, in the dtype of ``lse``; and the whole LSE.
    """
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.where(lse == _NEG_INF, 0.0, torch.exp(lse - whole))
    return out.to(lse.dtype) * share.transpose(1, 2).unsqueeze(-1), whole
