"""Block-sparse attention modules, their factory, and the bsattn command."""

from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .distributed import BlockSparseRingDistributedDilatedAttention
from .distributed_config import DistributedSparseConfig
from .factory import choose_block_sparse, create_block_sparse_attention, create_multihead_block_sparse
from .hierarchical import BlockSparseHierarchical, HierarchicalConfig
from .hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern
from .multihead import BlockSparseRingMultiheadDilatedAttention
from .presets import get_block_sparse_preset
from .replace import ReplacementReport, replace_attention
from .schedules import ProgressiveSparsityScheduler

__version__ = "0.1.0"

__all__ = [
    "BlockSparseAttention",
    "BlockSparseHierarchical",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionHilbertPostPattern",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DistributedSparseConfig",
    "HierarchicalConfig",
    "ProgressiveSparsityScheduler",
    "ReplacementReport",
    "SparsePatternConfig",
    "__version__",
    "choose_block_sparse",
    "create_block_sparse_attention",
    "create_multihead_block_sparse",
    "get_block_sparse_preset",
    "replace_attention",
]
