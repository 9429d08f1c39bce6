"""Whether Triton can run here, asked without importing it and without creating a CUDA context."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

__all__ = ["device_reason", "interpreting"]

#: The lowest compute capability that the kernels are compiled for.
MIN_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton runs, or would run if it were imported now, as an interpreter on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from . import launch as _  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except Exception as error:  # whatever a broken installation raises
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def device_reason(device: str) -> str | None:
    """Why the kernels cannot run on tensors of this device type, or None."""
    if device == "cpu":
        if not interpreting():
            return "it runs on GPUs, on cpu only in Triton's interpreter (TRITON_INTERPRET=1), which is for checking"
        return _missing()
    if device != "cuda":
        return f"it runs on CUDA and ROCm GPUs, not on {device}"
    if interpreting():
        return "TRITON_INTERPRET=1 makes Triton interpret kernels on CPU tensors; unset it to use the GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 or higher, this GPU has {found}"
    return _missing()
