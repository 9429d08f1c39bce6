"""Compile launches for devices that are not here: the evidence that a kernel builds, and what it would use.

Needs the assemblers that Triton's wheels bring along, no GPU. Imports Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .config import Target
from .launch import Launch

__all__ = ["TARGETS", "Compiled", "compile_for", "missing_tool"]

#: Devices by name: what the compiler is told, and the target that configurations are chosen for.
TARGETS: dict[str, tuple[GPUTarget, Target]] = {
    "sm80": (GPUTarget("cuda", 80, 32), Target("A100", "sm80", 163 << 10, 108)),
    "sm90": (GPUTarget("cuda", 90, 32), Target("H100", "sm90", 227 << 10, 132)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("MI300X", "hip", 64 << 10, 304)),
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
    """Compile a launch for another device, specialised as it would be there, by the functions that a launch calls.

    Args:
        launch: what would be launched; its tensors lie anywhere, only their dtypes matter.
        name: of `TARGETS`.

    Returns:
        What the kernel needs. Raises whatever the compiler does.
    """
    kernel, target = launch.kernel, TARGETS[name][0]
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    packed = kernel._pack_args(backend, dict(launch.options), bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
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
