"""Pieces that all Triton kernels share: which tile a program computes, loads, masks, biases and dropout.

Triton reads annotations as values, so this module does without ``from __future__ import annotations``. Coordinates come
expanded to two dimensions ([M, 1] and [1, N], or the other way round), so that one helper serves scores and their
transposes.
"""

# Triton compiles what follows; to a type checker of Python it makes no sense.
# pyright: reportOperatorIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "adjust", "as_operand", "clamp_distance", "dropout_keep", "load_rows", "load_tile", "place"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(order, count, slow, FAST: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr):
    """Which tile this program computes: ``(list, slow index, fast index, tile)``.

    Lists are taken in the order of ``order``, CHUNK at a time; within a chunk the slow index (batch element, key head)
    changes last, then the list, then the fast index (query heads that share keys), then the tile. So long lists start
    first, and programs that run side by side read neighbouring keys of one head.
    """
    pid = tl.program_id(0)
    chunk = pid // (slow * FAST * TILES * CHUNK)
    rest = pid % (slow * FAST * TILES * CHUNK)
    size = tl.minimum(count - chunk * CHUNK, CHUNK)
    outer = rest // (size * FAST * TILES)
    rest = rest % (size * FAST * TILES)
    at = tl.load(order + chunk * CHUNK + rest // (FAST * TILES))
    return at, outer, (rest // TILES) % FAST, rest % TILES


@triton.jit
def load_tile(pointers, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load a tile, zeros where ``rows`` [M] or ``cols`` [D] is false. What is not masked is known to be true."""
    if MASK_ROWS and MASK_COLS:
        tile = tl.load(pointers, mask=rows[:, None] & cols[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None], other=0.0)
    elif MASK_COLS:
        tile = tl.load(pointers, mask=cols[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(lse, delta, offset, inside):
    """LSE in units of log₂ and delta of some queries; +inf and 0 where there is no query or no key."""
    found = tl.load(lse + offset, mask=inside, other=float("-inf"))
    empty = found == float("-inf")
    rows = tl.where(empty, float("inf"), found * LOG2E)  # exp2(score − inf) = 0, also where the score is −inf
    return rows, tl.where(empty, 0.0, tl.load(delta + offset, mask=inside, other=0.0))


@triton.jit
def as_operand(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Round to the operands' dtype; the interpreter multiplies the rounded values in float32, which loses nothing."""
    y = x.to(dtype)
    if INTERPRET:
        y = y.to(tl.float32)
    return y


@triton.jit
def clamp_distance(k_start, q_start):
    """Distance of two absolute positions as int32; clamped beyond every bound that a mask can have."""
    far = k_start.to(tl.int64) - q_start.to(tl.int64)
    return tl.minimum(tl.maximum(far, -1500000000), 1500000000).to(tl.int32)


@triton.jit
def adjust(
    scores,
    distance,
    q_token,
    k_token,
    q_in,
    k_in,
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
    MASKED: tl.constexpr,
    ENDS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    ATTN_BIAS: tl.constexpr,
    HAS_BLOCK_BIAS: tl.constexpr,
):
    """Add biases to scores (in units of log₂) and set those that a mask drops to −inf.

    Args:
        scores: float32, scaled, times log₂ e.
        distance: key − query position of every pair.
        q_token, k_token: local tokens; q_in, k_in: whether they are part of their block.
        q_segment, k_segment: segment ids.
        entry: where block_bias is read.
        low, high: the band of distances that are kept.
        padding, attn_bias, block_bias: pointers at this batch element and head.
        MASKED: the band or the end of a block may cut into this tile.
        ENDS: whether keys beyond the end of their block are masked. Where scores of one key never meet those of
            another, they need not be; queries beyond the end never do.
        ATTN_BIAS: 0 none, 1 boolean, 2 floating.
    """
    if HAS_BLOCK_BIAS:
        scores += tl.load(block_bias + entry).to(tl.float32) * LOG2E
    if ATTN_BIAS == 2:
        pointers = attn_bias + q_token.to(tl.int64) * bias_query_stride + k_token.to(tl.int64) * bias_key_stride
        scores += tl.load(pointers, mask=q_in & k_in, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        if ENDS:
            scores = tl.where(k_in, scores, float("-inf"))
        if HAS_LOW:
            scores = tl.where(distance >= low, scores, float("-inf"))
        if HAS_HIGH:
            scores = tl.where(distance <= high, scores, float("-inf"))
    if HAS_PADDING:
        scores = tl.where(tl.load(padding + k_token, mask=k_in, other=0) != 0, scores, float("-inf"))
    if HAS_SEGMENTS:
        scores = tl.where(q_segment == k_segment, scores, float("-inf"))
    if ATTN_BIAS == 1:
        pointers = attn_bias + q_token.to(tl.int64) * bias_query_stride + k_token.to(tl.int64) * bias_key_stride
        scores = tl.where(tl.load(pointers, mask=q_in & k_in, other=0) != 0, scores, float("-inf"))
    return scores


@triton.jit
def dropout_keep(like, seed, batch, head, q_position, k_position, threshold):
    """Which probabilities dropout keeps; `bs_kernels.philox` defines the same function.

    Args:
        like: a float tile; gives the shape.
        seed: int64.
        batch, head: of the whole call.
        q_position, k_position: absolute.
        threshold: ⌊p · 2³²⌋ as the int32 with the same bits.
    """
    zero = tl.zeros_like(like).to(tl.int32)
    word, _, _, _ = tl.philox(seed, zero + batch, zero + head, zero + q_position, zero + k_position)
    return word >= threshold.to(tl.uint32, bitcast=True)
