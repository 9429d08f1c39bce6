"""Block-sparse attention layouts: which blocks attend to which, on numpy alone."""

from .layout import BlockLayout

__version__ = "0.1.0"

__all__ = ["BlockLayout", "__version__"]
