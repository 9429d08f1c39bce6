"""One function that makes any variant and refuses what would have no effect."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig, check_int, suggest

_VARIANTS: dict[str, type[BlockSparseAttention]] = {"base": BlockSparseRingDilatedAttention}
_NOT_YET = ("hierarchical", "adaptive", "multihead", "distributed", "hilbert", "dilated")
# Fields of SparsePatternConfig that the factory also takes directly; its dilation_rates are the candidates' here.
_FLAT = tuple(name for name in inspect.signature(SparsePatternConfig).parameters if name != "dilation_rates")

_logger = logging.getLogger("bs_modules")


def create_block_sparse_attention(
    variant: str = "auto", *, explain: bool = False, **kwargs: Any
) -> BlockSparseAttention:
    """Makes a block-sparse attention module.

    Args:
        variant: `"auto"` or `"base"`.
        explain: Log, at level INFO of the logger `bs_modules`, which variant `"auto"` chose and why.
        **kwargs: Arguments of the variant's constructor, and fields of `SparsePatternConfig` given directly
            (`sparsity_ratio` is a density: 0.1 keeps 10 % of the blocks). `dilation_rates` here always belong to
            `segment_lengths`; the rates of a dilated pattern go into `sparse_config`.

    Returns:
        The module.

    Raises:
        TypeError: An argument that the variant does not have; the valid ones are listed.
        ValueError: An unknown variant, or a config field given both directly and inside `sparse_config`.
        NotImplementedError: A variant that this version does not have yet.
    """
    chosen, reason = _resolve(variant)
    if explain:
        _logger.info("variant %r: %s", chosen, reason)
    module = _VARIANTS[chosen]
    constructor = [name for name in inspect.signature(module).parameters if name != "self"]
    valid = [*constructor, *(name for name in _FLAT if name not in constructor)]
    for name in kwargs:
        if name not in valid:
            raise TypeError(
                f"{name}: not an argument of variant {chosen!r}{suggest(name, valid)}; valid: {', '.join(valid)}"
            )
    flat = {name: kwargs.pop(name) for name in _FLAT if name in kwargs and name not in constructor}
    if flat:
        if kwargs.get("sparse_config") is not None:
            raise ValueError(
                f"{', '.join(flat)}: given beside sparse_config, which has the same field; set it in one place"
            )
        kwargs["sparse_config"] = SparsePatternConfig.from_dict(flat)
    return module(**kwargs)


def choose_block_sparse(seq_len: int, use_case: str, num_gpus: int = 1) -> str:
    """Names the variant that suits a use.

    Args:
        seq_len: Tokens.
        use_case: `"research"`, `"production"`, `"drop_in_replacement"`, `"extreme_length"`, or anything else for the
            base module.
        num_gpus: Devices to spread one sequence over.

    Returns:
        `"adaptive"` for research; for production `"distributed"` with more than one GPU, else `"hierarchical"` above
        50,000 tokens; `"multihead"` for a drop-in replacement; `"hierarchical"` for extreme lengths; else `"base"`.
    """
    check_int("seq_len", seq_len)
    check_int("num_gpus", num_gpus, least=0)
    if not isinstance(use_case, str):
        raise TypeError(f"use_case: expected a string, got {use_case!r}")
    if use_case == "production":
        if num_gpus > 1:
            return "distributed"
        return "hierarchical" if seq_len > 50_000 else "base"
    table: Mapping[str, str] = {
        "research": "adaptive",
        "drop_in_replacement": "multihead",
        "extreme_length": "hierarchical",
    }
    return table.get(use_case, "base")


def _resolve(variant: str) -> tuple[str, str]:
    if not isinstance(variant, str):
        raise TypeError(f"variant: expected a string, got {variant!r}")
    available = ["auto", *_VARIANTS]
    if variant == "auto":
        return "base", "the fixed pattern is the only variant of this version"
    if variant in _VARIANTS:
        return variant, "asked for by name"
    if variant in _NOT_YET:
        raise NotImplementedError(
            f"variant: {variant!r} is part of the design and not of this version; available: {', '.join(available)}"
        )
    near = suggest(variant, [*available, *_NOT_YET])
    raise ValueError(f"variant: expected one of {', '.join(available)}, got {variant!r}{near}")
