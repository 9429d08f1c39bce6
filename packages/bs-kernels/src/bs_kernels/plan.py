"""The device-resident form of a layout and its positional token mask, shared by every backend.

Shape legend: L layouts (1 = shared by the batch, else the batch size), H layout heads (1 = shared by all query heads,
else Hq), QB query blocks, KB key blocks, N entries. All list tensors are int32, contiguous and on the plan's device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from types import NoneType

import numpy as np
import torch
from torch import Tensor

import bs_patterns
from bs_memory import DeviceCache
from bs_patterns import BlockLayout

from ._geometry import Geometry, Positions
from ._plan_arrays import build_arrays
from ._pytrees import register_fields
from .batched import BatchedLayout, batched_lists
from .token_mask import TokenMask

__all__ = ["LayoutPlan"]

#: The tensor fields of a plan, in the order in which the registered op takes them.
TENSOR_FIELDS = (
    "row_begin",
    "row_end",
    "indices",
    "partial",
    "entries",
    "col_begin",
    "col_end",
    "t_rows",
    "t_slots",
    "row_order",
    "col_order",
    "q_bounds",
    "kv_bounds",
    "q_start",
    "kv_start",
)


_PER_HEAD_FIELDS = ("row_begin", "row_end", "col_begin", "col_end")


@dataclass(frozen=True, eq=False)
class LayoutPlan:
    """A layout and its token mask on a device: what every backend reads.

    Only blocks that keep at least one (query, key) pair under the positional mask are listed. Lists may have gaps: row
    r is ``row_begin[r] : row_end[r]``, and nothing promises ``row_end[r] == row_begin[r + 1]`` (a batched layout pads).
    Entries of a row are stored in processing order: ascending key block unless the plan was built with an ``order``.

    Attributes:
        row_begin: int32[L, H, QB]; first slot of each query block's row in ``indices``.
        row_end: int32[L, H, QB]; one past its last slot. Equal to ``row_begin`` for a row without keys.
        indices: int32[N]; key block of each slot.
        partial: uint8[N]; 1 where the positional mask cuts into the block, 0 where it leaves it whole. Key padding,
            segment ids and attn_bias belong to a call and are not counted. A short last block is not partial by itself.
        entries: int32[N]; the position of each slot's block in the layout's own CSR order (in ``indices`` of a
            `BatchedLayout`, flattened, for batched plans): where ``block_bias`` is read.
        col_begin, col_end: int32[L, H, KB]; the same for the transpose, into ``t_rows`` and ``t_slots``.
        t_rows: int32[N]; query block of each transposed slot, ascending within a column.
        t_slots: int32[N]; the slot in ``indices`` of each transposed slot.
        row_order: int32[L · H · QB]; flat rows ``(l · H + h) · QB + i`` in the order to schedule them, longest first
            unless the plan was built with an ``order``. Every row appears once.
        col_order: int32[L · H · KB]; flat columns ``(l · H + h) · KB + j``, likewise.
        q_bounds: int32[QB + 1]; query block i holds the local tokens ``q_bounds[i] : q_bounds[i + 1]``. Never more than
            ``block_size[0]`` tokens; any block may be short.
        kv_bounds: int32[KB + 1]; likewise for keys. With paged K/V, block j holds the first
            ``kv_bounds[j + 1] − kv_bounds[j]`` tokens of its page.
        q_start: int32[QB]; absolute position of the first token of each query block. May be negative.
        kv_start: int32[KB]; likewise for key blocks.
        block_size: ``(query, key)`` tokens per block.
        seq_len: ``(Sq, Sk)`` tokens.
        token_mask: the positional mask that is baked in.
        layout_nnz: how many blocks the layout lists (≥ the slots of the plan, which drops wholly masked ones).
        order: the name of the processing order, or "custom".
        digest: stable across processes for the same layout, mask, order and positions; None for batched plans.
        dense_offset: where the plan is dense attention under its token mask (every pair that the mask keeps is in a
            listed block, positions are consecutive), the first query's position minus the first key's; else None.
    """

    row_begin: Tensor
    row_end: Tensor
    indices: Tensor
    partial: Tensor
    entries: Tensor
    col_begin: Tensor
    col_end: Tensor
    t_rows: Tensor
    t_slots: Tensor
    row_order: Tensor
    col_order: Tensor
    q_bounds: Tensor
    kv_bounds: Tensor
    q_start: Tensor
    kv_start: Tensor
    block_size: tuple[int, int]
    seq_len: tuple[int, int]
    token_mask: TokenMask
    layout_nnz: int
    order: str = "auto"
    digest: str | None = None
    dense_offset: int | None = None

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        layout: BlockLayout | BatchedLayout,
        token_mask: TokenMask | None = None,
        device: torch.device | str = "cpu",
        *,
        order: str | np.ndarray = "auto",
        q_start: Positions = None,
        kv_start: Positions = None,
        q_bounds: Positions = None,
        kv_bounds: Positions = None,
    ) -> LayoutPlan:
        """Put a layout on a device. Plans of a `BlockLayout` are cached by content.

        Args:
            layout: a `bs_patterns.BlockLayout`, or a `BatchedLayout` (whose plan is built on its own device).
            token_mask: the positional mask; None for the layout's causal flag and no window.
            device: where the plan lives; for a `BatchedLayout` it must be the layout's device.
            order: "auto" (ascending keys, longest rows first), "row", "longest_first", "hilbert", "morton", or an
                int64[nnz] permutation of the layout's CSR entries. Changes results by rounding at most.
            q_start: absolute position of the first query token, or of the first token of every query block (int[QB]).
                None aligns the last query with the last key.
            kv_start: likewise for keys; None starts at 0.
            q_bounds: int[QB + 1], local token offsets of the query blocks; None for regular blocks.
            kv_bounds: int[KB + 1], likewise for keys.

        Returns:
            The plan.

        Raises:
            TypeError: ``layout`` is neither of the two.
            ValueError: positions or bounds that do not fit the layout, an unknown order, or a mask that is not causal
                for a causal layout.
        """
        if not isinstance(layout, (BlockLayout, BatchedLayout)):
            raise TypeError(f"layout: expected a BlockLayout or a BatchedLayout, got {type(layout).__name__}")
        if token_mask is None:
            token_mask = TokenMask(causal=layout.causal)
        if layout.causal and not token_mask.causal:
            raise ValueError("causal: expected True or None for a causal layout, got False")
        given = (q_start, kv_start, q_bounds, kv_bounds)
        if isinstance(layout, BatchedLayout):
            return _build_batched(layout, token_mask, order, given)
        device = torch.device(device)
        name = order if isinstance(order, str) else "custom"
        visit = None if isinstance(order, str) else np.asarray(order)
        what = (layout.digest, token_mask.band, name, _content(visit), *map(_content, given))
        return _plans.get_or_build(what, lambda: _build(layout, token_mask, device, name, visit, given), device=device)

    # -- views -------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """L: 1 for a plan shared by the batch, else the batch size it was made for."""
        return self.row_begin.shape[0]

    @property
    def heads(self) -> int:
        """H: 1 for a plan shared by all query heads, else their number."""
        return self.row_begin.shape[1]

    @property
    def q_blocks(self) -> int:
        """QB."""
        return self.row_begin.shape[2]

    @property
    def kv_blocks(self) -> int:
        """KB."""
        return self.col_begin.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.indices.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor fields in the order of `TENSOR_FIELDS`."""
        return tuple(getattr(self, name) for name in TENSOR_FIELDS)

    @property
    def nbytes(self) -> int:
        """Bytes that the lists occupy."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def to(self, device: torch.device | str) -> LayoutPlan:
        """The same plan on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSOR_FIELDS})

    def select(self, batch: slice, heads: slice) -> LayoutPlan:
        """The plan of some batch elements and query heads; entry lists are shared with this plan.

        Nothing waits for the device.

        Args:
            batch, heads: contiguous ranges; ignored along a dimension that the plan shares (L or H is 1).
        """
        batch = slice(None) if self.batch == 1 else batch
        heads = slice(None) if self.heads == 1 else heads
        if (batch, heads) == (slice(None), slice(None)):
            return self
        cut = {name: getattr(self, name)[batch, heads].contiguous() for name in _PER_HEAD_FIELDS}
        for name, blocks in (("row_order", self.q_blocks), ("col_order", self.kv_blocks)):
            order = getattr(self, name).to(torch.int64)
            inside = torch.zeros(self.batch, self.heads, blocks, dtype=torch.bool, device=self.device)
            inside[batch, heads] = True
            count, inside = inside[batch, heads].numel(), inside.flatten()
            kept = (~inside[order]).to(torch.uint8).argsort(stable=True)[:count]  # asks the device for no count
            cut[name] = (inside.cumsum(0) - 1)[order[kept]].to(torch.int32)
        return replace(self, **cut, digest=None)

    def __repr__(self) -> str:
        return (
            f"LayoutPlan(batch={self.batch}, heads={self.heads}, blocks=({self.q_blocks}, {self.kv_blocks}), "
            f"block_size={self.block_size}, seq_len={self.seq_len}, slots={self.indices.numel()}, "
            f"token_mask={self.token_mask}, order={self.order!r}, device={str(self.device)!r})"
        )


