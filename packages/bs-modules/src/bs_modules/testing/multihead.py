"""`nn.MultiheadAttention` side by side: cases over its whole argument space, and the dense module as the oracle.

Shapes: N batch, L queries, S keys, E embed_dim, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..multihead import BlockSparseRingMultiheadDilatedAttention

_MASKS = (None, "bool", "float", "bool per head", "float per head")


@dataclass(frozen=True)
class Case:
    """One construction and one call.

    Args:
        arguments: Of the constructor, those of `nn.MultiheadAttention`.
        sparse: The fields of `sparse_config`.
        lengths: (L, S).
        batch: N, or `None` for unbatched inputs.
        shared: Which inputs are one tensor: `"all"`, `"key and value"` or `"none"`.
        padding: Kind of key padding mask: `None`, `"bool"` or `"float"`.
        mask: Kind of attention mask: `None`, or bool or float, for all heads or per head.
        is_causal: Whether causality is asked for (without `mask` only).
        need_weights: Of the call.
        average: `average_attn_weights` of the call.
        seed: Of weights, inputs and masks.
    """

    arguments: Mapping[str, Any]
    sparse: Mapping[str, Any]
    lengths: tuple[int, int]
    batch: int | None
    shared: str
    padding: str | None
    mask: str | None
    is_causal: bool
    need_weights: bool
    average: bool
    seed: int

    @property
    def dense(self) -> bool:
        """Whether every block is active."""
        return self.sparse["sparsity_ratio"] == 1.0

    def modules(self, dtype: torch.dtype = torch.float32) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
        """The dense module and the block-sparse one, made from equal seeds, biases not zero."""
        torch.manual_seed(self.seed)
        dense = nn.MultiheadAttention(**self.arguments, dtype=dtype)
        torch.manual_seed(self.seed)
        sparse = BlockSparseRingMultiheadDilatedAttention(
            **self.arguments, dtype=dtype, sparse_config=dict(self.sparse)
        )
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.1)
                sparse.get_parameter(name).copy_(parameter)
        return dense, sparse

    def call(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The keyword arguments of the call; floating tensors require gradients. Key 0 is never masked."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        (len_q, len_k), width = self.lengths, self.arguments["embed_dim"]

        def tokens(length: int, features: int) -> Tensor:
            if self.batch is None:
                return normal(length, features)
            first = self.arguments["batch_first"]
            return normal(*((self.batch, length) if first else (length, self.batch)), features)

        query = tokens(len_q, width)
        key = query if self.shared == "all" else tokens(len_k, self.arguments["kdim"] or width)
        value = key if self.shared != "none" else tokens(len_k, self.arguments["vdim"] or width)
        call: dict[str, Any] = {"query": query, "key": key, "value": value}
        batch = self.batch or 1
        padding_shape = (len_k,) if self.batch is None else (batch, len_k)
        mask_shape = (batch * self.arguments["num_heads"],) if self.mask and "per head" in self.mask else ()
        for name, kind, shape in (
            ("key_padding_mask", self.padding, padding_shape),
            ("attn_mask", self.mask, (*mask_shape, len_q, len_k)),
        ):
            if kind is None:
                continue
            blocked = torch.rand(*shape, generator=generator) < 0.3
            blocked[..., 0] = False
            if kind.startswith("float"):
                added = normal(*shape).detach().masked_fill(blocked, -math.inf)
                call[name] = added.requires_grad_()
            else:
                call[name] = blocked
        call.update(need_weights=self.need_weights, average_attn_weights=self.average)
        return call


def cases() -> st.SearchStrategy[Case]:
    """Every combination of what `nn.MultiheadAttention` documents, small; sparse layouts keep the first key block."""
    return st.builds(_case, st.data(), st.integers(0, 2**32 - 1))


def _case(data: st.DataObject, seed: int) -> Case:
    draw = data.draw
    heads = draw(st.sampled_from((1, 2, 3)), "heads")
    shared = draw(st.sampled_from(("all", "key and value", "none")), "shared")
    widths = (None, 5) if shared == "none" else (None,)
    arguments = {
        "embed_dim": heads * draw(st.sampled_from((1, 4)), "head_dim"),
        "num_heads": heads,
        "bias": draw(st.booleans(), "bias"),
        "add_bias_kv": draw(st.booleans(), "add_bias_kv"),
        "add_zero_attn": draw(st.booleans(), "add_zero_attn"),
        "kdim": draw(st.sampled_from(widths), "kdim"),
        "vdim": draw(st.sampled_from(widths), "vdim"),
        "batch_first": draw(st.booleans(), "batch_first"),
    }
    len_q = draw(st.integers(1, 11), "L")
    mask = draw(st.sampled_from(_MASKS), "mask")
    padding = draw(st.sampled_from((None, *_same_kind(mask))), "padding")
    causal = mask is None and draw(st.booleans(), "is_causal")
    least = len_q if causal else 1  # every query keeps a key, without which the dense module gives NaN
    return Case(
        arguments=arguments,
        sparse={
            "pattern_type": "global_local",
            "global_tokens": 1,
            "window_size": 4,
            "block_size": draw(st.sampled_from((2, 4)), "block_size"),
            "sparsity_ratio": draw(st.sampled_from((1.0, None)), "density"),
        },
        lengths=(len_q, len_q if shared == "all" else draw(st.integers(least, 11), "S")),
        batch=draw(st.sampled_from((None, 1, 3)), "N"),
        shared=shared,
        padding=padding,
        mask=mask,
        is_causal=causal,
        need_weights=draw(st.booleans(), "need_weights"),
        average=draw(st.booleans(), "average"),
        seed=seed,
    )


def _same_kind(mask: str | None) -> tuple[str, ...]:
    """The kinds of padding mask that go with a mask without a deprecation warning."""
    return ("bool", "float") if mask is None else (mask.split()[0],)


def as_dense_call(module: BlockSparseRingMultiheadDilatedAttention, case: Case, call: dict[str, Any]) -> dict[str, Any]:
    """The call that makes `nn.MultiheadAttention` compute the same function: the layout becomes part of its mask."""
    if case.dense and not case.is_causal:
        return call
    visible = torch.from_numpy(module.layout(case.lengths, case.is_causal).token_mask())
    dtype, heads = call["query"].dtype, case.arguments["num_heads"]
    outside = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -math.inf)
    mask = call.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -math.inf)
    padding = call.get("key_padding_mask")
    if padding is not None and padding.dtype == torch.bool:
        padding = torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -math.inf)
    whole = outside.expand(heads, -1, -1).repeat(case.batch or 1, 1, 1)
    return {**call, "attn_mask": whole if mask is None else whole + mask, "key_padding_mask": padding}


def pair(
    *args: Any, sparse_config: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[nn.MultiheadAttention, BlockSparseRingMultiheadDilatedAttention]:
    """A dense and a block-sparse module of equal arguments and weights, the latter with a dense layout unless told."""
    dense = nn.MultiheadAttention(*args, **kwargs)
    config = sparse_config or {"sparsity_ratio": 1.0, "block_size": 4}
    sparse = BlockSparseRingMultiheadDilatedAttention(*args, **kwargs, sparse_config=config)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse
