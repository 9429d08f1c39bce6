"""Block-sparse attention layouts: which blocks attend to which, on numpy alone."""

from .layout import BlockLayout
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
    "LongNetSegments",
    "Pattern",
    "PerHead",
    "Union",
    "Variable",
    "__version__",
]
