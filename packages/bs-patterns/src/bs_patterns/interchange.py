"""Layouts to and from SciPy's sparse arrays and FlexAttention's `BlockMask`; both libraries are optional.

Dense masks and COO triples are methods of `BlockLayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from . import _check
from .layout import BlockLayout

if TYPE_CHECKING:
    from scipy.sparse import bsr_array, csr_array
    from torch import device as Device
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["from_block_mask", "from_bsr_array", "from_csr_array", "to_block_mask", "to_bsr_array", "to_csr_array"]


def to_csr_array(layout: BlockLayout, head: int | None = None) -> csr_array:
    """One head's blocks as a SciPy matrix: ``[i, j]`` is True where query block i attends to key block j.

    Args:
        layout: Any layout.
        head: Which head; may be left out if the layout is shared by all heads.

    Returns:
        A bool `csr_array` ``[q_blocks, kv_blocks]`` with the layout's nnz entries.

    Raises:
        ImportError: SciPy is missing: install ``bs-patterns[scipy]``.
        TypeError: An argument has the wrong type.
        ValueError: `head` is out of range, or left out although the heads differ.
    """
    sparse = _scipy_sparse()
    indptr, indices = _one_head(layout, head)
    return sparse.csr_array((np.ones(len(indices), np.bool_), indices, indptr), shape=layout.shape[1:])


def from_csr_array(
    matrices: Any, *, block_size: int | tuple[int, int], seq_len: int | tuple[int, int], causal: bool = False
) -> BlockLayout:
    """The layout whose blocks are the nonzeros of SciPy matrices.

    Args:
        matrices: A `csr_array` or `csr_matrix` ``[q_blocks, kv_blocks]``, shared by all heads, or a sequence of them,
            one per head. Stored zeros are not active.
        block_size: Tokens per (query, key) block; an integer stands for both.
        seq_len: Tokens of the (query, key) sequence; an integer stands for both.
        causal: Whether the layout is causal; blocks after the query are then left out.

    Returns:
        The layout.

    Raises:
        ImportError: SciPy is missing: install ``bs-patterns[scipy]``.
        TypeError: An argument has the wrong type.
        ValueError: A matrix has another shape than the grid of blocks, or an index is out of range.
    """
    items = _matrices(matrices, "csr")
    block_size, seq_len = _check.pair("block_size", block_size), _check.pair("seq_len", seq_len)
    expected = tuple(-(-length // size) for length, size in zip(seq_len, block_size, strict=True))
    for name, item in items:
        if item.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} for seq_len={seq_len} and block_size={block_size}, got {item.shape}"
            )
    return _from_rows(items, [item.data != 0 for _, item in items], block_size, seq_len, causal)


def to_bsr_array(layout: BlockLayout, head: int | None = None, *, dtype: DTypeLike = np.bool_) -> bsr_array:
    """One head's token mask as a SciPy matrix of dense blocks: ``[q, k]`` is 1 where query q sees key k.

    The causal rule and the ends of the sequences are in the blocks. Takes nnz · block area · itemsize bytes.

    Args:
        layout: Any layout.
        head: Which head; may be left out if the layout is shared by all heads.
        dtype: Type of the ones and zeros.

    Returns:
        A `bsr_array` with the layout's blocks, its shape rounded up to whole blocks.

    Raises:
        ImportError: SciPy is missing: install ``bs-patterns[scipy]``.
        TypeError: An argument has the wrong type.
        ValueError: `head` is out of range, or left out although the heads differ.
    """
    sparse = _scipy_sparse()
    indptr, indices = _one_head(layout, head)
    (block_q, block_k), (len_q, len_k) = layout.block_size, layout.seq_len
    _, rows, cols = layout.shape
    q = np.repeat(np.arange(rows), np.diff(indptr))[:, None] * block_q + np.arange(block_q)
    k = indices[:, None].astype(np.int64) * block_k + np.arange(block_k)
    data = ((q < len_q)[:, :, None] & (k < len_k)[:, None, :]).astype(dtype)
    if layout.causal:
        data *= k[:, None, :] <= q[:, :, None] + (len_k - len_q)
    return sparse.bsr_array((data, indices, indptr), shape=(rows * block_q, cols * block_k))


def from_bsr_array(matrices: Any, *, seq_len: int | tuple[int, int] | None = None, causal: bool = False) -> BlockLayout:
    """The layout whose blocks are the stored blocks of SciPy matrices; values only say which blocks are not all zero.

    Args:
        matrices: A `bsr_array` or `bsr_matrix` ``[Sq, Sk]``, shared by all heads, or a sequence of them, one per head.
        seq_len: Tokens of the (query, key) sequence if they are fewer than the matrix rounds up to.
        causal: Whether the layout is causal; blocks after the query are then left out.

    Returns:
        The layout, with the matrices' block size.

    Raises:
        ImportError: SciPy is missing: install ``bs-patterns[scipy]``.
        TypeError: An argument has the wrong type.
        ValueError: The matrices differ in shape or block size, `seq_len` has another number of blocks, or an index is
            out of range.
    """
    items = _matrices(matrices, "bsr")
    first = items[0][1]
    for name, item in items:
        if item.shape != first.shape or item.blocksize != first.blocksize:
            raise ValueError(
                f"{name}: expected shape {first.shape} in blocks of {first.blocksize} as the first, "
                f"got {item.shape} in blocks of {item.blocksize}"
            )
    block_size = (int(first.blocksize[0]), int(first.blocksize[1]))
    lengths = _check.pair("seq_len", first.shape if seq_len is None else seq_len)
    rounded = tuple(-(-length // size) * size for length, size in zip(lengths, block_size, strict=True))
    if rounded != first.shape:
        raise ValueError(f"seq_len: expected lengths that round up to {first.shape} in whole blocks, got {lengths}")
    return _from_rows(items, [(item.data != 0).any(axis=(1, 2)) for _, item in items], block_size, lengths, causal)


def to_block_mask(layout: BlockLayout, *, device: Device | str = "cpu") -> BlockMask:
    """The layout as a FlexAttention `BlockMask`, for all batch elements.

    Blocks that the token mask leaves whole are marked full, so that `mask_mod` is not evaluated there. `mask_mod`
    itself is complete: it says for any pair of tokens whether the layout lets it pass, which FlexAttention's eager mode
    needs. A `BlockMask` is dense in its block indices: expect 17 bytes per head, query block and key block.

    Args:
        layout: Any layout. One shared by all heads gives a mask that is, too.
        device: Where the mask's tensors live: that of the queries.

    Returns:
        The mask, ``[1, heads, Sq, Sk]``.

    Raises:
        ImportError: PyTorch is missing.
        TypeError: `layout` is not a `BlockLayout`.
    """
    _layout(layout)
    from ._block_mask import build

    return build(layout, device)


def from_block_mask(block_mask: BlockMask, *, causal: bool | None = None, ignore_mask_mod: bool = False) -> BlockLayout:
    """The layout of a FlexAttention `BlockMask`: its active blocks, full and partial.

    A layout masks tokens inside active blocks by the causal rule or not at all. So `mask_mod` is evaluated on every
    token pair of the partial blocks, and anything else in there is an error, unless it is to be ignored.

    Args:
        block_mask: The mask; one batch element, or equal ones.
        causal: Whether the layout is causal (aligned at the last token); blocks after the query are then left out. By
            default whatever `mask_mod` is; not causal where it makes no difference.
        ignore_mask_mod: Whether to take the blocks alone; `causal` must then be given.

    Returns:
        The layout, with the mask's block size, lengths and heads.

    Raises:
        ImportError: PyTorch is missing.
        TypeError: An argument has the wrong type.
        ValueError: Batch elements differ, `mask_mod` is neither causal nor without effect (or not as `causal` says), or
            `causal` is left out although `mask_mod` is to be ignored.
    """
    if causal is not None:
        causal = _check.boolean("causal", causal)
    if _check.boolean("ignore_mask_mod", ignore_mask_mod) and causal is None:
        raise ValueError("causal: expected True or False with ignore_mask_mod=True, got None")
    from ._block_mask import read

    return read(block_mask, causal, ignore_mask_mod)


def _scipy_sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError(f"SciPy arrays need SciPy: pip install 'bs-patterns[scipy]' ({error})") from error
    return sparse


def _layout(layout: Any) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {layout!r} ({type(layout).__name__})")


def _one_head(layout: Any, head: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row pointer and indices of one head; writable copies, which SciPy wants."""
    _layout(layout)
    if head is None and layout.heads > 1:
        raise ValueError(f"head: expected one in [0, {layout.heads - 1}] of a layout with several, got None")
    head = _check.integer("head", 0 if head is None else head, low=0, high=layout.heads - 1)
    row = layout.indptr[head]
    return row - row[0], layout.indices[row[0] : row[-1]].copy()


