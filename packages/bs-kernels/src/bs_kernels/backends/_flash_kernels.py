"""What a dense kernel is to the `flash` backend, and those inside torch: CPU, flash, cuDNN, memory-efficient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ._flash_segments import Segments, Variable

__all__ = ["TORCH_KERNELS", "Asked", "Kernel", "Operands", "on_amd"]

aten = torch.ops.aten

_POS_INF = float("inf")


class Asked(NamedTuple):
    """What a kernel may base its refusal on before it sees tensors.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of the operands.
        width: columns of q, k and v as the caller has them, the wider of head dim and value dim.
        backward: whether it is a backward.
        deterministic: whether the same bits are required from run to run.
        capability: compute capability of an NVIDIA device; None elsewhere, and where there is none to be asked.
    """

    device: str
    dtype: torch.dtype
    width: int
    backward: bool
    deterministic: bool
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Operands:
    """What every kernel takes. With variable lengths batch and sequence are one dimension T.

    Attributes:
        q: [B, Sq, Hq, X] or [Tq, Hq, X].
        k, v: [B, Sk, Hkv, X] or [Tk, Hkv, X].
        scale: positive.
        segments: with the band.
        variable: the segments on the device, or None where each batch element is one segment.
        deterministic: the same bits are required from run to run.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    segments: Segments
    variable: Variable | None
    deterministic: bool

    @property
    def causal(self) -> bool:
        """Whether the band is causal attention, last tokens aligned."""
        return self.segments.left is None and self.segments.right == 0

    @property
    def window(self) -> tuple[int, int]:
        """``(left, right)``, −1 for no bound; (−1, −1) where the band is none or causal."""
        if self.causal:
            return -1, -1
        left, right = (-1 if side is None else side for side in (self.segments.left, self.segments.right))
        return left, right

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[-2] // self.k.shape[-2]


class Kernel(Protocol):
    """A dense attention kernel."""

    #: How users know it.
    name: str
    #: The widths it computes are multiples of this.
    multiple: int
    #: Whether its backward takes δ itself; else δ is put into columns that are added for it.
    takes_delta: bool

    def reasons(self, asked: Asked) -> list[str]:
        """Why it cannot compute anything of this kind; empty if it can."""
        ...

    def refuses(self, x: Operands) -> list[str]:
        """Why it cannot compute what it said nothing against in `reasons`.

        Args:
            x: the segments, and q and k without data, [B, S, H, X] also where lengths vary.
        """
        ...

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        """Output shaped like q, and LSE [B, Hq, Sq] or [Hq, Tq]; rows of queries without keys may hold anything."""
        ...

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, shaped like these.

        Args:
            x: the operands.
            dout: like q.
            out: like q; Σ over columns of ``dout · out`` is δ unless the kernel takes it itself.
            lse: like that of the forward, +∞ for queries without keys.
            delta: like ``lse``.
        """
        ...


def on_amd() -> bool:
    """Whether "cuda" means ROCm."""
    return torch.version.hip is not None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _square_causal(x: Operands) -> list[str]:
    """Kernels that align causal attention at the first tokens."""
    if not x.segments.banded or (x.causal and x.segments.square):
        return []
    what = "no window" if not x.causal else "causal attention only where queries and keys stand at the same positions"
    return [f"it has {what}"]


def _like_queries(x: Tensor, group: int) -> Tensor:
    return x.repeat_interleave(group, -2) if group > 1 else x


def _sum_groups(gradient: Tensor, group: int) -> Tensor:
    """[…, Hq, X] → […, Hkv, X] in at least float32."""
    if group == 1:
        return gradient
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    return wide.unflatten(-2, (-1, group)).sum(-2)


class _CpuKernel:
    """torch's CPU kernel, one segment after another."""

    name, multiple, takes_delta = "torch's CPU kernel", 1, False

    def reasons(self, asked: Asked) -> list[str]:
        if asked.dtype in (torch.float32, torch.float64):
            return []
        # Measured: its LSE is off by 5e-5, outside the tolerance.
        return [f"torch's CPU kernel is less exact in {_name(asked.dtype)} than backends here are held to"]

    def refuses(self, x: Operands) -> list[str]:
        return _square_causal(x)

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        if x.variable is None:
            q, k, v = (t.transpose(1, 2) for t in _repeated(x))
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, x.causal, scale=x.scale)
            return out.transpose(1, 2), lse
        out, lse = torch.empty_like(x.q), x.q.new_empty((x.q.shape[1], x.q.shape[0]))
        for queries, keys in _pieces(x.variable):
            part = self.forward(_cut(x, queries, keys))
            out[queries], lse[:, queries] = part[0][0], part[1][0]
        return out, lse

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.variable is None:
            q, k, v = (t.transpose(1, 2) for t in _repeated(x))
            # The kernel reads rows of the LSE by the strides that its own forward gives it.
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, 0.0, x.causal, scale=x.scale
            )
            dq, dk, dv = (t.transpose(1, 2) for t in found)
            return dq, _sum_groups(dk, x.group), _sum_groups(dv, x.group)
        gradients = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v)
        for queries, keys in _pieces(x.variable):
            rows = dout[None, queries], out[None, queries], lse[None, :, queries], delta[None, :, queries]
            parts = self.backward(_cut(x, queries, keys), *rows)
            for gradient, part, at in zip(gradients, parts, (queries, keys, keys), strict=True):
                gradient[at] = part[0]
        return gradients


