"""Scores of (query block, key block) pairs from what pooling leaves of the blocks.

B batch, S queries or keys, H query heads, G key heads, D head dim, QB query blocks, KB key blocks, R rank.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter, is_lazy

from bs_kernels import block_scores, head_perceptron, pool_blocks

from ._gate_documents import Documents

_RANK = 32  # width of the embeddings whose product corrects the similarity


def pool_real_blocks(x: Tensor, block: int, real: Tensor | None, parts: int) -> Tensor:
    """As `bs_kernels.pool_blocks`, over the real tokens only.

    Args:
        x: `[B, S, H, D]`.
        block: Tokens per block; the last one may be short.
        real: bool `[B, S]`, the tokens to pool; `None`: all.
        parts: P.

    Returns:
        `[B, H, SB, P, D]` for SB blocks, fp32 (fp64 for fp64 inputs); 0 for a block without real tokens.
    """
    if real is None:
        return pool_blocks(x, block, parts)
    short = -x.shape[1] % block
    real = F.pad(real, (0, short)).view(x.shape[0], -1, block, 1, 1)
    tiles = F.pad(x, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, block))
    count = real.sum(2)
    low, high = torch.finfo(x.dtype).min, torch.finfo(x.dtype).max
    made = [torch.where(real, tiles, 0).sum(2) / count.clamp(min=1)]
    if parts > 1:
        made.append(torch.where(real, tiles, low).amax(2))
    if parts > 2:
        made.append(torch.where(real, tiles, high).amin(2))
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([torch.where(count > 0, part, 0) for part in made], dim=-2).transpose(1, 2).to(wide)


def pool_queries(q: Tensor, block: int, causal: bool, parts: int, real: Tensor | None = None) -> Tensor:
    """The same of every query block. Of a causal one, over the `block` queries that end with its first.

    So a causal block's summary reads nothing after its first position, and a block of one query is that query.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if block == 1:
        return q.transpose(1, 2).unsqueeze(-2).to(wide)
    if not causal:
        return pool_real_blocks(q, block, real, parts)
    blocks = -(-q.shape[1] // block)
    if real is None:  # nothing comes before the first query, so the first summary is of it alone
        return pool_blocks(q[:, : (blocks - 1) * block + 1], block, parts, first=1)
    first = q[:, :1].transpose(1, 2).unsqueeze(-2).to(wide).expand(-1, -1, -1, parts, -1)
    if blocks == 1:
        return first
    rest = slice(1, (blocks - 1) * block + 1)
    made = pool_real_blocks(q[:, rest], block, real[:, rest], parts)
    return torch.cat((first, made), dim=2)


class Pooled(NamedTuple):
    """What a scorer reads: `[B, H, QB, P, D]` and `[B, G, KB, P, D]`, and the dtype of the queries they come from."""

    queries: Tensor
    keys: Tensor
    dtype: torch.dtype


class ImportanceScorer(nn.Module):
    """Scores every (query block, key block) pair: a similarity of pooled queries and keys, and a learned correction.

    With q̄ the mean query, k̄, k⁺ and k⁻ the mean, largest and smallest keys of a block, the score is::

        gain₁ · scale · q̄·k̄  +  gain₂ · scale · (relu(q̄)·k⁺ − relu(−q̄)·k⁻)  +  f(q)·g(k)  +  slope · log2(1 + distance)

    The second term bounds every q̄·k in the block from above. f and g are perceptrons over what pooling leaves of a
    block, normalised; f ends in zeros, so that training starts from the similarities. The terms but the last are
    matrix products, whose cost is query blocks × key blocks × (3 D + R). They are in fp32 (fp64 for fp64 inputs); f and
    g are in the dtype of the queries, or without gradients on a CPU, where the native core computes all of it, in fp32.

    Args:
        num_heads: Query heads; `None` reads them from the first input.
        head_dim: Width of queries and keys; `None` reads it from the first input.
        num_kv_heads: Key heads; `None`: those of the first input, or `num_heads` where that and `head_dim` are given.
        hidden_dim: Width of the hidden layers.
        num_layers: Linear layers of f and of g.
        share_across_heads: One scorer over the mean of the heads.
        pooling: `"mean_max"`, `"mean"` or `"max"`.
        query_block_size: Tokens per query block; blocks of one have nothing to pool.
        density: Where a learned density starts: `threshold` is then a parameter per head, the normal quantile that
            standardised scores exceed with this probability. `None`: there is no threshold.
        scale: As for the attention; `None` is `head_dim ** -0.5`.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: the bound: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024.
    """

    def __init__(
        self,
        num_heads: int | None = None,
        head_dim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        hidden_dim: int = 128,
        num_layers: int = 2,
        share_across_heads: bool = False,
        pooling: str = "mean_max",
        query_block_size: int = 64,
        density: float | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.num_layers = hidden_dim, num_layers
        self.share_across_heads, self.pooling, self.query_block_size = share_across_heads, pooling, query_block_size
        self.scale, self._density = scale, density
        self.gain: Tensor
        self.slope: Tensor
        self.threshold: Tensor | None
        self.register_parameter("threshold", None)
        for name in self._names():
            # Its arguments come by a metaclass, which type checkers do not follow.
            made: Any = UninitializedParameter
            self.register_parameter(name, made(device=device, dtype=dtype))
        self._made_for: tuple[int, int, int] | None = None
        if num_heads is not None and head_dim is not None:
            self.initialize(num_heads, num_kv_heads or num_heads, head_dim)

    def _names(self) -> list[str]:
        layers = [f"{side}_{kind}_{i}" for side in "qk" for i in range(self.num_layers) for kind in ("weight", "bias")]
        return [*layers, "gain", "slope", *(["threshold"] if self._density is not None else [])]

    @property
    def extremes(self) -> bool:
        """Whether the scorer reads the largest and smallest keys."""
        return self.pooling != "mean"

    def initialize(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Makes the parameters, once; later calls check that the inputs still fit."""
        made = (1, 1, head_dim) if self.share_across_heads else (num_heads, num_kv_heads, head_dim)
        if self._made_for is not None:
            if made != self._made_for:
                raise ValueError(
                    f"q, k: expected (query heads, key heads, head_dim) {self._made_for} as the scorer was made for, "
                    f"got {made}"
                )
            return
        for name, shape in self._shapes(*made).items():
            parameter: Any = self.get_parameter(name)
            parameter.materialize(shape)
        self._made_for = made
        self.reset_parameters()

    def _shapes(self, heads: int, kv_heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"gain": (heads, 2), "slope": (heads,)}
        if self._density is not None:
            shapes["threshold"] = (heads,)
        parts = {"q": 1 if self.query_block_size == 1 else min(self._parts, 2), "k": self._parts}
        for side, count in (("q", heads), ("k", kv_heads)):
            widths = [parts[side] * dim, *[self.hidden_dim] * (self.num_layers - 1), _RANK]
            for i, (width, out) in enumerate(pairwise(widths)):
                shapes[f"{side}_weight_{i}"] = (count, width, out)
                shapes[f"{side}_bias_{i}"] = (count, 1, out)
        return shapes

    @property
    def _parts(self) -> int:
        return 3 if self.extremes else 1

    def reset_parameters(self) -> None:
        """Draws the layers anew (uniformly, as `nn.Linear`), and starts from the similarities alone."""
        for name in self._names():
            parameter = getattr(self, name)
            if "weight" in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
        nn.init.zeros_(getattr(self, f"q_weight_{self.num_layers - 1}"))
        nn.init.ones_(self.gain)
        if self.threshold is not None and self._density is not None:
            share = min(max(1 - self._density, 1e-6), 1 - 1e-6)
            nn.init.constant_(self.threshold, torch.special.ndtri(torch.tensor(share)).item())

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        block_size: int,
        is_causal: bool,
        distance: Tensor,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores of all pairs.

        Args:
            q: `[B, Sq, H, D]`.
            k: `[B, Sk, G, D]`.
            block_size: Tokens per key block.
            is_causal: Whether a query block's summary may read only up to its first query.
            distance: `[QB, KB]`, from the room.
            key_padding_mask: bool `[B, Sk]`, True = a real token; others are not pooled.

        Returns:
            `[B, H, QB, KB]`, or `[B, 1, QB, KB]` shared; fp32, or fp64 for fp64 inputs.
        """
        return self.score(self.pool(q, k, block_size, is_causal, key_padding_mask), distance)

    def pool(
        self,
        q: Tensor,
        k: Tensor,
        block_size: int,
        is_causal: bool,
        key_padding_mask: Tensor | None = None,
        packed: Documents | None = None,
    ) -> Pooled:
        """What the scorer reads.

        Arguments as for `forward`; `packed` says which tokens to pool of packed documents.
        """
        self.initialize(q.shape[2], k.shape[2], q.shape[3])
        real_q, real_k = (None, None) if packed is None else (packed.query_tokens, packed.key_tokens)
        if key_padding_mask is not None:
            real_k = key_padding_mask if real_k is None else real_k & key_padding_mask
        queries = pool_queries(q, self.query_block_size, is_causal, min(self._parts, 2), real_q)
        keys = pool_real_blocks(k, block_size, real_k, self._parts)
        if self.share_across_heads:
            queries, keys = queries.mean(1, keepdim=True), keys.mean(1, keepdim=True)
        return Pooled(queries, keys, q.dtype)

    def score(self, pooled: Pooled, distance: Tensor) -> Tensor:
        """Scores of what `pool` gives; `forward` is the two in a row."""
        queries, keys, dtype = pooled
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(distance.device.type, enabled=False):
            embeddings = tuple(
                self._perceptron(side, x.flatten(-2), dtype) for side, x in (("q", queries), ("k", keys))
            )
            return block_scores(queries, keys, embeddings, self.gain, self.slope, distance, scale, self.pooling)

    def _perceptron(self, side: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights, biases = (
            [getattr(self, f"{side}_{kind}_{i}") for i in range(self.num_layers)] for kind in ("weight", "bias")
        )
        return head_perceptron(x, weights, biases, dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._made_for is None:  # as a lazy module of torch: what has no values yet cannot be detached
            keep_vars = True
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key, gain = state_dict.get(f"{prefix}k_weight_0"), state_dict.get(f"{prefix}gain")
        if self._made_for is None and isinstance(key, Tensor) and isinstance(gain, Tensor):
            if is_lazy(key):
                return  # saved before the first input, too: there is nothing to take over
            self.initialize(gain.shape[0], key.shape[0], key.shape[1] // self._parts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What the scorer was made for, and how wide it is."""
        made = "lazy" if self._made_for is None else "query heads={}, key heads={}, head_dim={}".format(*self._made_for)
        return f"{made}, hidden_dim={self.hidden_dim}, num_layers={self.num_layers}, pooling={self.pooling}"
