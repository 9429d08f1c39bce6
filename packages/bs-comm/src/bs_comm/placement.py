"""Which rank owns which tokens: block-aligned cuts of a sequence, and moving tensors between the two orders.

A placement cuts a sequence into blocks and gives every block to one rank. A rank keeps its blocks in ascending order,
so its shard is ``x[positions(rank)]`` for every placement, and the order of tokens inside a shard is the order in the
sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._balance import balanced_owner
from ._check import integer

if TYPE_CHECKING:
    from bs_patterns import BlockLayout

Int64 = NDArray[np.int64]
#: A numpy array or a torch tensor.
Array = TypeVar("Array")

DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True, eq=False, repr=False)
class Placement:
    """The owner of every block of a sequence.

    Build one with `contiguous`, `zigzag`, `stripe`, `cost_balanced`, `from_lengths` or `from_owner`. The first four
    give every rank the same number of blocks, within one; a rank owns nothing when there are fewer blocks than ranks.

    Attributes:
        name: The rule that made it; a label only.
        seq_len: Tokens in the sequence; the last block may be short.
        block_size: Tokens per block; ownership changes at multiples of it only.
        world_size: Number of ranks.
        owner: ``int32[ceil(seq_len / block_size)]``, the rank of each block.
    """

    name: str
    seq_len: int
    block_size: int
    world_size: int
    owner: NDArray[np.integer]

    def __post_init__(self) -> None:
        integer("seq_len", self.seq_len)
        integer("block_size", self.block_size)
        integer("world_size", self.world_size)
        owner = np.asarray(self.owner)
        if owner.dtype.kind not in "iu":
            raise TypeError(f"owner: expected integers, got dtype {owner.dtype}")
        blocks = -(-self.seq_len // self.block_size)
        if owner.shape != (blocks,):
            raise ValueError(
                f"owner: expected one rank for each of {blocks} blocks (seq_len {self.seq_len}, block_size "
                f"{self.block_size}), got shape {owner.shape}"
            )
        if int(owner.min()) < 0 or int(owner.max()) >= self.world_size:
            raise ValueError(
                f"owner: expected ranks in [0, {self.world_size - 1}], got {int(owner.min())} … {int(owner.max())}"
            )
        owner = owner.astype(np.int32)
        owner.setflags(write=False)
        object.__setattr__(self, "owner", owner)

    @classmethod
    def contiguous(cls, seq_len: int, world_size: int, *, block_size: int = DEFAULT_BLOCK_SIZE) -> Placement:
        """Give rank r the r-th contiguous slice.

        Args:
            seq_len: Tokens in the sequence.
            world_size: Number of ranks.
            block_size: Tokens per block.
        """
        blocks, ranks, block = _sizes(seq_len, world_size, block_size)
        owner = np.repeat(np.arange(ranks), _even(blocks, ranks))
        return cls("contiguous", int(seq_len), block, ranks, owner)

    @classmethod
    def zigzag(cls, seq_len: int, world_size: int, *, block_size: int = DEFAULT_BLOCK_SIZE) -> Placement:
        """Cut into ``2 · world_size`` chunks and give rank r chunks r and ``2 · world_size − 1 − r``.

        An early chunk is paired with a late one, which evens out the work of dense causal attention.

        Args:
            seq_len: Tokens in the sequence.
            world_size: Number of ranks.
            block_size: Tokens per block.

        Source: the causal load balance of zhuzilin/ring-flash-attention and Llama 3 (arXiv:2407.21783, section 3.3.2).
        """
        blocks, ranks, block = _sizes(seq_len, world_size, block_size)
        chunk_owner = np.concatenate((np.arange(ranks), np.arange(ranks)[::-1]))
        return cls("zigzag", int(seq_len), block, ranks, np.repeat(chunk_owner, _even(blocks, 2 * ranks)))

    @classmethod
    def stripe(cls, seq_len: int, world_size: int, *, block_size: int = DEFAULT_BLOCK_SIZE) -> Placement:
        """Give block i to rank ``i mod world_size``.

        Args:
            seq_len: Tokens in the sequence.
            world_size: Number of ranks.
            block_size: Tokens per block, which is the width of a stripe.

        Source: Striped Attention (arXiv:2311.09431), at block instead of token granularity.
        """
        blocks, ranks, block = _sizes(seq_len, world_size, block_size)
        return cls("stripe", int(seq_len), block, ranks, np.arange(blocks) % ranks)

    @classmethod
    def cost_balanced(
        cls, layout: BlockLayout, world_size: int, *, kv_heads: int | None = None, tolerance: float = 0.05
    ) -> Placement:
        """Even out the work of any layout, then keep queries near the keys they read.

        Every rank gets the same number of blocks within one. Among the placements found whose busiest rank does at
        most ``1 + tolerance`` times the mean work, the one that moves the fewest blocks wins; when none is that even,
        the most even one. Contiguous, zigzag and stripe are among the candidates, so the result is never worse than
        those by this rule. Deterministic, in integers: the same on every machine.

        Args:
            layout: Whose active blocks are the work. Queries and keys must have the same length.
            world_size: Number of ranks.
            kv_heads: Key/value heads, for counting what is moved; default as in `ExchangePlan.build`.
            tolerance: Accepted excess of the busiest rank over the mean, ≥ 0.

        Returns:
            A placement whose block size is the least common multiple of the layout's two.

        Raises:
            ValueError: The layout's two sequence lengths differ, or an argument is out of range.

        Source: longest-processing-time-first (Graham 1969) under equal cardinality, then pairwise swaps after
        Kernighan and Lin (1970).
        """
        ranks = integer("world_size", world_size)
        seq_len = _one_length(layout)
        block = math.lcm(*layout.block_size)
        rules = [rule(seq_len, ranks, block_size=block).owner for rule in (cls.contiguous, cls.zigzag, cls.stripe)]
        owner = balanced_owner(layout, ranks, block, rules, kv_heads=kv_heads, tolerance=tolerance)
        return cls("cost_balanced", seq_len, block, ranks, owner)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, block_size: int = DEFAULT_BLOCK_SIZE) -> Placement:
        """Contiguous slices of the given lengths, which may differ or be 0.

        Args:
            lengths: Tokens of each rank, in order. Every cut between two ranks must fall on a multiple of
                ``block_size``; only the last token of the sequence need not.
            block_size: Tokens per block.

        Raises:
            ValueError: A cut that is not block-aligned, or no tokens at all.
        """
        block = integer("block_size", block_size)
        sizes = [integer(f"lengths[{i}]", n, low=0) for i, n in enumerate(lengths)]
        ends = np.cumsum(np.asarray(sizes, np.int64))
        if not sizes or not ends[-1]:
            raise ValueError(f"lengths: expected at least one token, got {list(lengths)!r}")
        seq_len = int(ends[-1])
        for rank, end in enumerate(ends.tolist()):
            if end % block and end != seq_len:
                raise ValueError(
                    f"lengths: expected cuts at multiples of block_size {block}, got a cut at token {end} after "
                    f"rank {rank}"
                )
        counts = np.diff(-(-ends // block), prepend=0)
        return cls("lengths", seq_len, block, len(sizes), np.repeat(np.arange(len(sizes)), counts))

    @classmethod
    def from_owner(
        cls, owner: ArrayLike, seq_len: int, world_size: int, *, block_size: int = DEFAULT_BLOCK_SIZE
    ) -> Placement:
        """Any ownership: ``owner[i]`` is the rank of block i.

        Args:
            owner: ``int[ceil(seq_len / block_size)]``.
            seq_len: Tokens in the sequence.
            world_size: Number of ranks; some may own nothing.
            block_size: Tokens per block.
        """
        return cls("owner", integer("seq_len", seq_len), block_size, world_size, np.asarray(owner))

    @cached_property
    def lengths(self) -> Int64:
        """``int64[world_size]``: tokens of each rank."""
        counts = np.bincount(self.owner, minlength=self.world_size) * self.block_size
        counts[self.owner[-1]] -= len(self.owner) * self.block_size - self.seq_len
        return counts

    def blocks(self, rank: int, *, block_size: int | None = None) -> Int64:
        """Blocks of a rank, ascending.

        Args:
            rank: Whose blocks.
            block_size: Count in blocks of this many tokens instead of the placement's own; ownership must not change
                inside one (`check_aligned`).
        """
        rank = integer("rank", rank, low=0, high=self.world_size - 1)
        owner = self.owner if block_size is None else self.owner_of_blocks(block_size)
        return np.flatnonzero(owner == rank)

    def positions(self, rank: int) -> Int64:
        """``int64[lengths[rank]]``: absolute position of each token of the rank's shard, ascending."""
        starts = self.blocks(rank) * self.block_size
        tokens = (starts[:, None] + np.arange(self.block_size)).ravel()
        return tokens[: int(self.lengths[rank])]

    @cached_property
    def inverse(self) -> Int64:
        """``int64[seq_len]``: where each token stands in the concatenation of all shards."""
        order = np.concatenate([self.positions(rank) for rank in range(self.world_size)])
        inverse = np.empty(self.seq_len, np.int64)
        inverse[order] = np.arange(self.seq_len)
        return inverse

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether the shards, joined in rank order, are the sequence itself."""
        return bool((np.diff(self.owner) >= 0).all())

    def check_aligned(self, block_size: int, name: str = "block_size") -> None:
        """Raise unless ownership changes only at multiples of ``block_size`` tokens."""
        block_size = integer(name, block_size)
        cuts = (np.flatnonzero(np.diff(self.owner)) + 1) * self.block_size
        bad = cuts[cuts % block_size != 0]
        if len(bad):
            raise ValueError(
                f"placement: expected cuts at multiples of {name} {block_size}, got {len(bad)} of {len(cuts)} cuts "
                f"elsewhere, the first at token {int(bad[0])} (placement block_size {self.block_size})"
            )

    def owner_of_blocks(self, block_size: int) -> NDArray[np.integer]:
        """``int32[ceil(seq_len / block_size)]``: owner per block of another size; ValueError unless aligned."""
        self.check_aligned(block_size)
        return self.owner[np.arange(-(-self.seq_len // block_size)) * block_size // self.block_size]

    def shard(self, x: Array, rank: int, *, dim: int = 1) -> Array:
        """Cut a rank's tokens out of a full tensor.

        Args:
            x: numpy array or torch tensor with ``seq_len`` along ``dim``.
            rank: Whose tokens.
            dim: The token dimension.

        Returns:
            The same kind with ``lengths[rank]`` along ``dim``: a view where the shard is one slice, else a copy. Torch
            gradients flow through it.
        """
        rank = integer("rank", rank, low=0, high=self.world_size - 1)
        dim = _token_dim("x", x, dim, self.seq_len)
        blocks = self.blocks(rank)
        if len(blocks) == 0 or blocks[-1] - blocks[0] + 1 == len(blocks):
            start = int(blocks[0]) * self.block_size if len(blocks) else 0
            return x[(slice(None),) * dim + (slice(start, start + int(self.lengths[rank])),)]  # type: ignore[index]
        return _take(x, self.positions(rank), dim)

    def unshard(self, shards: Sequence[Array], *, dim: int = 1) -> Array:
        """Put all ranks' shards back in sequence order; undoes `shard`.

        Args:
            shards: One numpy array or torch tensor per rank, ``lengths[rank]`` along ``dim``.
            dim: The token dimension.
        """
        if len(shards) != self.world_size:
            raise ValueError(f"shards: expected {self.world_size} (one per rank), got {len(shards)}")
        dims = [_token_dim(f"shards[{r}]", x, dim, int(self.lengths[r])) for r, x in enumerate(shards)]
        if all(isinstance(x, np.ndarray) for x in shards):
            joined: Any = np.concatenate(shards, axis=dims[0])  # type: ignore[arg-type]
        else:
            import torch

            joined = torch.cat(shards, dim=dims[0])  # type: ignore[arg-type]
        return joined if self.is_contiguous else _take(joined, self.inverse, dims[0])

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything but the name; equal on every rank and machine."""
        head = f"bs-comm placement 1\0{self.seq_len}\0{self.block_size}\0{self.world_size}\0".encode()
        return hashlib.sha256(head + self.owner.astype("<i4").tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Placement({self.name}, seq_len={self.seq_len}, block_size={self.block_size}, "
            f"world_size={self.world_size}, lengths {int(self.lengths.min())}–{int(self.lengths.max())})"
        )


PLACEMENTS: dict[str, Callable[..., Placement]] = {
    "contiguous": Placement.contiguous,
    "zigzag": Placement.zigzag,
    "stripe": Placement.stripe,
    "cost_balanced": Placement.cost_balanced,
}


def _sizes(seq_len: int, world_size: int, block_size: int) -> tuple[int, int, int]:
    tokens, ranks = integer("seq_len", seq_len), integer("world_size", world_size)
    block = integer("block_size", block_size)
    return -(-tokens // block), ranks, block


def _even(items: int, parts: int) -> Int64:
    """``items`` in ``parts`` shares that differ by at most one, larger ones first."""
    return items // parts + (np.arange(parts) < items % parts)


def _one_length(layout: BlockLayout) -> int:
    queries, keys = layout.seq_len
    if queries != keys:
        raise ValueError(f"layout: expected the same number of query and key tokens, got seq_len {layout.seq_len}")
    return int(queries)


def _token_dim(name: str, x: Any, dim: int, tokens: int) -> int:
    dim = integer("dim", dim, low=-x.ndim, high=x.ndim - 1) % x.ndim
    if x.shape[dim] != tokens:
        raise ValueError(f"{name}: expected {tokens} tokens along dim {dim}, got shape {tuple(x.shape)}")
    return dim


def _take(x: Any, index: Int64, dim: int) -> Any:
    if isinstance(x, np.ndarray):
        return np.take(x, index, axis=dim)
    import torch

    return x.index_select(dim, torch.from_numpy(index).to(x.device))