def _repeated(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return x.q, _like_queries(x.k, x.group), _like_queries(x.v, x.group)


def _pieces(variable: Variable) -> list[tuple[slice, slice]]:
    sides = [[slice(*ends) for ends in pairwise(cu.tolist())] for cu in (variable.cu_q, variable.cu_k)]
    return list(zip(*sides, strict=True))


def _cut(x: Operands, queries: slice, keys: slice) -> Operands:
    return Operands(x.q[None, queries], x.k[None, keys], x.v[None, keys], x.scale, x.segments, None, x.deterministic)


class _TorchKernel:
    """What the CUDA kernels inside torch have in common."""

    name, multiple, takes_delta, widest = "", 8, False, 256
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def reasons(self, asked: Asked) -> list[str]:
        reasons = []
        if asked.dtype not in self.dtypes:
            reasons.append(f"{self.name} computes {' and '.join(map(_name, self.dtypes))}, not {_name(asked.dtype)}")
        spare = 2 if asked.backward else 0
        if asked.width + spare > self.widest:
            less = f", less {spare} with a backward" if spare else ""
            reasons.append(f"{self.name} has head dims up to {self.widest}{less}, not {asked.width}")
        if asked.backward and asked.deterministic:
            reasons.append(f"{self.name} does not promise the same bits backward (deterministic=False allows it)")
        return reasons

    def _unusable(self, x: Operands, check: str, causal: bool) -> list[str]:
        """torch's own answer about the operands; it knows the build, the driver and what the user switched off."""
        q, k = (t[:, :, :1].expand(-1, -1, x.q.shape[2], -1).transpose(1, 2) for t in (x.q, x.k))
        params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, causal, False)
        return [] if getattr(torch.backends.cuda, check)(params) else [f"torch says that {self.name} cannot run here"]


