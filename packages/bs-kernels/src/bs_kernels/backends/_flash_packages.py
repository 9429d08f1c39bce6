"""The flash-attn packages as kernels of the `flash` backend: FlashAttention 2, 3 and 4.

A package is looked up without importing it when a backend is chosen, and imported by the first call that it computes.
What is called are the functions below its autograd, which take and return the LSE. Their signatures changed between
releases; which one is installed is read off the parameters.

Source:
    https://github.com/Dao-AILab/flash-attention, the releases 2.6.0 to 2.8.3 (``flash_attn/flash_attn_interface.py``),
    ``hopper/flash_attn_interface.py`` from January 2025 to March 2026, and ``flash_attn/cute/interface.py`` from its
    first gradient through the LSE (4.0.0 beta 5) to beta 27.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..hardware import importable
from ._flash_kernels import Asked, Kernel, Operands, on_amd

__all__ = ["PACKAGE_KERNELS"]


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters, also of one that `torch.library.custom_op` wrapped."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


class _Package(ABC):
    """What the three have in common."""

    name, multiple, takes_delta, widest = "", 8, False, 256
    module, looked_up = "", ""

    def reasons(self, asked: Asked) -> list[str]:
        if asked.device != "cuda" or not importable(self.looked_up):
            return [f"{self.name} is not installed"]
        reasons = self._device_reasons(asked)
        if asked.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"{self.name} computes float16 and bfloat16, not {str(asked.dtype).removeprefix('torch.')}")
        spare = 2 if asked.backward and not self.takes_delta else 0
        if asked.width + spare > self.widest:
            less = f", less {spare} with a backward" if spare else ""
            reasons.append(f"{self.name} has head dims up to {self.widest}{less}, not {asked.width}")
        return reasons

    @abstractmethod
    def _device_reasons(self, asked: Asked) -> list[str]: ...

    def refuses(self, x: Operands) -> list[str]:
        try:
            self.functions(not x.segments.whole)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return [f"{self.name} is installed but cannot be used: {type(error).__name__}: {error}".split("\n")[0]]
        return []

    @abstractmethod
    def functions(self, variable: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Its forward and backward; the package is imported here."""

    def _result(self, x: Operands, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        want = (x.q.shape[-2], x.q.shape[0]) if x.variable is not None else (x.q.shape[0], *x.q.shape[2:0:-1])
        if out.shape != x.q.shape or lse.shape != want:
            raise RuntimeError(
                f"{self.name}: expected an output {list(x.q.shape)} and an LSE {list(want)}, "
                f"got {list(out.shape)} and {list(lse.shape)}: this release is not one that bs-kernels knows"
            )
        return out, lse


def _variable(x: Operands) -> dict[str, Any]:
    """Arguments for variable lengths, by the names that every release has."""
    if x.variable is None:
        return {}
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, x.variable[2:], strict=True))


def _band(x: Operands, function: Callable[..., Any]) -> dict[str, Any]:
    """``window_size``, or its two sides where the release takes these."""
    if "window_size" in parameters(function):
        return {"window_size": x.window}
    return dict(zip(("window_size_left", "window_size_right"), x.window, strict=True))


