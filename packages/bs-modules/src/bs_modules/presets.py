"""Ready-made configurations by name."""

from __future__ import annotations

from typing import Any

from .attention import BlockSparseAttention
from .config import suggest
from .factory import create_block_sparse_attention

_PRESETS: dict[str, dict[str, Any]] = {
    "local": {"pattern_type": "local_window", "window_size": 512},
    "dilated": {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.1},
    "global_local": {"pattern_type": "global_local", "global_tokens": 128, "window_size": 512},
    "ultra_sparse": {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.01},
}
_NOT_YET = ("hierarchical_standard", "hierarchical_fine", "hierarchical_long", "adaptive_standard")


def get_block_sparse_preset(name: str, **overrides: Any) -> BlockSparseAttention:
    """Makes the module of a preset.

    Args:
        name: One of the presets below.
        **overrides: Arguments of `create_block_sparse_attention` that replace or add to the preset's own.

    Presets and the density of their layouts, not causal / causal (blocks of 64):

    PRESET_TABLE

    Raises:
        ValueError: An unknown name; the nearest is suggested.
        NotImplementedError: A preset of a variant that this version does not have yet.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a preset, got {name!r}")
    if name in _NOT_YET or name.startswith(("multihead_", "hilbert_")):
        raise NotImplementedError(
            f"name: the preset {name!r} is part of the design and not of this version; available: {', '.join(_PRESETS)}"
        )
    if name not in _PRESETS:
        near = suggest(name, [*_PRESETS, *_NOT_YET])
        raise ValueError(f"name: expected one of {', '.join(_PRESETS)}, got {name!r}{near}")
    return create_block_sparse_attention("base", **{**_PRESETS[name], **overrides})
