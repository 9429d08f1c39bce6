"""Gradient compression for `DistributedDataParallel`: top-k with error feedback, the rest through torch's own hooks.

A hook replaces the all-reduce of each gradient bucket. It runs while backward goes on, bucket by bucket.
"""
# No postponed annotations here: DDP compares those of a hook with the classes themselves.

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ._check import boolean, integer, positive

#: Bytes of one index on the wire.
_INDEX_BYTES = 4
METHODS = ("topk", "powersgd", "bf16", "fp16")


@dataclass
class TopKState:
    """State of `topk_hook`: what was not sent yet, and how many bytes were.

    Attributes:
        compression_ratio: Payload of a rank, values and indices together, over the bytes of its dense gradient; in
            (0, 1].
        process_group: Whose gradients are averaged; None: the default group.
        error_feedback: Keep what was not sent and add it to the next step's gradient. Without it small gradients may
            never be sent at all.
        residuals: Unsent gradient of each parameter, flat, by parameter id.
        payload_bytes: Bytes this rank has contributed, values and indices.
        dense_bytes: Bytes of the gradients they stand for.
        wire_bytes: Bytes this rank has sent: its payload once to every other rank's ear, as in a ring all-gather.
        all_reduce_bytes: Bytes a ring all-reduce would have sent instead.
    """

    compression_ratio: float
    process_group: Any = None
    error_feedback: bool = True
    residuals: dict[int, Tensor] = field(default_factory=dict)
    payload_bytes: int = 0
    dense_bytes: int = 0
    wire_bytes: int = 0
    all_reduce_bytes: int = 0

    def __post_init__(self) -> None:
        self.compression_ratio = positive("compression_ratio", self.compression_ratio)
        if self.compression_ratio > 1:
            raise ValueError(f"compression_ratio: expected a number in (0, 1], got {self.compression_ratio}")
        self.error_feedback = boolean("error_feedback", self.error_feedback)

    def entries(self, numel: int, itemsize: int) -> int:
        """How many of ``numel`` values may go next, so that all that was ever sent keeps to the ratio.

        What a bucket's share does not pay for (a value and its index) is left to those after it: a bucket too small to
        send anything at once sends something every few steps.
        """
        allowed = int(self.compression_ratio * (self.dense_bytes + numel * itemsize)) - self.payload_bytes
        return min(numel, max(0, allowed) // (itemsize + _INDEX_BYTES))


def topk_hook(state: TopKState, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket's largest entries over the ranks; the rest waits in ``state`` for the next step.

    Every rank sends its k largest values with their indices to all others in one message; all add them up in rank
    order, so all have the same bits.

    Source: Deep Gradient Compression (arXiv:1712.01887) without its momentum correction; error feedback as in
    Karimireddy et al. (arXiv:1901.09847).
    """
    group = dist.group.WORLD if state.process_group is None else state.process_group
    world = dist.get_world_size(group)
    gradient = bucket.buffer()
    parameters = bucket.parameters()
    if state.error_feedback:
        gradient = _with_residual(state, gradient, parameters)
    values_kept = state.entries(gradient.numel(), gradient.element_size())
    index = torch.topk(gradient.abs(), values_kept, sorted=False).indices
    values = gradient[index]
    if state.error_feedback:
        gradient[index] = 0
        if values_kept:  # An overflow went first and is seen by all; what is kept of it would come back for many steps.
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for parameter, rest in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            state.residuals[id(parameter)] = rest
    _count(state, values_kept * (gradient.element_size() + _INDEX_BYTES), gradient.nbytes, world)
    if not values_kept:  # The same on every rank.
        nothing: Future[Tensor] = Future(devices=[gradient.device] if gradient.is_cuda else None)
        nothing.set_result(bucket.buffer().zero_())
        return nothing
    payload = torch.cat((index.to(torch.int32).view(torch.uint8), values.view(torch.uint8)))
    everyone = torch.empty(world * payload.numel(), dtype=torch.uint8, device=payload.device)
    work = dist.all_gather_into_tensor(everyone, payload, group=group, async_op=True)
    assert work is not None

    def add_up(_: Future[Any]) -> Tensor:
        mean = bucket.buffer().zero_()
        for message in everyone.view(world, -1):
            where = message[: values_kept * _INDEX_BYTES].view(torch.int32).long()
            mean.index_add_(0, where, message[values_kept * _INDEX_BYTES :].view(values.dtype))
        return mean.div_(world)

    return work.get_future().then(add_up)


def _with_residual(state: TopKState, gradient: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient plus what earlier steps did not send, as a tensor of its own.

    By parameter and not by bucket: DDP deals its parameters into other buckets after the first step.
    """
    whole = gradient.clone()
    for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        rest = state.residuals.get(id(parameter))
        if rest is not None:
            part.add_(rest)
    return whole


def _count(state: TopKState, payload: int, dense: int, world: int) -> None:
    wire, all_reduce = (world - 1) * payload, 2 * (world - 1) * dense // max(world, 1)
    if wire > all_reduce and state.wire_bytes == 0:
        warnings.warn(
            f"compression_ratio: {state.compression_ratio:g} sends {wire:,} bytes per rank for a bucket where an "
            f"all-reduce over {world} ranks sends {all_reduce:,}; top-k saves bytes only below a ratio of "
            f"{2 / world:.3g} here",
            stacklevel=3,
        )
    state.payload_bytes += payload
    state.dense_bytes += dense
    state.wire_bytes += wire
    state.all_reduce_bytes += all_reduce


def compress_gradients(
    model: DistributedDataParallel,
    method: str = "topk",
    *,
    compression_ratio: float = 0.1,
    rank: int = 1,
    process_group: Any = None,
) -> Any:
    """Install a compression hook on a DDP model; once per model, before its first backward.

    Args:
        model: Wrapped in `DistributedDataParallel`.
        method: ``"topk"`` (with error feedback), ``"powersgd"``, ``"bf16"`` or ``"fp16"``.
        compression_ratio: For top-k: payload over dense bytes, per rank.
        rank: For PowerSGD: rank of the approximation.
        process_group: Whose gradients are averaged; default the group of the model.

    Returns:
        The hook's state: a `TopKState` with byte counters, torch's `PowerSGDState`, or the process group.

    Source: PowerSGD (arXiv:1905.13727) and the casts are torch's own communication hooks.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model: expected a DistributedDataParallel, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method != "topk" and compression_ratio != 0.1:
        raise ValueError(f"compression_ratio: expected the default with method {method!r}, got {compression_ratio}")
    if method != "powersgd" and rank != 1:
        raise ValueError(f"rank: expected the default with method {method!r}, got {rank}")
    group = model.process_group if process_group is None else process_group
    if method == "topk":
        state: Any = TopKState(compression_ratio, group)
        hook: Any = topk_hook
    elif method == "powersgd":
        # From the third step on, as torch's default bucketing settles by then; error feedback and warm start on.
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=integer("rank", rank), start_powerSGD_iter=2, min_compression_rate=1
        )
        hook = powerSGD_hook.powerSGD_hook
    else:
        state = group
        hook = default_hooks.bf16_compress_hook if method == "bf16" else default_hooks.fp16_compress_hook
    model.register_comm_hook(state, hook)
    return state
