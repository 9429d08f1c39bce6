"""What a call's tensors and numbers are to the kernels (see `operands`), and what they are specialised for."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...philox import dropout_threshold
from ...token_mask import UNBOUNDED
from ..base import Call
from .config import MIN_TILE, Config, Shape, Target
from .forward import forward_kernel
from .lists import ColumnLists, RowLists
from .operands import Bias, Geometry, Lists, Operand, Rules, Scales, Sizes, Traits

__all__ = [
    "CHUNK",
    "INTERPRETED",
    "bias_of",
    "common",
    "lists_of",
    "operand_of",
    "over",
    "packed_heads",
    "padded",
    "shape_of",
    "sizes_of",
    "tiles_per_block",
    "traits_of",
    "view_of",
]

#: Whether the kernels were made for Triton's interpreter; fixed when Triton is first imported.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

LOG2E = math.log2(math.e)
#: Lists that are scheduled together for all heads before the next ones; see `tiles.place`.
CHUNK = 32
_INT32 = 2**31
#: Query blocks of up to so many tokens share tiles with those of other heads that read the same keys.
_SHORT = 32


def padded(dim: int) -> int:
    """A head dim as tiles have it."""
    return max(MIN_TILE, triton.next_power_of_2(dim))


def _extent(call: Call) -> tuple[int, int]:
    """Tokens that a query and a key block can hold: no more than the sequence has."""
    (block_q, block_k), (len_q, len_k) = call.plan.block_size, call.plan.seq_len
    return min(block_q, max(len_q, 1)), min(block_k, max(len_k, 1))


def _group(call: Call) -> int:
    return call.q.shape[2] // max(call.k.shape[2], 1)


def packed_heads(call: Call, kernel: str) -> int:
    """Query heads that share a tile in the forward: a divisor of the group where they share lists and blocks are short.

    A tile has at least 16 rows; a block of one query (a decode step) would leave fifteen of them empty, and read the
    same keys once per head.
    """
    extent = _extent(call)[0]
    if kernel != "forward" or call.plan.heads > 1 or extent > _SHORT:
        return 1
    group = max(_group(call), 1)
    most = min(group, MIN_TILE, 2 * _SHORT // extent)
    return max(n for n in range(1, most + 1) if group % n == 0)


def shape_of(call: Call, kernel: str) -> Shape:
    """What a configuration is chosen by."""
    rows, keys = _extent(call)
    dim = max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
    return Shape(kernel, call.q.dtype, dim, (rows * packed_heads(call, kernel), keys))


def tiles_per_block(call: Call, config: Config, pack: int = 1) -> tuple[int, int]:
    """Tiles that a query and a key block are cut into."""
    extent = _extent(call)
    return -(-extent[0] // (config.tile_m // pack)), -(-extent[1] // config.tile_n)


def over(call: Call) -> int:
    """How often each list of the plan is expanded: batch elements and key heads that share it."""
    batch = call.q.shape[0] if call.plan.batch == 1 else 1
    return batch * (call.k.shape[2] if call.plan.heads == 1 else 1)


# -- tensors -----------------------------------------------------------------------------------------------------------


def operand_of(x: Tensor) -> Operand:
    """A 4-D tensor, copied unless its last dimension is contiguous and its rows near enough for 32-bit offsets."""
    fits = x.stride(3) == 1 or x.shape[3] == 1
    if not fits or x.stride(1) * 1024 >= _INT32:
        x = x.contiguous()
    return Operand(x, *x.stride()[:3])


def view_of(operand: Operand, tile: int, config: Config, target: Target) -> TensorDescriptor | None:
    """A descriptor [B, H, S, D] with tiles of ``tile`` tokens for the copy engine, where it is asked for and can be."""
    x, width = operand.data, operand.data.element_size()
    if not config.descriptors or target.kind not in ("sm90", "interpreter"):
        return None
    shape = [x.shape[at] for at in (0, 2, 1, 3)]
    # A dimension of one element has no stride to speak of.
    strides = [x.stride(at) if x.shape[at] > 1 else padded(x.shape[3]) for at in (0, 2, 1)]
    if min(shape) == 0 or x.data_ptr() % 16 or any(s <= 0 or s * width % 16 for s in strides):
        return None
    return TensorDescriptor(x, shape, [*strides, 1], [1, 1, tile, padded(x.shape[3])])


def bias_of(x: Tensor | None) -> Bias:
    """A tensor of up to four dimensions with stride 0 where it is broadcast; boolean ones as uint8."""
    if x is None:
        return Bias(None, None, None, None, None)
    if x.dtype in (torch.bool, torch.float64):
        x = x.view(torch.uint8) if x.dtype == torch.bool else x.float()
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return Bias(x, *strides, *[0] * (4 - x.ndim))


def lists_of(call: Call, lists: RowLists | ColumnLists) -> Lists:
    """Rows or columns as kernels walk them."""
    plan = call.plan
    if isinstance(lists, RowLists):
        begin, end = plan.row_begin, plan.row_end
        return Lists(plan.row_order, begin, lists.middle, end, lists.blocks, lists.starts, lists.entries)
    return Lists(lists.order, plan.col_begin, lists.middle, plan.col_end, lists.rows, lists.starts, lists.entries)


def sizes_of(call: Call, lists: Lists, blocks: int) -> Sizes:
    """The numbers of a call, as kernels take them; ``blocks``: lists per head."""
    plan = call.plan
    return Sizes(
        lists=lists.order.numel(),
        slow=over(call),
        blocks=blocks,
        kv_blocks=plan.kv_blocks,
        q_len=call.q.shape[1],
        kv_len=plan.seq_len[1],
        first_batch=call.first_batch,
        first_head=call.first_head,
        pages=call.k.shape[0],
        rows=call.q.shape[0] * call.q.shape[1] * call.q.shape[2],
    ).written()


def common(call: Call) -> dict[str, Any]:
    """Arguments that all kernels take, by name: operands, geometry, rules, scales."""
    plan, padding, block_bias = call.plan, call.key_padding_mask, call.block_bias
    (low, high), threshold = plan.token_mask.band, dropout_threshold(call.dropout_p)
    return {
        "q": operand_of(call.q),
        "k": operand_of(call.k),
        "v": operand_of(call.v),
        "geometry": Geometry(
            plan.q_bounds,
            plan.kv_bounds,
            plan.q_start,
            plan.kv_start,
            None if call.page_table is None else call.page_table.contiguous(),
        ),
        "rules": Rules(
            None if padding is None else padding.contiguous().view(torch.uint8),
            None if call.q_segments is None else call.q_segments.contiguous(),
            None if call.kv_segments is None else call.kv_segments.contiguous(),
            *bias_of(call.attn_bias),
            *bias_of(None if block_bias is None else block_bias.to(torch.float32).contiguous())[:3],
            low=low if low > -UNBOUNDED else None,
            high=high if high < UNBOUNDED else None,
            seeds=call.dropout_seed if call.dropout_p > 0 else None,
            threshold=threshold - (1 << 32) if threshold >= _INT32 else threshold,
        ),
        "scales": Scales(call.scale * LOG2E, call.scale, 1 / (1 - call.dropout_p)),
        "q_heads": call.q.shape[2],
        "kv_heads": call.k.shape[2],
    }


def traits_of(call: Call, config: Config, *, pack: int = 1, splits: int = 1) -> Traits:
    """What a kernel is specialised for."""
    plan, dim, value_dim = call.plan, call.q.shape[-1], call.v.shape[-1]
    masks = (call.key_padding_mask, call.q_segments, call.attn_bias, call.block_bias)
    tiles = tiles_per_block(call, config, pack)
    return Traits(
        SHARED_BATCH=plan.batch == 1,
        SHARED_HEADS=plan.heads == 1,
        GROUP=_group(call),
        CHUNK=CHUNK,
        D=dim,
        DV=value_dim,
        D_PAD=padded(dim),
        DV_PAD=padded(value_dim),
        BLOCK_M=plan.block_size[0],
        BLOCK_N=plan.block_size[1],
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        TILES_M=tiles[0],
        TILES_N=tiles[1],
        PACK=pack,
        SPLITS=splits,
        FUSED_SCALE=call.scale >= 0 and all(x is None for x in masks),
        INTERPRET=INTERPRETED,
        PRECISION=_precision(call.q.dtype),
    )


def _precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch, `torch.set_float32_matmul_precision`, as matmuls do."""
    exact = dtype != torch.float32 or torch.version.hip is not None
    return "ieee" if exact or torch.get_float32_matmul_precision() == "highest" else "tf32"
