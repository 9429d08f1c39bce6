"""Hypothesis strategies over the argument space of `block_sparse_attention`. Needs hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from .case import Case
from .factories import make_batched_layout, make_case, make_layout, make_pages
from .longnet import DilatedCase, make_dilated_case

__all__ = ["ARGUMENTS", "cases", "dilated_cases"]

#: Optional arguments that `cases` knows how to draw.
ARGUMENTS = (
    "causal",
    "window",
    "key_padding_mask",
    "segment_ids",
    "bool_bias",
    "attn_bias",
    "block_bias",
    "sinks",
    "dropout",
    "scale",
    "order",
    "page_table",
    "batched",
)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    arguments: Sequence[str] = ARGUMENTS,
    required: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    query_blocks: Sequence[int] = (1, 3, 4, 8, 16),
    key_blocks: Sequence[int] = (2, 4, 7, 16),
    max_tokens: int = 40,
    head_dims: Sequence[int] = (1, 3, 8, 16),
) -> Case:
    """Any call that the contract allows, with small sizes.

    Args:
        draw: Hypothesis's.
        arguments: optional arguments that may be present.
        required: optional arguments that are present.
        dtypes: of q, k and v.
        query_blocks, key_blocks: block sizes to choose from.
        max_tokens: longest sequence.
        head_dims: head dims and value head dims to choose from.
    """
    given = set(required) | {name for name in arguments if draw(st.booleans(), label=name)}
    if {"attn_bias", "bool_bias"} <= given:
        given.discard("bool_bias" if "attn_bias" in required else "attn_bias")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    generator = np.random.default_rng(seed)
    batch = draw(st.integers(1, 3), label="batch")
    kv_heads, group = draw(st.integers(1, 2), label="kv_heads"), draw(st.integers(1, 3), label="group")
    sizes: dict[str, Any] = {
        "seq_len": (draw(st.integers(1, max_tokens)), draw(st.integers(1, max_tokens))),
        "block_size": (draw(st.sampled_from(query_blocks)), draw(st.sampled_from(key_blocks))),
        "heads": draw(st.sampled_from((1, kv_heads * group)), label="layout heads"),
        "density": draw(st.sampled_from((0.0, 0.2, 0.5, 1.0)), label="density"),
        "causal": "causal" in given and draw(st.booleans(), label="causal layout"),
    }
    if "batched" in given:
        given -= {"order"} - set(required)
        layout = make_batched_layout(generator, batch=batch, **sizes)
    else:
        layout = make_layout(generator, **sizes)
    called: dict[str, Any] = {
        name: True for name in ("key_padding_mask", "segment_ids", "attn_bias", "block_bias", "sinks") if name in given
    }
    if "causal" in given and not layout.causal:
        called["causal"] = True
    if "window" in given:
        sides = st.one_of(st.none(), st.integers(0, 12))
        called["window"] = (draw(sides, label="left"), draw(sides, label="right"))
    if "dropout" in given:
        called |= {"dropout_p": draw(st.sampled_from((0.1, 0.5))), "dropout_seed": seed * 0x9E3779B97F4A7C15 % 2**64}
    if "scale" in given:
        called["scale"] = draw(st.sampled_from((0.0, 0.3, -1.0)), label="scale")
    if "order" in given and "batched" not in given:
        called["order"] = draw(st.sampled_from(("row", "hilbert", "morton")), label="order")
    case = make_case(
        layout,
        seed=seed,
        batch=batch,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(head_dims), label="head_dim"),
        value_dim=draw(st.sampled_from(head_dims), label="value_dim"),
        dtype=draw(st.sampled_from(dtypes), label="dtype"),
        **called,
    )
    shape = (batch, kv_heads * group, *layout.seq_len)
    if "bool_bias" in given:
        case.arguments["attn_bias"] = torch.from_numpy(generator.random(_broadcast(draw, shape)) < 0.7)
    if "attn_bias" in given:
        bias = case.arguments["attn_bias"]
        keep = tuple(slice(0, size) for size in _broadcast(draw, shape))
        case.arguments["attn_bias"] = bias[keep].clone()
    if "block_bias" in given and "batched" not in given:
        leading = draw(st.sampled_from(((), shape[1:2], shape[:2])), label="block_bias leading shape")
        nnz = case.arguments["block_bias"].shape[-1]
        case.arguments["block_bias"] = torch.from_numpy(generator.normal(size=(*leading, nnz))).to(
            case.arguments["block_bias"].dtype
        )
    return make_pages(case, seed=seed) if "page_table" in given else case


def _broadcast(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with some dimensions set to 1."""
    return tuple(draw(st.sampled_from((1, size)), label="bias dimension") for size in shape)


@st.composite
def dilated_cases(
    draw: st.DrawFn,
    *,
    combine: Sequence[str] = ("softmax", "longnet", "union"),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    max_tokens: int = 50,
) -> DilatedCase:
    """Any call of `dilated_attention` with small sizes: nested and odd branches, shards, GQA, padding, documents.

    Args:
        draw: Hypothesis's.
        combine: ways to combine branches to choose from.
        dtypes: of q, k and v.
        max_tokens: longest sequence.
    """
    nested = draw(st.booleans(), label="powers of two")
    lengths = st.sampled_from((2, 4, 8, 16, 32, 64)) if nested else st.integers(1, 70)
    rates = st.sampled_from((1, 2, 4, 8)) if nested else st.integers(1, 9)
    branches = draw(st.lists(st.tuples(lengths, rates), min_size=1, max_size=3), label="branches")
    kv_heads, group = draw(st.integers(1, 2), label="kv_heads"), draw(st.integers(1, 3), label="group")
    keys = draw(st.integers(1, max_tokens), label="keys")
    called: dict[str, Any] = {"combine": draw(st.sampled_from(combine)), "causal": draw(st.booleans(), label="causal")}
    for name in ("key_padding_mask", "segment_ids", "attn_bias"):
        if draw(st.sampled_from((False, False, True)), label=name):
            called[name] = True
    if draw(st.sampled_from((False, False, True)), label="dropout"):
        called |= {"dropout_p": 0.4, "dropout_seed": draw(st.integers(0, 2**64 - 1), label="dropout_seed")}
    if draw(st.booleans(), label="shard"):
        called |= {"q_start": draw(st.integers(-40, 40)), "kv_start": draw(st.integers(-40, 40))}
    if draw(st.booleans(), label="scale"):
        called["scale"] = draw(st.sampled_from((0.0, 0.3, -1.0)))
    return make_dilated_case(
        [length for length, _ in branches],
        [rate for _, rate in branches],
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
        batch=draw(st.integers(1, 2), label="batch"),
        seq_len=(draw(st.one_of(st.just(keys), st.integers(1, max_tokens)), label="queries"), keys),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 4, 16)), label="head_dim"),
        value_dim=draw(st.sampled_from((3, 16)), label="value_dim"),
        dtype=draw(st.sampled_from(dtypes), label="dtype"),
        **called,
    )
