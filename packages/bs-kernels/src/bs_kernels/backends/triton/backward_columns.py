"""The backward kernel of keys and values: one program per tile of keys, over the column's blocks.

Shape legend as in `forward`; scores are transposed, [N, M]. The query heads that share a key head are summed in order
by one program, so the bits are the same every time. Queries that several columns reach are another matter: only where
the call does not ask for determinism are their gradients added here, atomically.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import adjust, as_operand, clamp_distance, dropout_keep, load_rows, load_tile, place

__all__ = ["columns_kernel"]


@triton.jit
def _columns(
    dk,
    dv,
    k_tile,
    v_tile,
    begin,
    end,
    q_head,
    dout_head,
    dq_head,
    q_token_stride,
    dout_token_stride,
    dq_token_stride,
    lse,
    delta,
    rows,
    starts,
    entries,
    q_bounds,
    q_start,
    k_first_position,
    k_local,
    offs_n,
    k_in,
    k_segment,
    q_segments,
    padding,
    attn_bias,
    bias_query_stride,
    bias_key_stride,
    block_bias,
    seed,
    batch,
    head,
    low,
    high,
    scale,
    plain_scale,
    keep_scale,
    threshold,
    MASKED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILES_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    HAS_DROPOUT: tl.constexpr,
    ATOMIC: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Add what the transposed slots ``begin … end − 1`` give to the gradients of a tile of keys."""
    offs_d = tl.arange(0, D_PAD)
    offs_v = tl.arange(0, DV_PAD)
    q_local = tl.load(starts + begin)  # loaded a step ahead, so that no address waits for it
    # The loop with masks is short where it matters, and not overlapping it with loads leaves registers to the other.
    for step in tl.range(begin * TILES_M, end * TILES_M, num_stages=1 if MASKED else None):
        slot = step // TILES_M
        offs_m = (step % TILES_M) * TILE_M + tl.arange(0, TILE_M)
        if MASKED or HAS_DROPOUT:
            i = tl.load(rows + slot)
        if MASKED:
            length = tl.load(q_bounds + i + 1) - q_local
        else:
            length = BLOCK_M
        q_in = offs_m < length
        q_pointers = q_head + q_local.to(tl.int64) * q_token_stride + offs_m[:, None] * q_token_stride + offs_d[None, :]
        o_base = dout_head + q_local.to(tl.int64) * dout_token_stride
        o_pointers = o_base + offs_m[:, None] * dout_token_stride + offs_v[None, :]
        q_tile = as_operand(load_tile(q_pointers, q_in, offs_d < D, MASKED, D != D_PAD), dtype, INTERPRET)
        dout_tile = as_operand(load_tile(o_pointers, q_in, offs_v < DV, MASKED, DV != DV_PAD), dtype, INTERPRET)
        rows_lse, rows_delta = load_rows(lse, delta, q_local + offs_m, q_in)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        if MASKED or HAS_DROPOUT:
            q_position = tl.load(q_start + i)
            # The blocks' distance goes in first: a tile that never changed would be kept in registers.
            distance = (clamp_distance(k_first_position, q_position) + offs_n)[:, None] - offs_m[None, :]
        else:
            q_position = 0
            distance = 0
        if HAS_SEGMENTS:
            q_segment = tl.load(q_segments + q_local + offs_m, mask=q_in, other=0)[None, :]
        else:
            q_segment = 0
        if HAS_BLOCK_BIAS:
            entry = tl.load(entries + slot)
        else:
            entry = 0
        scores = adjust(
            scores,
            distance,
            q_local + offs_m[None, :],
            k_local + offs_n[:, None],
            q_in[None, :],
            k_in[:, None],
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
            False,
            HAS_LOW,
            HAS_HIGH,
            HAS_PADDING,
            HAS_SEGMENTS,
            ATTN_BIAS,
            HAS_BLOCK_BIAS,
        )
        weights = tl.exp2(scores - rows_lse[None, :])
        dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        dropped = weights
        if HAS_DROPOUT:
            k_position = k_first_position + offs_n[:, None]
            keep = dropout_keep(weights, seed, batch, head, q_position + offs_m[None, :], k_position, threshold)
            dropped = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dv = tl.dot(as_operand(dropped, dtype, INTERPRET), dout_tile, dv, input_precision=PRECISION)
        dscores = weights * (dweights - rows_delta[None, :])
        if ATOMIC:  # here keys do meet: those beyond the end of their block must add nothing
            dscores = tl.where(k_in[:, None], dscores, 0.0)
        dscores = as_operand(dscores, dtype, INTERPRET)
        dk = tl.dot(dscores, q_tile, dk, input_precision=PRECISION)
        if ATOMIC:
            part = tl.dot(tl.trans(dscores), k_tile, input_precision=PRECISION) * plain_scale
            dq_tile = dq_head + q_local.to(tl.int64) * dq_token_stride
            dq_pointers = dq_tile + offs_m[:, None] * dq_token_stride + offs_d[None, :]
            tl.atomic_add(dq_pointers, part, mask=q_in[:, None] & (offs_d < D)[None, :], sem="relaxed")
        q_local = tl.load(starts + (step + 1) // TILES_M)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "columns",
        "slow",
        "kv_blocks",
        "q_len",
        "kv_len",
        "low",
        "high",
        "threshold",
        "first_batch",
        "first_head",
    ]
)
def columns_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    dk,
    dv,
    col_order,
    col_begin,
    col_middle,
    col_end,
    t_rows,
    t_starts,
    t_entries,
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
    columns,
    slow,
    kv_blocks,
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
    TILE_N: tl.constexpr,
    TILES_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILES_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    HAS_DROPOUT: tl.constexpr,
    ATOMIC: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of TILE_N keys and values of one key head, summed over the query heads that share it.

    ``col_order`` lists columns of the plan where heads share them, else columns of key heads (see
    `lists.ColumnLists.col_order`). ``dk`` and ``dv`` are contiguous [B, Sk, Hkv, ·]. ATOMIC: the gradient of the
    queries is added to ``dq``, float32 [B, Sq, Hq, D], which spares the kernel over rows but sums in no fixed order.
    """
    column, outer, _, tile = place(col_order, columns, slow, 1, TILES_N, CHUNK)
    j = column % kv_blocks
    owner = column // kv_blocks
    if SHARED_HEADS:
        kv_head = outer % kv_heads
        batch = outer // kv_heads if SHARED_BATCH else owner
        first_list = column
    else:
        kv_head = owner % kv_heads
        batch = outer if SHARED_BATCH else owner // kv_heads
        first_list = owner * GROUP * kv_blocks + j
    k_local = tl.load(kv_bounds + j)
    k_length = tl.load(kv_bounds + j + 1) - k_local
    if tile * TILE_N >= k_length:
        return

    dtype: tl.constexpr = q.dtype.element_ty
    offs_n = tile * TILE_N + tl.arange(0, TILE_N)
    offs_d = tl.arange(0, D_PAD)
    offs_v = tl.arange(0, DV_PAD)
    k_in = offs_n < k_length
    wide = batch.to(tl.int64)
    tokens = k_local + offs_n
    k_base = k + wide * k_batch_stride + kv_head.to(tl.int64) * k_head_stride + k_local.to(tl.int64) * k_token_stride
    k_pointers = k_base + offs_n[:, None] * k_token_stride + offs_d[None, :]
    k_tile = as_operand(load_tile(k_pointers, k_in, offs_d < D, True, D != D_PAD), dtype, INTERPRET)
    v_base = v + wide * v_batch_stride + kv_head.to(tl.int64) * v_head_stride + k_local.to(tl.int64) * v_token_stride
    v_pointers = v_base + offs_n[:, None] * v_token_stride + offs_v[None, :]
    v_tile = as_operand(load_tile(v_pointers, k_in, offs_v < DV, True, DV != DV_PAD), dtype, INTERPRET)
    if HAS_PADDING:
        padding += wide * kv_len
    if HAS_SEGMENTS:
        q_segments += wide * q_len
        k_segment = tl.load(kv_segments + wide * kv_len + tokens, mask=k_in, other=0)[:, None]
    else:
        k_segment = 0
    if HAS_DROPOUT:
        seed = tl.load(seeds)
    else:
        seed = 0
    position = tl.load(kv_start + j)

    k_gradient = tl.zeros([TILE_N, D_PAD], dtype=tl.float32)
    v_gradient = tl.zeros([TILE_N, DV_PAD], dtype=tl.float32)
    for inner in range(GROUP):
        head = kv_head * GROUP + inner
        wide_head = head.to(tl.int64)
        at = first_list if SHARED_HEADS else first_list + inner * kv_blocks
        begin = tl.load(col_begin + at)
        middle = tl.load(col_middle + at)
        end = tl.load(col_end + at)
        for part in tl.static_range(2):
            k_gradient, v_gradient = _columns(
                k_gradient,
                v_gradient,
                k_tile,
                v_tile,
                begin if part == 0 else middle,
                middle if part == 0 else end,
                q + wide * q_batch_stride + wide_head * q_head_stride,
                dout + wide * dout_batch_stride + wide_head * dout_head_stride,
                dq + (wide * q_len * q_heads + head) * D if ATOMIC else dq,
                q_token_stride,
                dout_token_stride,
                q_heads * D,
                lse + (wide * q_heads + head) * q_len,
                delta + (wide * q_heads + head) * q_len,
                t_rows,
                t_starts,
                t_entries,
                q_bounds,
                q_start,
                position,
                k_local,
                offs_n,
                k_in,
                k_segment,
                q_segments,
                padding,
                attn_bias + wide * bias_batch_stride + wide_head * bias_head_stride if ATTN_BIAS else attn_bias,
                bias_query_stride,
                bias_key_stride,
                block_bias + wide * block_bias_batch_stride + wide_head * block_bias_head_stride
                if HAS_BLOCK_BIAS
                else block_bias,
                seed,
                first_batch + batch,
                first_head + head,
                low,
                high,
                scale,
                plain_scale,
                keep_scale,
                threshold,
                part == 1,
                TILE_M,
                TILES_M,
                BLOCK_M,
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
                HAS_DROPOUT,
                ATOMIC,
                INTERPRET,
                PRECISION,
                dtype,
            )
    wide_tokens = wide * kv_len + tokens[:, None]
    k_out = dk + (wide_tokens * kv_heads + kv_head) * D + offs_d[None, :]
    v_out = dv + (wide_tokens * kv_heads + kv_head) * DV + offs_v[None, :]
    k_gradient = (k_gradient * plain_scale).to(dk.dtype.element_ty)
    tl.store(k_out, k_gradient, mask=k_in[:, None] & (offs_d < D)[None, :])
    tl.store(v_out, v_gradient.to(dv.dtype.element_ty), mask=k_in[:, None] & (offs_v < DV)[None, :])
