"""Block-sparse attention modules, their factory, and the bsattn command."""

from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .factory import choose_block_sparse, create_block_sparse_attention
from .presets import get_block_sparse_preset

__version__ = "0.1.0"

__all__ = [
    "BlockSparseAttention",
    "BlockSparseRingDilatedAttention",
    "SparsePatternConfig",
    "__version__",
    "choose_block_sparse",
    "create_block_sparse_attention",
    "get_block_sparse_preset",
]
