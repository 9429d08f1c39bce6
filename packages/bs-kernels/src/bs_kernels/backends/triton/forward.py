"""The forward kernel: one program per tile of queries, online softmax over the row's blocks.

Shape legend and units as in `tiles`.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    adjust,
    as_operand,
    dropout_keep,
    filled,
    keys_of,
    load_block,
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

__all__ = ["forward_kernel", "merge_kernel"]


@triton.jit
def forward_kernel(
    q, k, v, k_view, v_view, out, lse, lists, geometry, rules, sinks, sizes, scales, q_heads, kv_heads, T: tl.constexpr
):
    """Output and LSE of the rows of a tile: queries of one row of the plan, for one batch element and PACK heads.

    Rows list their whole blocks first (``begin … middle``), then those that need the positional mask. ``out`` is
    contiguous [SPLITS, B, Sq, Hq, DV], ``lse`` [SPLITS, B, Hq, Sq]; piece s of a row is the s-th of equal parts of it.
    """
    sizes = sizes_from(sizes)
    at, outer, inner, tile = place(
        lists.order, sizes, T.GROUP // T.PACK if T.SHARED_HEADS else 1, T.TILES_M * T.SPLITS, T.CHUNK
    )
    piece = tile // T.TILES_M
    i, head, batch = owner_of(at, outer, sizes, kv_heads, q_heads, T)
    if T.SHARED_HEADS:
        kv_head = head
        head = kv_head * T.GROUP + inner * T.PACK
    else:
        kv_head = head // T.GROUP
    q_local = tl.load(geometry.q_bounds + i)
    first = (tile % T.TILES_M) * (T.TILE_M // T.PACK)
    if first >= tl.load(geometry.q_bounds + i + 1) - q_local:
        return

    if T.PACK > 1:
        head = head + tl.arange(0, T.TILE_M) % T.PACK
        of_row = head[:, None]
    else:
        of_row = head
    here = rules_at(rules, sizes, scales, batch, of_row)
    queries = queries_of(i, q_local, first, batch, geometry, rules, sizes, T.PACK, True, T)
    q_pointer = pointer_at(q, batch, of_row, None) + q_local.to(tl.int64) * q.token
    q_tile = load_block(q_pointer, q.token, queries.at, queries.inside, T.D, T.D_PAD, True, T)
    pages = geometry.pages
    k_pointer, v_pointer = pointer_at(k, batch, kv_head, pages), pointer_at(v, batch, kv_head, pages)
    if pages is not None:
        pages += batch.to(tl.int64) * sizes.kv_blocks

    acc = zeros(T.TILE_M, T.DV_PAD)
    total = filled(T.TILE_M, 0.0)
    top = filled(T.TILE_M, float("-inf"))
    begin, middle, last = slots_of(lists, at)
    if T.SPLITS > 1:
        length = (last - begin).to(tl.int64)
        last = (begin + length * (piece + 1) // T.SPLITS).to(tl.int32)
        begin = (begin + length * piece // T.SPLITS).to(tl.int32)
        middle = tl.minimum(tl.maximum(middle, begin), last)
    for part in tl.static_range(2):  # blocks that are whole, then those that may need the positional mask
        begin, end = (begin, middle) if part == 0 else (middle, last)
        k_local = tl.load(lists.starts + begin)  # loaded a step ahead, so that no address waits for it
        for step in range(begin * T.TILES_N, end * T.TILES_N):
            slot = step // T.TILES_N
            block, k_first = tl.load(lists.blocks + slot), (step % T.TILES_N) * T.TILE_N
            keys = keys_of(block, k_local, k_first, batch, geometry, rules, sizes, part == 1, T)
            k_tile = load_step(k_pointer, k, k_view, keys, batch, kv_head, pages, T.D, T.D_PAD, part == 1, T)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=T.PRECISION)
            if T.FUSED_SCALE and part == 0:
                new_top = tl.maximum(top, tl.max(scores, 1) * scales.scores)
                weights = tl.exp2(scores * scales.scores - new_top[:, None])
                rescale = tl.exp2(top - new_top)
            else:
                scores, entry = scores * scales.scores, lists.entries + slot
                scores = adjust(scores, queries, keys, entry, here, rules, part == 1, True, 0)
                new_top = tl.maximum(top, tl.max(scores, 1))
                finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # so that exp2(−inf − finite) = 0
                weights = tl.exp2(scores - finite[:, None])
                rescale = tl.exp2(top - finite)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None]
            top = new_top
            if rules.seeds is not None:
                weights = tl.where(dropout_keep(weights, queries, keys, here, 0), weights, 0.0)
            v_tile = load_step(v_pointer, v, v_view, keys, batch, kv_head, pages, T.DV, T.DV_PAD, part == 1, T)
            weights = as_operand(weights, k.data.dtype.element_ty, T)
            acc = tl.dot(weights, v_tile, acc, input_precision=T.PRECISION)
            k_local = tl.load(lists.starts + (step + 1) // T.TILES_N)

    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        if T.SPLITS > 1:
            sink = tl.where(piece == 0, sink, float("-inf"))
        new_top = tl.maximum(top, sink)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2(top - finite)
        total = total * rescale + tl.exp2(sink - finite)
        acc = acc * rescale[:, None]
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (scales.keep / total)[:, None]
    found = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    if T.SPLITS > 1:
        lse += piece.to(tl.int64) * sizes.rows
        out += piece.to(tl.int64) * sizes.rows * T.DV
    wide, tokens, cols = batch.to(tl.int64), queries.local + queries.at, tl.arange(0, T.DV_PAD)
    tl.store(lse + (wide * q_heads + head) * sizes.q_len + tokens, found, mask=queries.inside)
    rows = (wide * sizes.q_len + tokens) * q_heads + head
    out_pointers = out + rows[:, None] * T.DV + cols[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=queries.inside[:, None] & (cols < T.DV)[None, :])


@triton.jit(do_not_specialize=["rows", "q_len"])
def merge_kernel(
    parts,
    parts_lse,
    out,
    lse,
    rows,
    q_len,
    q_heads,
    SPLITS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge the pieces of rows, always in the same order: ``parts`` [SPLITS, B, Sq, Hq, DV] and their LSE."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside, cols = row < rows, tl.arange(0, DV_PAD)
    token, head = row // q_heads, row % q_heads
    at = (token // q_len * q_heads + head) * q_len + token % q_len
    stored = inside[:, None] & (cols < DV)[None, :]
    top = tl.full([TILE], float("-inf"), dtype=tl.float32)
    for piece in range(SPLITS):
        top = tl.maximum(top, tl.load(parts_lse + piece * rows.to(tl.int64) + at, mask=inside, other=float("-inf")))
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([TILE], dtype=tl.float32)
    acc = tl.zeros([TILE, DV_PAD], dtype=tl.float32)
    for piece in range(SPLITS):
        base = piece * rows.to(tl.int64)
        found = tl.load(parts_lse + base + at, mask=inside, other=float("-inf"))
        weight = tl.exp2((found - finite) * LOG2E)
        total += weight
        acc += tl.load(parts + (base + row)[:, None] * DV + cols[None, :], mask=stored, other=0.0) * weight[:, None]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse + at, tl.where(empty, float("-inf"), finite + tl.log2(total) * LN2), mask=inside)
    acc = acc / total[:, None]
    tl.store(out + row[:, None] * DV + cols[None, :], acc.to(out.dtype.element_ty), mask=stored)
