"""The `flash` backend: dense flash-attention kernels, for layouts that are dense per segment.

On a GPU the first that can of FlashAttention 3 (Hopper), FlashAttention 4 (Hopper, Blackwell), FlashAttention 2, and,
inside torch, cuDNN (Hopper and newer), flash and memory-efficient; on a CPU torch's kernel. `_flash_segments` says what
"dense per segment" is, `_flash_kernels` and `_flash_packages` hold the kernels.

Their backward takes the output to compute ``Σ_d dout · out``; a backward here is given that number (with the gradient
that arrives through the LSE in it) and no output. So operands get two more columns: zeros in q, k and v, (1, 1) in
dout, and in the place of the output (δ rounded, δ − δ rounded). Then ``Σ_d dout · out`` is δ, and nothing else changes.
FlashAttention 4 takes the gradient of the LSE, so there −δ goes in its place and the output is zero.

Sinks join after the kernel: they scale the output and enter the LSE, and the backward starts from that LSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .._identities import join_sinks
from ..hardware import nvidia_capability
from ._flash_kernels import TORCH_KERNELS, Asked, Kernel, Operands
from ._flash_packages import PACKAGE_KERNELS
from ._flash_rubbish import contained_backward, contained_forward
from ._flash_segments import Segments, Variable, find_segments
from .base import Call, Gradients, Needs, Problem

__all__ = ["FlashBackend"]

_EXTRA = 2
_NEG_INF, _POS_INF = float("-inf"), float("inf")


class FlashBackend:
    """Dense attention, segment by segment, through flash-attn or torch's own kernels."""

    name = "flash"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        if problem.device not in TORCH_KERNELS:
            return [f"it runs on CPUs and on CUDA and ROCm GPUs, not on {problem.device}"]
        refused = {
            "attn_bias": problem.attn_bias is not None,
            "block_bias": problem.block_bias,
            "dropout by position": problem.dropout,
            "paged K/V": problem.paged,
        }
        reasons = [f"it has no {what}" for what, asked in refused.items() if asked]
        width = max(problem.head_dim, problem.value_dim)
        for backward in (False, True) if problem.backward else (False,):
            able, why = _able(_asked(problem.device, problem.dtype, width, backward, problem.deterministic))
            if not able:
                return reasons + [reason for reason in why if reason not in reasons]
        return reasons

    def refusals(self, call: Call, backward: bool) -> list[str]:
        """See `Inspecting.refusals`."""
        found = find_segments(call)
        if isinstance(found, str):
            return [found]
        if call.q.numel() == 0 or not found.batch.size:
            return []
        return [why for late in ((False, True) if backward else (False,)) for why in _Run(call, found, late).refused]

    def detail(self, problem: Problem) -> str:
        """See `Detailed.detail`."""
        width = max(problem.head_dim, problem.value_dim)
        asked = _asked(problem.device, problem.dtype, width, problem.backward, problem.deterministic)
        return ", else ".join(kernel.name for kernel in _able(asked)[0])

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        segments, value_dim = _segments(call), call.v.shape[3]
        if call.q.numel() == 0 or not segments.batch.size:
            out, lse = call.nothing(out_dtype)
        else:
            run = _Run(call, segments, backward=False)
            out, lse = contained_forward(run.kernel, run.operands)
            out, lse = run.of_queries(out)[..., :value_dim], run.lse_of_queries(lse).to(call.accumulate_dtype)
            if run.empty is not None:
                out = out.masked_fill(run.empty[:, :, None, None], 0)
                lse = lse.masked_fill(run.empty[:, None], _NEG_INF)
        if call.sinks is not None:
            out, lse = join_sinks(out, lse, call.sinks)
        return out.to(out_dtype).contiguous(), lse.contiguous()

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        segments = _segments(call)
        if call.q.numel() == 0 or not segments.batch.size:
            return call.no_gradients(grad_dtype)
        run = _Run(call, segments, backward=True)
        value_dim = call.v.shape[3]
        do = run.queries(_widened(dout.to(call.q.dtype), run.width, run.kernel.multiple))
        lse, delta = run.rows(lse.masked_fill(lse == _NEG_INF, _POS_INF)), run.rows(delta)
        out = torch.zeros_like(do)
        if not run.kernel.takes_delta:
            by_row = delta.transpose(-1, -2)
            rounded = by_row.to(do.dtype)
            do[..., run.width - _EXTRA :] = 1
            out[..., run.width - 2] = rounded
            out[..., run.width - 1] = (by_row - rounded.to(delta.dtype)).to(do.dtype)
        dq, dk, dv = contained_backward(run.kernel, run.operands, do, out, lse, delta)
        dq = run.of_queries(dq)[..., : call.q.shape[3]]
        if run.empty is not None:
            dq = dq.masked_fill(run.empty[:, :, None, None], 0)
        return Gradients(
            (dq * _sign(call)).to(grad_dtype).contiguous(),
            run.of_keys(dk)[..., : call.k.shape[3]].to(grad_dtype).contiguous(),
            run.of_keys(dv)[..., :value_dim].to(grad_dtype).contiguous(),
        )


def _asked(device: str, dtype: torch.dtype, width: int, backward: bool, deterministic: bool) -> Asked:
    return Asked(device, dtype, width, backward, deterministic, nvidia_capability() if device == "cuda" else None)


