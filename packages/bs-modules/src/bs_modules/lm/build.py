"""The model of a run: freshly made, with the weights of another run, or as its checkpoint holds it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bs_patterns import BlockLayout

from ..adaptive import BlockSparseAdaptive
from ..factory import create_block_sparse_attention
from .checkpoint import load_checkpoint
from .errors import InputError
from .model import ByteModel, DenseAttention
from .run import Run
from .settings import Settings


def build_model(settings: Settings, *, spread: bool = False) -> ByteModel:
    """The model of a run, freshly initialised; its attention comes from the public factory.

    Args:
        settings: Of the run.
        spread: Whether the attention is over the slices of several processes.
    """

    def attention(layer: int) -> nn.Module:
        if settings.attention == "dense":
            return DenseAttention()
        variant = "distributed" if spread else settings.attention
        sizes: dict[str, Any] = {"head_dim": config.head_dim} if variant == "adaptive" else {}
        return create_block_sparse_attention(variant, sparse_config=shared, num_heads=config.heads, **sizes)

    config, shared = settings.model_config(), settings.sparse_config()
    return ByteModel(config, attention, compute_dtype=getattr(torch, settings.dtype), seed=settings.seed)


def trained_model(run: Run, settings: Settings) -> ByteModel:
    """The model of a run's checkpoint, in evaluation mode.

    Args:
        run: It has a checkpoint.
        settings: Its own, but for the device.

    Raises:
        InputError: The checkpoint is corrupt, or of a model of another shape.
    """
    model = build_model(settings).to(settings.device)
    try:
        model.load_state_dict(_weights(run.checkpoint))
    except RuntimeError as error:
        raise InputError(f"checkpoint: {run.checkpoint} does not fit the model of config.toml: {error}") from None
    return model.eval()


def starting_weights(settings: Settings) -> dict[str, Tensor]:
    """The weights that `settings.start_from` names.

    Raises:
        InputError: There is no run or no checkpoint, it is corrupt, or its model has other sizes.
    """
    assert settings.start_from is not None
    run = Run.open(Path(settings.start_from))
    if not run.started:
        raise InputError(f"start_from: {run.path} has no checkpoint yet")
    if run.settings.model_config() != settings.model_config():
        raise InputError(
            f"start_from: expected a model of the sizes {settings.model_config()}, {run.path} has "
            f"{run.settings.model_config()}"
        )
    return _weights(run.checkpoint)


def start_with(model: ByteModel, weights: dict[str, Tensor]) -> None:
    """Gives a model the weights of another one; those of a gate's scorer are taken where they fit.

    The temperature of a gate is not taken: it belongs to the schedule.
    """
    own = model.state_dict()
    fitting = {n: t for n, t in weights.items() if n in own and own[n].shape == t.shape}
    model.load_state_dict({n: t for n, t in fitting.items() if not n.endswith("log_temperature")}, strict=False)


def trained_layout(settings: Settings) -> BlockLayout | None:
    """The causal layout of a run's context; of a dense run, every allowed block. `None` if the text decides."""
    config = settings.sparse_config()
    if settings.attention == "adaptive":
        return None
    if config is None:
        settings = Settings(context=settings.context, density=1.0)
        config = settings.sparse_config()
    return config.layout(settings.context, causal=True)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


@torch.no_grad()
def picked_layout(model: ByteModel, windows: list[Any]) -> BlockLayout:
    """What the gate of the first layer picks most often over some windows of text."""
    gate: Any = model.blocks[0].attention
    assert isinstance(gate, BlockSparseAdaptive)
    with gate.calibrating():
        for window in windows:
            model(torch.from_numpy(window[:-1].copy()).to(model.embedding.device)[None])
    return gate.freeze().layout(len(windows[0]) - 1, is_causal=True, num_heads=model.config.heads)


def density_met(model: ByteModel, settings: Settings) -> float:
    """Active / allowed blocks of what the model trained on; of gates, at their last call, over all layers."""
    if settings.attention == "dense":
        return 1.0
    attentions: list[Any] = [block.attention for block in model.blocks]
    if settings.attention == "adaptive":
        return statistics.mean(gate.get_pattern_stats(settings.context)["density"] for gate in attentions)
    return attentions[0].layout(settings.context, is_causal=True).density


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    found = load_checkpoint(checkpoint).tensors
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}
