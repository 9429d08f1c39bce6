"""From a call to kernel launches. Imports Triton; the backend imports this module with the first call.

A `Launch` holds everything that Triton is given, so what tests compile for other devices is what runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..base import Call, Gradients, Needs
from . import arguments
from .arguments import bias_of, common, lists_of, over, sizes_of, tiles_per_block, traits_of, view_of
from .backward_bias import bias_kernel
from .backward_columns import columns_kernel
from .backward_rows import rows_kernel
from .config import Config, Shape, Target, candidates, pieces
from .forward import forward_kernel, merge_kernel
from .lists import column_lists, row_lists
from .pages import sum_pages

__all__ = [
    "Launch",
    "bias_launch",
    "columns_launch",
    "forward",
    "forward_launch",
    "merge_launch",
    "rows_launch",
    "run_backward",
    "run_forward",
]


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel.
        programs: how many programs.
        arguments: by parameter name; see `operands`.
        config: how it is compiled.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        # Fusion is said aloud because the default of Triton changes, and results with it.
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current stream."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def run_forward(call: Call, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`Backend.forward`."""
    batch, q_len, q_heads, _ = call.q.shape
    out = call.q.new_empty((batch, q_len, q_heads, call.v.shape[-1]), dtype=out_dtype)
    lse = call.q.new_empty((batch, q_heads, q_len), dtype=torch.float32)

    _try_each(call, "forward", lambda config: forward(call, out, lse, config))
    return out, lse


def forward(call: Call, out: Tensor, lse: Tensor, config: Config) -> None:
    """Fill ``out`` [B, Sq, Hq, Dv] and ``lse`` [B, Hq, Sq] with one configuration: rows whole, or in pieces."""
    splits = _splits(call.whole or call, config)
    if splits == 1:
        forward_launch(call, out, lse, config).run()
    else:
        parts, parts_lse = (x.new_empty((splits, *x.shape), dtype=torch.float32) for x in (out, lse))
        forward_launch(call, parts, parts_lse, config).run()
        merge_launch(parts, parts_lse, out, lse).run()


def run_backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs: Needs, grad_dtype: torch.dtype
) -> Gradients:
    """`Backend.backward`."""
    paged, (batch, _, q_heads, _) = call.page_table is not None, call.q.shape
    dk, dv = (
        x.new_empty((batch, call.plan.seq_len[1], *x.shape[2:]), dtype=torch.float32 if paged else grad_dtype)
        for x in (call.k, call.v)
    )
    dout = dout.to(call.q.dtype)
    if not call.deterministic and not any(needs):
        dq = torch.empty(0)

        def both(config: Config) -> None:
            nonlocal dq
            dq = torch.zeros(call.q.shape, dtype=torch.float32, device=call.q.device)
            columns_launch(call, dout, lse, delta, dq, dk, dv, config).run()

        _try_each(call, "atomic", both)
        return Gradients(dq.to(grad_dtype), *_keys(call, dk, dv, grad_dtype))

    dq = call.q.new_empty(call.q.shape, dtype=grad_dtype)
    per_query = per_key = pairs = sums = None
    if needs.attn_bias and call.attn_bias is not None:
        shape = call.attn_bias.shape
        if shape[3] == 1:
            per_query = lse.new_empty((batch, q_heads, call.q.shape[1], 1))
        elif shape[2] == 1:
            per_key = lse.new_empty((batch, q_heads, 1, shape[3]))
        else:
            pairs = lse.new_empty(shape)

    def rows(config: Config) -> None:
        nonlocal sums
        sums = _block_sums(call, config) if needs.block_bias else None
        rows_launch(call, dout, lse, delta, dq, sums, config, per_query).run()

    def bias(config: Config) -> None:
        assert pairs is not None
        bias_launch(call, dout, lse, delta, pairs.zero_(), config).run()

    _try_each(call, "rows", rows)
    _try_each(
        call, "columns", lambda config: columns_launch(call, dout, lse, delta, None, dk, dv, config, per_key).run()
    )
    if pairs is not None:
        _try_each(call, "rows", bias)
    d_attn = next((x for x in (per_query, per_key, pairs) if x is not None), None)
    if d_attn is not None and call.attn_bias is not None:
        d_attn = d_attn.sum_to_size(call.attn_bias.shape)
    d_block = None
    if sums is not None and call.block_bias is not None:
        d_block = sums.sum(2).sum_to_size(call.block_bias.shape)
    return Gradients(dq, *_keys(call, dk, dv, grad_dtype), d_attn, d_block)


