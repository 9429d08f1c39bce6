"""Finding and loading the native core: a shared library with a plain C interface (``csrc/call.h``), through ctypes."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from bs_memory import default_pool

__all__ = [
    "EMULATED",
    "ISA_NAMES",
    "CoreCall",
    "CoreTensor",
    "NativeCore",
    "NativeUnavailableError",
    "addresses",
    "load",
    "missing_reason",
]

#: Must equal BSA_ABI_VERSION in csrc/call.h.
ABI_VERSION = 12
#: Instruction sets by their number in csrc/call.h, slowest first.
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16_emulated")
#: For tests: runs anywhere, slowly, and only when ``BS_KERNELS_ISA`` names it.
EMULATED = "amx_bf16_emulated"
#: What runs other types than bfloat16, as in csrc/dispatch.cpp.
_WIDE = {"avx512_bf16": "avx512", "amx_bf16": "avx512", EMULATED: "portable"}

#: The fields of a `LayoutPlan` that the core reads, in the order in which it takes them.
PLAN_LISTS = (
    *("row_begin", "row_end", "indices", "entries", "col_begin", "col_end", "t_rows", "t_slots"),
    *("row_order", "col_order", "q_bounds", "kv_bounds", "q_start", "kv_start"),
)
#: Functions whose arguments are structs of their own.
OWN_STRUCTS = ("best_blocks", "batched_lists", "head_perceptron", "block_scores")
#: Larger workspaces are returned to the system after the call.
_POOLED = 2**28
_CPU = torch.device("cpu")
_DIRECTORY = Path(__file__).resolve().parent.parent / "_native"
_LIBRARY = {"darwin": "libbs_native.dylib", "win32": "bs_native.dll"}.get(sys.platform, "libbs_native.so")


class NativeUnavailableError(RuntimeError):
    """The native core is missing or does not fit; the message says why."""


class CoreTensor(ctypes.Structure):
    """``bsa_tensor``: a pointer and the strides of [batch, token, head, dim] in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class CoreCall(ctypes.Structure):
    """``bsa_call``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "isa", "num_threads", "split", "dtype", "result_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "dim", "v_dim")),
        ("scale", ctypes.c_float),
        ("stretch", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("layouts", "layout_heads", "q_blocks", "kv_blocks")),
        *((name, ctypes.c_void_p) for name in PLAN_LISTS),
        ("band_lo", ctypes.c_int64),
        ("band_hi", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("key_padding", "q_segments", "kv_segments", "sinks", "page_table")),
        ("pages", ctypes.c_int64),
        ("block_bias", ctypes.c_void_p),
        ("dblock_bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_batch", "bias_head", "bias_entries")),
        ("attn_bias", ctypes.c_void_p),
        *((f"attn_bias_{name}", ctypes.c_int64) for name in ("bool", "batch", "head", "query", "key")),
        ("dattn_bias", ctypes.c_void_p),
        *((f"dattn_bias_{name}", ctypes.c_int64) for name in ("batch", "head", "query", "key")),
        ("dropout_seed", ctypes.c_void_p),
        ("dropout_threshold", ctypes.c_uint32),
        ("dropout_scale", ctypes.c_float),
        ("first_batch", ctypes.c_int64),
        ("first_head", ctypes.c_int64),
        *((name, CoreTensor) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse", "delta", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
    )


def _workspace(nbytes: int) -> AbstractContextManager[Tensor]:
    """A buffer of at least ``nbytes``: recycled up to `_POOLED`, so that its pages stay mapped, else fresh.

    Sizes are rounded up to four steps per power of two, so that calls of similar sizes share buffers.
    """
    step = 1 << max(nbytes.bit_length() - 3, 6)
    size = -(-nbytes // step) * step
    if size > _POOLED:
        return nullcontext(torch.empty(size, dtype=torch.uint8))
    return default_pool().lease((size,), torch.uint8, _CPU)


class NativeCore:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        version = library.bsa_abi_version()
        if version != ABI_VERSION:
            raise NativeUnavailableError(
                f"{path.name} was built for interface {version}, this package needs {ABI_VERSION}: rebuild it"
            )
        self.path = path
        self.threaded = bool(library.bsa_openmp())
        library.bsa_isa_refused.restype = ctypes.c_char_p
        self._refused = library.bsa_isa_refused
        self._fastest = next(name for name in reversed(ISA_NAMES) if name != EMULATED and self.refusal(name) is None)
        self._run = {name: getattr(library, f"bsa_{name}") for name in ("forward", "backward")}
        for function in self._run.values():
            function.argtypes = (ctypes.POINTER(CoreCall), ctypes.POINTER(ctypes.c_int64))
            function.restype = ctypes.c_int
        self._at_once = {name: getattr(library, f"bsa_{name}") for name in ("delta", "pool")}
        for function in self._at_once.values():
            function.argtypes, function.restype = (ctypes.POINTER(CoreCall),), ctypes.c_int
        self._own = {name: getattr(library, f"bsa_{name}") for name in OWN_STRUCTS}

    def refusal(self, name: str) -> str | None:
        """Why an instruction set cannot run here; None if it can. The first question may take a self-test."""
        reason = self._refused(ISA_NAMES.index(name))
        return None if reason is None else reason.decode()

    @property
    def supported(self) -> tuple[str, ...]:
        """Instruction sets that can run here, slowest first; `EMULATED`, if it is among them, last."""
        return tuple(name for name in ISA_NAMES if self.refusal(name) is None)

    @property
    def refused(self) -> dict[str, str]:
        """Why each of the others cannot."""
        reasons = {name: self.refusal(name) for name in ISA_NAMES}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @property
    def isa(self) -> str:
        """The instruction set to run: the fastest this machine has, or what ``BS_KERNELS_ISA`` names.

        Raises:
            ValueError: ``BS_KERNELS_ISA`` names none that this machine and build can run.
        """
        asked = os.environ.get("BS_KERNELS_ISA")
        if not asked:
            return self._fastest
        reason = self.refusal(asked) if asked in ISA_NAMES else "there is no such instruction set"
        if reason is not None:
            raise ValueError(
                f"BS_KERNELS_ISA: expected one of {', '.join(self.supported)} here, got {asked!r}: {reason}"
            )
        return asked

    @property
    def threads(self) -> int:
        """How many threads a call takes: as many as torch does."""
        return torch.get_num_threads() if self.threaded else 1

    def engine(self, bfloat16: bool) -> str:
        """The instruction set that a call takes: those that are for bfloat16 alone leave the rest to another."""
        isa = self.isa
        return isa if bfloat16 else _WIDE.get(isa, isa)

    def faster(self) -> dict[str, str]:
        """Instruction sets that would be faster than `isa`, and why they do not run."""
        reasons = {name: self.refusal(name) for name in ISA_NAMES[ISA_NAMES.index(self.isa) + 1 :] if name != EMULATED}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def run(self, name: str, call: CoreCall) -> None:
        """Run ``bsa_<name>`` on a workspace from the default pool.

        Raises:
            RuntimeError: no memory for the workspace, or the core refused the call, which is a bug in the binding.
        """
        need = ctypes.c_int64()
        self._check(name, self._run[name](call, need))
        with _workspace(need.value) as workspace:
            call.workspace, call.workspace_bytes = workspace.data_ptr(), workspace.numel()
            self._check(name, self._run[name](call, None))

    def run_at_once(self, name: str, call: CoreCall) -> None:
        """Run ``bsa_<name>``, which takes no workspace.

        Raises:
            RuntimeError: the core refused the call, which is a bug in the binding.
        """
        self._check(name, self._at_once[name](call))

    def run_own(self, name: str, arguments: ctypes.Structure) -> None:
        """Run ``bsa_<name>`` on a struct of its own.

        Raises:
            RuntimeError: the core refused the call, which is a bug in the binding.
        """
        self._check(name, self._own[name](ctypes.byref(arguments)))

    @staticmethod
    def _check(name: str, status: int) -> None:
        if status:
            raise RuntimeError(f"native core: {name} returned status {status}")


@functools.cache
def _load() -> NativeCore | str:
    """The core, or why there is none."""
    path = _DIRECTORY / _LIBRARY
    if not path.exists():
        record = _DIRECTORY / "build.json"
        if record.exists():
            message = json.loads(record.read_text()).get("error") or "the build left no message"
            return f"the native core was not built: {message}"
        return "the native core is not built: install with a C++ compiler, or run hatch_build.py of the source"
    try:
        return NativeCore(path)
    except (OSError, AttributeError, NativeUnavailableError) as error:
        return f"the native core does not load: {error}"


def load() -> NativeCore:
    """The native core.

    Raises:
        NativeUnavailableError: it is missing, does not load, or ``BS_KERNELS_NATIVE=off``.
    """
    if os.environ.get("BS_KERNELS_NATIVE") == "off":
        raise NativeUnavailableError("the native core is switched off by BS_KERNELS_NATIVE=off")
    core = _load()
    if isinstance(core, str):
        raise NativeUnavailableError(core)
    return core


def addresses(**tensors: Tensor) -> dict[str, int]:
    """Where tensors lie, by name."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def missing_reason() -> str | None:
    """Why there is no native core, or None when there is one.

    Raises:
        NativeUnavailableError: there is none although ``BS_KERNELS_NATIVE=require``.
    """
    try:
        load()
    except NativeUnavailableError as error:
        if os.environ.get("BS_KERNELS_NATIVE") == "require":
            raise
        return str(error)
    return None
