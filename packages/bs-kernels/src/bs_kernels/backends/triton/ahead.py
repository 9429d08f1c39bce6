"""Compile launches for devices that are not here: the evidence that a kernel builds, and what it would use.

Needs the assemblers that Triton's wheels bring along, no GPU. Imports Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import Target
from .launch import Launch

__all__ = ["TARGETS", "Compiled", "compile_for", "missing_tool"]

#: Devices by name: what the compiler is told, and the target that configurations are chosen for.
TARGETS: dict[str, tuple[GPUTarget, Target]] = {
    "sm80": (GPUTarget("cuda", 80, 32), Target("A100", "sm80", 163 << 10)),
    "sm90": (GPUTarget("cuda", 90, 32), Target("H100", "sm90", 227 << 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("MI300X", "hip", 64 << 10)),
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs of its device.

    Attributes:
        shared_memory: bytes per program.
        registers: per thread; None where the assembler does not say.
        stack: bytes per thread that do not fit registers (spills); None likewise.
        assembly: PTX or AMDGCN.
    """

    shared_memory: int
    registers: int | None
    stack: int | None
    assembly: str


def missing_tool(name: str) -> str | None:
    """Why nothing can be compiled for a target of `TARGETS`, or None."""
    target, _ = TARGETS[name]
    backends = Path(triton.__file__).parent / "backends"
    needed = backends / "nvidia/bin/ptxas" if target.backend == "cuda" else backends / "amd"
    return None if needed.exists() else f"this Triton comes without {needed.relative_to(backends)}"


def compile_for(launch: Launch, name: str) -> Compiled:
    """Compile a launch for another device, specialised as it would be there.

    Args:
        launch: what would be launched; its tensors lie anywhere, only their dtypes matter.
        name: of `TARGETS`.

    Returns:
        What the kernel needs. Raises whatever the compiler does.
    """
    kernel, target = launch.kernel, TARGETS[name][0]
    plain = set(kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.arg_names):
        value = launch.constants[parameter] if parameter in launch.constants else launch.arguments[parameter]
        special = parameter not in plain
        if parameter in launch.constants or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter], constants[parameter] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter] = "*" + _TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=target, options=launch.options)
    assembly = made.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    used = _usage(made.asm["cubin"]) if target.backend == "cuda" else _amd_usage(assembly)
    return Compiled(made.metadata.shared, *used, assembly)


def _usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack per thread, from the disassembler that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")]
    registers, stack = (int(match[1]) if match else None for match in found)
    return registers, stack
