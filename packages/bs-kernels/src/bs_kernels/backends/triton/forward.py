"""The forward kernel: one program per tile of queries, online softmax over the row's blocks.

Shape legend: M queries and N keys per tile, D, DV head dims padded to a power of two. Scores are in units of log₂.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, adjust, as_operand, clamp_distance, dropout_keep, load_tile, place

__all__ = ["forward_kernel"]


@triton.jit
def _attend(
    acc,
    total,
    top,
    q_tile,
    begin,
    end,
    k_head,
    v_head,
    k_token_stride,
    v_token_stride,
    k_page_stride,
    v_page_stride,
    page_row,
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
    seed,
    batch,
    head,
    low,
    high,
    scale,
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
    HAS_DROPOUT: tl.constexpr,
    PAGED: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Take the slots ``begin … end − 1`` into the running sums of a tile. MASKED slots may need the positional mask."""
    offs_d = tl.arange(0, D_PAD)
    offs_v = tl.arange(0, DV_PAD)
    k_local = tl.load(starts + begin)  # loaded a step ahead, so that no address waits for it
    for step in range(begin * TILES_N, end * TILES_N):
        slot = step // TILES_N
        offs_n = (step % TILES_N) * TILE_N + tl.arange(0, TILE_N)
        if MASKED or HAS_DROPOUT or PAGED:
            block = tl.load(blocks + slot)
        if MASKED:
            length = tl.load(kv_bounds + block + 1) - k_local
        else:
            length = BLOCK_N
        k_in = offs_n < length
        if PAGED:
            page = tl.load(page_row + block).to(tl.int64)
            k_base = k_head + page * k_page_stride
            v_base = v_head + page * v_page_stride
        else:
            k_base = k_head + k_local.to(tl.int64) * k_token_stride
            v_base = v_head + k_local.to(tl.int64) * v_token_stride
        k_pointers = k_base + offs_n[:, None] * k_token_stride + offs_d[None, :]
        k_tile = as_operand(load_tile(k_pointers, k_in, offs_d < D, MASKED, D != D_PAD), dtype, INTERPRET)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED or HAS_DROPOUT:
            k_position = tl.load(kv_start + block)
            # The blocks' distance goes in first: a tile that never changed would be kept in registers.
            distance = (clamp_distance(k_position, q_first_position) + offs_n)[None, :] - offs_m[:, None]
        else:
            k_position = 0
            distance = 0

        if FUSED_SCALE and not MASKED:
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
            rescale = tl.exp2(top - new_top)
        else:
            scores = scores * scale
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
            new_top = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # so that exp2(−inf − finite) = 0
            weights = tl.exp2(scores - finite[:, None])
            rescale = tl.exp2(top - finite)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        top = new_top
        if HAS_DROPOUT:
            q_position = q_first_position + offs_m[:, None]
            keep = dropout_keep(weights, seed, batch, head, q_position, k_position + offs_n[None, :], threshold)
            weights = tl.where(keep, weights, 0.0)
        v_pointers = v_base + offs_n[:, None] * v_token_stride + offs_v[None, :]
        v_tile = as_operand(load_tile(v_pointers, k_in, offs_v < DV, MASKED, DV != DV_PAD), dtype, INTERPRET)
        acc = tl.dot(as_operand(weights, dtype, INTERPRET), v_tile, acc, input_precision=PRECISION)
        k_local = tl.load(starts + (step + 1) // TILES_N)
    return acc, total, top


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
    ]
)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    sinks,
    page_table,
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
    bias_batch_stride,
    bias_head_stride,
    bias_query_stride,
    bias_key_stride,
    block_bias_batch_stride,
    block_bias_head_stride,
    rows,
    slow,
    q_blocks,
    kv_blocks,
    q_len,
    kv_len,
    q_heads,
    kv_heads,
    low,
    high,
    scale,
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
    HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PAGED: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and LSE of TILE_M queries of one row of the plan, for one batch element and head.

    Rows list their whole blocks first (``row_begin … row_middle``), then those that need the positional mask. ``scale``
    includes log₂ e. ``out`` is contiguous [B, Sq, Hq, DV], ``lse`` [B, Hq, Sq].
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
    q_base = q + wide * q_batch_stride + head.to(tl.int64) * q_head_stride + q_local.to(tl.int64) * q_token_stride
    q_pointers = q_base + offs_m[:, None] * q_token_stride + offs_d[None, :]
    q_tile = as_operand(load_tile(q_pointers, q_in, offs_d < D, True, D != D_PAD), dtype, INTERPRET)
    if PAGED:
        page_row = page_table + wide * kv_blocks
        k_head = k + kv_head.to(tl.int64) * k_head_stride
        v_head = v + kv_head.to(tl.int64) * v_head_stride
    else:
        page_row = page_table
        k_head = k + wide * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
        v_head = v + wide * v_batch_stride + kv_head.to(tl.int64) * v_head_stride
    if HAS_PADDING:
        padding += wide * kv_len
    if HAS_SEGMENTS:
        kv_segments += wide * kv_len
        q_segment = tl.load(q_segments + wide * q_len + q_local + offs_m, mask=q_in, other=0)[:, None]
    else:
        q_segment = 0
    if ATTN_BIAS:
        attn_bias += wide * bias_batch_stride + head.to(tl.int64) * bias_head_stride
    if HAS_BLOCK_BIAS:
        block_bias += wide * block_bias_batch_stride + head.to(tl.int64) * block_bias_head_stride
    if HAS_DROPOUT:
        seed = tl.load(seeds)
    else:
        seed = 0
    position = tl.load(q_start + i)

    acc = tl.zeros([TILE_M, DV_PAD], dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    top = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    begin = tl.load(row_begin + row)
    middle = tl.load(row_middle + row)
    end = tl.load(row_end + row)
    for part in tl.static_range(2):
        acc, total, top = _attend(
            acc,
            total,
            top,
            q_tile,
            begin if part == 0 else middle,
            middle if part == 0 else end,
            k_head,
            v_head,
            k_token_stride,
            v_token_stride,
            k_batch_stride,
            v_batch_stride,
            page_row,
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
            seed,
            first_batch + batch,
            first_head + head,
            low,
            high,
            scale,
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
            HAS_DROPOUT,
            PAGED,
            FUSED_SCALE,
            INTERPRET,
            PRECISION,
            dtype,
        )

    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2(top - finite)
        total = total * rescale + tl.exp2(sink - finite)
        acc = acc * rescale[:, None]
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (keep_scale / total)[:, None]
    found = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tokens = q_local + offs_m
    tl.store(lse + (wide * q_heads + head) * q_len + tokens, found, mask=q_in)
    out_pointers = out + ((wide * q_len + tokens[:, None]) * q_heads + head) * DV + offs_v[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=q_in[:, None] & (offs_v < DV)[None, :])
