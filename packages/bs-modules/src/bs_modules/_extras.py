"""Optional libraries: imported when first needed, with one clear line when missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of the extra `train` is not installed."""


def require(module: str) -> ModuleType:
    """Imports a library of the extra `train`.

    Raises:
        MissingExtraError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        name = module.split(".")[0].replace("_", "-")
        raise MissingExtraError(
            f"{name} is not installed; it comes with the extra: pip install 'bs-modules[train]'", name=error.name
        ) from None
