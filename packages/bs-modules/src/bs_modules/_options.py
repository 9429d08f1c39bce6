"""The arguments that attention modules have in common, written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast

import torch

from .config import CheckedConfig

F = TypeVar("F", bound=Callable[..., None])
C = TypeVar("C", bound=CheckedConfig)


class UnorderedOptions(TypedDict, total=False):
    """Keyword arguments of `BlockSparseRingDilatedAttention` but `order`; it says what they mean."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    num_heads: int | None
    dropout: float
    scale: float | None
    mixed_precision: bool
    use_memory_pool: bool
    backend: str
    deterministic: bool


class AttentionOptions(UnorderedOptions, total=False):
    """All keyword arguments of `BlockSparseRingDilatedAttention`."""

    order: str


def with_options_of(base: Callable[..., Any], *, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Shows a constructor that passes `**options` on to `base` with all of the keyword arguments that it has.

    Args:
        base: The constructor that takes them.
        without: Those that the constructor settles itself, and so refuses.
    """
    options = [p for p in inspect.signature(base).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def show(constructor: F) -> F:
        signature = inspect.signature(constructor)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [p for p in options if p.name not in signature.parameters and p.name not in without]
        valid = {p.name for p in (*own, *more)}

        @wraps(constructor)
        def shown(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in valid:
                    raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
            constructor(self, *args, **kwargs)

        del shown.__wrapped__  # whose source has fewer arguments, which Sphinx compares
        shown.__signature__ = signature.replace(parameters=[*own, *more])  # pyright: ignore[reportAttributeAccessIssue]
        return cast(F, shown)

    return show


def one_config(kind: type[C], name: str, given: Any, sparse_config: Any) -> Any:
    """The config of a module that takes it as `sparse_config` or under a name of its own.

    Raises:
        ValueError: Both are given.
    """
    if given is None:
        return sparse_config
    if sparse_config is not None:
        raise ValueError(f"{name}: given beside sparse_config, which is the same; give one of the two")
    return kind.of(name, given)