register_fields(
    LayoutPlan,
    TENSOR_FIELDS,
    ("block_size", "seq_len", "token_mask", "layout_nnz", "order", "digest", "dense_offset"),
)

_ORDERS = ("auto", "row", "longest_first", "hilbert", "morton")


#: Every plan of a `BlockLayout` that was built lately.
_plans = DeviceCache(max_bytes=1 << 28, max_entries=256)


def _content(value: Positions) -> object:
    """Something hashable that tells positions apart."""
    if value is None or isinstance(value, int):
        return value
    array = np.ascontiguousarray(value)
    return array.dtype.str, array.shape, array.tobytes()


def _visiting_order(layout: BlockLayout, name: str, visit: np.ndarray | None) -> np.ndarray | None:
    """int64[nnz] visiting order of the entries, or None where they stay in CSR order."""
    if name == "custom":
        return visit
    if name not in _ORDERS:
        raise ValueError(f"order: expected one of {', '.join(_ORDERS)} or int64[{layout.nnz}], got {name!r}")
    if name in ("hilbert", "morton"):
        return getattr(bs_patterns, f"{name}_order")(layout)
    return None


def _digest(layout: str, mask: TokenMask, name: str, visit: np.ndarray | None, geometry: Geometry) -> str:
    content = sha256(f"bs_kernels.LayoutPlan 1 {layout} {mask.band} {name} ".encode())
    if visit is not None:
        content.update(np.ascontiguousarray(visit, "<i8").tobytes())
    content.update(geometry.tobytes())
    return content.hexdigest()


