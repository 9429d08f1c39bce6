"""Block-sparse attention modules, their factory, and the bsattn command."""

from ._adaptive_config import AdaptiveConfig
from ._adaptive_training import AdaptiveSparsityTrainer
from ._gate_scorer import ImportanceScorer
from .adaptive import BlockSparseAdaptive
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .dilated import DilatedAttention
from .distributed import BlockSparseRingDistributedDilatedAttention
from .distributed_config import DistributedSparseConfig
from .explain import Explanation
from .factory import choose_block_sparse, create_block_sparse_attention, create_multihead_block_sparse
from .hierarchical import BlockSparseHierarchical, HierarchicalConfig
from .hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern
from .monitor import ModuleMetrics, Monitor
from .multihead import BlockSparseRingMultiheadDilatedAttention
from .presets import get_block_sparse_preset
from .replace import ReplacementReport, replace_attention
from .schedules import ProgressiveSparsityScheduler
from .sinks import LoggingSink, PrometheusSink, TensorBoardSink, prometheus_text

__version__ = "0.1.0"

__all__ = [
    "AdaptiveConfig",
    "AdaptiveSparsityTrainer",
    "BlockSparseAdaptive",
    "BlockSparseAttention",
    "BlockSparseHierarchical",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionHilbertPostPattern",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DilatedAttention",
    "DistributedSparseConfig",
    "Explanation",
    "HierarchicalConfig",
    "ImportanceScorer",
    "LoggingSink",
    "ModuleMetrics",
    "Monitor",
    "ProgressiveSparsityScheduler",
    "PrometheusSink",
    "ReplacementReport",
    "SparsePatternConfig",
    "TensorBoardSink",
    "__version__",
    "choose_block_sparse",
    "create_block_sparse_attention",
    "create_multihead_block_sparse",
    "get_block_sparse_preset",
    "prometheus_text",
    "replace_attention",
]
