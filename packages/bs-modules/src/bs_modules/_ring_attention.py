"""Attention over a ring as one differentiable function: a partial kernel per arrival, merged in fp32, rounded once.

Shape legend: B batch, S own tokens, T tokens of an arrival, N tokens of the whole sequence, H heads, D and E head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bs_comm import Arrival, PackedRing, RingPeerError
from bs_kernels import attention_delta, partial_backward, partial_forward
from bs_kernels.partial import PartialGradients

from ._head_exchange import AmongAll
from ._ring_session import OpenRing, RingSession

NEG_INF = float("-inf")


@dataclass(frozen=True)
class RingCall:
    """One call of a distributed module, but for the tensors that gradients flow to.

    Attributes:
        session: Of the group.
        open_ring: For the shapes of the call.
        key_padding: bool[B, N], True = a real token; or None.
        q_segments: int[B, S]; or None.
        kv_segments: int[B, N]; or None.
        scale: Multiplies the scores; None is D ** −0.5.
        dropout_p: Probability with which a probability is dropped.
        dropout_seed: The same on every rank; None without dropout.
        order: Of tiles.
        deterministic: Whether the backward gives the same bits every time.
        backend: Of the kernels.
        keep_kv: Keep what came in for the backward pass.
        among: Where the heads are a share of all, and their numbers count; else None.
    """

    session: RingSession
    open_ring: OpenRing
    key_padding: Tensor | None
    q_segments: Tensor | None
    kv_segments: Tensor | None
    scale: float | None
    dropout_p: float
    dropout_seed: int | None
    order: str
    deterministic: bool
    backend: str
    keep_kv: bool
    among: AmongAll | None

    def ring(self) -> PackedRing:
        """The ring; opened again if others have taken its place since."""
        return self.session.ring(*self.open_ring.key).ring

    def sent(self, x: Tensor) -> Tensor:
        """Own keys or values as the ring moves them."""
        return x

    def came(self, x: Tensor) -> Tensor:
        """Undoes `sent`: keys, values or gradients ``[B, T, H, ·]`` from what the ring moves."""
        return x

    def part(self, arrival: Arrival, block_bias: Tensor | None) -> tuple[Any, dict[str, Any]]:
        """(kernel plan, keyword arguments that depend on the layout) of the partial kernels for an arrival."""
        del block_bias  # there is none where the layout is known without the input
        return self.open_ring.kernel_plan(arrival, self.order, self.among), {}

    def _with_bias(
        self, arrival: Arrival, bias: Tensor | None, block_bias: Tensor | None
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """(kernel plan, all keyword arguments); ``bias`` covers all N keys."""
        plan, arguments = self.part(arrival, block_bias)
        arguments |= self.arguments(arrival)
        if bias is not None:
            one_for_all = bias.shape[-1] == 1
            arguments["attn_bias"] = bias if one_for_all else bias[..., self.open_ring.columns(arrival)]
        return plan, arguments

    def attend(
        self, q: Tensor, arrival: Arrival, bias: Tensor | None, block_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the own queries over an arrival."""
        plan, arguments = self._with_bias(arrival, bias, block_bias)
        operands = q, self.came(arrival.k), self.came(arrival.v)
        if self.among is not None:
            return self.among.forward(*operands, plan, arguments)
        return partial_forward(*operands, plan, **arguments)

    def differentiate(
        self,
        given: tuple[Tensor, Tensor, Tensor],
        q: Tensor,
        arrival: Arrival,
        bias: Tensor | None,
        block_bias: Tensor | None,
    ) -> PartialGradients:
        """Gradients through an arrival; ``given`` are those of the output, delta, and the merged LSE."""
        plan, arguments = self._with_bias(arrival, bias, block_bias)
        operands = *given, q, self.came(arrival.k), self.came(arrival.v)
        if self.among is not None:
            return self.among.backward(*operands, plan, arguments)
        return partial_backward(*operands, plan, **arguments)

    def add_block_bias(self, total: Tensor, arrival: Arrival, share: Tensor) -> None:
        """Add an arrival's share of the gradient of ``block_bias``."""
        raise NotImplementedError

    def arguments(self, arrival: Arrival) -> dict[str, Any]:
        """Keyword arguments of any attention over an arrival, but for a bias."""
        arguments: dict[str, Any] = {"deterministic": self.deterministic, "backend": self.backend}
        if self.scale is not None:
            arguments["scale"] = self.scale
        if self.dropout_p:
            arguments |= {"dropout_p": self.dropout_p, "dropout_seed": self.dropout_seed}
        if self.key_padding is not None:
            arguments["key_padding_mask"] = self.key_padding[:, self.open_ring.columns(arrival)]
        if self.q_segments is not None and self.kv_segments is not None:
            arguments["segment_ids"] = (self.q_segments, self.kv_segments[:, self.open_ring.columns(arrival)])
        return arguments


