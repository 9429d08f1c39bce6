"""Which tile, how many warps and stages: a pure function of the device and the sizes, never of a timing.

Tile sizes decide the order of reductions, so a call must not pick them by trial: the same machine gives the same bits.
The built-in table can be replaced per device by a file of measured choices (`read_tuned`, `write_tuned`), which is then
just as fixed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["Config", "Shape", "Target", "candidates", "pieces", "read_tuned", "tuned_path", "write_tuned"]

#: The least that the dimensions of `tl.dot` may be.
MIN_TILE = 16


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled.

    Attributes:
        tile_m, tile_n: queries and keys per tile; powers of two, at least 16.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        descriptors: read whole blocks through tensor descriptors, which Hopper's copy engine serves. The same bits.
        waves: programs per processor that the forward wants; see `pieces`. 0: rows are never cut.

    No built-in choice asks for descriptors: only a measured one can.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    descriptors: bool = False
    waves: int = 2


@dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
        name: as the driver reports it; measured choices are kept under it.
        kind: "sm90" (Hopper and newer data-centre parts), "sm80" (other NVIDIA), "hip" or "interpreter".
        shared_memory: bytes that one program may use.
        processors: streaming multiprocessors or compute units; 0 where it does not matter.
    """

    name: str
    kind: str
    shared_memory: int
    processors: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target of a device that kernels can run on."""
        if device.type == "cpu":
            return cls("interpreter", "interpreter", 1 << 40)
        return _target_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _target_of(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target(properties.name, "hip", 1 << 16, properties.multi_processor_count)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    kind = "sm90" if properties.major in (9, 10) else "sm80"
    return Target(properties.name, kind, shared, properties.multi_processor_count)


@dataclass(frozen=True)
class Shape:
    """What a choice depends on besides the device.

    Attributes:
        kernel: "forward", "rows", "columns", or "atomic" for the columns that add gradients of queries, too.
        dtype: of the operands.
        dim: the larger of the head dims, padded to a power of two.
        extent: rows and keys of a block, no more than the sequence has; rows are the queries of all heads that share a
            tile.
    """

    kernel: str
    dtype: torch.dtype
    dim: int
    extent: tuple[int, int]

    @property
    def key(self) -> str:
        """How a measured choice is named in a file."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {dtype} dim={self.dim} block={self.extent[0]}x{self.extent[1]}"


# Tiles for blocks that hold them, by the larger head dim: Config(tile_m, tile_n, warps, stages). Chosen so that the
# compiler keeps (almost) everything in registers (see `ahead`) and, on Hopper, its products are those of four warps
# with 64 rows or more; no timing is behind them yet.
_NARROW = {
    "sm90": {
        "forward": {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 64, 8, 2)},
        "rows": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        "columns": {64: Config(64, 128, 8, 3), 128: Config(64, 128, 8, 3), 256: Config(32, 64, 8, 2)},
    },
    "sm80": {
        "forward": {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
        "rows": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 4, 2)},
        "columns": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
    },
    "hip": {
        "forward": {64: Config(128, 64, 4, 2), 128: Config(128, 64, 8, 1), 256: Config(64, 32, 8, 1)},
        "rows": {64: Config(64, 64, 4, 1), 128: Config(64, 32, 8, 1), 256: Config(32, 16, 4, 1)},
        "columns": {64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 32, 4, 1)},
    },
}
#: On Hopper, the stages of tiles of 64 queries, where tiles could be larger but blocks are not: four warps compute one,
#: and two programs share a processor.
_HALF = {("forward", 64): 3, ("forward", 128): 3, ("rows", 64): 3, ("rows", 128): 2}
_WIDE = {  # float32
    "forward": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 16, 4, 2)},
    "rows": {64: Config(32, 32, 4, 2), 128: Config(32, 16, 4, 2), 256: Config(16, 16, 4, 1)},
    "columns": {64: Config(32, 32, 8, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 1)},
}
_INTERPRETER = Config(128, 128, 4, 1)


