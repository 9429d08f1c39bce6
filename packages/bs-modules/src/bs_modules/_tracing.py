"""What compiled code does about plans, which numpy makes: it makes them while it traces, for the sizes it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that compiled code calls once, as it traces, taking what it returns for a constant.

    This is `torch.compiler.assume_constant_result` without its import of the compiler, which eager users never need.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


class TracedPlans:
    """Plans that were made while tracing, each an attribute of its own: a graph that reads one guards no other."""

    def __init__(self) -> None:
        self._names: dict[tuple[Any, ...], str] = {}

    def name_of(self, key: tuple[Any, ...], make: Callable[[], Any]) -> str:
        """The attribute that holds the plan of `key`, which `make` makes if there is none."""
        name = self._names.get(key)
        if name is None:
            name = f"plan_{len(self._names)}"
            setattr(self, name, make())
            self._names[key] = name
        return name