class RingAttention(torch.autograd.Function):
    """(out ``[B, S, Hq, E]`` in the dtype of q, lse ``[B, Hq, S]``) of this rank's queries over every rank's keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, block_bias: Tensor | None, call: RingCall
    ) -> Any:
        """Merge the parts as they arrive."""
        merged: list[Tensor] = []

        def merge(arrival: Arrival) -> None:
            add_part(merged, *call.attend(q, arrival, bias, block_bias))

        keep = call.keep_kv and any(ctx.needs_input_grad)
        with reported(call.session):
            ctx.kept = call.ring().forward(call.sent(k), call.sent(v), merge, keep=keep)
        if not merged:
            wide = torch.promote_types(q.dtype, torch.float32)
            merged = [
                q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide),
                q.new_full((q.shape[0], q.shape[2], q.shape[1]), NEG_INF, dtype=wide),
            ]
        out, lse = merged[0].to(q.dtype), merged[1]
        ctx.save_for_backward(q, k, v, bias, block_bias, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Differentiate part by part against the merged LSE; dK and dV go home to their owners."""
        q, k, v, bias, block_bias, out, lse = ctx.saved_tensors
        call: RingCall = ctx.call
        # A rank whose loss ignores the output still has shares of the others' gradients to compute: none of its own.
        dout = torch.zeros_like(out) if dout is None else dout
        delta = attention_delta(dout, out, lse, dlse)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dbias = None
        if bias is not None and bias.is_floating_point() and ctx.needs_input_grad[3]:
            dbias = torch.zeros(bias.shape, dtype=lse.dtype, device=bias.device)
        dblock = None if block_bias is None else torch.zeros(block_bias.shape, dtype=lse.dtype, device=q.device)

        def differentiate(arrival: Arrival) -> tuple[Tensor, Tensor]:
            got = call.differentiate((dout, delta, lse), q, arrival, bias, block_bias)
            dq.add_(got.q)
            if dblock is not None and got.block_bias is not None:
                call.add_block_bias(dblock, arrival, got.block_bias)
            if dbias is not None and got.attn_bias is not None:
                if dbias.shape[-1] == 1:
                    dbias.add_(got.attn_bias)
                else:
                    dbias.index_add_(-1, call.open_ring.columns(arrival), got.attn_bias.to(dbias.dtype))
            return call.sent(got.k), call.sent(got.v)

        with reported(call.session):
            home = call.ring().backward(call.sent(k), call.sent(v), differentiate, kept=ctx.kept)
        dk, dv = (call.came(x) for x in home)
        grad_bias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        grad_block = None if dblock is None or block_bias is None else dblock.to(block_bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), grad_bias, grad_block, None


class reported:
    """Tell the group of a failure, so that nobody waits for this rank in the next call."""

    def __init__(self, session: RingSession) -> None:
        self._session = session

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RingPeerError):
            self._session.failed(error)
        elif error is not None:
            mine = f"{type(error).__name__} on this rank: {error}"[:300]
            self._session.failed(RingPeerError(self._session.rank, 0, 0, "forward", mine))


class passed_on:
    """Tell the groups of a mesh of a failure met in one of them, each in its own numbers."""

    def __init__(self, *sessions: RingSession) -> None:
        self._sessions = sessions

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RingPeerError):
            for session in self._sessions:
                if session.failure is None:
                    mine = f"this rank met a failure in another group of the mesh: {error}"[:300]
                    session.failed(RingPeerError(session.rank, 0, 0, error.phase, mine))


def add_part(merged: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Add a part to the running result, in place: ``l = logaddexp(l₁, l₂)``, ``o = Σ exp(l_i − l) o_i``."""
    if not merged:
        merged[:] = [out, lse]
        return
    so_far, so_far_lse = merged
    total = torch.logaddexp(so_far_lse, lse)
    # −inf − (−inf) is NaN, and a weight of nothing is 0.
    finite = total.masked_fill(total == NEG_INF, 0)
    so_far.mul_((so_far_lse - finite).exp_().transpose(1, 2)[..., None])
    so_far.addcmul_(out, (lse - finite).exp_().transpose(1, 2)[..., None])
    merged[1] = total
