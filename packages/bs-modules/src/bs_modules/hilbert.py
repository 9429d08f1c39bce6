"""The base module, its tiles processed along a Hilbert curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from ._options import UnorderedOptions, with_options_of
from .attention import BlockSparseRingDilatedAttention
from .config import SparsePatternConfig


class BlockSparseRingDilatedAttentionHilbertPostPattern(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention` with `order="hilbert"`: the same blocks, visited along a Hilbert curve.

    The order is applied after the pattern is made, so layout, density and result are the base module's, up to
    rounding. Whether neighbouring tiles in the cache save time depends on the device; nothing promises it.

    Args:
        segment_lengths: As for `BlockSparseRingDilatedAttention`, like every argument here.
        dilation_rates: See there.
        sparse_config: See there.
        device: See there.
        dtype: See there.
        num_heads: See there.
        dropout: See there.
        scale: See there.
        mixed_precision: See there.
        use_memory_pool: See there.
        backend: See there.
        deterministic: See there.

    Source: Hilbert, "Ueber die stetige Abbildung einer Linie auf ein Flächenstück", 1891; `bs_patterns` orders any
    rectangle by it.
    """

    @with_options_of(BlockSparseRingDilatedAttention.__init__, without=("order",))
    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        **options: Unpack[UnorderedOptions],
    ) -> None:
        super().__init__(segment_lengths, dilation_rates, sparse_config, order="hilbert", **options)