def _into(
    backward: Callable[..., Any], x: Operands, dout: Tensor, out: Tensor, lse: Tensor, common: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a backward that writes its gradients into tensors that it is given."""
    dq, dk, dv = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v)
    backward(dout, x.q, x.k, x.v, out, lse, dq=dq, dk=dk, dv=dv, **common, deterministic=x.deterministic)
    return dq, dk, dv


class _FlashAttention2(_Package):
    """The package flash-attn, 2.6 to 2.8."""

    name, looked_up, module = "FlashAttention 2", "flash_attn.flash_attn_interface", "flash_attn.flash_attn_interface"

    def _device_reasons(self, asked: Asked) -> list[str]:
        low = asked.capability is not None and asked.capability < (8, 0)
        return [f"{self.name} needs compute capability 8.0"] if low else []

    def functions(self, variable: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        module, kind = import_module(self.module), "varlen_" if variable else ""
        return getattr(module, f"_flash_attn_{kind}forward"), getattr(module, f"_flash_attn_{kind}backward")

    def _common(self, x: Operands, function: Callable[..., Any]) -> dict[str, Any]:
        return {
            **_variable(x),
            **_band(x, function),
            "dropout_p": 0.0,
            "softmax_scale": x.scale,
            "causal": x.causal,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        forward, _ = self.functions(x.variable is not None)
        found = forward(x.q, x.k, x.v, **self._common(x, forward), return_softmax=False)
        # 2.6 returns (out, q, k, v, padded out, lse, …), later releases (out, lse, …).
        return self._result(x, found[0], found[5 if len(found) == 8 else 1])

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        _, backward = self.functions(x.variable is not None)
        return _into(backward, x, dout, out, lse, self._common(x, backward))


class _FlashAttention3(_Package):
    """FlashAttention 3's own module, on Hopper."""

    name, looked_up, module = "FlashAttention 3", "flash_attn_interface", "flash_attn_interface"

    def _device_reasons(self, asked: Asked) -> list[str]:
        reasons = []
        if on_amd() or (asked.capability or (9, 0))[0] != 9:
            reasons.append(f"{self.name} is for compute capability 9 (Hopper)")
        if asked.backward and asked.deterministic and asked.width + 2 > 192:
            reasons.append(f"{self.name} has no deterministic backward for head dims above 192")
        return reasons

    def functions(self, variable: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        module = import_module(self.module)
        if "cu_seqlens_q" not in parameters(module._flash_attn_forward):
            raise AttributeError("it is older than January 2025")
        return module._flash_attn_forward, module._flash_attn_backward

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        forward, _ = self.functions(x.variable is not None)
        found = forward(
            x.q,
            x.k,
            x.v,
            **_variable(x),
            **_band(x, forward),
            softmax_scale=x.scale,
            causal=x.causal,
            num_splits=1,
        )
        return self._result(x, found[0], found[1])

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        _, backward = self.functions(x.variable is not None)
        causal = "is_causal" if "is_causal" in parameters(backward) else "causal"
        common = {**_variable(x), **_band(x, backward), causal: x.causal, "softmax_scale": x.scale}
        return _into(backward, x, dout, out, lse, common)


class _FlashAttention4(_Package):
    """FlashAttention 4 (CuTe), on Hopper and Blackwell; its backward takes the gradient of the LSE."""

    name, looked_up, module = "FlashAttention 4", "flash_attn.cute", "flash_attn.cute.interface"
    takes_delta = True

    def _device_reasons(self, asked: Asked) -> list[str]:
        major, minor = asked.capability or (9, 0)
        if on_amd() or major not in (9, 10, 11):
            return [f"{self.name} is for compute capabilities 9, 10 and 11"]
        if major > 9 and 128 < asked.width <= 248:
            return [f"{self.name} has head dims up to 128 and 256 on {major}.{minor}, not {asked.width}"]
        return []

    def functions(self, variable: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        module = import_module(self.module)
        if "dlse" not in parameters(module._flash_attn_bwd):
            raise AttributeError("its backward takes no gradient of the LSE (4.0.0 beta 5 does)")
        return module._flash_attn_fwd, module._flash_attn_bwd

    def _common(self, x: Operands) -> dict[str, Any]:
        left, right = (None if side == -1 else side for side in x.window)
        band = {"window_size_left": left, "window_size_right": right}
        return {**_variable(x), **band, "softmax_scale": x.scale, "causal": x.causal}

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        forward, _ = self.functions(x.variable is not None)
        out, lse, *_ = forward(x.q, x.k, x.v, **self._common(x), num_splits=1, return_lse=True)
        return self._result(x, out, lse)

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`. It computes δ as Σ dout · out − dlse: with an output of zeros, −dlse is δ."""
        _, backward = self.functions(x.variable is not None)
        common = self._common(x)
        dlse = torch.neg(delta).contiguous()
        dq, dk, dv = backward(x.q, x.k, x.v, out, dout, lse, **common, deterministic=x.deterministic, dlse=dlse)
        return dq, dk, dv


#: The packages, the first choice first: each says for which devices it is.
PACKAGE_KERNELS: tuple[Kernel, ...] = (_FlashAttention3(), _FlashAttention4(), _FlashAttention2())
