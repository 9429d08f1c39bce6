"""The `triton` backend as dispatch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Call, Gradients, Needs, Problem
from .support import device_reason

__all__ = ["TritonBackend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 256
_MAX_BLOCK = 1024


class TritonBackend:
    """Block-sparse attention in Triton, for CUDA and ROCm; deterministic."""

    name = "triton"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """See `Backend.not_supported_reasons`."""
        reasons = []
        if problem.dtype not in _DTYPES:
            reasons.append(
                f"it computes float32, bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
            )
        for name, size in (("head dims", problem.head_dim), ("value head dims", problem.value_dim)):
            if not 1 <= size <= _MAX_DIM:
                reasons.append(f"it has {name} from 1 to {_MAX_DIM}, not {size}")
        if max(problem.block_size) > _MAX_BLOCK:
            reasons.append(f"it has blocks of up to {_MAX_BLOCK} tokens, not {problem.block_size}")
        if not reasons and (reason := device_reason(problem.device)):
            reasons.append(reason)
        return reasons

    def forward(self, call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        from .launch import run_forward

        return run_forward(call, out_dtype)

    def backward(
        self, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
    ) -> Gradients:
        """See `Backend.backward`."""
        from .launch import run_backward

        return run_backward(call, dout, lse, delta, needs, grad_dtype)
