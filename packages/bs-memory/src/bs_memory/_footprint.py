"""How much memory a value holds, and which of its tensors live on an accelerator."""

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

# Shared with the rest of the program, or without a size of their own that would mean anything.
_ATOMS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device)


class FakeValueError(TypeError):
    """A value holds fake tensors, which stand for real ones while torch.compile traces: never to be kept."""


def footprint(value: Any) -> tuple[int, list[torch.Tensor]]:
    """Sums the memory behind a value.

    Args:
        value: tensors, arrays, containers, dataclasses and plain objects, nested in any way.

    Returns:
        The bytes of every distinct tensor storage (a view keeps its whole storage alive, so that is what it costs),
        of arrays and of the Python objects between them; and the tensors that are not on the CPU.

    Raises:
        FakeValueError: if the value holds fake tensors.
    """
    nbytes = 0
    elsewhere: list[torch.Tensor] = []
    seen: set[int] = set()
    storages: set[tuple[torch.device, int]] = set()
    queue = [value]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, _ATOMS):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if isinstance(item, FakeTensor):
                raise FakeValueError("value: expected real tensors, got fake ones")
            parts = _parts(item)
            if parts:
                queue += parts
                continue
            if item.device.type not in ("cpu", "meta"):
                elsewhere.append(item)
            if item.device.type != "meta":
                storage = item.untyped_storage()
                key = (item.device, storage.data_ptr())
                if key not in storages:
                    storages.add(key)
                    nbytes += storage.nbytes()
            continue
        size = getattr(item, "nbytes", None)
        if isinstance(size, int) and not isinstance(item, type):
            nbytes += size  # numpy and everything that follows its protocol
            continue
        nbytes += sys.getsizeof(item, 0)
        queue += _children(item)
    return nbytes, elsewhere


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors a sparse tensor or a wrapper subclass is made of; empty for one with a storage of its own."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return [getattr(tensor, name) for name in flatten()[0]]
    return []


def _children(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    if isinstance(item, str | bytes | bytearray | int | float | complex) or item is None:
        return []
    children = list(getattr(item, "__dict__", {}).values())
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                name = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name
                children.append(getattr(item, name, None))
    return children


def to_device(value: Any, device: torch.device) -> Any:
    """Copies a value to a device: through its own `.to(device)`, or tensor by tensor through containers.

    Args:
        value: a tensor, something with a `.to` method, a dataclass or a container of those.
        device: where to.

    Returns:
        The copy.

    Raises:
        TypeError: if nothing in `value` can be moved, so that the "copy" would still be on the host.
    """
    moved = False

    def move(leaf: Any) -> Any:
        nonlocal moved
        if callable(getattr(leaf, "to", None)):
            moved = True
            return leaf.to(device)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.init}
            return dataclasses.replace(leaf, **_pytree.tree_map(move, fields))
        return leaf

    copy = move(value) if callable(getattr(value, "to", None)) else _pytree.tree_map(move, value)
    if not moved:
        raise TypeError(
            f"to_device: expected a function, since {type(value).__name__} has neither tensors nor a .to method"
        )
    return copy