def _matrices(matrices: Any, kind: str) -> list[tuple[str, Any]]:
    """Named matrices, checked to be of one SciPy format."""
    sparse = _scipy_sparse()
    if sparse.issparse(matrices):
        items = [("matrices", matrices)]
    elif isinstance(matrices, Sequence) and not isinstance(matrices, str) and matrices:
        items = [(f"matrices[{n}]", item) for n, item in enumerate(matrices)]
    else:
        raise TypeError(f"matrices: expected a {kind}_array or a sequence of them, got {matrices!r}")
    for name, item in items:
        if not sparse.issparse(item) or item.format != kind:
            raise TypeError(f"{name}: expected a {kind}_array, got {item!r}")
        try:
            item.check_format(full_check=True)
        except ValueError as error:
            raise ValueError(f"{name}: expected a valid {kind}_array, got one whose {error}") from error
    return items


def _from_rows(
    items: list[tuple[str, Any]], keep: list[np.ndarray], block_size: Any, seq_len: Any, causal: bool
) -> BlockLayout:
    """Build a layout from the kept entries of one compressed matrix per head."""
    pairs = [(item, kept) for (_, item), kept in zip(items, keep, strict=True)]
    row = [np.repeat(np.arange(len(item.indptr) - 1), np.diff(item.indptr))[kept] for item, kept in pairs]
    column = [item.indices[kept] for item, kept in pairs]
    head = np.repeat(np.arange(len(items)), [len(part) for part in row])
    return BlockLayout.from_coo(
        head, np.concatenate(row), np.concatenate(column),
        block_size=block_size, seq_len=seq_len, heads=len(items), causal=causal,
    )  # fmt: skip
