"""From a call to kernel launches. Imports Triton; the backend imports this module with the first call.

A `Launch` holds everything that Triton is given, so what tests compile for other devices is what runs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...philox import dropout_threshold
from ...token_mask import UNBOUNDED
from ..base import Call, Gradients, Needs
from .backward_columns import columns_kernel
from .backward_rows import rows_kernel
from .config import MIN_TILE, Config, Shape, Target, candidates
from .forward import forward_kernel
from .lists import column_lists, row_lists

__all__ = ["INTERPRETED", "Launch", "columns_launch", "forward_launch", "rows_launch", "run_backward", "run_forward"]

#: Whether the kernels were made for Triton's interpreter; fixed when Triton is first imported.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

LOG2E = math.log2(math.e)
#: Lists that are scheduled together for all heads before the next ones; see `tiles.place`.
CHUNK = 32
_INT32 = 2**31


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel.
        programs: how many programs.
        arguments: tensors and numbers, by parameter name; None where a flag says that nothing is read.
        constants: what the kernel is specialised for.
        config: how it is compiled.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config
    keep: list[Tensor] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        # Fusion is said aloud because the default of Triton changes, and results with it.
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current stream."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def run_forward(call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`Backend.forward`."""
    batch, q_len, q_heads, _ = call.q.shape
    out = call.q.new_empty((batch, q_len, q_heads, call.v.shape[-1]), dtype=out_dtype)
    lse = call.q.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    _try_each(call, "forward", lambda config: forward_launch(call, out, lse, config).run())
    return out, lse


