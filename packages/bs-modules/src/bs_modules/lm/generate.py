"""Sampling with a KV cache: each new byte attends to the keys of its layout row, and to no others.

What a gate picks depends on the text, so a gated model reads its whole context anew for every byte instead.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bs_kernels import block_sparse_attention
from bs_patterns import BlockLayout

from .model import ByteModel


class Decoder:
    """A model, the keys and values of every token it has read, and the layout it was trained on.

    Args:
        model: A trained model.
        layout: The causal layout of its whole context (of the dense one: every allowed block).

    Source:
        The row of token t in a causal layout names every key block it may see, so `layout.rows_at(t, t + 1)` over a
        cache of t + 1 keys is the same function as row t of the full forward.
    """

    def __init__(self, model: ByteModel, layout: BlockLayout) -> None:
        self.model, self.layout = model, layout
        config, device = model.config, model.embedding.device
        shape = (config.layers, 1, layout.seq_len[1], config.heads, config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=model.compute_dtype, device=device) for _ in range(2))
        self.length = 0

    @property
    def context(self) -> int:
        """Tokens the cache can hold."""
        return self.layout.seq_len[1]

    @torch.no_grad()
    def feed(self, tokens: bytes) -> Tensor:
        """Reads some bytes and returns the scores of the one that follows each: fp32 `[len(tokens), 256]`.

        Raises:
            ValueError: No bytes, or more than the context has room for.
        """
        start, stop = _room(self, tokens)
        model, device = self.model, self.model.embedding.device
        rows = self.layout.rows_at(start, stop)
        embedding = model.embedding.to(model.compute_dtype)
        x_BSE = model.embed(torch.tensor(list(tokens), device=device)[None], embedding)
        table = model.rotary(start, stop, device)
        for i, block in enumerate(model.blocks):
            q, k, v = block.project(x_BSE, table)  # pyright: ignore[reportCallIssue]
            self.keys[i, :, start:stop], self.values[i, :, start:stop] = k, v
            seen = block_sparse_attention(q, self.keys[i, :, :stop], self.values[i, :, :stop], rows)
            x_BSE = block.finish(x_BSE, seen)  # pyright: ignore[reportCallIssue]
        self.length = stop
        return model.score(x_BSE, embedding)[0]


class Rereader:
    """A gated model and the text that it has read: every byte costs one forward over the whole context.

    Args:
        model: A trained model, in evaluation mode.
        context: Tokens of its training sequences. The text is filled up to that length, because the budgets of a gate
            depend on it; nothing is read ahead, so what fills it does not matter.
    """

    def __init__(self, model: ByteModel, context: int) -> None:
        self.model, self.context, self.length = model, context, 0
        self._text = torch.zeros(1, context, dtype=torch.int64, device=model.embedding.device)

    @torch.no_grad()
    def feed(self, tokens: bytes) -> Tensor:
        """As `Decoder.feed`."""
        start, stop = _room(self, tokens)
        self._text[0, start:stop] = torch.tensor(list(tokens))
        self.length = stop
        return self.model(self._text)[0, start:stop]


def generate(
    model: ByteModel,
    layout: BlockLayout | int,
    prompt: bytes,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields new bytes one by one.

    When the context is full, the cache is rebuilt from the later half of the text.

    Args:
        model: A trained model.
        layout: The causal layout of its context; of a gated model, the context's length.
        prompt: At least one byte; of a longer one than the context, the end is read.
        tokens: How many bytes to make.
        temperature: Divides the scores; 0 takes the likeliest byte.
        top_k: Sample among so many likeliest bytes; `None`: among all.
        seed: Of the samples: the same arguments give the same bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    fresh = partial(Rereader, model, layout) if isinstance(layout, int) else partial(Decoder, model, layout)
    decoder = fresh()
    text = bytearray(prompt)
    scores = decoder.feed(bytes(text[-(decoder.context - 1) :]))[-1]
    for made in range(tokens):
        byte = _sample(scores.cpu(), temperature, top_k, generator)
        text.append(byte)
        yield byte
        if made + 1 == tokens:
            return
        if decoder.length == decoder.context:
            decoder = fresh()
            scores = decoder.feed(bytes(text[-(decoder.context // 2) :]))[-1]
        else:
            scores = decoder.feed(bytes([byte]))[-1]


def stream_text(tokens: Iterator[int]) -> Iterator[str]:
    """Turns bytes into text as soon as characters are complete; what is not UTF-8 becomes U+FFFD."""
    decoder: Any = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in tokens:
        piece = decoder.decode(bytes([byte]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def _room(decoder: Decoder | Rereader, tokens: bytes) -> tuple[int, int]:
    """Positions of the first of some new bytes and of the one after the last."""
    start, stop = decoder.length, decoder.length + len(tokens)
    if not tokens or stop > decoder.context:
        raise ValueError(f"tokens: expected 1 to {decoder.context - start} bytes, got {len(tokens)}")
    return start, stop


def _sample(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    scores = scores / temperature
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
