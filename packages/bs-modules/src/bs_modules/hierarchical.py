"""Several resolutions at once: near keys in full, far keys in ever wider strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

from bs_patterns import BlockLayout, Hierarchical, HierarchicalLevel, LongNetSegments

from ._checks import check_density, check_flag
from ._options import AttentionOptions, one_config, with_options_of
from .attention import BlockSparseRingDilatedAttention
from .config import DEFAULT_DENSITY, CheckedConfig

_AUTO_BLOCK = 64


@dataclasses.dataclass
class HierarchicalConfig(CheckedConfig):
    """The levels of a hierarchical pattern, and its density.

    Assigning to a field checks it at once and takes effect at the next call of the modules that hold the config.

    Args:
        level_configs: Mappings with `stride` (in level blocks), `window_size` (tokens; −1: everywhere) and `block_size`
            (tokens). A level keeps the blocks within its window whose distance is a multiple of its stride. `None`: the
            default three levels, at blocks of 64: local (256 tokens), every 4th block within 1,024 tokens, every 16th
            everywhere.
        sparsity_ratio: The **density** to meet, in (0, 1]; the levels then say in which order blocks are taken, finest
            first. `None`: the levels alone decide.
        auto_levels: Let the length and the density (0.1 if `sparsity_ratio` is `None`) pick the number of levels, at
            blocks of 64, each four times as wide and as sparse as the one before.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or levels are given and picked automatically.
    """

    level_configs: Sequence[Mapping[str, int]] | None = None
    sparsity_ratio: float | None = None
    auto_levels: bool = False

    @property
    def density(self) -> float | None:
        """The density asked for; `None` when the levels alone decide."""
        return DEFAULT_DENSITY if self.auto_levels and self.sparsity_ratio is None else self.sparsity_ratio

    @property
    def block_size(self) -> int:
        """Tokens per block of the layout: those of the level with the smallest blocks."""
        if self.auto_levels:
            return _AUTO_BLOCK
        return min(cast(HierarchicalLevel, level).block_size for level in self.pattern(1).levels)

    @property
    def pattern_type(self) -> str:
        """The pattern's name in statistics."""
        return self._pattern_name()

    def validate(self) -> None:
        """Checks the fields, also after a level was changed in place.

        Raises:
            ValueError: A level is not valid, or `level_configs` would have no effect beside `auto_levels=True`.
        """
        super().validate()
        if self.auto_levels and self.level_configs is not None:
            raise ValueError("level_configs: has no effect with auto_levels=True, which picks them; give one")

    def pattern(self, seq_len: int | tuple[int, int]) -> Hierarchical:
        """Builds the `bs_patterns` pattern for a length, on which it depends with `auto_levels` only."""
        self.validate()
        if self.auto_levels:
            return Hierarchical.auto(seq_len, self.density or DEFAULT_DENSITY, block_size=_AUTO_BLOCK)
        return Hierarchical() if self.level_configs is None else Hierarchical(self.level_configs)

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        heads: int = 1,
        causal: bool = False,
        candidates: LongNetSegments | None = None,
    ) -> BlockLayout:
        """Builds the layout for a length; arguments as for `SparsePatternConfig.layout`."""
        return self.pattern(seq_len).layout(
            seq_len,
            block_size=self.block_size,
            heads=heads,
            causal=causal,
            density=self.density,
            candidates=candidates,
        )

    def _pattern_name(self) -> str:
        if self.auto_levels:
            return "hierarchical (automatic levels)"
        return f"hierarchical ({len(self.pattern(1).levels)} levels)"


class BlockSparseHierarchical(BlockSparseRingDilatedAttention):
    """Attention over several resolutions at once, one exact softmax over the union of their blocks.

    Its cost is that of its active blocks, nothing per level. It never communicates.

    Args:
        segment_lengths: As for `BlockSparseRingDilatedAttention`.
        dilation_rates: As for `BlockSparseRingDilatedAttention`.
        sparse_config: A `HierarchicalConfig` or a mapping of its fields. The module keeps this very object: assigning
            to its fields takes effect at the next call.
        hierarchical_config: The same under another name; give one of the two.
        device: As for `BlockSparseRingDilatedAttention`, like the arguments below.
        dtype: See there.
        num_heads: See there.
        dropout: See there.
        scale: See there.
        mixed_precision: See there.
        use_memory_pool: See there.
        order: See there.
        backend: See there.
        deterministic: See there.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or both configs are given.

    Source: Ye et al., "BP-Transformer", 2019, and Child et al., "Generating Long Sequences with Sparse Transformers",
    2019, at block granularity.
    """

    sparse_config: Any
    _config_type = HierarchicalConfig

    @with_options_of(BlockSparseRingDilatedAttention.__init__)
    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: HierarchicalConfig | Mapping[str, Any] | None = None,
        *,
        hierarchical_config: HierarchicalConfig | Mapping[str, Any] | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        config = one_config(HierarchicalConfig, "hierarchical_config", hierarchical_config, sparse_config)
        super().__init__(segment_lengths, dilation_rates, config, **options)


def _check_levels(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        levels = Hierarchical(value).levels
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("levels", name, 1)) from None
    return [dataclasses.asdict(cast(HierarchicalLevel, level)) for level in levels]


HierarchicalConfig._checks = {
    "level_configs": _check_levels,
    "sparsity_ratio": check_density,
    "auto_levels": check_flag,
}
