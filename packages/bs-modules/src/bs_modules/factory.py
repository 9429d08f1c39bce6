"""One function that makes any variant and refuses what would have no effect."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ._adaptive_config import AdaptiveConfig
from ._checks import check_choice, check_flag, check_int, suggest
from .adaptive import BlockSparseAdaptive
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .dilated import DilatedAttention
from .distributed import BlockSparseRingDistributedDilatedAttention
from .hierarchical import BlockSparseHierarchical, HierarchicalConfig
from .hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern
from .multihead import BlockSparseRingMultiheadDilatedAttention


@dataclass(frozen=True)
class _Variant:
    """A module and the config whose fields the factory also takes directly."""

    module: type[nn.Module]
    config: Any = SparsePatternConfig
    config_argument: str = "sparse_config"


_VARIANTS: dict[str, _Variant] = {
    "base": _Variant(BlockSparseRingDilatedAttention),
    "hierarchical": _Variant(BlockSparseHierarchical, HierarchicalConfig),
    "adaptive": _Variant(BlockSparseAdaptive, AdaptiveConfig),
    "multihead": _Variant(BlockSparseRingMultiheadDilatedAttention),
    "hilbert": _Variant(BlockSparseRingDilatedAttentionHilbertPostPattern),
    "dilated": _Variant(DilatedAttention),
    "distributed": _Variant(BlockSparseRingDistributedDilatedAttention),
}
# The arguments that a config object may come under, and are excluded by its fields given directly.
_CONFIGS = ("sparse_config", "hierarchical_config", "adaptive_config")
_LONG = 50_000  # tokens above which the choice table prefers levels, or a ring

# Variants around another one, and those of their arguments that the other does not get.
_AROUND: dict[str, list[str]] = {
    "multihead": list(inspect.signature(nn.MultiheadAttention).parameters),
    "distributed": ["distributed_config", "group", "enable_deepspeed_integration"],
}

_logger = logging.getLogger("bs_modules")


def create_block_sparse_attention(
    variant: str = "auto",
    *,
    explain: bool = False,
    seq_len: int | None = None,
    world_size: int | None = None,
    **kwargs: Any,
) -> BlockSparseAttention | BlockSparseRingMultiheadDilatedAttention:
    """Makes a block-sparse attention module.

    `"auto"` decides, in this order: multihead if `embed_dim` is given; the variant that alone has an argument that is
    given, or whose config is; distributed if `world_size` is above 1, or if the process group has several ranks, serves
    the device, and `seq_len` is above 50,000; hierarchical if `seq_len` is above 50,000; else base. The last three only
    if they have every argument that is given.

    Args:
        variant: `"auto"`, or a variant by name; an unknown one lists them.
        explain: Log, at level INFO of the logger `bs_modules`, which variant was chosen and why. The module keeps the
            reason as `chosen_because` in any case.
        seq_len: The length to expect, of the whole sequence, for `"auto"` only. The module takes any length.
        world_size: How many ranks share each sequence, for `"auto"` only. `None`: as the process group says, for
            long sequences. Give 1 where ranks hold different sequences (data parallelism).
        **kwargs: Arguments of the variant's constructor, and fields of its config given directly (`sparsity_ratio` is a
            density: 0.1 keeps 10 % of the blocks). `dilation_rates` here always belong to `segment_lengths`; the rates
            of a dilated pattern go into `sparse_config`. For `"multihead"` and `"distributed"`, `attention` may be the
            name of another variant, which gets the arguments that are its own; see `create_multihead_block_sparse`.

    Returns:
        The module.

    Raises:
        TypeError: An argument that the variant does not have; the valid ones are listed.
        ValueError: An unknown variant, a config field given both directly and inside a config, or `seq_len` or
            `world_size` with a named variant.
    """
    check_flag("explain", explain)
    chosen, reason = _resolve(variant, seq_len, world_size, kwargs)
    if explain:
        _logger.info("variant %r: %s", chosen, reason)
    if chosen in _AROUND and isinstance(kwargs.get("attention"), str):
        kwargs = _with_inner(chosen, **kwargs)
    _check_known(kwargs, _arguments(chosen), repr(chosen))
    module: Any = _VARIANTS[chosen].module(**_gather(chosen, kwargs))
    module.chosen_because = f"{chosen}: {reason}"
    return module


def create_multihead_block_sparse(
    embed_dim: int, num_heads: int, *, attention: str | nn.Module = "base", **kwargs: Any
) -> BlockSparseRingMultiheadDilatedAttention:
    """Makes a drop-in `nn.MultiheadAttention` around any variant.

    Args:
        embed_dim: As for `nn.MultiheadAttention`.
        num_heads: As for `nn.MultiheadAttention`.
        attention: The variant between the projections, or a module.
        **kwargs: The other arguments of `nn.MultiheadAttention`, and of the variant as
            `create_block_sparse_attention` takes them.

    Returns:
        The module.

    Raises:
        TypeError: An argument that neither has.
        ValueError: An unknown variant, or values out of range.
    """
    module = create_block_sparse_attention(
        "multihead", embed_dim=embed_dim, num_heads=num_heads, attention=attention, **kwargs
    )
    assert isinstance(module, BlockSparseRingMultiheadDilatedAttention)
    return module


def choose_block_sparse(seq_len: int, use_case: str, num_gpus: int = 1) -> str:
    """Names the variant that suits a use.

    Args:
        seq_len: Tokens.
        use_case: `"research"`, `"production"`, `"drop_in_replacement"`, `"extreme_length"`, or anything else for the
            base module.
        num_gpus: Devices to spread one sequence over.

    Returns:
        `"adaptive"` for research; for production `"distributed"` with more than one GPU, else `"hierarchical"` above
        50,000 tokens; `"multihead"` for a drop-in replacement; `"hierarchical"` for extreme lengths; else `"base"`.
    """
    check_int("seq_len", seq_len)
    check_int("num_gpus", num_gpus, least=0)
    if not isinstance(use_case, str):
        raise TypeError(f"use_case: expected a string, got {use_case!r}")
    if use_case == "production":
        if num_gpus > 1:
            return "distributed"
        return "hierarchical" if seq_len > _LONG else "base"
    table: Mapping[str, str] = {
        "research": "adaptive",
        "drop_in_replacement": "multihead",
        "extreme_length": "hierarchical",
    }
    return table.get(use_case, "base")


def _resolve(variant: str, seq_len: int | None, world_size: int | None, given: Mapping[str, Any]) -> tuple[str, str]:
    check_choice("variant", variant, ["auto", *_VARIANTS])
    for name, value in (("seq_len", seq_len), ("world_size", world_size)):
        if value is not None:
            check_int(name, value)
            if variant != "auto":
                raise ValueError(f"{name}: has no effect with variant={variant!r}, only 'auto' reads it; leave it out")
    if variant == "auto":
        return _choose(seq_len, world_size, given)
    return variant, "asked for by name"


def _choose(seq_len: int | None, world_size: int | None, given: Mapping[str, Any]) -> tuple[str, str]:
    """What `"auto"` stands for, and why."""
    if "embed_dim" in given:
        if world_size is not None and world_size > 1:
            raise ValueError("world_size: has no effect beside embed_dim; give attention='distributed' instead")
        return "multihead", "embed_dim is given, which only a module with projections has"
    for name in _VARIANTS:
        others = set().union(*(_arguments(other) for other in _VARIANTS if other != name))
        own = sorted(set(given) & set(_arguments(name)) - others)
        if own and name != "multihead":
            _check_ranks(name, world_size)
            return name, f"{own[0]} is given, which only this variant has"
    config = given.get("sparse_config")
    for name, variant in _VARIANTS.items():
        if variant.config is not SparsePatternConfig and isinstance(config, variant.config):
            if _takes("distributed", given) and world_size is not None and world_size > 1:
                break
            return name, f"sparse_config is a {type(config).__name__}"
    ranks, why = _ranks(seq_len, world_size, given.get("device"))
    if ranks > 1 and _takes("distributed", given):
        return "distributed", why
    if ranks > 1 and world_size is not None:
        _check_known(given, _arguments("distributed"), "'distributed', which world_size asks for")
    if seq_len is not None and seq_len > _LONG:
        if _takes("hierarchical", given) and not isinstance(config, SparsePatternConfig | Mapping):
            return "hierarchical", f"{seq_len:,} tokens are more than {_LONG:,}, and nothing given asks for another"
        return "base", f"what is given describes one pattern, although {seq_len:,} tokens are more than {_LONG:,}"
    return "base", f"nothing given asks for another, and {why}"


def _check_ranks(name: str, world_size: int | None) -> None:
    if name != "distributed" and world_size is not None and world_size > 1:
        raise ValueError(
            f"world_size: has no effect with arguments of {name!r}; name 'distributed' and give attention={name!r}"
        )


def _ranks(seq_len: int | None, world_size: int | None, device: Any) -> tuple[int, str]:
    """How many ranks share a sequence, and how that is known."""
    if world_size is not None:
        return world_size, f"world_size is {world_size}"
    if not (dist.is_available() and dist.is_initialized()) or (ranks := dist.get_world_size()) == 1:
        return 1, "one rank holds the sequence"
    where = torch.get_default_device() if device is None else torch.device(device)
    if where.type not in {part.split(":")[0] for part in dist.get_backend_config().split(",")}:
        return 1, f"the process group of {ranks} ranks does not serve {where.type} tensors"
    if seq_len is None or seq_len <= _LONG:
        length = "no length is given" if seq_len is None else f"{seq_len:,} tokens are at most {_LONG:,}"
        return 1, f"{length}, so {ranks} ranks are taken to hold a sequence each"
    return ranks, f"{ranks} ranks share a sequence of more than {_LONG:,} tokens"


def _takes(variant: str, given: Mapping[str, Any]) -> bool:
    return variant in _VARIANTS and set(given) <= set(_arguments(variant))


def _fields(variant: str) -> list[str]:
    """The config fields that the factory also takes directly; `dilation_rates` are the candidates' here."""
    return [name for name in inspect.signature(_VARIANTS[variant].config).parameters if name != "dilation_rates"]


