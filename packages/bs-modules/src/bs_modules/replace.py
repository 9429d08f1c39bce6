"""Swaps the dense attention of an existing model for block-sparse attention, keeping its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .factory import multihead_arguments
from .multihead import BlockSparseRingMultiheadDilatedAttention


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_attention` did.

    Args:
        replaced: Names of the modules that are block-sparse now, in the model's order; a module used
            in two places counts twice.
        skipped: (name, reason) of each `nn.MultiheadAttention` that was left alone.
    """

    replaced: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.replaced)

    def __iter__(self) -> Iterator[str]:
        return iter(self.replaced)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} nn.MultiheadAttention, skipped {len(self.skipped)}"]
        lines += [f"  replaced {name}" for name in self.replaced]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def replace_attention(
    model: nn.Module,
    *,
    select: Callable[[str, nn.MultiheadAttention], bool] | None = None,
    attention: Callable[[nn.MultiheadAttention], nn.Module] | None = None,
    **sparse: Any,
) -> ReplacementReport:
    """Replaces every `nn.MultiheadAttention` inside a model by `BlockSparseRingMultiheadDilatedAttention`, in place.

    Parameters, hooks and settings are carried over as the same objects, so optimizers, tied weights and handles stay
    valid. Every `nn.TransformerEncoder` above a replaced module stops nesting tensors that would be padded again.

    Args:
        model: Is changed. The model itself must not be the `nn.MultiheadAttention`: use
            `BlockSparseRingMultiheadDilatedAttention.from_multihead` then.
        select: Called with the qualified name and the module; only modules for which it is true are replaced, for
            example self-attention only: `lambda name, module: name.endswith("self_attn")`. `None`: all.
        attention: Makes the inner attention for one module (`attention=` of the constructor). `None`: the base module.
        **sparse: Keyword-only arguments of the multihead module's constructor, and fields of its config given directly
            (`sparsity_ratio` is a density), the same for all. A `sparse_config` object is shared by all, so changing it
            changes them all.

    Returns:
        The names replaced, and those skipped with the reason.

    Raises:
        TypeError: An argument has the wrong type, or an unknown keyword.
        ValueError: `model` itself is an `nn.MultiheadAttention`, or an argument is out of range; the model is
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if type(model) is nn.MultiheadAttention:
        raise ValueError(
            "model: expected a module around nn.MultiheadAttention, got one itself; "
            "use BlockSparseRingMultiheadDilatedAttention.from_multihead(model)"
        )
    for name, function in (("select", select), ("attention", attention)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function or None, got {function!r}")
    sparse = multihead_arguments(sparse)
    twins: dict[int, nn.Module] = {}
    swaps: list[tuple[str, nn.Module, str, nn.Module]] = []
    skipped: list[tuple[str, str]] = []
    for name, parent, key, child in list(_dense_attentions(model)):
        reason = _reason_to_skip(name, child, select)
        if reason is not None:
            skipped.append((name, reason))
            continue
        if id(child) not in twins:
            inner = None if attention is None else attention(child)
            twins[id(child)] = BlockSparseRingMultiheadDilatedAttention.from_multihead(child, attention=inner, **sparse)
        swaps.append((name, parent, key, twins[id(child)]))
    for _, parent, key, twin in swaps:
        parent._modules[key] = twin
    made = set(twins.values())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and made.intersection(module.modules()):
            module.use_nested_tensor = False
    return ReplacementReport(tuple(name for name, *_ in swaps), tuple(skipped))


def _dense_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.MultiheadAttention]]:
    """(qualified name, parent, key in the parent, module) of each place of an `nn.MultiheadAttention`."""
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            if isinstance(child, nn.MultiheadAttention):
                yield f"{path}.{key}" if path else key, parent, key, child


def _reason_to_skip(
    name: str, module: nn.MultiheadAttention, select: Callable[[str, nn.MultiheadAttention], bool] | None
) -> str | None:
    if isinstance(module, BlockSparseRingMultiheadDilatedAttention):
        return "is block-sparse already"
    if type(module) is not nn.MultiheadAttention:
        return f"is a {type(module).__name__}, whose own behaviour would be lost"
    return None if select is None or select(name, module) else "not selected"
