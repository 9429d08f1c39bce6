"""Block-sparse attention layouts: which blocks attend to which, on numpy alone."""

__version__ = "0.1.0"