def _arguments(variant: str) -> list[str]:
    own = [name for name in inspect.signature(_VARIANTS[variant].module).parameters if name != "self"]
    return [*own, *(name for name in _fields(variant) if name not in own)]


def _check_known(given: Mapping[str, Any], valid: list[str], variant: str) -> None:
    for name in given:
        if name not in valid:
            raise TypeError(
                f"{name}: not an argument of variant {variant}{suggest(name, valid)}; valid: {', '.join(valid)}"
            )


def _gather(variant: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: config fields given directly become one config."""
    names = _fields(variant)
    flat = {name: value for name, value in given.items() if name in names}
    arguments = {name: value for name, value in given.items() if name not in flat}
    if not flat:
        return arguments
    for other in (*_CONFIGS, "attention"):
        if arguments.get(other) is not None:
            raise ValueError(f"{', '.join(flat)}: given beside {other}, where it belongs then; set it in one place")
    chosen = _VARIANTS[variant]
    return {**arguments, chosen.config_argument: chosen.config.from_dict(flat)}


def multihead_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a multihead module besides those of `nn.MultiheadAttention`, config fields among them gathered.

    Raises:
        TypeError: An argument that it does not have.
        ValueError: A config field given both directly and inside a config.
    """
    own = [name for name in _arguments("multihead") if name not in (*_AROUND["multihead"], "attention")]
    _check_known(given, own, "'multihead'")
    return _gather("multihead", given)


def _with_inner(around: str, attention: str, **given: Any) -> dict[str, Any]:
    """Arguments of the module around, with the named variant made of those that are not its own."""
    if attention == "base":
        return given
    if attention == "multihead":
        raise ValueError("attention: expected a variant without projections of its own, got 'multihead'")
    if attention == around:
        raise ValueError(f"attention: expected a variant to put inside {around!r}, got {attention!r} again")
    outer = _AROUND[around]
    inner = {name: value for name, value in given.items() if name not in outer}
    try:
        chosen, _ = _resolve(attention, None, None, inner)
    except ValueError as error:
        raise ValueError(str(error).replace("variant", "attention", 1)) from None
    own = [name for name in _arguments(chosen) if name not in outer]
    _check_known(inner, [*outer, *own], f"{around!r} around {chosen!r}")
    both = ("num_heads", "dropout", "device") if around == "multihead" else ()
    shared = {name: given[name] for name in both if name in given}
    width, heads = given.get("embed_dim"), given.get("num_heads")
    if around == "multihead" and "head_dim" in own and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        shared["head_dim"] = max(width // heads, 1)  # so that a gate has its parameters before the first call
    if shared.get("dropout") == 1:
        del shared["dropout"]  # the multihead module itself drops everything
    made = create_block_sparse_attention(chosen, **shared, **inner)
    around_it = {name: value for name, value in given.items() if name in outer}
    if around == "distributed" and "use_memory_pool" in given:
        around_it["use_memory_pool"] = given["use_memory_pool"]
    return {**around_it, "attention": made}
