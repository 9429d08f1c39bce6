"""The backward kernel of keys and values: one program per tile of keys, over the column's blocks.

Shape legend and units as in `tiles`; scores are transposed, [N, M]. The query heads that share a key head are summed in
order by one program, so the bits are the same every time. Queries that several columns reach are another matter: only
where the call does not ask for determinism are their gradients added here, atomically.
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
    load_block,
    load_rows,
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

__all__ = ["columns_kernel"]


@triton.jit
def columns_kernel(
    q,
    k,
    v,
    q_view,
    dout_view,
    dout,
    lse,
    delta,
    dq,
    dk,
    dv,
    d_key_bias,
    lists,
    geometry,
    rules,
    sizes,
    scales,
    q_heads,
    kv_heads,
    T: tl.constexpr,
):
    """Gradients of TILE_N keys and values of one key head, summed over the query heads that share it.

    ``lists.order`` has columns of the plan where heads share them, else columns of key heads (see
    `lists.ColumnLists.order`). ``dk`` and ``dv`` are contiguous [B, Sk, Hkv, ·], also where keys and values are read
    from pages. ``dq``, float32 zeros [B, Sq, Hq, D], gets the gradient of the queries if given, which spares the kernel
    over rows but sums in no fixed order. ``d_key_bias``, contiguous [B, Hq, Sk], gets the sum over all queries.
    """
    sizes = sizes_from(sizes)
    at, outer, _, tile = place(lists.order, sizes, 1, T.TILES_N, T.CHUNK)
    j, kv_head, batch = owner_of(at, outer, sizes, kv_heads, kv_heads, T)
    if not T.SHARED_HEADS:
        at = at // sizes.blocks * T.GROUP * sizes.blocks + j
    k_local = tl.load(geometry.kv_bounds + j)
    first = tile * T.TILE_N
    if first >= tl.load(geometry.kv_bounds + j + 1) - k_local:
        return

    wide = batch.to(tl.int64)
    keys = keys_of(j, k_local, first, batch, geometry, rules, sizes, True, T)
    pages = geometry.pages
    k_pointer, v_pointer = pointer_at(k, batch, kv_head, pages), pointer_at(v, batch, kv_head, pages)
    held = keys.inside
    if pages is not None:
        page = tl.load(pages + wide * sizes.kv_blocks + j)
        k_pointer += page.to(tl.int64) * k.batch
        v_pointer += page.to(tl.int64) * v.batch
        of_token = page + tl.zeros_like(keys.at)  # of a block that is not active it may be anything
        held = held & (of_token >= 0) & (of_token < sizes.pages)
    else:
        k_pointer += k_local.to(tl.int64) * k.token
        v_pointer += k_local.to(tl.int64) * v.token
    k_tile = load_block(k_pointer, k.token, keys.at, held, T.D, T.D_PAD, True, T)
    v_tile = load_block(v_pointer, v.token, keys.at, held, T.DV, T.DV_PAD, True, T)

    tokens = k_local + keys.at
    dtype: tl.constexpr = q.data.dtype.element_ty
    cols = tl.arange(0, T.D_PAD)
    k_gradient = zeros(T.TILE_N, T.D_PAD)
    v_gradient = zeros(T.TILE_N, T.DV_PAD)
    for inner in range(T.GROUP):
        head = kv_head * T.GROUP + inner
        rows = (wide * q_heads + head) * sizes.q_len
        dq_head = None
        if dq is not None:
            dq_head = dq + (wide * sizes.q_len * q_heads + head) * T.D
        d_bias = filled(T.TILE_N, 0.0)
        here = rules_at(rules, sizes, scales, batch, head)
        list_at = at if T.SHARED_HEADS else at + inner * sizes.blocks
        q_pointer, o_pointer = pointer_at(q, batch, head, None), pointer_at(dout, batch, head, None)
        begin, middle, last = slots_of(lists, list_at)
        for part in tl.static_range(2):  # blocks that are whole, then those that may need the positional mask
            begin, end = (begin, middle) if part == 0 else (middle, last)
            q_local = tl.load(lists.starts + begin)  # loaded a step ahead, so that no address waits for it
            # The loop with masks is short where it matters; that its loads overlap nothing leaves the other registers.
            for step in tl.range(begin * T.TILES_M, end * T.TILES_M, num_stages=1 if part == 1 else None):
                slot = step // T.TILES_M
                block, q_first, entry = (
                    tl.load(lists.blocks + slot),
                    (step % T.TILES_M) * T.TILE_M,
                    lists.entries + slot,
                )
                queries = queries_of(block, q_local, q_first, batch, geometry, rules, sizes, 1, part == 1, T)
                q_tile = load_step(q_pointer, q, q_view, queries, batch, head, None, T.D, T.D_PAD, part == 1, T)
                do_tile = load_step(
                    o_pointer, dout, dout_view, queries, batch, head, None, T.DV, T.DV_PAD, part == 1, T
                )
                rows_lse, rows_delta = load_rows(lse, delta, rows + q_local + queries.at, queries.inside)
                dropped, dscores = gradient_tile(
                    k_tile,
                    q_tile,
                    v_tile,
                    do_tile,
                    rows_lse,
                    rows_delta,
                    queries,
                    keys,
                    entry,
                    here,
                    rules,
                    scales,
                    part == 1,
                    False,
                    1,
                    T,
                )
                dropped = as_operand(dropped, dtype, T)
                v_gradient = tl.dot(dropped, do_tile, v_gradient, input_precision=T.PRECISION)
                if dq is not None:  # here keys do meet: those beyond the end of their block must add nothing
                    dscores = tl.where(keys.inside[:, None], dscores, 0.0)
                if d_key_bias is not None:
                    d_bias += tl.sum(dscores, 1)
                dscores = as_operand(dscores, dtype, T)
                k_gradient = tl.dot(dscores, q_tile, k_gradient, input_precision=T.PRECISION)
                if dq is not None:
                    product = tl.dot(tl.trans(dscores), k_tile, input_precision=T.PRECISION) * scales.plain
                    dq_tile = dq_head + q_local.to(tl.int64) * q_heads * T.D
                    dq_pointers = dq_tile + queries.at[:, None] * (q_heads * T.D) + cols[None, :]
                    inside = queries.inside[:, None] & (cols < T.D)[None, :]
                    tl.atomic_add(dq_pointers, product, mask=inside, sem="relaxed")
                q_local = tl.load(lists.starts + (step + 1) // T.TILES_M)
        if d_key_bias is not None:
            tl.store(d_key_bias + (wide * q_heads + head) * sizes.kv_len + tokens, d_bias, mask=keys.inside)
    wide_tokens = (wide * sizes.kv_len + tokens[:, None]) * kv_heads + kv_head
    v_cols = tl.arange(0, T.DV_PAD)
    k_gradient = (k_gradient * scales.plain).to(dk.dtype.element_ty)
    tl.store(dk + wide_tokens * T.D + cols[None, :], k_gradient, mask=keys.inside[:, None] & (cols < T.D)[None, :])
    v_gradient, v_in = v_gradient.to(dv.dtype.element_ty), (v_cols < T.DV)[None, :]
    tl.store(dv + wide_tokens * T.DV + v_cols[None, :], v_gradient, mask=keys.inside[:, None] & v_in)
