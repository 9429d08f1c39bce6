"""Block-sparse attention layouts: which blocks attend to which, on numpy alone."""

from .interchange import (
    from_block_mask,
    from_bsr_array,
    from_csr_array,
    to_block_mask,
    to_bsr_array,
    to_csr_array,
)
from .layout import BlockLayout
from .ordering import (
    Locality,
    group_rows,
    hilbert_index,
    hilbert_order,
    hilbert_tokens,
    locality,
    longest_first_order,
    morton_order,
    reuse_distances,
    row_order,
)
from .pattern import Pattern
from .patterns._classic import ClassicPattern
from .patterns.butterfly import Butterfly
from .patterns.classic import BigBird, BSLongformer, Dense, LocalSlidingWindow
from .patterns.compose import Custom, Difference, Intersection, PerHead, Union
from .patterns.dilated import DilatedSparse
from .patterns.fixed import Fixed, Variable
from .patterns.global_local import GlobalLocal
from .patterns.hierarchical import Hierarchical, HierarchicalLevel
from .patterns.local_window import LocalWindow
from .render import render_figure, render_text, save_image
from .segments import LongNetSegments

__version__ = "0.1.0"

__all__ = [
    "BSLongformer",
    "BigBird",
    "BlockLayout",
    "Butterfly",
    "ClassicPattern",
    "Custom",
    "Dense",
    "Difference",
    "DilatedSparse",
    "Fixed",
    "GlobalLocal",
    "Hierarchical",
    "HierarchicalLevel",
    "Intersection",
    "LocalSlidingWindow",
    "LocalWindow",
    "Locality",
    "LongNetSegments",
    "Pattern",
    "PerHead",
    "Union",
    "Variable",
    "__version__",
    "from_block_mask",
    "from_bsr_array",
    "from_csr_array",
    "group_rows",
    "hilbert_index",
    "hilbert_order",
    "hilbert_tokens",
    "locality",
    "longest_first_order",
    "morton_order",
    "render_figure",
    "render_text",
    "reuse_distances",
    "row_order",
    "save_image",
    "to_block_mask",
    "to_bsr_array",
    "to_csr_array",
]
