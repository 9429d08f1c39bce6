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
    load_block,
    load_rows,
    load_step,
    owner_of,
    place,
    pointer_at,
    rules_at,
    slots_of,
    tokens_of,
    zeros,
)

__all__ = ["rows_kernel"]


@triton.jit
def _rows(
    dq,
    d_bias,
    q_tile,
    do_tile,
    rows_lse,
    rows_delta,
    queries,
    begin,
    end,
    k,
    v,
    k_view,
    v_view,
    k_pointer,
    v_pointer,
    pages,
    batch,
    kv_head,
    lists,
    geometry,
    here,
    rules,
    sizes,
    scale,
    d_block_bias,
    block_sums,
    d_query_bias,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """Add what the slots ``begin … end − 1`` give to the gradients of a tile of queries."""
    dtype: tl.constexpr = k.data.dtype.element_ty
    k_local = tl.load(lists.starts + begin)  # loaded a step ahead, so that no address waits for it
    for step in range(begin * T.TILES_N, end * T.TILES_N):
        slot = step // T.TILES_N
        first = (step % T.TILES_N) * T.TILE_N
        block = tl.load(lists.blocks + slot)
        keys = tokens_of(
            block,
            k_local,
            first,
            geometry.kv_bounds,
            geometry.kv_start,
            rules.kv_segments,
            batch.to(tl.int64) * sizes.kv_len,
            T.TILE_N,
            1,
            T.BLOCK_N,
            MASKED,
        )
        k_tile = load_step(k_pointer, k, k_view, keys, batch, kv_head, pages, T.D, T.D_PAD, MASKED, T)
        v_tile = load_step(v_pointer, v, v_view, keys, batch, kv_head, pages, T.DV, T.DV_PAD, MASKED, T)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=T.PRECISION) * scale
        entry = lists.entries + slot
        _, dscores = gradient_tile(
            scores,
            do_tile,
            v_tile,
            rows_lse,
            rows_delta,
            queries,
            keys,
            entry,
            here,
            rules,
            sizes,
            MASKED,
            True,
            0,
            T,
        )
        if d_block_bias.data is not None:
            sums = block_sums + (step % T.TILES_N) * d_block_bias.query + tl.load(entry)
            tl.store(sums, tl.sum(tl.sum(dscores, 1), 0))
        if d_query_bias is not None:
            d_bias += tl.sum(dscores, 1)
        dq = tl.dot(as_operand(dscores, dtype, T), k_tile, dq, input_precision=T.PRECISION)
        k_local = tl.load(lists.starts + (step + 1) // T.TILES_N)
    return dq, d_bias


@triton.jit(do_not_specialize=["sizes"])
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
    queries = tokens_of(
        i,
        q_local,
        first,
        geometry.q_bounds,
        geometry.q_start,
        rules.q_segments,
        wide * sizes.q_len,
        T.TILE_M,
        1,
        T.BLOCK_M,
        True,
    )
    tokens, start = q_local + queries.at, q_local.to(tl.int64)
    q_pointer = pointer_at(q, batch, head, None) + start * q.token
    o_pointer = pointer_at(dout, batch, head, None) + start * dout.token
    q_tile = load_block(q_pointer, q.token, queries.at, queries.inside, T.D, T.D_PAD, True, T)
    do_tile = load_block(o_pointer, dout.token, queries.at, queries.inside, T.DV, T.DV_PAD, True, T)
    rows = (wide * q_heads + head) * sizes.q_len + tokens
    rows_lse, rows_delta = load_rows(lse, delta, rows, queries.inside)
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
    begin, middle, end = slots_of(lists, at)
    for part in tl.static_range(2):
        gradient, d_bias = _rows(
            gradient,
            d_bias,
            q_tile,
            do_tile,
            rows_lse,
            rows_delta,
            queries,
            begin if part == 0 else middle,
            middle if part == 0 else end,
            k,
            v,
            k_view,
            v_view,
            k_pointer,
            v_pointer,
            pages,
            batch,
            kv_head,
            lists,
            geometry,
            here,
            rules,
            sizes,
            scales.scores,
            d_block_bias,
            block_sums,
            d_query_bias,
            part == 1,
            T,
        )
    cols = tl.arange(0, T.D_PAD)
    out_pointers = dq + ((wide * sizes.q_len + tokens[:, None]) * q_heads + head) * T.D + cols[None, :]
    gradient = (gradient * scales.plain).to(dq.dtype.element_ty)
    tl.store(out_pointers, gradient, mask=queries.inside[:, None] & (cols < T.D)[None, :])
    if d_query_bias is not None:
        tl.store(d_query_bias + rows, d_bias, mask=queries.inside)
