"""What the native core does for layouts that are picked row by row: the best blocks, and the lists of a plan."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _native_lib
from ._native_lib import ISA_NAMES, addresses

__all__ = ["native_best_blocks", "native_lists"]

_GEOMETRY = ("q_bounds", "kv_bounds", "q_start", "kv_start")
#: What each list of a plan has a number for: layout heads × query blocks, × key blocks, or slots.
_LISTS = {
    **dict.fromkeys(("row_begin", "row_end", "row_order"), "rows"),
    **dict.fromkeys(("indices", "entries", "t_rows", "t_slots"), "slots"),
    **dict.fromkeys(("col_begin", "col_end", "col_order"), "columns"),
}


class _Best(ctypes.Structure):
    """``bsa_best``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "isa", "num_threads", "reserved")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "slots")),
        *((name, ctypes.c_void_p) for name in ("scores", "counts", "picked", "scratch")),
    )


class _Lists(ctypes.Structure):
    """``bsa_lists``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("abi_version", "num_threads")),
        *((name, ctypes.c_int64) for name in ("heads", "q_blocks", "kv_blocks", "slots")),
        *((name, ctypes.c_void_p) for name in ("picked", "counts", *_GEOMETRY)),
        ("band_lo", ctypes.c_int64),
        ("band_hi", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_begin", "row_end", "indices", "entries", "t_rows", "t_slots")),
        *((name, ctypes.c_void_p) for name in ("col_begin", "col_end", "row_order", "col_order")),
        *((name, ctypes.c_void_p) for name in ("partial", "scratch", "unclear")),
    )


def native_best_blocks(scores: Tensor, counts: Tensor, slots: int) -> Tensor | None:
    """`best_blocks` of plain tensors.

    Args:
        scores, counts, slots: those of `best_blocks`.

    Returns:
        int64 [B, H, QB, K]; None where the core cannot compute it: other devices and dtypes, or no core.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or _native_lib.missing_reason():
        return None
    core = _native_lib.load()
    columns = scores.shape[-1]
    scores, counts = scores.contiguous(), counts.to(torch.int64).contiguous()
    picked = torch.empty((*counts.shape, slots), dtype=torch.int64)
    scratch = torch.empty(core.threads * columns, dtype=torch.int32)
    core.run_own(
        "best_blocks",
        _Best(
            abi_version=_native_lib.ABI_VERSION,
            isa=ISA_NAMES.index(core.isa),
            num_threads=core.threads,
            rows=counts.numel(),
            columns=columns,
            slots=slots,
            **addresses(scores=scores, counts=counts, picked=picked, scratch=scratch),
        ),
    )
    return picked


def native_lists(
    indices: Tensor, counts: Tensor, geometry: dict[str, Tensor], band: tuple[int, int]
) -> tuple[dict[str, Tensor], bool] | None:
    """`batched_lists` of plain tensors.

    Args:
        indices, counts: those of a `BatchedLayout`.
        geometry: int32 ``q_bounds``, ``kv_bounds``, ``q_start`` and ``kv_start`` of a plan.
        band: of the positional mask.

    Returns:
        The lists, and whether all used slots were seen to be in range and rising; None where the core cannot compute
        them: other devices, or no core.
    """
    if indices.device.type != "cpu" or _native_lib.missing_reason():
        return None
    core = _native_lib.load()
    batch, heads, q_blocks, slots = indices.shape
    kv_blocks = len(geometry["kv_start"])
    shapes = {"rows": (batch, heads, q_blocks), "columns": (batch, heads, kv_blocks), "slots": (indices.numel(),)}
    lists = {name: torch.empty(shapes[of], dtype=torch.int32) for name, of in _LISTS.items()}
    lists |= {name: lists[name].flatten() for name in ("row_order", "col_order")}
    lists["partial"] = torch.empty(indices.numel(), dtype=torch.uint8)
    given = {"picked": indices.to(torch.int64).contiguous(), "counts": counts.to(torch.int64).contiguous()}
    given |= {name: geometry[name].contiguous() for name in _GEOMETRY}
    scratch = torch.empty(max(batch * heads, slots + 1, q_blocks + 1), dtype=torch.int32)
    unclear = ctypes.c_int32()
    core.run_own(
        "batched_lists",
        _Lists(
            abi_version=_native_lib.ABI_VERSION,
            num_threads=core.threads,
            heads=batch * heads,
            q_blocks=q_blocks,
            kv_blocks=kv_blocks,
            slots=slots,
            band_lo=band[0],
            band_hi=band[1],
            unclear=ctypes.addressof(unclear),
            **addresses(**given, **lists, scratch=scratch),
        ),
    )
    return lists, not unclear.value
