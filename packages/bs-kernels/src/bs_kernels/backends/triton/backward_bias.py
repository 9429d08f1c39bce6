"""The backward kernel of `attn_bias` with a value per pair: one program per tile of queries of the bias.

Shape legend and units as in `tiles`. Batch elements and heads that share a bias are summed by one program, in order, so
the bits are the same every time.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import gradient_tile, load_block, load_rows, load_step, pointer_at, rules_at, slots_of, tokens_of

__all__ = ["bias_kernel"]


@triton.jit
def _add_pairs(
    out,
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
    ACCUMULATE: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """Add the gradients of the scores in the slots ``begin … end − 1`` to ``out``."""
    for step in range(begin * T.TILES_N, end * T.TILES_N):
        slot = step // T.TILES_N
        first = (step % T.TILES_N) * T.TILE_N
        block = tl.load(lists.blocks + slot)
        k_local = tl.load(lists.starts + slot)
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
        k_tile = load_step(k_pointer, k, None, keys, batch, kv_head, pages, T.D, T.D_PAD, MASKED, T)
        v_tile = load_step(v_pointer, v, None, keys, batch, kv_head, pages, T.DV, T.DV_PAD, MASKED, T)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=T.PRECISION) * scale
        entry = lists.entries + slot
        _, found = gradient_tile(
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
            False,
            0,
            T,
        )
        q_token, k_token = (queries.local + queries.at).to(tl.int64), (keys.local + keys.at).to(tl.int64)
        pointers = out + q_token[:, None] * d_bias.query + k_token[None, :] * d_bias.key
        inside = queries.inside[:, None] & keys.inside[None, :]
        if ACCUMULATE:
            found += tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, found, mask=inside)
        if ACCUMULATE:
            tl.debug_barrier()  # what other threads of this program have stored is seen when it is loaded again


@triton.jit(do_not_specialize=["sizes", "batches", "heads"])
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
        queries = tokens_of(
            i,
            q_local,
            first,
            geometry.q_bounds,
            geometry.q_start,
            rules.q_segments,
            batch.to(tl.int64) * sizes.q_len,
            T.TILE_M,
            1,
            T.BLOCK_M,
            True,
        )
        start = q_local.to(tl.int64)
        q_pointer = pointer_at(q, batch, head, None) + start * q.token
        o_pointer = pointer_at(dout, batch, head, None) + start * dout.token
        q_tile = load_block(q_pointer, q.token, queries.at, queries.inside, T.D, T.D_PAD, True, T)
        do_tile = load_block(o_pointer, dout.token, queries.at, queries.inside, T.DV, T.DV_PAD, True, T)
        rows = (batch.to(tl.int64) * q_heads + head) * sizes.q_len + q_local + queries.at
        rows_lse, rows_delta = load_rows(lse, delta, rows, queries.inside)
        pages = geometry.pages
        k_pointer, v_pointer = pointer_at(k, batch, kv_head, pages), pointer_at(v, batch, kv_head, pages)
        if pages is not None:
            pages += batch.to(tl.int64) * sizes.kv_blocks
        at = i
        if not T.SHARED_HEADS:
            at += head * sizes.blocks
        if not T.SHARED_BATCH:
            at += batch * sizes.blocks * (1 if T.SHARED_HEADS else q_heads)
        begin, middle, end = slots_of(lists, at)
        for part in tl.static_range(2):
            _add_pairs(
                out,
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
                ACCUMULATE,
                part == 1,
                T,
            )
