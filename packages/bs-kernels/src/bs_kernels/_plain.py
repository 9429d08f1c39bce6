"""Whether tensors may be handed to the native core by their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.nn import Parameter

__all__ = ["is_plain"]


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing watches these tensors: no autograd, tracing, function transform or dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    wrapped = any(is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x) for x in tensors)
    return not wrapped and all(type(x) in (Tensor, Parameter) for x in tensors)
