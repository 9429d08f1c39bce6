"""What a gate may pick from, besides what causality and its own budget allow."""

from __future__ import annotations

from typing import Any

from bs_patterns import BlockLayout, LocalWindow, LongNetSegments

from ._adaptive_config import AdaptiveConfig
from .config import CheckedConfig, SparsePatternConfig


def check_candidates(value: Any) -> Any:
    """Checks a restriction: a `bs_patterns` pattern, the config of one, or `None`."""
    if isinstance(value, AdaptiveConfig):
        raise TypeError("candidates: expected a fixed pattern, got an AdaptiveConfig")
    needed = "pattern" if isinstance(value, CheckedConfig) else "layout"
    if value is not None and (isinstance(value, type) or not callable(getattr(value, needed, None))):
        raise TypeError(f"candidates: expected a bs_patterns pattern, the config of one or None, got {value!r}")
    return value


def candidate_layout(
    given: Any,
    segments: LongNetSegments | None,
    blocks: tuple[int, int],
    lengths: tuple[int, int],
    is_causal: bool,
    heads: int,
) -> BlockLayout | None:
    """The blocks that may be picked, `None` for all.

    Args:
        given: As `check_candidates` takes it; the block size of a config plays no part.
        segments: LongNet's geometry, a further restriction.
        blocks: Tokens per (query, key) block.
        lengths: Query and key tokens.
        is_causal: Whether queries see only keys up to their own position.
        heads: Query heads.
    """
    density = None
    if given is None:
        if segments is None:
            return None
        given = LocalWindow(2 * sum(lengths))  # everything, for the segments to cut down
    elif isinstance(given, SparsePatternConfig):
        given, density = given.pattern(), given.density
    elif isinstance(given, CheckedConfig):
        given, density = given.pattern(lengths), given.density  # pyright: ignore[reportAttributeAccessIssue]
    return given.layout(lengths, block_size=blocks, heads=heads, causal=is_causal, density=density, candidates=segments)