def run_backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
) -> Gradients:
    """`Backend.backward`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=grad_dtype, device=x.device) for x in (call.q, call.k, call.v))
    dout = dout.to(call.q.dtype)
    if not call.deterministic and not needs.block_bias:

        def both(config: Config) -> None:
            nonlocal dq
            dq = torch.zeros(call.q.shape, dtype=torch.float32, device=call.q.device)
            columns_launch(call, dout, lse, delta, dq, dk, dv, config).run()

        _try_each(call, "atomic", both)
        return Gradients(dq.to(grad_dtype), dk, dv)
    sums: list[Tensor] = []

    def rows(config: Config) -> None:
        if needs.block_bias:
            sums[:] = [_bias_sums(call, config)]
        rows_launch(call, dout, lse, delta, dq, sums[0] if sums else None, config).run()

    _try_each(call, "rows", rows)
    _try_each(call, "columns", lambda config: columns_launch(call, dout, lse, delta, None, dk, dv, config).run())
    d_bias = sums[0].sum(2).sum_to_size(call.block_bias.shape) if sums and call.block_bias is not None else None
    return Gradients(dq, dk, dv, block_bias=d_bias)


def _bias_sums(call: Call, config: Config) -> Tensor:
    """Zeros [1 or B, 1 or Hq, tiles per block, entries] for what every tile adds to the gradient of block_bias.

    Where batch elements (or heads) have lists of their own, an entry belongs to one of them, and one row holds all.
    """
    bias, plan, extent = call.block_bias, call.plan, _extent(call)
    assert bias is not None
    tiles = _tiles(extent[0], config.tile_m) * _tiles(extent[1], config.tile_n)
    batch = 1 if plan.batch > 1 and bias.shape[0] == 1 else call.q.shape[0]
    heads = 1 if plan.heads > 1 and bias.shape[1] == 1 else call.q.shape[2]
    return torch.zeros((batch, heads, tiles, bias.shape[2]), dtype=torch.float32, device=bias.device)


def _try_each(call: Call, kernel: str, launch: Callable[[Config], None]) -> None:
    """Launch with the first configuration that the device has the resources for."""
    device = call.q.device
    target, shape = Target.of(device), _shape(call, kernel)
    refused = _refused.setdefault((target.name, shape), set())
    last: OutOfResources | None = None
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for config in candidates(target, shape):
            if config in refused:
                continue
            try:
                return launch(config)
            except OutOfResources as error:
                refused.add(config)
                last = error
    raise RuntimeError(f"backend: 'triton' found no configuration of {shape.key} that {target.name} can run") from last


#: Configurations that a device turned out not to have the resources for.
_refused: dict[tuple[str, Shape], set[Config]] = {}


def _padded(dim: int) -> int:
    return max(MIN_TILE, triton.next_power_of_2(dim))


def _extent(call: Call) -> tuple[int, int]:
    """Tokens that a query and a key block can hold: no more than the sequence has."""
    (block_q, block_k), (len_q, len_k) = call.plan.block_size, call.plan.seq_len
    return min(block_q, max(len_q, 1)), min(block_k, max(len_k, 1))


def _shape(call: Call, kernel: str) -> Shape:
    return Shape(kernel, call.q.dtype, max(_padded(call.q.shape[-1]), _padded(call.v.shape[-1])), _extent(call))


def _tiles(extent: int, tile: int) -> int:
    return -(-extent // tile)


def _strided(x: Tensor, keep: list[Tensor]) -> Tensor:
    """A 4-D tensor whose last dimension is contiguous and whose rows are near enough for 32-bit offsets in a tile."""
    fits = x.stride(3) == 1 or x.shape[3] == 1
    if not fits or x.stride(1) * 1024 >= _INT32:
        x = x.contiguous()
    keep.append(x)
    return x


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    batch, token, head, _ = x.stride()
    return {f"{prefix}_batch_stride": batch, f"{prefix}_token_stride": token, f"{prefix}_head_stride": head}


def _shared(call: Call, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any], list[Tensor]]:
    """Arguments and constants that all kernels take, and copies to keep alive until the launch."""
    keep: list[Tensor] = []
    plan, (_, q_len, q_heads, dim) = call.plan, call.q.shape
    kv_heads, value_dim = call.k.shape[2], call.v.shape[-1]
    low, high = plan.token_mask.band
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        x = _strided(x, keep)
        arguments |= {name: x, **_strides(name, x)}
    padding, attn_bias, block_bias = call.key_padding_mask, call.attn_bias, call.block_bias
    boolean = attn_bias is not None and attn_bias.dtype == torch.bool
    attn_strides, block_strides = (0, 0, 0, 0), (0, 0)
    if attn_bias is not None:
        attn_bias = attn_bias.view(torch.uint8) if boolean else attn_bias
        if attn_bias.dtype == torch.float64:
            attn_bias = attn_bias.float()
        attn_strides = _broadcast_strides(attn_bias)
    if block_bias is not None:
        block_bias = block_bias.to(torch.float32).contiguous()
        block_strides = _broadcast_strides(block_bias)[:2]
    threshold = dropout_threshold(call.dropout_p)
    arguments |= {
        "q_bounds": plan.q_bounds,
        "kv_bounds": plan.kv_bounds,
        "q_start": plan.q_start,
        "kv_start": plan.kv_start,
        "padding": None if padding is None else padding.contiguous().view(torch.uint8),
        "q_segments": None if call.q_segments is None else call.q_segments.contiguous(),
        "kv_segments": None if call.kv_segments is None else call.kv_segments.contiguous(),
        "attn_bias": attn_bias,
        "block_bias": block_bias,
        "seeds": call.dropout_seed,
        "bias_batch_stride": attn_strides[0],
        "bias_head_stride": attn_strides[1],
        "bias_query_stride": attn_strides[2],
        "bias_key_stride": attn_strides[3],
        "block_bias_batch_stride": block_strides[0],
        "block_bias_head_stride": block_strides[1],
        "q_len": q_len,
        "kv_len": plan.seq_len[1],
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "low": low,
        "high": high,
        "scale": call.scale * LOG2E,
        "keep_scale": 1 / (1 - call.dropout_p),
        "threshold": threshold - (1 << 32) if threshold >= _INT32 else threshold,
        "first_batch": call.first_batch,
        "first_head": call.first_head,
    }
    constants = {
        "SHARED_BATCH": plan.batch == 1,
        "SHARED_HEADS": plan.heads == 1,
        "GROUP": q_heads // max(kv_heads, 1),
        "CHUNK": CHUNK,
        "D": dim,
        "DV": value_dim,
        "D_PAD": _padded(dim),
        "DV_PAD": _padded(value_dim),
        "HAS_LOW": low > -UNBOUNDED,
        "HAS_HIGH": high < UNBOUNDED,
        "HAS_PADDING": padding is not None,
        "HAS_SEGMENTS": call.q_segments is not None,
        "ATTN_BIAS": 0 if attn_bias is None else 1 if boolean else 2,
        "HAS_BLOCK_BIAS": block_bias is not None,
        "HAS_DROPOUT": call.dropout_p > 0,
        "INTERPRET": INTERPRETED,
        "PRECISION": _precision(call.q.dtype),
    }
    return arguments, constants, keep


def _precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch, `torch.set_float32_matmul_precision`, as matmuls do."""
    exact = dtype != torch.float32 or torch.version.hip is not None
    return "ieee" if exact or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _over(call: Call) -> int:
    """How often each row of the plan is expanded: batch elements and key heads that share it."""
    batch = call.q.shape[0] if call.plan.batch == 1 else 1
    return batch * (call.k.shape[2] if call.plan.heads == 1 else 1)


