"""The backward kernel of `attn_bias` with a value per pair: one program per tile of queries of the bias.

Shape legend and units as in `tiles`. Batch elements and heads that share a bias are summed by one program, in order, so
the bits are the same every time.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import (
    gradient_tile,
    keys_of,
    load_queries,
    load_step,
    pointer_at,
    queries_of,
    rules_at,
    sizes_from,
    slots_of,
)

__all__ = ["bias_kernel"]


@triton.jit(do_not_specialize=["batches", "heads"])
def bias_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    d_bias,
    lists,
    geometry,
    rules,
    sizes,
    scales,
    q_heads,
    kv_heads,
    batches,
    heads,
    ACCUMULATE: tl.constexpr,
    T: tl.constexpr,
):
    """The gradient of the bias of TILE_M queries.

    ``d_bias``: a `Bias` of zeros, float32 [1 or B, 1 or Hq, Sq, Sk]; ``batches`` and ``heads`` of the call share each
    of its entries. ACCUMULATE: more than one pair of them does.
    """
    sizes = sizes_from(sizes)
    pid = tl.program_id(0)
    tile, rest = pid % T.TILES_M, pid // T.TILES_M
    i, owner = rest % sizes.blocks, rest // sizes.blocks
    out_batch, out_head = owner // (q_heads // heads), owner % (q_heads // heads)
    q_local = tl.load(geometry.q_bounds + i)
    first = tile * T.TILE_M
    if first >= tl.load(geometry.q_bounds + i + 1) - q_local:
        return
    out = d_bias.data + out_batch.to(tl.int64) * d_bias.batch + out_head.to(tl.int64) * d_bias.head
    for turn in range(batches * heads):
        batch, head = out_batch * batches + turn // heads, out_head * heads + turn % heads
        kv_head = head // T.GROUP
        here = rules_at(rules, sizes, scales, batch, head)
        queries = queries_of(i, q_local, first, batch, geometry, rules, sizes, 1, True, T)
        q_tile, do_tile, rows_lse, rows_delta = load_queries(
            q, dout, lse, delta, queries, batch, head, sizes, q_heads, T
        )
        pages = geometry.pages
        k_pointer, v_pointer = pointer_at(k, batch, kv_head, pages), pointer_at(v, batch, kv_head, pages)
        if pages is not None:
            pages += batch.to(tl.int64) * sizes.kv_blocks
        at = i
        if not T.SHARED_HEADS:
            at += head * sizes.blocks
        if not T.SHARED_BATCH:
            at += batch * sizes.blocks * (1 if T.SHARED_HEADS else q_heads)
        begin, middle, last = slots_of(lists, at)
        for part in tl.static_range(2):  # blocks that are whole, then those that may need the positional mask
            begin, end = (begin, middle) if part == 0 else (middle, last)
            for step in range(begin * T.TILES_N, end * T.TILES_N):
                slot = step // T.TILES_N
                block, k_first = tl.load(lists.blocks + slot), (step % T.TILES_N) * T.TILE_N
                k_local, entry = tl.load(lists.starts + slot), lists.entries + slot
                keys = keys_of(block, k_local, k_first, batch, geometry, rules, sizes, part == 1, T)
                k_tile = load_step(k_pointer, k, None, keys, batch, kv_head, pages, T.D, T.D_PAD, part == 1, T)
                v_tile = load_step(v_pointer, v, None, keys, batch, kv_head, pages, T.DV, T.DV_PAD, part == 1, T)
                _, found = gradient_tile(
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
                    False,
                    0,
                    T,
                )
                q_token, k_token = (q_local + queries.at).to(tl.int64), (k_local + keys.at).to(tl.int64)
                pointers = out + q_token[:, None] * d_bias.query + k_token[None, :] * d_bias.key
                inside = queries.inside[:, None] & keys.inside[None, :]
                if ACCUMULATE:
                    found += tl.load(pointers, mask=inside, other=0.0)
                tl.store(pointers, found, mask=inside)
                if ACCUMULATE:
                    tl.debug_barrier()  # what other threads of this program have stored is seen when it is loaded again
