"""The backward kernel of queries: one program per tile of queries, over the row's blocks.

Shape legend as in `forward`. Probabilities are recomputed from the LSE.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import adjust, as_operand, clamp_distance, dropout_keep, load_rows, load_tile, place

__all__ = ["rows_kernel"]


@triton.jit
def _rows(
    dq,
    q_tile,
    dout_tile,
    rows_lse,
    rows_delta,
    begin,
    end,
    k_head,
    v_head,
    k_token_stride,
    v_token_stride,
    blocks,
    starts,
    entries,
    kv_bounds,
    kv_start,
    q_first_position,
    q_local,
    offs_m,
    q_in,
    q_segment,
    kv_segments,
    padding,
    attn_bias,
    bias_query_stride,
    bias_key_stride,
    block_bias,
    d_block_bias,
    bias_columns,
    seed,
    batch,
    head,
    low,
    high,
    scale,
    keep_scale,
    threshold,
    MASKED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILES_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    ATTN_BIAS: tl.constexpr,
    HAS_BLOCK_BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Add what the slots ``begin … end − 1`` give to the gradient of a tile of queries."""
    offs_d = tl.arange(0, D_PAD)
    offs_v = tl.arange(0, DV_PAD)
    k_local = tl.load(starts + begin)  # loaded a step ahead, so that no address waits for it
    for step in range(begin * TILES_N, end * TILES_N):
        slot = step // TILES_N
        offs_n = (step % TILES_N) * TILE_N + tl.arange(0, TILE_N)
        if MASKED or HAS_DROPOUT:
            block = tl.load(blocks + slot)
        if MASKED:
            length = tl.load(kv_bounds + block + 1) - k_local
        else:
            length = BLOCK_N
        k_in = offs_n < length
        k_pointers = k_head + k_local.to(tl.int64) * k_token_stride + offs_n[:, None] * k_token_stride + offs_d[None, :]
        v_pointers = v_head + k_local.to(tl.int64) * v_token_stride + offs_n[:, None] * v_token_stride + offs_v[None, :]
        k_tile = as_operand(load_tile(k_pointers, k_in, offs_d < D, MASKED, D != D_PAD), dtype, INTERPRET)
        v_tile = as_operand(load_tile(v_pointers, k_in, offs_v < DV, MASKED, DV != DV_PAD), dtype, INTERPRET)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        if MASKED or HAS_DROPOUT:
            k_position = tl.load(kv_start + block)
            # The blocks' distance goes in first: a tile that never changed would be kept in registers.
            distance = (clamp_distance(k_position, q_first_position) + offs_n)[None, :] - offs_m[:, None]
        else:
            k_position = 0
            distance = 0
        if HAS_SEGMENTS:
            k_segment = tl.load(kv_segments + k_local + offs_n, mask=k_in, other=0)[None, :]
        else:
            k_segment = 0
        if HAS_BLOCK_BIAS:
            entry = tl.load(entries + slot)
        else:
            entry = 0
        scores = adjust(
            scores,
            distance,
            q_local + offs_m[:, None],
            k_local + offs_n[None, :],
            q_in[:, None],
            k_in[None, :],
            q_segment,
            k_segment,
            entry,
            low,
            high,
            padding,
            attn_bias,
            bias_query_stride,
            bias_key_stride,
            block_bias,
            MASKED,
            True,
            HAS_LOW,
            HAS_HIGH,
            HAS_PADDING,
            HAS_SEGMENTS,
            ATTN_BIAS,
            HAS_BLOCK_BIAS,
        )
        weights = tl.exp2(scores - rows_lse[:, None])
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if HAS_DROPOUT:
            q_position = q_first_position + offs_m[:, None]
            keep = dropout_keep(weights, seed, batch, head, q_position, k_position + offs_n[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - rows_delta[:, None])
        if BIAS_GRADIENT:
            tl.store(d_block_bias + (step % TILES_N) * bias_columns + entry, tl.sum(tl.sum(dscores, 1), 0))
        dq = tl.dot(as_operand(dscores, dtype, INTERPRET), k_tile, dq, input_precision=PRECISION)
        k_local = tl.load(starts + (step + 1) // TILES_N)
    return dq


@triton.jit(
    do_not_specialize=[
        "rows",
        "slow",
        "q_blocks",
        "q_len",
        "kv_len",
        "low",
        "high",
        "threshold",
        "first_batch",
        "first_head",
        "bias_columns",
    ]
)
def rows_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    d_block_bias,
    row_order,
    row_begin,
    row_middle,
    row_end,
    blocks,
    starts,
    entries,
    q_bounds,
    kv_bounds,
    q_start,
    kv_start,
    padding,
    q_segments,
    kv_segments,
    attn_bias,
    block_bias,
    seeds,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    dout_batch_stride,
    dout_token_stride,
    dout_head_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_query_stride,
    bias_key_stride,
    block_bias_batch_stride,
    block_bias_head_stride,
    d_bias_batch_stride,
    d_bias_head_stride,
    bias_columns,
    rows,
    slow,
    q_blocks,
    q_len,
    kv_len,
    q_heads,
    kv_heads,
    low,
    high,
    scale,
    plain_scale,
    keep_scale,
    threshold,
    first_batch,
    first_head,
    SHARED_BATCH: tl.constexpr,
    SHARED_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILES_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILES_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    ATTN_BIAS: tl.constexpr,
    HAS_BLOCK_BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of TILE_M queries and, per tile of scores, the sum that belongs to ``block_bias``.

    ``dq`` is contiguous [B, Sq, Hq, D]; ``d_block_bias`` [1 or B, 1 or Hq, TILES_M · TILES_N, bias_columns], zeros
    where no tile stores. ``scale`` includes log₂ e, ``plain_scale`` does not.
    """
    row, outer, inner, tile = place(row_order, rows, slow, GROUP if SHARED_HEADS else 1, TILES_M, CHUNK)
    i = row % q_blocks
    owner = row // q_blocks
    if SHARED_HEADS:
        kv_head = outer % kv_heads
        head = kv_head * GROUP + inner
        batch = outer // kv_heads if SHARED_BATCH else owner
    else:
        head = owner % q_heads
        kv_head = head // GROUP
        batch = outer if SHARED_BATCH else owner // q_heads
    q_local = tl.load(q_bounds + i)
    q_length = tl.load(q_bounds + i + 1) - q_local
    if tile * TILE_M >= q_length:
        return

    dtype: tl.constexpr = q.dtype.element_ty
    offs_m = tile * TILE_M + tl.arange(0, TILE_M)
    offs_d = tl.arange(0, D_PAD)
    offs_v = tl.arange(0, DV_PAD)
    q_in = offs_m < q_length
    wide = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    tokens = q_local + offs_m
    q_base = q + wide * q_batch_stride + wide_head * q_head_stride + q_local.to(tl.int64) * q_token_stride
    q_pointers = q_base + offs_m[:, None] * q_token_stride + offs_d[None, :]
    q_tile = as_operand(load_tile(q_pointers, q_in, offs_d < D, True, D != D_PAD), dtype, INTERPRET)
    o_base = dout + wide * dout_batch_stride + wide_head * dout_head_stride + q_local.to(tl.int64) * dout_token_stride
    o_pointers = o_base + offs_m[:, None] * dout_token_stride + offs_v[None, :]
    dout_tile = as_operand(load_tile(o_pointers, q_in, offs_v < DV, True, DV != DV_PAD), dtype, INTERPRET)
    rows_lse, rows_delta = load_rows(lse, delta, (wide * q_heads + head) * q_len + tokens, q_in)
    if HAS_PADDING:
        padding += wide * kv_len
    if HAS_SEGMENTS:
        kv_segments += wide * kv_len
        q_segment = tl.load(q_segments + wide * q_len + tokens, mask=q_in, other=0)[:, None]
    else:
        q_segment = 0
    if ATTN_BIAS:
        attn_bias += wide * bias_batch_stride + wide_head * bias_head_stride
    if HAS_BLOCK_BIAS:
        block_bias += wide * block_bias_batch_stride + wide_head * block_bias_head_stride
    if BIAS_GRADIENT:
        d_block_bias += wide * d_bias_batch_stride + wide_head * d_bias_head_stride
        d_block_bias += tile.to(tl.int64) * TILES_N * bias_columns
    if HAS_DROPOUT:
        seed = tl.load(seeds)
    else:
        seed = 0
    position = tl.load(q_start + i)

    gradient = tl.zeros([TILE_M, D_PAD], dtype=tl.float32)
    begin = tl.load(row_begin + row)
    middle = tl.load(row_middle + row)
    end = tl.load(row_end + row)
    for part in tl.static_range(2):
        gradient = _rows(
            gradient,
            q_tile,
            dout_tile,
            rows_lse,
            rows_delta,
            begin if part == 0 else middle,
            middle if part == 0 else end,
            k + wide * k_batch_stride + kv_head.to(tl.int64) * k_head_stride,
            v + wide * v_batch_stride + kv_head.to(tl.int64) * v_head_stride,
            k_token_stride,
            v_token_stride,
            blocks,
            starts,
            entries,
            kv_bounds,
            kv_start,
            position,
            q_local,
            offs_m,
            q_in,
            q_segment,
            kv_segments,
            padding,
            attn_bias,
            bias_query_stride,
            bias_key_stride,
            block_bias,
            d_block_bias,
            bias_columns,
            seed,
            first_batch + batch,
            first_head + head,
            low,
            high,
            scale,
            keep_scale,
            threshold,
            part == 1,
            TILE_N,
            TILES_N,
            BLOCK_N,
            D,
            DV,
            D_PAD,
            DV_PAD,
            HAS_LOW,
            HAS_HIGH,
            HAS_PADDING,
            HAS_SEGMENTS,
            ATTN_BIAS,
            HAS_BLOCK_BIAS,
            BIAS_GRADIENT,
            HAS_DROPOUT,
            INTERPRET,
            PRECISION,
            dtype,
        )
    out_pointers = dq + ((wide * q_len + tokens[:, None]) * q_heads + head) * D + offs_d[None, :]
    gradient = (gradient * plain_scale).to(dq.dtype.element_ty)
    tl.store(out_pointers, gradient, mask=q_in[:, None] & (offs_d < D)[None, :])