def _geometry_tensors(geometry: Geometry, device: torch.device) -> dict[str, Tensor]:
    names = ("q_bounds", "kv_bounds", "q_start", "kv_start")
    return {name: torch.from_numpy(getattr(geometry, name).astype(np.int32)).to(device) for name in names}


def _build(
    layout: BlockLayout,
    token_mask: TokenMask,
    device: torch.device,
    name: str,
    visit: np.ndarray | None,
    given: tuple[Positions, ...],
) -> LayoutPlan:
    layout.validate()
    if layout.nnz >= 2**31:
        raise ValueError(f"layout: expected fewer than 2**31 active blocks (int32 lists), got {layout.nnz}")
    geometry = Geometry.of(layout.block_size, layout.seq_len, layout.shape[1:], *given)
    visit = _visiting_order(layout, name, visit)
    arrays = build_arrays(
        layout.indptr,
        layout.indices,
        layout.shape[2],
        token_mask,
        geometry.q_start,
        geometry.q_last,
        geometry.kv_start,
        geometry.kv_last,
        visit,
        longest_first=name in ("auto", "longest_first"),
    )
    lists = {field: torch.from_numpy(array).to(device) for field, array in vars(arrays).items()}
    return LayoutPlan(
        **lists,
        **_geometry_tensors(geometry, device),
        block_size=layout.block_size,
        seq_len=layout.seq_len,
        token_mask=token_mask,
        layout_nnz=layout.nnz,
        order=name,
        digest=_digest(layout.digest, token_mask, name, visit, geometry),
        dense_offset=geometry.dense_offset(token_mask.band, arrays.indices.size, layout.shape[0]),
    )


#: Bounds and starts of layouts that differ per batch element, on a CPU: all such layouts of some lengths share them.
_geometries = DeviceCache(max_bytes=1 << 24, max_entries=64)


def _batched_geometry(layout: BatchedLayout, given: tuple[Positions, ...]) -> dict[str, Tensor]:
    """Bounds and starts of the blocks of a batched layout; copied from the host only where given as arrays."""
    if layout.device.type != "cpu" or torch.compiler.is_compiling():
        return _make_batched_geometry(layout, given)
    what = (layout.shape[2:], layout.block_size, layout.seq_len, *map(_content, given))
    return _geometries.get_or_build(what, lambda: _make_batched_geometry(layout, given), device=layout.device)


def _make_batched_geometry(layout: BatchedLayout, given: tuple[Positions, ...]) -> dict[str, Tensor]:
    geometry = Geometry.of(layout.block_size, layout.seq_len, layout.shape[2:], *given)
    q_start, kv_start, *irregular = given
    if not isinstance(q_start, (int, NoneType)) or not isinstance(kv_start, (int, NoneType)):
        return _geometry_tensors(geometry, layout.device)
    if any(x is not None for x in irregular):
        return _geometry_tensors(geometry, layout.device)
    first = [layout.seq_len[1] - layout.seq_len[0] if q_start is None else q_start, kv_start or 0]
    tensors = {}
    for axis, name in enumerate(("q", "kv")):
        blocks, block = layout.shape[2 + axis], layout.block_size[axis]
        bounds = torch.arange(blocks + 1, dtype=torch.int32, device=layout.device) * block
        bounds = bounds.clamp(max=layout.seq_len[axis])
        tensors |= {f"{name}_bounds": bounds, f"{name}_start": bounds[:-1] + first[axis]}
    return tensors


def _build_batched(
    layout: BatchedLayout, token_mask: TokenMask, order: str | np.ndarray, given: tuple[Positions, ...]
) -> LayoutPlan:
    if not isinstance(order, str) or order not in ("auto", "longest_first"):
        raise ValueError(f"order: expected 'auto' or 'longest_first' for a BatchedLayout, got {order!r}")
    if layout.indices.numel() >= 2**31:
        raise ValueError(f"layout: expected fewer than 2**31 slots (int32 lists), got {layout.indices.numel()}")
    tensors = _batched_geometry(layout, given)
    lists = batched_lists(layout, token_mask, tensors)
    return LayoutPlan(
        **lists,
        **tensors,
        block_size=layout.block_size,
        seq_len=layout.seq_len,
        token_mask=token_mask,
        dense_offset=None,
        layout_nnz=layout.indices.numel(),
        order=order,
        digest=None,
    )
