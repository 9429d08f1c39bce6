"""Layouts on a device as pytrees: their tensors are leaves, everything else is part of the structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["register_fields"]


def register_fields(cls: type, tensors: Sequence[str], rest: Sequence[str]) -> None:
    """Register a dataclass whose fields are ``tensors`` and then ``rest``, in the order of its constructor."""

    def leaves_of(x: Any) -> tuple[list[Any], Any]:
        return [getattr(x, name) for name in tensors], tuple(getattr(x, name) for name in rest)

    def keyed_leaves_of(x: Any) -> tuple[list[tuple[Any, Any]], Any]:  # torch.export asks for names
        leaves, static = leaves_of(x)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(tensors, leaves, strict=True)], static

    pytree.register_pytree_node(
        cls,
        leaves_of,
        lambda leaves, static: cls(*leaves, *static),
        serialized_type_name=f"bs_kernels.{cls.__name__}",
        flatten_with_keys_fn=keyed_leaves_of,
    )
