"""Pieces that all Triton kernels share: which tile a program computes, loads, masks, biases, dropout, and the gradient
of a tile of scores.

Triton reads annotations as values, so this module does without ``from __future__ import annotations``. Shape legend: M
queries and N keys per tile, D, DV head dims padded to a power of two. Scores are in units of log₂. They lie [M, N], or
transposed [N, M]: AXIS says which axis the queries are on.

What a function returns has no None in it: Triton 3.6 refuses that. Members that do not apply are 0.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .operands import Here, Sizes, Tokens

__all__ = [
    "LN2",
    "LOG2E",
    "adjust",
    "along",
    "as_operand",
    "distances",
    "dropout_keep",
    "filled",
    "gradient_tile",
    "keys_of",
    "load_block",
    "load_queries",
    "load_rows",
    "load_step",
    "owner_of",
    "place",
    "pointer_at",
    "queries_of",
    "rules_at",
    "sizes_from",
    "slots_of",
    "zeros",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# -- which tile --------------------------------------------------------------------------------------------------------


@triton.jit
def sizes_from(written):
    """The numbers that `Sizes.written` wrote."""
    return Sizes(
        written.lists >> 2,
        written.slow >> 2,
        written.blocks >> 2,
        written.kv_blocks >> 2,
        written.q_len >> 2,
        written.kv_len >> 2,
        written.first_batch >> 2,
        written.first_head >> 2,
        written.pages >> 2,
        written.rows >> 2,
    )


@triton.jit
def place(order, sizes, FAST: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr):
    """Which tile this program computes: ``(list, slow index, fast index, tile)``.

    Lists are taken in the order of ``order``, CHUNK at a time; within a chunk the slow index (batch element, key head)
    changes last, then the list, then the fast index (query heads that share keys), then the tile. So long lists start
    first, and programs that run side by side read neighbouring keys of one head.
    """
    pid = tl.program_id(0)
    chunk = pid // (sizes.slow * FAST * TILES * CHUNK)
    rest = pid % (sizes.slow * FAST * TILES * CHUNK)
    size = tl.minimum(sizes.lists - chunk * CHUNK, CHUNK)
    outer = rest // (size * FAST * TILES)
    rest = rest % (size * FAST * TILES)
    at = tl.load(order + chunk * CHUNK + rest // (FAST * TILES))
    return at, outer, (rest // TILES) % FAST, rest % TILES


@triton.jit
def owner_of(at, outer, sizes, kv_heads, units, T: tl.constexpr):
    """Whose list ``at`` is, expanded by the slow index: ``(block, head, batch)``.

    Where heads share lists, the head is a key head; else it is one of the ``units`` heads that have lists.
    """
    owner = at // sizes.blocks
    if T.SHARED_HEADS:
        head = outer % kv_heads
        batch = outer // kv_heads if T.SHARED_BATCH else owner
    else:
        head = owner % units
        batch = outer if T.SHARED_BATCH else owner // units
    return at % sizes.blocks, head, batch


@triton.jit
def slots_of(lists, at):
    """Where a list begins, where its slots begin to need the positional mask, and where it ends."""
    return tl.load(lists.begin + at), tl.load(lists.middle + at), tl.load(lists.end + at)


@triton.jit
def tokens_of(
    block,
    local,
    first,
    bounds,
    positions,
    segments,
    offset,
    TILE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tokens of a tile that begins at ``first`` in a block. Unless MASKED, all BLOCK of them are known to exist.

    ``segments`` are None or the segment ids of all batch elements; those of this one begin at ``offset``.
    """
    rows = tl.arange(0, TILE)
    if PACK > 1:
        at = first + rows // PACK
    else:
        at = first + rows
    if MASKED:
        length = tl.load(bounds + block + 1) - local
    else:
        length = BLOCK
    inside = at < length
    if PACK > 1:
        inside = inside & (rows < TILE // PACK * PACK)
    if segments is not None:
        segment = tl.load(segments + offset + local + at, mask=inside, other=0)
    else:
        segment = 0
    return Tokens(block, local, tl.load(positions + block), first, at, inside, segment)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile to sum in."""
    return tl.zeros([ROWS, COLS], dtype=tl.float32)


@triton.jit
def filled(SIZE: tl.constexpr, value):
    """A vector of one number per row."""
    return tl.full([SIZE], value, dtype=tl.float32)


# -- loads -------------------------------------------------------------------------------------------------------------


@triton.jit
def as_operand(x, dtype: tl.constexpr, T: tl.constexpr):
    """Round to the operands' dtype; the interpreter multiplies the rounded values in float32, which loses nothing."""
    y = x.to(dtype)
    if T.INTERPRET:
        y = y.to(tl.float32)
    return y


@triton.jit
def pointer_at(operand, batch, head, pages):
    """Where a head (and batch element, unless pages say where its blocks are) begins."""
    pointer = operand.data + head.to(tl.int64) * operand.head
    if pages is None:
        pointer += batch.to(tl.int64) * operand.batch
    return pointer


@triton.jit
def load_block(
    pointer, token_stride, at, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr
):
    """Load the tokens ``at`` [n, PADDED] of a block, zeros unless they are ``inside`` and beyond WIDTH."""
    cols = tl.arange(0, PADDED)
    pointers = pointer + at[:, None] * token_stride + cols[None, :]
    if MASKED and WIDTH != PADDED:
        tile = tl.load(pointers, mask=inside[:, None] & (cols < WIDTH)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return as_operand(tile, pointer.dtype.element_ty, T)


@triton.jit
def load_step(
    pointer,
    operand,
    view,
    tokens,
    batch,
    head,
    pages,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """Load a tile that a loop comes to.

    Args:
        pointer: of `pointer_at`.
        operand: the tensor.
        view: its descriptor [B, H, S, D], or None.
        tokens: which; their block is whole unless MASKED.
        batch, head: whose.
        pages: this batch element's row of the page table, or None.
    """
    start = tokens.local
    if pages is not None:
        batch = tl.load(pages + tokens.block).to(tl.int32)
        start = 0
    if view is not None and not MASKED:
        tile = view.load([batch, head, start + tokens.first, 0])
        tile = as_operand(tile.reshape(tokens.at.shape[0], PADDED), pointer.dtype.element_ty, T)
    else:
        if pages is not None:
            pointer += batch.to(tl.int64) * operand.batch
        else:
            pointer += start.to(tl.int64) * operand.token
        tile = load_block(pointer, operand.token, tokens.at, tokens.inside, WIDTH, PADDED, MASKED, T)
    return tile


@triton.jit
def load_rows(lse, delta, offset, inside):
    """LSE in units of log₂ and delta of some queries; +inf and 0 where there is no query or no key."""
    found = tl.load(lse + offset, mask=inside, other=float("-inf"))
    empty = found == float("-inf")
    rows = tl.where(empty, float("inf"), found * LOG2E)  # exp2(score − inf) = 0, also where the score is −inf
    return rows, tl.where(empty, 0.0, tl.load(delta + offset, mask=inside, other=0.0))


@triton.jit
def queries_of(
    block, local, first, batch, geometry, rules, sizes, PACK: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr
):
    """`tokens_of` TILE_M rows of queries."""
    bounds, positions, offset = geometry.q_bounds, geometry.q_start, batch.to(tl.int64) * sizes.q_len
    segments = rules.q_segments
    return tokens_of(block, local, first, bounds, positions, segments, offset, T.TILE_M, PACK, T.BLOCK_M, MASKED)


@triton.jit
def keys_of(block, local, first, batch, geometry, rules, sizes, MASKED: tl.constexpr, T: tl.constexpr):
    """`tokens_of` TILE_N keys."""
    bounds, positions, offset = geometry.kv_bounds, geometry.kv_start, batch.to(tl.int64) * sizes.kv_len
    segments = rules.kv_segments
    return tokens_of(block, local, first, bounds, positions, segments, offset, T.TILE_N, 1, T.BLOCK_N, MASKED)


@triton.jit
def load_queries(q, dout, lse, delta, queries, batch, head, sizes, q_heads, T: tl.constexpr):
    """All that a backward reads of a tile of queries: q, dO, and `load_rows`."""
    start = queries.local.to(tl.int64)
    q_pointer = pointer_at(q, batch, head, None) + start * q.token
    o_pointer = pointer_at(dout, batch, head, None) + start * dout.token
    q_tile = load_block(q_pointer, q.token, queries.at, queries.inside, T.D, T.D_PAD, True, T)
    do_tile = load_block(o_pointer, dout.token, queries.at, queries.inside, T.DV, T.DV_PAD, True, T)
    rows = (batch.to(tl.int64) * q_heads + head) * sizes.q_len + queries.local + queries.at
    rows_lse, rows_delta = load_rows(lse, delta, rows, queries.inside)
    return q_tile, do_tile, rows_lse, rows_delta


# -- scores ------------------------------------------------------------------------------------------------------------


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector as the rows (0) or the columns (1) of a tile."""
    if AXIS == 0:
        y = x[:, None]
    else:
        y = x[None, :]
    return y


@triton.jit
def rules_at(rules, sizes, scales, batch, head):
    """The rules at a batch element and query head (a scalar, or [M, 1] where rows differ)."""
    wide, wide_head = batch.to(tl.int64), head.to(tl.int64)
    padding, attn_bias, block_bias, seed = 0, 0, 0, 0
    if rules.padding is not None:
        padding = rules.padding + wide * sizes.kv_len
    if rules.attn_bias is not None:
        attn_bias = rules.attn_bias + wide * rules.attn_batch + wide_head * rules.attn_head
    if rules.block_bias is not None:
        block_bias = rules.block_bias + wide * rules.block_batch + wide_head * rules.block_head
    if rules.seeds is not None:
        seed = tl.load(rules.seeds)
    return Here(
        padding,
        attn_bias,
        block_bias,
        seed,
        sizes.first_batch + batch,
        sizes.first_head + head,
        rules.threshold,
        scales.keep,
    )


@triton.jit
def distances(q, k, AXIS: tl.constexpr):
    """Key − query position of every pair as int32; blocks further apart than any mask's bound are clamped."""
    far = k.position.to(tl.int64) - q.position.to(tl.int64)
    near = tl.minimum(tl.maximum(far, -1500000000), 1500000000).to(tl.int32)
    # The blocks' distance goes in first: a tile that never changed would be kept in registers.
    return along(near + k.at, 1 - AXIS) - along(q.at, AXIS)


@triton.jit
def adjust(scores, q, k, entry, here, rules, MASKED: tl.constexpr, ENDS: tl.constexpr, AXIS: tl.constexpr):
    """Add biases to scores and set those that a mask drops to −inf.

    Args:
        scores: float32, scaled, times log₂ e.
        q, k: `Tokens` of the tile.
        entry: where block_bias is read.
        here: the rules at this batch element and head; ``rules`` say which there are.
        MASKED: the band or the end of a block may cut into this tile.
        ENDS: whether keys beyond the end of their block are masked. Where scores of one key never meet those of
            another, they need not be; queries beyond the end never do.
        AXIS: that of the queries.
    """
    k_in = along(k.inside, 1 - AXIS)
    if rules.block_bias is not None:
        scores += tl.load(here.block_bias + tl.load(entry)).to(tl.float32) * LOG2E
    if rules.attn_bias is not None:
        q_token, k_token = along(q.local + q.at, AXIS).to(tl.int64), along(k.local + k.at, 1 - AXIS).to(tl.int64)
        pointers = here.attn_bias + q_token * rules.attn_query + k_token * rules.attn_key
        bias = tl.load(pointers, mask=along(q.inside, AXIS) & k_in, other=0)
        if bias.dtype == tl.uint8:
            scores = tl.where(bias != 0, scores, float("-inf"))
        else:
            scores += bias.to(tl.float32) * LOG2E
    if MASKED:
        if ENDS:
            scores = tl.where(k_in, scores, float("-inf"))
        if rules.low is not None:
            scores = tl.where(distances(q, k, AXIS) >= rules.low, scores, float("-inf"))
        if rules.high is not None:
            scores = tl.where(distances(q, k, AXIS) <= rules.high, scores, float("-inf"))
    if rules.padding is not None:
        real = tl.load(here.padding + k.local + k.at, mask=k.inside, other=0) != 0
        scores = tl.where(along(real, 1 - AXIS), scores, float("-inf"))
    if rules.q_segments is not None:
        scores = tl.where(along(q.segment, AXIS) == along(k.segment, 1 - AXIS), scores, float("-inf"))
    return scores


@triton.jit
def dropout_keep(like, q, k, here, AXIS: tl.constexpr):
    """Which probabilities dropout keeps; `bs_kernels.philox` defines the same function.

    ``like``: a float tile, gives the shape. ``here.threshold``: ⌊p · 2³²⌋ as the int32 with the same bits.
    """
    zero = tl.zeros_like(like).to(tl.int32)
    q_position, k_position = along(q.position + q.at, AXIS), along(k.position + k.at, 1 - AXIS)
    word, _, _, _ = tl.philox(here.seed, zero + here.batch, zero + here.head, zero + q_position, zero + k_position)
    return word >= here.threshold.to(tl.uint32, bitcast=True)


@triton.jit
def gradient_tile(
    left,
    right,
    d_left,
    d_right,
    rows_lse,
    rows_delta,
    q,
    k,
    entry,
    here,
    rules,
    scales,
    MASKED: tl.constexpr,
    ENDS: tl.constexpr,
    AXIS: tl.constexpr,
    T: tl.constexpr,
):
    """Probabilities after dropout, and the gradient of the scores, from the LSE.

    Args:
        left, right: tiles whose product are the scores: Q and K, or K and Q.
        d_left, d_right: tiles whose product is the gradient of the probabilities: dO and V, or V and dO.
        rows_lse, rows_delta: of `load_rows`.
        q, k, entry, here, rules, MASKED, ENDS, AXIS: as in `adjust`.
    """
    scores = tl.dot(left, tl.trans(right), input_precision=T.PRECISION) * scales.scores
    scores = adjust(scores, q, k, entry, here, rules, MASKED, ENDS, AXIS)
    weights = tl.exp2(scores - along(rows_lse, AXIS))
    dweights = tl.dot(d_left, tl.trans(d_right), input_precision=T.PRECISION)
    dropped = weights
    if rules.seeds is not None:
        keep = dropout_keep(weights, q, k, here, AXIS)
        dropped = tl.where(keep, weights * here.keep_scale, 0.0)
        dweights = tl.where(keep, dweights * here.keep_scale, 0.0)
    return dropped, weights * (dweights - along(rows_delta, AXIS))
