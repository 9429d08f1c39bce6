"""What a device and its software can do, and in which order backends are tried there, with the reasons.

The decision, made here and nowhere else:

- CPU: ``native`` (the C++ core: every layout, and faster than torch's own kernel on dense ones), ``flash`` (torch's CPU
  kernel, for layouts that are dense per segment, where the core is missing, has no such dtype or is the portable one),
  ``torch`` (everything), ``reference``.
- CUDA and ROCm: ``triton`` (the whole contract, deterministic), ``flash`` (layouts that are dense per segment, through
  the flash-attn package of the device or torch's own kernels), ``flex``, ``torch``, ``reference``.
- any other device: ``torch``, ``reference``.

``flex`` on a CPU and ``triton`` on a CPU (an interpreter) run only when they are named.

Nothing here imports triton or flash-attn: packages are looked up, not loaded. A CUDA device is asked about itself only
when facts about it are asked for.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch

from .backends._native_lib import load, missing_reason

__all__ = ["DEVICES", "Facts", "Ranked", "find_facts", "importable", "nvidia_capability", "rank_backends"]

#: Devices known by name: what `Facts.generation` says of a compute capability or an AMD architecture.
DEVICES: dict[str, str] = {
    "sm_80": "Ampere (A100)",
    "sm_86": "Ampere (A10, RTX 30)",
    "sm_89": "Ada (L4, L40S, RTX 40)",
    "sm_90": "Hopper (H100, H200)",
    "sm_100": "Blackwell (B200, GB200)",
    "sm_103": "Blackwell (B300)",
    "sm_120": "Blackwell (RTX 50)",
    "gfx90a": "CDNA 2 (MI210, MI250X)",
    "gfx942": "CDNA 3 (MI300A, MI300X, MI325X)",
    "gfx950": "CDNA 4 (MI350X, MI355X)",
}

#: Packages that matter: how they are called, and the module that is looked up. FlashAttention 4 by itself makes a
#: package flash_attn, too.
_PACKAGES = {
    "triton": ("Triton", "triton"),
    "flash_attn": ("FlashAttention 2", "flash_attn.flash_attn_interface"),
    "flash_attn_interface": ("FlashAttention 3", "flash_attn_interface"),
    "flash_attn.cute": ("FlashAttention 4", "flash_attn.cute"),
}


@dataclass(frozen=True)
class Facts:
    """The table of facts about one device. Plain data: a table of another machine can be written down and asked about.

    Attributes:
        device: "cpu", "cuda" (NVIDIA and, as torch calls it, AMD), or another device type.
        name: what the device calls itself, "NVIDIA H200" for example.
        capability: NVIDIA compute capability, ``(9, 0)`` for example; None elsewhere.
        arch: AMD architecture, "gfx942" for example; None elsewhere.
        packages: the modules of Triton ("triton"), FlashAttention 2 ("flash_attn"), 3 ("flash_attn_interface") and 4
            ("flash_attn.cute") that could be imported.
        torch_kernels: dense kernels inside torch that are built and enabled: "flash", "efficient", "cudnn".
        cpu_features: instruction sets of the CPU that kernels here care about.
        native_isa: the instruction set that the native core runs; None where it does not run.
        native_missing: why it does not run; None if it does.
    """

    device: str
    name: str = ""
    capability: tuple[int, int] | None = None
    arch: str | None = None
    packages: frozenset[str] = field(default_factory=frozenset)
    torch_kernels: frozenset[str] = field(default_factory=frozenset)
    cpu_features: tuple[str, ...] = ()
    native_isa: str | None = None
    native_missing: str | None = None

    @property
    def generation(self) -> str:
        """The family of the device, with the products that it is known by; "" where it is not known."""
        key = self.arch if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"
        return DEVICES.get(key or "", "")

    def __str__(self) -> str:
        what = [self.name or self.device]
        if self.capability is not None:
            what.append(f"compute capability {self.capability[0]}.{self.capability[1]}")
        if self.arch is not None:
            what.append(self.arch)
        if self.generation:
            what.append(self.generation)
        if self.cpu_features:
            what.append(" ".join(self.cpu_features))
        what.append("torch kernels: " + (", ".join(sorted(self.torch_kernels)) or "none"))
        found = [label for package, (label, _) in _PACKAGES.items() if package in self.packages]
        what.append("packages: " + (", ".join(found) or "none"))
        return "; ".join(what)


@dataclass(frozen=True)
class Ranked:
    """A backend's place on a device.

    Attributes:
        name: the backend.
        why: why it stands there.
        automatic: whether ``backend="auto"`` may take it; else it runs only when named.
    """

    name: str
    why: str
    automatic: bool = True


def rank_backends(facts: Facts) -> tuple[Ranked, ...]:
    """The order in which backends are tried on a device; see the head of this module.

    Args:
        facts: of the device.

    Returns:
        Every backend once, the first choice first. Whether one can compute a given call is its own answer.
    """
    if facts.device == "cpu":
        native = Ranked("native", facts.native_missing or "the C++ core")
        flash = Ranked("flash", "torch's CPU kernel, where a layout is dense per segment")
        # Without vector instructions torch's own kernel is faster on what it computes (docs/benchmarks/cpu.md).
        portable = facts.native_isa == "portable"
        return (
            *((flash, native) if portable else (native, flash)),
            Ranked("torch", "PyTorch operations: computes everything"),
            Ranked("flex", "unfused and dense here, forward only: runs when named", automatic=False),
            Ranked("triton", "an interpreter here: runs when named", automatic=False),
            Ranked("reference", "dense: for checking"),
        )
    if facts.device == "cuda":
        on = facts.generation or facts.arch or facts.name or "this GPU"
        return (
            Ranked("triton", f"block-sparse forward and backward on {on}, the same bits every time"),
            Ranked("flash", f"{_dense_kernel(facts)}, where a layout is dense per segment"),
            Ranked("flex", "FlexAttention, compiled per shape"),
            Ranked("torch", "PyTorch operations: computes everything"),
            Ranked("native", "for CPUs"),
            Ranked("reference", "dense: for checking"),
        )
    return (
        Ranked("torch", "PyTorch operations: computes everything, on any device"),
        Ranked("reference", "dense: for checking"),
        *(Ranked(name, "not for this device") for name in ("native", "triton", "flash", "flex")),
    )


def _dense_kernel(facts: Facts) -> str:
    """The first choice of the ``flash`` backend on a GPU; the backend itself says which one a call gets."""
    major = None if facts.capability is None else facts.capability[0]
    for package, majors in (("flash_attn_interface", (9,)), ("flash_attn.cute", (9, 10, 11))):
        if package in facts.packages and major in majors:
            return _PACKAGES[package][0]
    if "flash_attn" in facts.packages and (major is None or major >= 8):
        return _PACKAGES["flash_attn"][0]
    from_major = {"cudnn": 9, "flash": 8, "efficient": 0}
    built = [k for k, first in from_major.items() if k in facts.torch_kernels and (major is None or major >= first)]
    return f"torch's {built[0]} kernel" if built else "no dense kernel found here"


def find_facts(device: torch.device | str) -> Facts:
    """Look up the facts about a device of this machine.

    Args:
        device: where tensors live. For a CUDA device this asks the driver, which makes a context where there is none.

    Returns:
        The table of facts.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    packages = frozenset(name for name, (_, module) in _PACKAGES.items() if importable(module))
    if device.type == "cpu":
        missing = missing_reason()
        return Facts(
            "cpu",
            name=platform.processor() or platform.machine(),
            packages=packages,
            torch_kernels=frozenset({"flash"}),
            cpu_features=tuple(label for label, probe in _CPU_FEATURES.items() if getattr(torch.cpu, probe, bool)()),
            native_isa=None if missing else load().isa,
            native_missing=missing,
        )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        amd = torch.version.hip is not None
        return Facts(
            "cuda",
            name=properties.name,
            capability=None if amd else (properties.major, properties.minor),
            arch=getattr(properties, "gcnArchName", "").split(":")[0] or None if amd else None,
            packages=packages,
            torch_kernels=_torch_kernels(),
        )
    return Facts(device.type, packages=packages)


def nvidia_capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device; None on ROCm, and where torch sees no device."""
    return (
        None if torch.version.hip is not None or not torch.cuda.is_available() else torch.cuda.get_device_capability()
    )


def importable(module: str) -> bool:
    """Whether a module could be imported, found without importing it or its parent."""
    parent, _, child = module.partition(".")
    try:
        spec = find_spec(parent)
    except (ImportError, ValueError):  # a package that is loaded half, or without a spec
        return False
    if spec is None or not child:
        return spec is not None
    return PathFinder.find_spec(module, spec.submodule_search_locations) is not None


def _torch_kernels() -> frozenset[str]:
    """The dense CUDA kernels inside torch that are switched on and built."""
    probes = {
        "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.is_flash_attention_available),
        "efficient": (torch.backends.cuda.mem_efficient_sdp_enabled,),
        "cudnn": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cudnn.is_available),
    }
    return frozenset(name for name, asked in probes.items() if all(ask() for ask in asked))


_CPU_FEATURES = {
    "AVX2": "_is_avx2_supported",
    "AVX-512": "_is_avx512_supported",
    "AVX-512 BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}