@lru_cache(maxsize=256)
def _able(asked: Asked) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """The kernels that say nothing against this kind of call, in their order, and what the others say."""
    kernels = (*PACKAGE_KERNELS, *TORCH_KERNELS[asked.device]) if asked.device == "cuda" else TORCH_KERNELS["cpu"]
    answers = [(kernel, kernel.reasons(asked)) for kernel in kernels]
    installed = [reason for _, reasons in answers for reason in reasons if not reason.endswith("is not installed")]
    return tuple(kernel for kernel, reasons in answers if not reasons), tuple(installed)


def _segments(call: Call) -> Segments:
    found = find_segments(call)
    if isinstance(found, str):
        raise ValueError(f"backend: 'flash' cannot compute this: {found}")
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    """One forward or backward of a call: the kernel that computes it, and its operands."""

    call: Call
    segments: Segments
    backward: bool

    @cached_property
    def _chosen(self) -> tuple[Kernel | None, list[str]]:
        call = self.call
        width = max(call.q.shape[3], call.v.shape[3])
        asked = _asked(call.q.device.type, call.q.dtype, width, self.backward, call.deterministic)
        kernels, reasons = _able(asked)
        refused = list(reasons)
        for kernel in kernels:
            width = self._width(kernel)
            q, k = (x.new_empty(width).expand(*x.shape[:3], width) for x in (call.q, call.k))
            why = kernel.refuses(Operands(q, k, k, 1.0, self.segments, None, call.deterministic))
            if not why:
                return kernel, []
            refused += why
        return None, refused

    @property
    def refused(self) -> list[str]:
        """Why no kernel can compute this; empty if one can."""
        return self._chosen[1]

    @property
    def kernel(self) -> Kernel:
        """The kernel."""
        if self._chosen[0] is None:
            raise ValueError(f"backend: 'flash' cannot compute this: {'; '.join(self.refused)}")
        return self._chosen[0]

    @property
    def width(self) -> int:
        """Columns of the operands."""
        return self._width(self.kernel)

    def _width(self, kernel: Kernel) -> int:
        extra = _EXTRA if self.backward and not kernel.takes_delta else 0
        return -(-(max(self.call.q.shape[3], self.call.v.shape[3]) + extra) // kernel.multiple) * kernel.multiple

    @cached_property
    def variable(self) -> Variable | None:
        """The segments on the device, or None where every batch element is one."""
        return None if self.segments.whole else self.segments.on(self.call.q.device)

    @cached_property
    def empty(self) -> Tensor | None:
        """bool[B, Sq]; queries without keys, or None."""
        found = self.segments.without_keys
        return None if found is None else found.to(self.call.q.device)

    @cached_property
    def operands(self) -> Operands:
        """q, k and v as the kernel takes them: of one width, of one batch where lengths vary."""
        call = self.call
        # The kernels mask before they scale: a scale that is not positive would turn −∞ around. Its sign goes into q.
        q = call.q if call.scale > 0 else call.q * _sign(call)
        q, k, v = (_widened(x.detach(), self.width, self.kernel.multiple) for x in (q, call.k, call.v))
        scale = abs(call.scale) or 1.0
        return Operands(
            self.queries(q), self._keys(k), self._keys(v), scale, self.segments, self.variable, call.deterministic
        )

    # -- between [B, S, heads, X] and what kernels take ----------------------------------------------------------------

    def queries(self, x: Tensor) -> Tensor:
        """Rows of queries in the order of segments."""
        return x if self.variable is None else _picked(x.flatten(0, 1), self.variable.q_index)

    def _keys(self, x: Tensor) -> Tensor:
        return x if self.variable is None else _picked(x.flatten(0, 1), self.variable.k_index)

    def rows(self, x: Tensor) -> Tensor:
        """[B, Hq, Sq] as the kernel takes an LSE."""
        if self.variable is None:
            return x.contiguous()
        return _picked(x.transpose(1, 2).flatten(0, 1), self.variable.q_index).T.contiguous()

    def of_queries(self, x: Tensor) -> Tensor:
        """The reverse of `queries`; rows in no segment are zero."""
        return x if self.variable is None else _placed(x, self.variable.q_index, self.call.q.shape[:2])

    def of_keys(self, x: Tensor) -> Tensor:
        """The reverse for keys."""
        return x if self.variable is None else _placed(x, self.variable.k_index, self.call.k.shape[:2])

    def lse_of_queries(self, x: Tensor) -> Tensor:
        """The reverse of `rows`."""
        if self.variable is None:
            return x
        return _placed(x.T, self.variable.q_index, self.call.q.shape[:2]).transpose(1, 2)


def _widened(x: Tensor, width: int, multiple: int) -> Tensor:
    """``x`` with columns of zeros up to ``width``, laid out as kernels read it: ``multiple`` elements at a time."""
    x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
    steps = (*x.stride()[:-1], x.storage_offset())
    readable = x.stride(-1) == 1 and all(step % multiple == 0 for step in steps)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _picked(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _placed(x: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    if index is not None:
        x = x.new_zeros((shape.numel(), *x.shape[1:])).index_copy_(0, index, x)
    return x.unflatten(0, tuple(shape))


def _sign(call: Call) -> int:
    return (call.scale > 0) - (call.scale < 0)
