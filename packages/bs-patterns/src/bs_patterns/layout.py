"""`BlockLayout`: which (head, query block, key block) triples are active."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _build, _check, _csr, _io, _stats, _text, _validate
from ._csr import Bool, Int32, Int64
from ._grid import Blocks, Grid


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """Active blocks of block-sparse attention, as CSR per head. An immutable, hashable, picklable value.

    Row i of head h holds the key blocks ``indices[indptr[h, i] : indptr[h, i + 1]]``. Offsets are global: one head
    continues where the one before ended, so ``indptr[0, 0] == 0``, ``indptr[h, -1] == indptr[h + 1, 0]`` and
    ``indptr[-1, -1] == nnz``. The last block of a sequence may be short; any length fits any block size.

    Positions are absolute and aligned at the last token: query token t stands at ``t + seq_len[1] − seq_len[0]``. In a
    causal layout a block is *allowed* if it holds a pair with key position ≤ query position; else every block is.

    Args:
        block_size: Tokens per (query, key) block; an integer stands for both.
        seq_len: Tokens of the (query, key) sequence; an integer stands for both.
        indptr: int64 ``[heads, q_blocks + 1]``; heads == 1 means one layout shared by all heads (which is not equal to
            one that writes the same heads out).
        indices: int32 ``[nnz]``, ascending and unique within a row.
        causal: Whether keys after the query are masked inside active blocks and blocks above the diagonal forbidden.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, row pointers or sizes do not fit together. The entries themselves are checked by `validate`,
            which every method that makes something of them calls first.
    """

    block_size: tuple[int, int]
    seq_len: tuple[int, int]
    indptr: Int64
    indices: Int32
    causal: bool = False

    def __post_init__(self) -> None:
        put = self.__dict__.__setitem__
        put("block_size", _check.pair("block_size", self.block_size))
        put("seq_len", _check.pair("seq_len", self.seq_len))
        put("causal", _check.boolean("causal", self.causal))
        rows = self._grid.shape[0]
        indptr = _integer_array("indptr", self.indptr, np.int64)
        indices = _integer_array("indices", self.indices, np.int32)
        if indptr.ndim != 2 or indptr.shape[0] < 1 or indptr.shape[1] != rows + 1:
            raise ValueError(f"indptr: expected shape [heads ≥ 1, {rows + 1}], got {list(indptr.shape)}")
        if indices.ndim != 1:
            raise ValueError(f"indices: expected one dimension, got shape {list(indices.shape)}")
        if indptr[0, 0] != 0 or indptr[-1, -1] != len(indices) or (indptr[1:, 0] != indptr[:-1, -1]).any():
            raise ValueError(
                f"indptr: expected heads to follow one another from 0 to nnz={len(indices)}, "
                f"got heads starting at {indptr[:, 0].tolist()} and ending at {indptr[:, -1].tolist()}"
            )
        if len(indptr) * rows * self._grid.shape[1] >= _csr.KEY_LIMIT:
            raise ValueError(f"seq_len: expected fewer than 2**62 blocks in all, got a grid of {self._grid.shape}")
        put("indptr", indptr)
        put("indices", indices)

    @classmethod
    def _trusted(cls, grid: Grid, indptr: Int64, indices: Int32) -> BlockLayout:
        """Wrap arrays that are known to be valid and that nobody else holds."""
        indptr.flags.writeable = False
        indices.flags.writeable = False
        layout = cls(grid.block_size, grid.seq_len, indptr, indices, grid.causal)
        layout.__dict__["_valid"] = True
        return layout

    # ------------------------------------------------------------------ sizes

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.block_size, self.seq_len, self.causal)

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self._grid, self.indptr, self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, query blocks, key blocks)."""
        return (len(self.indptr), *self._grid.shape)

    @property
    def heads(self) -> int:
        """Number of per-head layouts; 1 means one shared by all heads."""
        return len(self.indptr)

    @property
    def nnz(self) -> int:
        """Number of active blocks over all heads."""
        return len(self.indices)

    @cached_property
    def allowed(self) -> int:
        """Number of allowed blocks over all heads."""
        return self._blocks.allowed

    @property
    def density(self) -> float:
        """Active / allowed blocks."""
        return self.nnz / self.allowed

    def stats(self) -> Mapping[str, Any]:
        """Figures of this layout, in O(rows).

        Returns:
            A dict with ``heads``, ``q_blocks``, ``kv_blocks``, ``nnz``, ``allowed`` (blocks), ``density``, ``sparsity``
            (``1 − density``); ``blocks_per_row_min``, ``_median``, ``_max`` and ``empty_rows``; ``reach`` (tokens: the
            greatest distance of a query and a key in one active block; causal: of keys before the query); ``bytes`` (of
            the layout itself); ``flops`` (forward FLOPs per unit of head dim: 4 per token pair of an active block),
            ``flops_dense`` (the same for all allowed blocks), both summed over the layout's heads, and their quotient
            ``flops_ratio``.
        """
        return _stats.layout_stats(self._blocks)

    # ------------------------------------------------------------------ identity

    def validate(self) -> BlockLayout:
        """Check every entry (once) and return the layout.

        Raises:
            ValueError: A row pointer decreases, or an index is out of range, repeated, out of order or not allowed.
        """
        if "_valid" not in self.__dict__:
            _validate.validate_entries(self._blocks)
            self.__dict__["_valid"] = True
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex digest of the content; the same in every process and on every machine."""
        from hashlib import sha256

        head = [*self.block_size, *self.seq_len, int(self.causal), *self.shape]
        content = sha256(b"bs_patterns.BlockLayout 1\0" + np.array(head, "<i8").tobytes())
        content.update(np.ascontiguousarray(self.indptr, "<i8").data)
        content.update(np.ascontiguousarray(self.indices, "<i4").data)
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self is other:
            return True
        return (
            self._grid == other._grid
            and self.nnz == other.nnz
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
        )

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockLayout, (self.block_size, self.seq_len, self.indptr, self.indices, self.causal)

    def __repr__(self) -> str:
        heads, rows, cols = self.shape
        return (
            f"BlockLayout(heads={heads}, blocks={rows}×{cols}, block_size={self.block_size}, seq_len={self.seq_len}, "
            f"causal={self.causal}, nnz={self.nnz}, density={self.density:.4g})"
        )

    def __str__(self) -> str:
        """A picture of the layout; see `bs_patterns.render_text`."""
        return "\n".join(_text.picture(self._blocks, range(self.heads), _text.WIDTH, _text.UNICODE))

    # ------------------------------------------------------------------ rows

    def rows(self, head: int, i: int) -> Int32:
        """Active key blocks of query block ``i``, ascending (a read-only view).

        Args:
            head: Head index; any non-negative one if the layout is shared by all heads.
            i: Query block index.
        """
        head = _check.integer("head", head, low=0, high=None if self.heads == 1 else self.heads - 1)
        row = self.indptr[0 if self.heads == 1 else head]
        i = _check.integer("i", i, low=0, high=len(row) - 2)
        return self.indices[row[i] : row[i + 1]]

    def rows_at(self, q_start: int, q_stop: int) -> BlockLayout:
        """The layout of query tokens ``q_start … q_stop − 1`` alone (a rank's shard, a chunk, a decode step).

        A range that starts on a block boundary cuts the rows; one inside a single query block is one row; any other
        gets query blocks of gcd(block size, q_start) tokens, with rows repeated, so that the result is exact.

        A causal layout also loses the keys that none of these queries sees: the key length becomes
        ``q_stop + seq_len[1] − seq_len[0]``, so that bottom-right alignment stays right, and decoding at position t is
        ``rows_at(t, t + 1)`` with a cache of t + 1 keys. (If no key is visible at all, one key with no active block
        remains.) A layout that is not causal keeps every key; its queries are then no longer the last ones, and a
        token mask that depends on positions needs them passed explicitly.

        Args:
            q_start: First query token, in ``[0, seq_len[0])``.
            q_stop: One past the last query token, in ``(q_start, seq_len[0]]``.
        """
        q_start = _check.integer("q_start", q_start, low=0, high=self.seq_len[0] - 1)
        q_stop = _check.integer("q_stop", q_stop, low=q_start + 1, high=self.seq_len[0])
        if (q_start, q_stop) == (0, self.seq_len[0]):
            return self
        self.validate()
        block_q, block_k = self.block_size
        inside_one_block = q_start // block_q == (q_stop - 1) // block_q
        new_q = block_q if inside_one_block else gcd(block_q, q_start)
        rows = np.arange(q_start, q_stop, new_q, dtype=np.int64) // block_q
        indptr, indices = _csr.gather_rows(self.indptr, self.indices, rows)
        keys = max(1, q_stop + self._grid.shift) if self.causal else self.seq_len[1]
        grid = Grid((new_q, block_k), (q_stop - q_start, keys), self.causal)
        if not self.causal:
            return BlockLayout._trusted(grid, indptr, indices)
        allowed = grid.allowed_per_row() if q_stop + self._grid.shift > 0 else np.zeros(len(rows), np.int64)
        return _drop_forbidden(grid, indptr, indices, allowed)

    # ------------------------------------------------------------------ algebra

    @cached_property
    def T(self) -> BlockLayout:
        """Every head's transpose: keys as rows, queries as columns; ``layout.T.T is layout``.

        "Key ≤ query" has no meaning once rows are keys, so the transpose of a causal layout holds the same blocks with
        ``causal=False``.
        """
        self.validate()
        indptr, indices = _csr.transpose(self.indptr, self.indices, self.shape[2])
        grid = Grid((self.block_size[1], self.block_size[0]), (self.seq_len[1], self.seq_len[0]), False)
        out = BlockLayout._trusted(grid, indptr, indices)
        out.__dict__["T"] = self
        return out

    def __or__(self, other: BlockLayout) -> BlockLayout:
        return self._combine("|", other, _csr.union)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        return self._combine("&", other, _csr.intersection)

    def __sub__(self, other: BlockLayout) -> BlockLayout:
        return self._combine("-", other, _csr.difference)

    def __le__(self, other: BlockLayout) -> bool:
        """Whether every active block of this layout is active in the other."""
        return (self - other).nnz == 0

    def _combine(self, sign: str, other: BlockLayout, operation: Any) -> BlockLayout:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self._grid != other._grid or 1 != self.heads != other.heads != 1:
            raise ValueError(f"{sign}: expected layouts of one grid (heads may be 1), got {self!r} and {other!r}")
        heads = max(self.heads, other.heads)
        rows, cols = self._grid.shape
        keys = operation(self._keys(heads), other._keys(heads))
        return BlockLayout._trusted(self._grid, *_csr.csr_of(keys, heads, rows, cols))

    def _keys(self, heads: int) -> Int64:
        """Entry keys, a shared layout repeated for ``heads`` heads."""
        self.validate()
        keys = _csr.keys_of(self.indptr, self.indices, self.shape[2])
        if heads == self.heads:
            return keys
        steps = np.arange(heads, dtype=np.int64) * (self.shape[1] * self.shape[2])
        return (steps[:, None] + keys).ravel()

    def as_causal(self) -> BlockLayout:
        """The causal layout of this one's allowed blocks."""
        if self.causal:
            return self
        self.validate()
        grid = Grid(self.block_size, self.seq_len, True)
        return _drop_forbidden(grid, self.indptr, self.indices, grid.allowed_per_row())

    @staticmethod
    def stack_heads(layouts: Sequence[BlockLayout]) -> BlockLayout:
        """Join the heads of layouts that share one grid, in order.

        Args:
            layouts: At least one layout; block sizes, lengths and causal flags equal.
        """
        if isinstance(layouts, BlockLayout) or not all(isinstance(item, BlockLayout) for item in layouts):
            raise TypeError(f"layouts: expected a sequence of BlockLayout, got {layouts!r}")
        if not layouts:
            raise ValueError("layouts: expected at least one BlockLayout, got an empty sequence")
        for n, item in enumerate(layouts):
            if item._grid != layouts[0]._grid:
                raise ValueError(f"layouts[{n}]: expected the grid of layouts[0], {layouts[0]!r}, got {item!r}")
            item.validate()
        starts = np.cumsum([0] + [item.nnz for item in layouts[:-1]])
        indptr = np.concatenate([item.indptr + start for item, start in zip(layouts, starts, strict=True)])
        indices = np.concatenate([item.indices for item in layouts])
        return BlockLayout._trusted(layouts[0]._grid, indptr, indices)

    # ------------------------------------------------------------------ conversion

    def to_coo(self) -> tuple[Int64, Int64, Int64]:
        """(head, row, column), each int64 ``[nnz]``, in CSR order."""
        self.validate()
        heads, rows, _ = self.shape
        row_ids = np.repeat(np.arange(heads * rows, dtype=np.int64), np.diff(self.indptr, axis=1).ravel())
        return row_ids // rows, row_ids % rows, self.indices.astype(np.int64)

    def to_dense(self) -> Bool:
        """bool ``[heads, q_blocks, kv_blocks]``, True = active."""
        out = np.zeros(self.shape, np.bool_)
        out[self.to_coo()] = True
        return out

    def token_mask(self) -> Bool:
        """bool ``[heads, Sq, Sk]``, True = the query sees the key; with the causal rule. Dense: for tests only."""
        (block_q, block_k), (len_q, len_k) = self.block_size, self.seq_len
        mask = self.to_dense().repeat(block_q, axis=1)[:, :len_q].repeat(block_k, axis=2)[:, :, :len_k]
        if self.causal:
            mask &= np.arange(len_k) <= np.arange(len_q)[:, None] + self._grid.shift
        return mask

    @staticmethod
    def from_coo(
        head: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        *,
        block_size: int | tuple[int, int],
        seq_len: int | tuple[int, int],
        heads: int = 1,
        causal: bool = False,
    ) -> BlockLayout:
        """Build a layout from (head, row, column) triples, in any order; repeats count once.

        Args:
            head: int ``[n]`` or one integer for all, in ``[0, heads)``.
            row: int ``[n]``, query blocks.
            column: int ``[n]``, key blocks.
            block_size: Tokens per (query, key) block; an integer stands for both.
            seq_len: Tokens of the (query, key) sequence; an integer stands for both.
            heads: Number of heads; 1 means shared by all.
            causal: Make a causal layout: blocks that are not allowed are dropped.
        """
        grid = _grid_of(block_size, seq_len, causal)
        return BlockLayout._trusted(*_build.from_coo(head, row, column, grid, _check.integer("heads", heads)))

    @staticmethod
    def from_dense(
        mask: ArrayLike,
        *,
        block_size: int | tuple[int, int],
        seq_len: int | tuple[int, int],
        causal: bool = False,
    ) -> BlockLayout:
        """Build a layout from a dense block mask.

        Args:
            mask: bool ``[heads, q_blocks, kv_blocks]`` or ``[q_blocks, kv_blocks]``, True = active.
            block_size: Tokens per (query, key) block; an integer stands for both.
            seq_len: Tokens of the (query, key) sequence; an integer stands for both.
            causal: Make a causal layout: blocks that are not allowed are dropped.
        """
        return BlockLayout._trusted(*_build.from_dense(mask, _grid_of(block_size, seq_len, causal)))

    @staticmethod
    def from_token_mask(mask: ArrayLike, *, block_size: int | tuple[int, int], causal: bool = False) -> BlockLayout:
        """Build the smallest layout that covers a dense token mask.

        Args:
            mask: bool ``[heads, Sq, Sk]`` or ``[Sq, Sk]``, True = the query sees the key.
            block_size: Tokens per (query, key) block; an integer stands for both.
            causal: Make a causal layout: pairs with key after query are dropped first.
        """
        block_size, causal = _check.pair("block_size", block_size), _check.boolean("causal", causal)
        return BlockLayout._trusted(*_build.from_token_mask(mask, block_size, causal))

    def save(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write an npz file (uncompressed, no pickle); a path is written whole or not at all."""
        _io.save(self._blocks, file)

    @staticmethod
    def load(file: str | os.PathLike[str] | IO[bytes]) -> BlockLayout:
        """Read a layout that `save` wrote, and validate it.

        Raises:
            ValueError: The file is not a layout file, is damaged, or holds an invalid layout.
            OSError: The file cannot be read.
        """
        return _io.load(file, lambda *fields: BlockLayout(*fields).validate())


def _grid_of(block_size: Any, seq_len: Any, causal: Any) -> Grid:
    return Grid(
        _check.pair("block_size", block_size), _check.pair("seq_len", seq_len), _check.boolean("causal", causal)
    )


def _integer_array(name: str, value: Any, dtype: type[np.integer]) -> NDArray[Any]:
    """Return a private, read-only, contiguous copy; arrays that are already so pass through."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype.kind == "f" and isinstance(value, list)):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    owned = array.dtype == dtype and array.flags.c_contiguous and not array.flags.writeable and array.flags.owndata
    if owned:
        return array
    if array.dtype != dtype and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name}: expected values that fit {limits.dtype}, got {low if low < 0 else high}")
    array = np.array(array, dtype=dtype, order="C", copy=True)
    array.flags.writeable = False
    return array


def _drop_forbidden(grid: Grid, indptr: Int64, indices: Int32, allowed: Int64) -> BlockLayout:
    """Keep each row's entries left of ``allowed[q_blocks]``."""
    limits = np.tile(allowed, len(indptr)).astype(np.int32)
    keep = indices < np.repeat(limits, np.diff(indptr, axis=1).ravel())
    return BlockLayout._trusted(grid, *_csr.keep_entries(indptr, indices, keep))
