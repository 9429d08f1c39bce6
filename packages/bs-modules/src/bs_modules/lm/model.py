"""A byte-level decoder: pre-norm blocks of block-sparse causal attention and SwiGLU, RoPE, RMSNorm, tied embedding.

Shape legend: B batch, S tokens, H heads, D head dim, E = H · D model width, F feed-forward width, V = 256 bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import fuse_qkv, norm_rotate, rms_norm, rotary_table, swiglu

VOCABULARY = 256

#: `(q, k, v) → out`, each `[B, S, H, D]`, causal.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Attributes:
        width: E.
        layers: Number of blocks.
        head_dim: D; must be even and divide the width.
        feed_forward: F; `None` takes 8/3 of the width, rounded up to a multiple of 64 (the run
            of elements that vectorises).
        rope_base: Longest wavelength of the rotary embedding, over 2π.
    """

    width: int = 256
    layers: int = 4
    head_dim: int = 64
    feed_forward: int | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % self.head_dim or self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even divisor of width={self.width}, got {self.head_dim}")

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    @property
    def hidden(self) -> int:
        """F, resolved."""
        return self.feed_forward or math.ceil(self.width * 8 / 3 / 64) * 64


class Block(nn.Module):
    """One pre-norm block: attention, then SwiGLU. Gains of the norms are folded into the weights that follow."""

    def __init__(self, config: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.attention = attention
        self.attention_gain = nn.Parameter(torch.ones(width))
        self.qkv = nn.Parameter(torch.empty(3, width, width))
        self.out = nn.Parameter(torch.empty(width, width))
        self.feed_forward_gain = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Parameter(torch.empty(2, hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Uniform fan-in initialisation; the two output projections start at zero, each block as the identity."""
        bound = math.sqrt(3 / self.qkv.shape[-1])
        for weight in (self.qkv, self.gate_up):
            nn.init.uniform_(weight, -bound, bound, generator=generator)
        for weight in (self.out, self.down):
            nn.init.zeros_(weight)

    def project(self, x_BSE: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention inputs q, k, v, each `[B, S, H, D]`."""
        weight = fuse_qkv(self.qkv * self.attention_gain, self.heads).to(x_BSE.dtype)
        return norm_rotate(F.linear(rms_norm(x_BSE), weight), *table, self.heads)

    def finish(self, x_BSE: Tensor, attended_BSHD: Tensor) -> Tensor:
        """Output projection, residual and feed-forward."""
        dtype = x_BSE.dtype
        x_BSE = x_BSE + F.linear(attended_BSHD.flatten(-2), self.out.to(dtype))
        weight = (self.gate_up * self.feed_forward_gain).to(dtype)
        hidden_BSF = swiglu(F.linear(rms_norm(x_BSE), weight.flatten(0, 1)))
        return x_BSE + F.linear(hidden_BSF, self.down.to(dtype))

    def forward(self, x_BSE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, S, E] → [B, S, E]`."""
        return self.finish(x_BSE, self.attention(*self.project(x_BSE, table), is_causal=True))


class ByteModel(nn.Module):
    """The language model.

    Args:
        config: Sizes.
        attention: Makes the attention of one layer from its index: a module called as
            `attention(q, k, v, is_causal=True)` on `[B, S, H, D]`.
        compute_dtype: What activations and matrix products are in. Parameters are fp32 and are cast once per step.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Callable[[int], nn.Module],
        *,
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Parameter(torch.empty(VOCABULARY, config.width))
        self.blocks = nn.ModuleList(Block(config, attention(i)) for i in range(config.layers))
        self.final_gain = nn.Parameter(torch.ones(config.width))
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embedding, std=config.width**-0.5, generator=generator)
        for block in self._blocks():
            block.reset_parameters(generator)

    def forward(self, tokens_BS: Tensor, start: int = 0) -> Tensor:
        """Scores of the next byte: `uint8 or int64 [B, S] → fp32 [B, S, V]`.

        Args:
            tokens_BS: The text, or a slice of it where the attention is spread over slices.
            start: Position of the first of them.
        """
        embedding = self.embedding.to(self.compute_dtype)
        x_BSE = self.embed(tokens_BS, embedding)
        table = self.rotary(start, start + tokens_BS.shape[1], tokens_BS.device)
        for block in self._blocks():
            x_BSE = block(x_BSE, table)
        return self.score(x_BSE, embedding)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor, *, reduction: str = "mean", start: int = 0) -> Tensor:
        """Cross entropy in nats: a scalar, or `[B, S]` with `reduction="none"`; `start` as in `forward`."""
        scores = self(tokens_BS, start)
        loss = F.cross_entropy(scores.flatten(0, 1), targets_BS.flatten().long(), reduction=reduction)
        return loss if reduction != "none" else loss.view(targets_BS.shape)

    def embed(self, tokens_BS: Tensor, embedding: Tensor) -> Tensor:
        """`[B, S] → [B, S, E]`, at unit scale."""
        return rms_norm(F.embedding(tokens_BS.long(), embedding))

    def score(self, x_BSE: Tensor, embedding: Tensor) -> Tensor:
        """`[B, S, E] → fp32 [B, S, V]` through the tied embedding."""
        return F.linear(rms_norm(x_BSE), embedding * self.final_gain.to(embedding.dtype)).float()

    def rotary(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary table of positions `start … stop − 1`; the last few are kept."""
        key = (start, stop, device, self.compute_dtype)
        if key not in self._tables:
            if len(self._tables) >= 4:
                self._tables.clear()
            positions = torch.arange(start, stop, device=device)
            self._tables[key] = rotary_table(
                positions, self.config.heads, self.config.head_dim, self.compute_dtype, self.config.rope_base
            )
        return self._tables[key]

    def parameter_groups(self) -> tuple[list[nn.Parameter], ...]:
        """Splits the parameters by how they are optimised: matrices of the blocks, the embedding, gains, gates."""
        matrices = [p for block in self._blocks() for p in (block.qkv, block.out, block.gate_up, block.down)]
        gains = [p for block in self._blocks() for p in (block.attention_gain, block.feed_forward_gain)]
        gates = [p for block in self._blocks() for p in block.attention.parameters()]
        return matrices, [self.embedding], [*gains, self.final_gain], gates

    def _blocks(self) -> Iterator[Block]:
        return iter(self.blocks)  # pyright: ignore[reportArgumentType, reportReturnType]


class DenseAttention(nn.Module):
    """torch's dense causal attention, for comparison."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """`[B, S, H, D] → [B, S, H, D]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)
