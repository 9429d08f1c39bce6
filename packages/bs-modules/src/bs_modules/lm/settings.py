"""Everything a training run is determined by, as one flat validated record that TOML can hold."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._adaptive_config import AdaptiveConfig
from .._checks import check_density, suggest
from ..config import DEFAULT_DENSITY, DEFAULT_PATTERN, PATTERN_TYPES, SparsePatternConfig
from ..hierarchical import HierarchicalConfig
from .errors import InputError
from .model import ModelConfig

DEFAULT_MINUTES = 2.5
DTYPES = ("float32", "bfloat16")

#: What a layer's attention can be, and the settings that each reads.
ATTENTIONS: dict[str, tuple[str, ...]] = {
    "base": ("pattern", "density", "block_size", "window_size", "global_tokens", "dilation_rates"),
    "hierarchical": ("density", "block_size"),
    "adaptive": (
        "density",
        "block_size",
        "window_size",
        "query_block_size",
        "distill_rows",
        "distillation_weight",
        "temperatures",
    ),
    "dense": (),
}
_DEFAULTS: dict[str, Any] = {
    "pattern": DEFAULT_PATTERN,
    "block_size": 64,
    "distill_rows": 0,
    "temperatures": (0.5, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        data: Files, folders and globs; empty: the standard library's source.
        context: Tokens per sequence.
        batch: Sequences per step.
        steps: Optimizer steps; `None` until `minutes` was turned into steps.
        minutes: Wall-clock budget of the whole run (start to final table), from which `steps` is derived once.
        seed: Of weights and batches.
        start_from: Folder of another run of a model of the same sizes, whose weights this one starts with; the scorers
            of a gate that it lacks start fresh.
        attention: A fixed pattern (`"base"`), two `"hierarchical"` levels that share the density (near by, and
            everything in wide strides), a learned gate (`"adaptive"`), or torch's dense attention (`"dense"`). Each
            reads the settings that `ATTENTIONS` lists; others are errors.
        pattern: A `SparsePatternConfig.pattern_type`.
        density: Active / allowed blocks, in (0, 1]; `None` with a pattern's `window_size`: the geometry decides, else
            0.1.
        block_size: Tokens per (key) block. 64 unless given.
        window_size, global_tokens, dilation_rates: Geometry of a pattern, as in `SparsePatternConfig`.
        query_block_size, window_size, distill_rows: Of the gate, as in `AdaptiveConfig`; no distillation unless asked
            for.
        distillation_weight: Of the distillation in the loss, with `distill_rows`; 1 unless given.
        temperatures: Of the gate, at the first and at the last step.
        width, layers, head_dim, feed_forward: Sizes of the model.
        matrix_lr, embedding_lr, gain_lr, gate_lr: Peak learning rates; the last one is that of a gate's scorer.
        momentum: Muon's. The default suits runs of some hundred steps, where 0.95 learns slower; see the guide.
        warmup: Steps over which learning rates rise.
        cooldown: Share of the steps, at the end, over which they fall to zero.
        device, dtype: `"auto"`, or what torch calls them.
        threads: CPU threads; recorded, because the bits depend on it. `None`: torch's choice, shared by all processes.
        nproc: Processes that share every sequence on this machine, each with a contiguous slice of it; recorded for the
            same reason.
        save_seconds: Seconds between checkpoints.
        validation_bytes: At most so many bytes are validated on, evenly spread.
    """

    data: tuple[str, ...] = ()
    context: int = 8192
    batch: int = 1
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    start_from: str | None = None
    attention: str = "base"
    pattern: str | None = None
    density: float | None = None
    block_size: int | None = None
    window_size: int | None = None
    global_tokens: int | None = None
    dilation_rates: tuple[int, ...] | None = None
    query_block_size: int | None = None
    distill_rows: int | None = None
    distillation_weight: float | None = None
    temperatures: tuple[float, ...] | None = None
    width: int = 128
    layers: int = 4
    head_dim: int = 64
    feed_forward: int | None = None
    matrix_lr: float = 0.015
    embedding_lr: float = 0.02
    gain_lr: float = 0.005
    gate_lr: float = 0.003
    momentum: float = 0.8
    warmup: int = 10
    cooldown: float = 0.6
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    nproc: int = 1
    save_seconds: float = 20.0
    validation_bytes: int = 2**20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _coerce(field.name, getattr(self, field.name)))
        ones = ("context", "batch", "width", "layers", "head_dim", "warmup", "validation_bytes", "nproc")
        for name in ones:
            _require(name, getattr(self, name), "an integer ≥ 1", getattr(self, name) >= 1)
        optional = (
            "steps",
            "threads",
            "feed_forward",
            "block_size",
            "window_size",
            "global_tokens",
            "query_block_size",
        )
        for name in optional:
            value = getattr(self, name)
            _require(name, value, "an integer ≥ 1", value is None or value >= 1)
        for name in ("matrix_lr", "embedding_lr", "gain_lr", "gate_lr", "save_seconds"):
            value = getattr(self, name)
            _require(name, value, "a number ≥ 0", math.isfinite(value) and value >= 0)
        _require("seed", self.seed, "an integer in [0, 2^63)", 0 <= self.seed < 2**63)
        _require("momentum", self.momentum, "a number in [0, 1)", 0 <= self.momentum < 1)
        _require("cooldown", self.cooldown, "a number in [0, 1]", 0 <= self.cooldown <= 1)
        _require("minutes", self.minutes, "a number > 0", self.minutes is None or 0 < self.minutes < math.inf)
        _require("dtype", self.dtype, f"auto, {', '.join(DTYPES)}", self.dtype in ("auto", *DTYPES))
        _require("start_from", self.start_from, "the folder of a run", self.start_from != "")
        self._settle_attention()
        if self.nproc > 1:
            fixed = f"1 with {self.attention} attention, because only the base attention is shared"
            _require("nproc", self.nproc, fixed, self.attention == "base")
            assert self.block_size is not None
            blocks = -(-self.context // self.block_size)
            most = f"an integer in [1, {blocks}] (a context of {self.context} tokens has {blocks} blocks to share)"
            _require("nproc", self.nproc, most, self.nproc <= blocks)
            on_cpu = self.device.split(":")[0] in ("auto", "cpu")
            _require("nproc", self.nproc, f"1 on {self.device}, because only CPU processes share", on_cpu)
        try:
            check_density("density", self.density)
            self.sparse_config()
            self.model_config()
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None

    def _settle_attention(self) -> None:
        """Refuses settings that the attention does not read, and fills in those that it does."""
        if self.attention not in ATTENTIONS:
            near = suggest(self.attention, list(ATTENTIONS))
            raise InputError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {self.attention!r}{near}")
        read = ATTENTIONS[self.attention]
        for name in dict.fromkeys(name for names in ATTENTIONS.values() for name in names):
            if name in read and getattr(self, name) is None:
                object.__setattr__(self, name, _DEFAULTS.get(name))
            elif name not in read and getattr(self, name) is not None:
                reads = ", ".join(read) or "none of these settings"
                raise InputError(
                    f"{name}: has no effect with attention={self.attention!r}, which reads {reads}; leave it out"
                )
        if self.pattern is not None and self.pattern not in PATTERN_TYPES:
            near = suggest(self.pattern, list(PATTERN_TYPES))
            raise InputError(f"pattern: expected one of {', '.join(PATTERN_TYPES)}, got {self.pattern!r}{near}")
        if self.attention == "adaptive":
            self._check_gate()

    def _check_gate(self) -> None:
        rows, weight, temperatures = self.distill_rows, self.distillation_weight, self.temperatures
        _require("distill_rows", rows, "an integer ≥ 0", rows is not None and rows >= 0)
        _require("distillation_weight", weight, "a number > 0", weight is None or 0 < weight < math.inf)
        if weight is not None and not rows:
            raise InputError("distillation_weight: has no effect without distill_rows; leave it out")
        if rows and weight is None:
            object.__setattr__(self, "distillation_weight", 1.0)
        fits = temperatures is not None and len(temperatures) == 2 and all(0 < t < math.inf for t in temperatures)
        _require("temperatures", temperatures, "two numbers > 0", fits)

    def dense(self, **changes: Any) -> Settings:
        """The same run with dense attention."""
        without = dict.fromkeys(name for names in ATTENTIONS.values() for name in names)
        return dataclasses.replace(self, attention="dense", **{**without, **changes})

    def sparse_config(self) -> SparsePatternConfig | HierarchicalConfig | AdaptiveConfig | None:
        """The attention's own configuration (its `density` is the one asked for); `None` for dense attention."""
        if self.attention == "dense":
            return None
        assert self.block_size is not None
        density = DEFAULT_DENSITY if self.density is None else self.density
        if self.attention == "hierarchical":
            return HierarchicalConfig(level_configs=self._levels(density), sparsity_ratio=density)
        if self.attention == "adaptive":
            assert self.temperatures is not None
            return AdaptiveConfig(
                base_sparsity=1 - density,
                block_size=self.block_size,
                query_block_size=self.query_block_size,
                window_size=self.window_size,
                distill_rows=self.distill_rows or 0,
                temperature=self.temperatures[0],
                min_temperature=min(self.temperatures),
                learnable_temperature=False,
            )
        geometry: dict[str, Any] = {"window_size": self.window_size, "dilation_rates": self.dilation_rates}
        if self.global_tokens is not None:
            geometry["global_tokens"] = self.global_tokens
        return SparsePatternConfig(
            pattern_type=self.pattern, sparsity_ratio=self.density, block_size=self.block_size, **geometry
        )

    def _levels(self, density: float) -> list[dict[str, int]]:
        """Two levels that share a density: half of the blocks near by, half spread evenly over all before.

        The automatic levels of `HierarchicalConfig` do not fit into low densities at a few thousand tokens.
        """
        assert self.block_size is not None
        near = max(round(density * self.context / 4), 1)  # a causal row sees half of the context on average
        levels = ((1, near), (max(round(2 / density), 1), -1))
        return [{"stride": stride, "window_size": window, "block_size": self.block_size} for stride, window in levels]

    def model_config(self) -> ModelConfig:
        """The model's sizes."""
        return ModelConfig(self.width, self.layers, self.head_dim, self.feed_forward)

    def learning_rate(self, step: int) -> float:
        """Share of the peak learning rates at a step: a linear rise, a plateau, a linear fall to zero."""
        assert self.steps is not None
        rise = min(1.0, (step + 1) / self.warmup)
        fall = (1 - (step + 0.5) / self.steps) / self.cooldown if self.cooldown else 1.0
        return rise * min(1.0, fall)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that TOML can hold; `None` is left out."""
        values = dataclasses.asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None}


NAMES = tuple(field.name for field in dataclasses.fields(Settings))


def settings_from(values: Mapping[str, Any], where: str) -> Settings:
    """Builds settings from plain values.

    Args:
        values: By field name.
        where: Named in errors: the file the values come from.

    Raises:
        InputError: An unknown name (the nearest is suggested) or a bad value.
    """
    for name in values:
        if name not in NAMES:
            raise InputError(
                f"{where}: unknown setting {name!r}{suggest(name, list(NAMES))}; known: {', '.join(NAMES)}"
            )
    return Settings(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        InputError: It is missing, unreadable or not TOML.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path} is not valid TOML: {error}") from None


def _require(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}, got {value!r}")


def _coerce(name: str, value: Any) -> Any:
    """Checks a value against the field's annotation; integers become floats, lists become tuples."""
    annotation = _HINTS[name]
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (int, str) and isinstance(value, option) and not isinstance(value, bool):
            return value
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            kinds = (int, float) if item is float else item
            if isinstance(value, list | tuple) and all(isinstance(x, kinds) and not isinstance(x, bool) for x in value):
                return tuple(map(item, value))
    wanted = " or ".join(
        "a list" if typing.get_origin(o) is tuple else o.__name__ for o in options if o is not type(None)
    )
    raise InputError(f"{name}: expected {wanted}, got {value!r}")


_HINTS = typing.get_type_hints(Settings)