def _keys(call: Call, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients per token of a sequence as those of what the call was given."""
    if call.page_table is None:
        return dk, dv
    return sum_pages(call, dk, call.k, dtype), sum_pages(call, dv, call.v, dtype)


def _block_sums(call: Call, config: Config) -> Tensor:
    """Zeros [1 or B, 1 or Hq, tiles per block, entries] for what every tile adds to the gradient of block_bias.

    Where batch elements (or heads) have lists of their own, an entry belongs to one of them, and one row holds all.
    """
    bias, plan = call.block_bias, call.plan
    assert bias is not None
    tiles_m, tiles_n = tiles_per_block(call, config)
    batch = 1 if plan.batch > 1 and bias.shape[0] == 1 else call.q.shape[0]
    heads = 1 if plan.heads > 1 and bias.shape[1] == 1 else call.q.shape[2]
    return torch.zeros((batch, heads, tiles_m * tiles_n, bias.shape[2]), dtype=torch.float32, device=bias.device)


def _try_each(call: Call, kernel: str, launch: Callable[[Config], None]) -> None:
    """Launch with the first configuration that the device has the resources for."""
    device = call.q.device
    target, shape = Target.of(device), arguments.shape_of(call, kernel)
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


# -- launches ----------------------------------------------------------------------------------------------------------


def _row_programs(call: Call, config: Config, pack: int) -> int:
    """Programs that kernels over rows need."""
    group = call.q.shape[2] // max(call.k.shape[2], 1) if call.plan.heads == 1 else 1
    return call.plan.row_order.numel() * over(call) * (group // pack) * tiles_per_block(call, config, pack)[0]


def _splits(call: Call, config: Config) -> int:
    """Pieces that the forward cuts every row into: see `config.pieces`."""
    pack = arguments.packed_heads(call, "forward")
    rows = max(call.plan.row_order.numel(), 1)
    steps = call.plan.indices.numel() // rows * tiles_per_block(call, config, pack)[1]
    return pieces(Target.of(call.q.device), config, _row_programs(call, config, pack), steps)


def _rows(call: Call, config: Config) -> dict[str, Any]:
    """What kernels over rows take beside what all take."""
    lists = lists_of(call, row_lists(call.plan, masked_ends=call.plan.block_size[1] % config.tile_n != 0))
    return {"lists": lists, "sizes": sizes_of(call, lists, call.plan.q_blocks)}


def _key_views(shared: dict[str, Any], call: Call, config: Config) -> dict[str, Any]:
    target = Target.of(call.q.device)
    return {f"{name}_view": view_of(shared[name], config.tile_n, config, target) for name in "kv"}


def forward_launch(call: Call, out: Tensor, lse: Tensor, config: Config) -> Launch:
    """The launch that fills ``out`` [B, Sq, Hq, Dv] and ``lse`` [B, Hq, Sq], both contiguous.

    With one more dimension in front, each row is cut into that many pieces, whose results `merge_launch` merges.
    """
    pack, splits = arguments.packed_heads(call, "forward"), out.shape[0] if out.ndim == 5 else 1
    shared = common(call)
    shared |= _rows(call, config) | _key_views(shared, call, config)
    traits = traits_of(call, config, pack=pack, splits=splits)
    shared |= {"out": out, "lse": lse, "sinks": call.sinks, "T": traits}
    return Launch(forward_kernel, _row_programs(call, config, pack) * splits, shared, config)


def merge_launch(parts: Tensor, parts_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch that merges the pieces of `forward_launch`."""
    rows, dim, tile = lse.numel(), out.shape[-1], 16
    given = {"parts": parts, "parts_lse": parts_lse, "out": out, "lse": lse, "rows": rows, "q_len": lse.shape[2]}
    constants = {"SPLITS": parts.shape[0], "DV": dim, "DV_PAD": arguments.padded(dim), "TILE": tile}
    given |= {"q_heads": lse.shape[1], **constants}
    return Launch(merge_kernel, -(-rows // tile), given, Config(16, 16, 4, 1))


def rows_launch(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    d_block_bias: Tensor | None,
    config: Config,
    d_query_bias: Tensor | None = None,
) -> Launch:
    """The launch that fills ``dq`` and, where given, ``d_block_bias`` (see `_block_sums`) and ``d_query_bias``."""
    shared = common(call)
    shared |= _rows(call, config) | _key_views(shared, call, config)
    shared |= {
        "dout": arguments.operand_of(dout),
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "d_block_bias": bias_of(d_block_bias),
        "d_query_bias": d_query_bias,
        "T": traits_of(call, config),
    }
    return Launch(rows_kernel, _row_programs(call, config, 1), shared, config)


def columns_launch(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    config: Config,
    d_key_bias: Tensor | None = None,
) -> Launch:
    """The launch that fills ``dk``, ``dv`` and, where given, ``d_key_bias``; and adds to ``dq`` in no fixed order."""
    shared, traits, target = common(call), traits_of(call, config), Target.of(call.q.device)
    ends = call.plan.block_size[0] % config.tile_m != 0
    lists = lists_of(call, column_lists(call.plan, traits.GROUP, masked_ends=ends))
    shared |= {
        "dout": arguments.operand_of(dout),
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "d_key_bias": d_key_bias,
        "lists": lists,
        "sizes": sizes_of(call, lists, call.plan.kv_blocks),
        "T": traits,
    }
    shared |= {f"{name}_view": view_of(shared[name], config.tile_m, config, target) for name in ("q", "dout")}
    return Launch(columns_kernel, lists.order.numel() * over(call) * traits.TILES_N, shared, config)


def bias_launch(call: Call, dout: Tensor, lse: Tensor, delta: Tensor, d_bias: Tensor, config: Config) -> Launch:
    """The launch that adds the gradient of every pair to ``d_bias``, zeros [1 or B, 1 or Hq, Sq, Sk]."""
    shared, traits = common(call) | _rows(call, config), traits_of(call, config)
    batches, heads = (whole // max(part, 1) for whole, part in zip(call.q.shape[::2], d_bias.shape[:2], strict=True))
    shared |= {
        "dout": arguments.operand_of(dout),
        "lse": lse,
        "delta": delta,
        "d_bias": bias_of(d_bias),
        "batches": batches,
        "heads": heads,
        "ACCUMULATE": batches * heads > 1,
        "T": traits,
    }
    owners = d_bias.shape[0] * d_bias.shape[1]
    return Launch(bias_kernel, owners * call.plan.q_blocks * traits.TILES_M, shared, config)