def _row_arguments(call: Call, config: Config) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the kernels over rows take, and the number of programs."""
    plan, (tile_m, tile_n) = call.plan, (config.tile_m, config.tile_n)
    lists = row_lists(plan, masked_ends=plan.block_size[1] % tile_n != 0)
    rows, slow, extent = plan.row_order.numel(), _over(call), _extent(call)
    group = call.q.shape[2] // max(call.k.shape[2], 1) if plan.heads == 1 else 1
    arguments = {
        "row_order": plan.row_order,
        "row_begin": plan.row_begin,
        "row_middle": lists.middle,
        "row_end": plan.row_end,
        "blocks": lists.blocks,
        "starts": lists.starts,
        "entries": lists.entries,
        "rows": rows,
        "slow": slow,
        "q_blocks": plan.q_blocks,
    }
    constants = {
        "TILE_M": tile_m,
        "TILES_M": _tiles(extent[0], tile_m),
        "TILE_N": tile_n,
        "TILES_N": _tiles(extent[1], tile_n),
        "BLOCK_N": plan.block_size[1],
    }
    return arguments, constants, rows * slow * group * constants["TILES_M"]


def forward_launch(call: Call, out: Tensor, lse: Tensor, config: Config) -> Launch:
    """The launch that fills ``out`` [B, Sq, Hq, Dv] and ``lse`` [B, Hq, Sq], both contiguous."""
    arguments, constants, keep = _shared(call, {"q": call.q, "k": call.k, "v": call.v})
    of_rows, tiles, programs = _row_arguments(call, config)
    masks = (call.key_padding_mask, call.q_segments, call.attn_bias, call.block_bias)
    arguments |= of_rows | {
        "out": out,
        "lse": lse,
        "sinks": call.sinks,
        "page_table": None if call.page_table is None else call.page_table.contiguous(),
        "kv_blocks": call.plan.kv_blocks,
    }
    constants |= tiles | {
        "HAS_SINKS": call.sinks is not None,
        "PAGED": call.page_table is not None,
        "FUSED_SCALE": call.scale >= 0 and all(x is None for x in masks),
    }
    return Launch(forward_kernel, programs, arguments, constants, config, keep)


def rows_launch(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, d_block_bias: Tensor | None, config: Config
) -> Launch:
    """The launch that fills ``dq`` and, where given, ``d_block_bias`` (see `_bias_sums`)."""
    arguments, constants, keep = _shared(call, {"q": call.q, "k": call.k, "v": call.v, "dout": dout})
    of_rows, tiles, programs = _row_arguments(call, config)
    arguments |= of_rows | {
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "d_block_bias": d_block_bias,
        "d_bias_batch_stride": 0 if d_block_bias is None else _broadcast_strides(d_block_bias)[0],
        "d_bias_head_stride": 0 if d_block_bias is None else _broadcast_strides(d_block_bias)[1],
        "bias_columns": 0 if d_block_bias is None else d_block_bias.shape[-1],
        "plain_scale": call.scale,
    }
    constants |= tiles | {"BIAS_GRADIENT": d_block_bias is not None}
    return Launch(rows_kernel, programs, arguments, constants, config, keep)


def columns_launch(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    config: Config,
) -> Launch:
    """The launch that fills ``dk`` and ``dv`` and, where given, adds to ``dq`` in no fixed order."""
    arguments, constants, keep = _shared(call, {"q": call.q, "k": call.k, "v": call.v, "dout": dout})
    plan, extent, slow = call.plan, _extent(call), _over(call)
    lists = column_lists(plan, constants["GROUP"], masked_ends=plan.block_size[0] % config.tile_m != 0)
    columns = lists.col_order.numel()
    arguments |= {
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "col_order": lists.col_order,
        "col_begin": plan.col_begin,
        "col_middle": lists.middle,
        "col_end": plan.col_end,
        "t_rows": lists.rows,
        "t_starts": lists.starts,
        "t_entries": lists.entries,
        "columns": columns,
        "slow": slow,
        "kv_blocks": plan.kv_blocks,
        "plain_scale": call.scale,
    }
    constants |= {
        "TILE_N": config.tile_n,
        "TILES_N": _tiles(extent[1], config.tile_n),
        "TILE_M": config.tile_m,
        "TILES_M": _tiles(extent[0], config.tile_m),
        "BLOCK_M": plan.block_size[0],
        "ATOMIC": dq is not None,
    }
    return Launch(columns_kernel, columns * slow * constants["TILES_N"], arguments, constants, config, keep)