def _fit(extent: int, limit: int) -> int:
    """The tile for blocks of ``extent`` tokens: the one that wastes least, counting 32 tokens of overhead per tile."""
    sizes = [size for size in (16, 32, 64, 128) if size <= max(limit, MIN_TILE)]
    return min(sizes, key=lambda size: (-(-extent // size) * (size + 32), -size))


def candidates(target: Target, shape: Shape) -> Iterator[Config]:
    """The configuration to use and, should the device lack the resources for it, the next ones to try.

    Args:
        target: the device.
        shape: the sizes.

    Yields:
        Configurations, each asking less of the device than the one before. Always the same ones.
    """
    bucket = 64 if shape.dim <= 64 else 128 if shape.dim <= 128 else 256
    kernel = "columns" if shape.kernel == "atomic" else shape.kernel
    if target.kind == "interpreter":
        best = _INTERPRETER
    elif shape.dtype == torch.float32:
        best = _WIDE[kernel][bucket]
    else:
        best = _NARROW[target.kind][kernel][bucket]
    fitted = replace(best, tile_m=_fit(shape.extent[0], best.tile_m), tile_n=_fit(shape.extent[1], best.tile_n))
    if fitted != best and fitted.tile_m * fitted.tile_n <= 32 * 64:
        fitted = replace(fitted, warps=min(fitted.warps, 4))
    if target.kind == "sm90" and fitted.tile_m == 64 < best.tile_m and (kernel, bucket) in _HALF:
        fitted = replace(fitted, warps=4, stages=_HALF[kernel, bucket])
    config = _tuned(target.name).get(shape.key, fitted)
    width = 4 if shape.dtype == torch.float32 else 2
    while True:
        smaller = _smaller(config)
        if smaller is None or _footprint(config, shape, width) <= target.shared_memory:
            yield config
        if smaller is None:
            return
        config = smaller


#: Steps over tiles of keys that a piece of a row has at least, and the most pieces of a row.
_LEAST_STEPS, _MOST_PIECES = 4, 64


def pieces(target: Target, config: Config, programs: int, steps: int) -> int:
    """How many pieces the forward cuts each row into: a power of two, 1 where there is work enough for the device.

    A decode step has few queries and a long cache: one program per row would leave most of the device idle. Sizes that
    the host knows decide, so the same call is cut the same way every time.

    Args:
        target: the device.
        config: says how many programs per processor are wanted.
        programs: how many there are without cutting.
        steps: tiles of keys that a row has on average.
    """
    wanted = config.waves * target.processors // max(programs, 1)
    limit = min(wanted, steps // _LEAST_STEPS, _MOST_PIECES)
    return 1 << max(limit, 1).bit_length() - 1


def _footprint(config: Config, shape: Shape, width: int) -> int:
    """A lower bound of the bytes of shared memory: the buffers of what is read in every step."""
    stepped = config.tile_m if shape.kernel in ("columns", "atomic") else config.tile_n
    return max(config.stages - 1, 1) * 2 * stepped * shape.dim * width


def _smaller(config: Config) -> Config | None:
    if config.stages > 1:
        return replace(config, stages=config.stages - 1)
    if max(config.tile_m, config.tile_n) == MIN_TILE:
        return None
    if config.tile_n >= config.tile_m:
        return replace(config, tile_n=config.tile_n // 2)
    return replace(config, tile_m=config.tile_m // 2)


# -- measured choices --------------------------------------------------------------------------------------------------


def tuned_path() -> Path | None:
    """The file of measured choices: ``BS_KERNELS_TUNING`` ("off" for none), else in the user's cache directory."""
    given = os.environ.get("BS_KERNELS_TUNING")
    if given:
        return None if given.lower() in ("off", "0") else Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bs-kernels" / "triton.json"


def read_tuned(path: Path, device: str) -> dict[str, Config]:
    """The choices that a file has for a device, by `Shape.key`. What makes no sense counts as absent."""
    try:
        stored = json.loads(path.read_text())[device].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
    read = ((key, _config(values)) for key, values in stored)
    return {key: config for key, config in read if config is not None}


def _config(values: object) -> Config | None:
    """A configuration from a file: its fields, or the first four; None if they make no sense."""
    if not isinstance(values, list) or len(values) not in (4, 6) or not all(type(x) is int for x in values):
        return None
    tile_m, tile_n, warps, stages, *rest = values
    sizes = {tile_m, tile_n} <= {16, 32, 64, 128, 256} and warps in (1, 2, 4, 8, 16) and 1 <= stages <= 8
    if not sizes or (rest and not (rest[0] in (0, 1) and 0 <= rest[1] <= 16)):
        return None
    later = (bool(rest[0]), rest[1]) if rest else ()
    return Config(tile_m, tile_n, warps, stages, *later)


def write_tuned(path: Path, device: str, choices: dict[str, Config]) -> None:
    """Add choices to a file. Readers see the old file or the new one, never half of one.

    Args:
        path: the file; made with its directory if need be.
        device: `Target.name`.
        choices: by `Shape.key`.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {}
    content = content if isinstance(content, dict) else {}
    kept = read_tuned(path, device) | choices
    content[device] = {key: [int(value) for value in astuple(config)] for key, config in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _tuned.cache_clear()


@lru_cache(maxsize=64)
def _tuned(device: str) -> dict[str, Config]:
    path = tuned_path()
    return {} if path is None else read_tuned(path, device)
