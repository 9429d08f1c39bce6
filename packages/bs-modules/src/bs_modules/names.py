"""Names of the earlier block-sparse ring dilated attention API, for code that still imports them.

Most of its classes have the same name in `bs_modules`. Those that had another are here, each the class of today and
nothing else. The page "Earlier names" of the documentation lists all, with what to write instead where the arguments
differ.
"""

from bs_memory import DeviceCache

from .attention import BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .distributed import BlockSparseRingDistributedDilatedAttention
from .multihead import BlockSparseRingMultiheadDilatedAttention

BlockSparseBase = BlockSparseRingDilatedAttention
BlockSparseRingDilatedAttentionFixed = BlockSparseRingDilatedAttention
BlockSparseRingDilatedAttentionOriginal = BlockSparseRingDilatedAttention
BlockSparseMultihead = BlockSparseRingMultiheadDilatedAttention
BlockSparseDistributed = BlockSparseRingDistributedDilatedAttention
SparseConfig = SparsePatternConfig
PersistentPatternCache = DeviceCache

__all__ = [
    "BlockSparseBase",
    "BlockSparseDistributed",
    "BlockSparseMultihead",
    "BlockSparseRingDilatedAttentionFixed",
    "BlockSparseRingDilatedAttentionOriginal",
    "PersistentPatternCache",
    "SparseConfig",
]
