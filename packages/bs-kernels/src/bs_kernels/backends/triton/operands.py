"""What kernels are given and hand to one another, grouped; Triton takes named tuples like any argument.

A member is a pointer (on the host: a tensor), a number, or None. What a kernel does with an optional member is decided
when it is compiled, by whether the member is None. Tuples are not nested: Triton 3.6 loses numbers in inner ones.
"""

from typing import Any, NamedTuple

__all__ = ["Bias", "Geometry", "Here", "Lists", "Operand", "Rules", "Scales", "Sizes", "Tokens", "Traits"]


class Operand(NamedTuple):
    """A tensor [B, S, H, D], or a pool of pages [pages, block, H, D], and strides; the last dimension is contiguous."""

    data: Any
    batch: Any
    token: Any
    head: Any


class Bias(NamedTuple):
    """A tensor [B, H, ·, ·] and its strides, 0 where it is broadcast; all None where there is none."""

    data: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Lists(NamedTuple):
    """Rows or columns of a plan as `lists.RowLists` and `lists.ColumnLists` describe them."""

    order: Any
    begin: Any
    middle: Any
    end: Any
    blocks: Any
    starts: Any
    entries: Any


class Geometry(NamedTuple):
    """Bounds and absolute positions of the blocks, as in a plan, and the page table where keys and values have one."""

    q_bounds: Any
    kv_bounds: Any
    q_start: Any
    kv_start: Any
    pages: Any


class Rules(NamedTuple):
    """What a call adds to scores or masks; boolean tensors are uint8. Strides are 0 where a bias is broadcast.

    Attributes:
        padding: [B, Sk]; q_segments, kv_segments: [B, S].
        attn_bias: [B, H, Sq, Sk], and its strides.
        block_bias: [B, H, entries], and its first two strides.
        low, high: the band of distances that the positional mask keeps; None where it has no bound.
        seeds: the seed of dropout; threshold: see `tiles.dropout_keep`.
    """

    padding: Any
    q_segments: Any
    kv_segments: Any
    attn_bias: Any
    attn_batch: Any
    attn_head: Any
    attn_query: Any
    attn_key: Any
    block_bias: Any
    block_batch: Any
    block_head: Any
    low: Any
    high: Any
    seeds: Any
    threshold: Any


class Sizes(NamedTuple):
    """Numbers that no kernel is specialised for; `tiles.sizes_from` reads what the host has `written`.

    Triton compiles a kernel again where an integer becomes 1 or a multiple of 16, or ceases to be, and what it is told
    not to specialise for does not count within tuples. Were these numbers what they mean, a cache that grows by a token
    a step or a batch of other lengths would wait for the compiler. So x travels as 4x + 3, which is neither.

    Attributes:
        lists: how many lists are scheduled; slow: how often each is expanded (see `tiles.place`).
        blocks: lists per head; kv_blocks: of those over key blocks.
        q_len, kv_len: tokens.
        first_batch, first_head: where dropout counts from.
        pages: how many pages there are.
        rows: queries of all heads and batch elements.
    """

    lists: Any
    slow: Any
    blocks: Any
    kv_blocks: Any
    q_len: Any
    kv_len: Any
    first_batch: Any
    first_head: Any
    pages: Any
    rows: Any

    def written(self) -> "Sizes":
        """As kernels take them."""
        return Sizes(*(4 * number + 3 for number in self))


class Scales(NamedTuple):
    """``scores``: of q·k, with log₂ e; ``plain``: without it; ``keep``: of what dropout keeps."""

    scores: Any
    plain: Any
    keep: Any


class Here(NamedTuple):
    """`Rules` at one batch element and query head (or, [M, 1], the heads of a tile's rows); 0 for what they lack."""

    padding: Any
    attn_bias: Any
    block_bias: Any
    seed: Any
    batch: Any
    head: Any
    threshold: Any
    keep_scale: Any


class Tokens(NamedTuple):
    """The tokens of a tile along one axis.

    Attributes:
        block: their block; local: its first local token; position: that token's absolute position.
        first: where in the block the tile begins; at: [n] where each token is.
        inside: bool[n], whether it is part of the block.
        segment: [n] segment ids, or 0.
    """

    block: Any
    local: Any
    position: Any
    first: Any
    at: Any
    inside: Any
    segment: Any


class Traits(NamedTuple):
    """What kernels are specialised for.

    Attributes:
        SHARED_BATCH, SHARED_HEADS: whether lists are shared by batch elements, by heads.
        GROUP: query heads per key head.
        CHUNK: lists that are scheduled together.
        D, DV: head dims; D_PAD, DV_PAD: padded to powers of two.
        BLOCK_M, BLOCK_N: tokens per query and key block.
        TILE_M, TILE_N: rows and keys per tile; TILES_M, TILES_N: tiles per block.
        PACK: query heads that share a tile's rows: row r is query ``r // PACK`` of head ``r % PACK``.
        SPLITS: pieces that every row is cut into, one program each.
        FUSED_SCALE: nothing is added to scores of whole blocks, and their scale is not negative.
        INTERPRET: Triton interprets; PRECISION: of products.
    """

    SHARED_BATCH: bool
    SHARED_HEADS: bool
    GROUP: int
    CHUNK: int
    D: int
    DV: int
    D_PAD: int
    DV_PAD: int
    BLOCK_M: int
    BLOCK_N: int
    TILE_M: int
    TILE_N: int
    TILES_M: int
    TILES_N: int
    PACK: int
    SPLITS: int
    FUSED_SCALE: bool
    INTERPRET: bool
    PRECISION: str
