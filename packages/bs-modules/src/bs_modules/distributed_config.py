"""How an attention module spreads one sequence over ranks, as plain validated data."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bs_comm import Placement

from ._checks import check_choice, check_flag, check_int, check_number
from .config import CheckedConfig

PLACEMENTS = ("contiguous", "zigzag", "stripe", "cost_balanced")
WIRE_DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
_DEFAULT_RATIO = 0.1


@dataclasses.dataclass
class DistributedSparseConfig(CheckedConfig):
    """Placement, wire and upkeep of `BlockSparseRingDistributedDilatedAttention`; the same on every rank.

    Assigning to a field checks it at once and takes effect at the next call of the modules that hold the config.

    Args:
        enable_gradient_compression: Let `register_comm_hook(ddp_model)` install top-k compression with error feedback
            for the gradients of a `DistributedDataParallel` model.
        compression_ratio: Bytes of values and indices that a rank sends over the bytes of its dense gradient, in
            (0, 1].
        pattern_update_interval: Training steps after which `update_pattern` takes a gate's layout anew.
        load_balance_interval: Training steps after which `rebalance` looks for a better placement.
        placement: Where tokens live: `"contiguous"` (rank r holds the r-th slice), `"zigzag"`, `"stripe"`,
            `"cost_balanced"` (from the layout), or a `bs_comm.Placement`.
        hop_timeout: Seconds to wait for one message before the call is given up on every rank.
        wire_dtype: Send K and V in this dtype instead: `"bfloat16"`, `"float16"` or `"float8_e4m3fn"`, as a name or a
            `torch.dtype`. What travels is rounded once. `None`: as they are.
        keep_kv: Keep the K and V that came in for the backward pass, instead of fetching them again: memory for bytes.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or would have no effect.
    """

    enable_gradient_compression: bool = False
    compression_ratio: float = _DEFAULT_RATIO
    pattern_update_interval: int = 100
    load_balance_interval: int = 1000
    placement: Any = "contiguous"
    hop_timeout: float = 60.0
    wire_dtype: Any = None
    keep_kv: bool = False

    def validate(self) -> None:
        """Checks the fields against one another.

        Raises:
            ValueError: `compression_ratio` is set and there is no compression.
        """
        super().validate()
        if self.compression_ratio != _DEFAULT_RATIO and not self.enable_gradient_compression:
            raise ValueError(
                f"compression_ratio: has no effect without enable_gradient_compression=True, got "
                f"{self.compression_ratio!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data (no `None`), which `from_dict` reads back.

        Raises:
            TypeError: `placement` is a `Placement`, which has no name to write down.
        """
        values = {name: value for name in self._checks if (value := getattr(self, name)) is not None}
        if isinstance(self.placement, Placement):
            raise TypeError(f"placement: expected a name to convert to a dict, got {self.placement!r}")
        if self.wire_dtype is not None:
            values["wire_dtype"] = str(self.wire_dtype).removeprefix("torch.")
        return values


def _placement(name: str, value: Any) -> Any:
    if isinstance(value, Placement):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(PLACEMENTS)} or a Placement, got {value!r}")
    return check_choice(name, value, PLACEMENTS)


def _wire_dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None:
        return None
    if not isinstance(value, str | torch.dtype):
        raise TypeError(f"{name}: expected one of {', '.join(WIRE_DTYPES)} or None, got {value!r}")
    if str(value).removeprefix("torch.") not in WIRE_DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(WIRE_DTYPES)} or None, got {value!r}")
    return getattr(torch, str(value).removeprefix("torch."))


DistributedSparseConfig._checks = {
    "enable_gradient_compression": check_flag,
    "compression_ratio": lambda name, value: check_number(name, value, "a number in (0, 1]", lambda x: 0 < x <= 1),
    "pattern_update_interval": check_int,
    "load_balance_interval": check_int,
    "placement": _placement,
    "hop_timeout": lambda name, value: check_number(name, value, "seconds > 0", lambda x: x > 0),
    "wire_dtype": _wire_dtype,
    "keep_kv": check_flag,
}