class _TorchFlash(_TorchKernel):
    """FlashAttention 2 as built into torch: variable lengths and windows."""

    name = "torch's flash kernel"

    def reasons(self, asked: Asked) -> list[str]:
        reasons = super().reasons(asked)
        if (asked.capability or (8, 0)) < (8, 0):
            reasons.append(f"{self.name} needs compute capability 8.0")
        if not reasons and not torch.backends.cuda.is_flash_attention_available():
            reasons.append("this torch was built without flash attention")
        return reasons

    def refuses(self, x: Operands) -> list[str]:
        # Without the flag: torch aligns causal attention at the first tokens, and would refuse other lengths for that.
        return self._unusable(x, "can_use_flash_attention", causal=False)

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        left, right = x.window
        out, lse, *_ = aten._flash_attention_forward(
            *_repeated(x),
            *_lengths(x),
            0.0,
            x.causal,
            False,
            scale=x.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = x.window
        dq, dk, dv = aten._flash_attention_backward(
            dout,
            *_repeated(x),
            out,
            lse,
            *_lengths(x),
            0.0,
            x.causal,
            *_random_state(x.q.device),
            scale=x.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return dq, _sum_groups(dk, x.group), _sum_groups(dv, x.group)


def _lengths(x: Operands) -> tuple[Tensor | None, Tensor | None, int, int]:
    if x.variable is None:
        return None, None, x.q.shape[1], x.k.shape[1]
    return x.variable.cu_q, x.variable.cu_k, x.variable.max_q, x.variable.max_k


def _random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a forward without dropout hands to its backward."""
    if on_amd():
        return torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)


class _HeadMajor(_TorchKernel, ABC):
    """Kernels inside torch for dense calls, full or causal, with operands [B, H, S, X]."""

    check = ""

    def refuses(self, x: Operands) -> list[str]:
        if not x.segments.whole:
            return [f"{self.name} has no variable lengths"]
        return _square_causal(x) or self._unusable(x, self.check, x.causal)

    def forward(self, x: Operands) -> tuple[Tensor, Tensor]:
        out, lse = self._forward(x, *(t.transpose(1, 2) for t in _repeated(x)))
        return out.transpose(1, 2), lse.flatten(2)[..., : x.q.shape[1]]

    def backward(
        self, x: Operands, dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.transpose(1, 2) for t in (dout, *_repeated(x), out))
        dq, dk, dv = (t.transpose(1, 2) for t in self._backward(x, do, q, k, v, o, lse))
        return dq, _sum_groups(dk, x.group), _sum_groups(dv, x.group)

    @abstractmethod
    def _forward(self, x: Operands, q: Tensor, k: Tensor, v: Tensor) -> Any: ...

    @abstractmethod
    def _backward(
        self, x: Operands, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Any: ...


class _TorchCudnn(_HeadMajor):
    """cuDNN's attention through torch, on Hopper and newer, where it beats FlashAttention 2."""

    name, widest, check = "torch's cuDNN kernel", 128, "can_use_cudnn_attention"

    def reasons(self, asked: Asked) -> list[str]:
        reasons = super().reasons(asked)
        if on_amd() or (asked.capability or (9, 0)) < (9, 0):
            reasons.append(f"{self.name} is taken from compute capability 9.0 on")
        return reasons

    def _forward(self, x: Operands, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, x.causal, False, scale=x.scale)[:2]

    def _backward(self, x: Operands, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        none = torch.empty((), dtype=torch.int64, device=q.device)  # no dropout
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1),
            none,
            none,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            x.causal,
            scale=x.scale,
        )


class _TorchEfficient(_HeadMajor):
    """The memory-efficient kernel inside torch: float32, and wide heads."""

    name, widest, check = "torch's memory-efficient kernel", 2**16, "can_use_efficient_attention"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def _forward(self, x: Operands, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, x.causal, scale=x.scale)[:2]

    def _backward(self, x: Operands, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        none = torch.empty((), dtype=torch.int64, device=q.device)  # no dropout
        if not on_amd():  # rows of the LSE are padded to multiples of 32
            lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=_POS_INF)
        return aten._scaled_dot_product_efficient_attention_backward(
            dout,
            q,
            k,
            v,
            None,
            out,
            lse,
            none,
            none,
            0.0,
            [True, True, True, False],
            x.causal,
            scale=x.scale,
        )[:3]


#: The kernels inside torch, the first choice first.
TORCH_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (_CpuKernel(),),
    "cuda": (_TorchCudnn(), _TorchFlash(), _TorchEfficient()),
}
