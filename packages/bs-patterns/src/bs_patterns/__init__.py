"""Block-sparse attention layouts: which blocks attend to which, on numpy alone."""

from .layout import BlockLayout
from .pattern import Pattern
from .patterns.dilated import DilatedSparse
from .patterns.global_local import GlobalLocal
from .patterns.local_window import LocalWindow
from .segments import LongNetSegments

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "DilatedSparse",
    "GlobalLocal",
    "LocalWindow",
    "LongNetSegments",
    "Pattern",
    "__version__",
]
