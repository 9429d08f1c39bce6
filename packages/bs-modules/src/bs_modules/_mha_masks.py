"""The arguments of `nn.MultiheadAttention.forward`: checked as it checks them, and turned into this suite's masks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """The masks of one call, in the senses of `bs_kernels.block_sparse_attention`.

    Args:
        causal: Whether keys after the query are masked.
        key_padding: `bool[N, S]`, True = a real token, or `None`.
        bias: Bool (True = attend) or float, broadcastable to `[N, heads, L, S]`, or `None`.
    """

    causal: bool = False
    key_padding: Tensor | None = None
    bias: Tensor | None = None

    def arguments(self) -> dict[str, Tensor]:
        """The masks that are there, by the names of the attention's arguments."""
        named = {"key_padding_mask": self.key_padding, "attn_bias": self.bias}
        return {name: mask for name, mask in named.items() if mask is not None}


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    embed_dim: int,
    num_heads: int,
    batch_first: bool,
    packed: bool,
) -> bool:
    """Checks one call, raising the exception types of `nn.MultiheadAttention`, and its words where it has any.

    Args:
        query, key, value, key_padding_mask, attn_mask: As given by the caller.
        embed_dim, num_heads, batch_first: The module's.
        packed: Whether query, key and value share one input projection, and so one width.

    Returns:
        Whether the inputs are batched.

    Raises:
        AssertionError: Ranks, widths, mask dtypes or a padding mask that do not fit.
        RuntimeError: A shape of `attn_mask`, batch sizes or float mask dtypes that do not fit.
        TypeError: A mask is not a tensor.
    """
    batched = query.dim() == 3
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if not isinstance(mask, Tensor | None):
            raise TypeError(f"{name}: expected a tensor or None, got {type(mask).__name__}")
        if mask is not None and mask.dtype != torch.bool and not torch.is_floating_point(mask):
            raise AssertionError(f"{name}: only bool and floating types of {name} are supported, got {mask.dtype}")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead "
            f"(got {key_padding_mask.dtype} and {attn_mask.dtype}).",
            stacklevel=4,
        )
    if not batched and query.dim() != 2:
        raise AssertionError(
            f"query: query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    which = "batched (3-D)" if batched else "unbatched (2-D)"
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            f"key, value: For {which} `query`, expected `key` and `value` to be {query.dim()}-D but found "
            f"{key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    token, batch = (1, 0) if batch_first and batched else (0, 1)
    n = query.shape[batch] if batched else 1
    lengths = (query.shape[token], key.shape[token])
    _check_mask_ranks(key_padding_mask, attn_mask, batched, num_heads, lengths)
    if query.shape[-1] != embed_dim:
        raise AssertionError(
            f"query: was expecting embedding dimension of {embed_dim}, the embed_dim, but got {query.shape[-1]}"
        )
    if packed and key.shape != value.shape:
        raise AssertionError(f"value: key shape {key.shape} does not match value shape {value.shape}")
    if key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"value: key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
        )
    if batched and key.shape[batch] != n:
        raise RuntimeError(f"key: expected a batch of {n}, that of query, got {key.shape[batch]}")
    _check_mask_shapes(key_padding_mask, attn_mask, batched, n, num_heads, lengths)
    return batched


def _check_mask_ranks(
    padding: Tensor | None, mask: Tensor | None, batched: bool, num_heads: int, lengths: tuple[int, int]
) -> None:
    which, rank = ("batched (3-D)", 2) if batched else ("unbatched (2-D)", 1)
    if padding is not None and padding.dim() != rank:
        raise AssertionError(
            f"key_padding_mask: For {which} `query`, expected `key_padding_mask` to be `None` or {rank}-D but found "
            f"{padding.dim()}-D tensor instead"
        )
    if mask is not None and mask.dim() not in (2, 3):
        raise AssertionError(
            f"attn_mask: For {which} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found {mask.dim()}-D "
            "tensor instead"
        )
    if mask is not None and not batched and mask.dim() == 3 and mask.shape != (num_heads, *lengths):
        wanted = (num_heads, *lengths)
        raise AssertionError(f"attn_mask: Expected `attn_mask` shape to be {wanted} but got {mask.shape}")


def _check_mask_shapes(
    padding: Tensor | None, mask: Tensor | None, batched: bool, n: int, num_heads: int, lengths: tuple[int, int]
) -> None:
    if mask is not None:
        wanted = lengths if mask.dim() == 2 else (n * num_heads, *lengths)
        if mask.shape != wanted:
            raise RuntimeError(
                f"attn_mask: The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {wanted}."
            )
    if padding is not None:
        wanted = (n, lengths[1]) if batched else (lengths[1],)
        if padding.shape != wanted:
            raise AssertionError(f"key_padding_mask: expected shape {list(wanted)}, got {list(padding.shape)}")


def check_mask_dtypes(dtype: torch.dtype, **masks: Tensor | None) -> None:
    """Raises RuntimeError for a float mask that is neither fp32 nor of the projected query's dtype."""
    for name, mask in masks.items():
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, dtype):
            raise RuntimeError(f"{name}: expected bool, float32 or {dtype}, that of the query, got {mask.dtype}")


def merge(padding: Tensor | None, mask: Tensor | None, is_causal: bool, num_heads: int, square: bool) -> Masks:
    """Turns the two masks of `nn.MultiheadAttention` (True = blocked, floats add) into one `Masks`.

    Args:
        padding: Bool or float `[N, S]`.
        mask: Bool or float `[L, S]` or `[N * num_heads, L, S]`.
        is_causal: Whether the caller asks for causality, or hints that `mask` is the causal one.
        num_heads: Heads.
        square: Whether L == S; otherwise a given `mask` alone says what is causal.
    """
    causal = is_causal and (mask is None or square)
    if causal and mask is not None and _is_causal_mask(mask):
        mask = None
    if padding is not None and padding.dtype != torch.bool and _only_blocks(padding):
        padding = padding != 0
    bias = None if mask is None else (~mask if mask.dtype == torch.bool else mask)
    if bias is not None:
        bias = bias[None, None] if bias.dim() == 2 else bias.unflatten(0, (-1, num_heads))
    if padding is None or padding.dtype == torch.bool:
        return Masks(causal, None if padding is None else ~padding, bias)
    added = padding[:, None, None]
    if bias is None:
        bias = added
    elif bias.dtype == torch.bool:
        bias = torch.where(bias, added, float("-inf"))
    else:
        bias = bias + added
    return Masks(causal, None, bias)


def _is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask blocks the keys after the query and nothing else, so that a causal layout can stand for it."""
    if mask.dim() != 2 or mask.requires_grad or mask.is_meta or torch.compiler.is_compiling():
        return False
    blocked = mask if mask.dtype == torch.bool else mask == float("-inf")
    after = torch.ones_like(blocked).triu(1)
    return torch.equal(blocked, after) and (mask.dtype == torch.bool or not bool(mask.tril().any()))


def _only_blocks(padding: Tensor) -> bool:
    """Whether a float mask holds 0 and −inf only: a bool mask that `nn.TransformerEncoder` turned into floats."""
    if padding.requires_grad or padding.is_meta or torch.compiler.is_compiling():
        return False
    return bool(((padding == 0) | (padding == float("-inf"))).all())
