"""The backward kernel of queries: one program per tile of queries, over the row's blocks.

Shape legend and units as in `tiles`. Probabilities are recomputed from the LSE.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import (
    as_operand,
    filled,
    gradient_tile,
    keys_of,
    load_queries,
    load_step,
    owner_of,
    place,
    pointer_at,
    queries_of,
    rules_at,
    sizes_from,
    slots_of,
    zeros,
)

__all__ = ["rows_kernel"]


@triton.jit
def rows_kernel(
    q,
    k,
    v,
    k_view,
    v_view,
    dout,
    lse,
    delta,
    dq,
    d_block_bias,
    d_query_bias,
    lists,
    geometry,
    rules,
    sizes,
    scales,
    q_heads,
    kv_heads,
    T: tl.constexpr,
):
    """Gradient of TILE_M queries and, where asked for, what they give to the gradients of biases.

    ``dq`` is contiguous [B, Sq, Hq, D]; ``d_block_bias`` a `Bias` [1 or B, 1 or Hq, TILES_M · TILES_N, entries], zeros
    where no tile stores; ``d_query_bias`` contiguous [B, Hq, Sq]: the sum over all keys.
    """
    sizes = sizes_from(sizes)
    at, outer, inner, tile = place(lists.order, sizes, T.GROUP if T.SHARED_HEADS else 1, T.TILES_M, T.CHUNK)
    i, head, batch = owner_of(at, outer, sizes, kv_heads, q_heads, T)
    if T.SHARED_HEADS:
        kv_head = head
        head = kv_head * T.GROUP + inner
    else:
        kv_head = head // T.GROUP
    q_local = tl.load(geometry.q_bounds + i)
    first = tile * T.TILE_M
    if first >= tl.load(geometry.q_bounds + i + 1) - q_local:
        return

    wide, wide_head = batch.to(tl.int64), head.to(tl.int64)
    here = rules_at(rules, sizes, scales, batch, head)
    queries = queries_of(i, q_local, first, batch, geometry, rules, sizes, 1, True, T)
    q_tile, do_tile, rows_lse, rows_delta = load_queries(q, dout, lse, delta, queries, batch, head, sizes, q_heads, T)
    pages = geometry.pages
    k_pointer, v_pointer = pointer_at(k, batch, kv_head, pages), pointer_at(v, batch, kv_head, pages)
    if pages is not None:
        pages += wide * sizes.kv_blocks
    block_sums = None
    if d_block_bias.data is not None:
        block_sums = d_block_bias.data + wide * d_block_bias.batch + wide_head * d_block_bias.head
        block_sums += tile.to(tl.int64) * T.TILES_N * d_block_bias.query

    gradient = zeros(T.TILE_M, T.D_PAD)
    d_bias = filled(T.TILE_M, 0.0)
    begin, middle, last = slots_of(lists, at)
    for part in tl.static_range(2):  # blocks that are whole, then those that may need the positional mask
        begin, end = (begin, middle) if part == 0 else (middle, last)
        k_local = tl.load(lists.starts + begin)  # loaded a step ahead, so that no address waits for it
        for step in range(begin * T.TILES_N, end * T.TILES_N):
            slot = step // T.TILES_N
            block, k_first = tl.load(lists.blocks + slot), (step % T.TILES_N) * T.TILE_N
            keys, entry = (
                keys_of(block, k_local, k_first, batch, geometry, rules, sizes, part == 1, T),
                lists.entries + slot,
            )
            k_tile = load_step(k_pointer, k, k_view, keys, batch, kv_head, pages, T.D, T.D_PAD, part == 1, T)
            v_tile = load_step(v_pointer, v, v_view, keys, batch, kv_head, pages, T.DV, T.DV_PAD, part == 1, T)
            _, dscores = gradient_tile(
                q_tile,
                k_tile,
                do_tile,
                v_tile,
                rows_lse,
                rows_delta,
                queries,
                keys,
                entry,
                here,
                rules,
                scales,
                part == 1,
                True,
                0,
                T,
            )
            if d_block_bias.data is not None:
                sums = block_sums + (step % T.TILES_N) * d_block_bias.query + tl.load(entry)
                tl.store(sums, tl.sum(tl.sum(dscores, 1), 0))
            if d_query_bias is not None:
                d_bias += tl.sum(dscores, 1)
            dscores = as_operand(dscores, k.data.dtype.element_ty, T)
            gradient = tl.dot(dscores, k_tile, gradient, input_precision=T.PRECISION)
            k_local = tl.load(lists.starts + (step + 1) // T.TILES_N)
    rows = (wide * q_heads + head) * sizes.q_len + q_local + queries.at
    tokens = q_local + queries.at
    cols = tl.arange(0, T.D_PAD)
    out_pointers = dq + ((wide * sizes.q_len + tokens[:, None]) * q_heads + head) * T.D + cols[None, :]
    gradient = (gradient * scales.plain).to(dq.dtype.element_ty)
    tl.store(out_pointers, gradient, mask=queries.inside[:, None] & (cols < T.D)[None, :])
    if d_query_bias is not None:
        tl.store(d_query_bias + rows, d_bias, mask=queries.inside)
