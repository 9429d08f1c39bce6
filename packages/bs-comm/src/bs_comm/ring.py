"""`PackedRing`: carry out an exchange plan between real processes.

It moves buffers and calls back. What is computed with an arrival is the caller's business: an attention kernel's
partial form, or anything else that reads keys and values block by block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_memory import BufferPool, default_pool
from bs_patterns import BlockLayout

from ._buffers import PackedBuffers, scale_bytes
from ._check import boolean, integer, positive
from ._header import agree
from ._membership import membership
from .health import PATIENCE, Health, Report, RingMismatchError, RingPeerError, check_usable, note_failure
from .plan import ExchangePlan, Traffic
from .transport import CHANNELS, GRAD, KV, STEPS, Hop, HopFailed, Transport
from .wire import FLOAT8, StepWire, wires_of

Int64 = NDArray[np.int64]

DEFAULT_HOP_TIMEOUT = 60.0
#: Bytes up to which a message costs its latency and hardly any bandwidth.
_SMALL_MESSAGE = 64 << 10
#: Rings made per group and channel; every group starts anew.
_serials: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Arrival:
    """Keys and values that are here now: the rank's own (step 0), or those a peer sent.

    Shapes: B batch, T tokens, H kv heads, D and E head dims, U key blocks, Q own query blocks.

    Attributes:
        step: 0 for the rank's own blocks, else the step of the plan.
        peer: Who owns them.
        k: ``[B, T, H, D]``. A (block, head) that no own query reads holds zeros. Valid until the callback returns.
        v: ``[B, T, H, E]``, likewise.
        blocks: ``int64[U]``: which key blocks of the sequence these are, ascending; T tokens in all.
        kv_start: ``int64[U]``: absolute position of each block's first token.
        q_start: ``int64[Q]``: absolute position of the first token of each of the rank's query blocks.
        layout: Own query blocks × ``blocks``; None for a dense ring. Its causal flag is off: causality follows from the
            positions, and `ExchangePlan.causal` says whether it applies.
    """

    step: int
    peer: int
    k: Tensor
    v: Tensor
    blocks: Int64
    kv_start: Int64
    q_start: Int64
    layout: BlockLayout | None


#: Forward: use the arrival. Backward: return (dk, dv) of its shapes, in the ring's ``grad_dtype``.
OnArrival = Callable[[Arrival], Any]
#: (k, v) of each arrival by step.
Kept = dict[int, tuple[Tensor, Tensor]]


class PackedRing:
    """One rank's end of a ring: buffers, index lists and connections for one plan and one tensor shape.

    Constructing it is collective: every rank of the group does it, with the same arguments, and in the same order where
    there are several rings; the ranks compare plan digests, sizes and versions before the first byte of data moves.
    `forward` and `backward` are collective too. While the callback computes, the next transfer or two are under way.

    Args:
        plan: The same on every rank (not transposed).
        batch: B, sequences.
        head_dim: D, elements of a key row.
        value_head_dim: E, elements of a value row; default ``head_dim``.
        dtype: Of K and V.
        device: Of K and V.
        group: Process group; default the default group. Not needed for one rank.
        pool: Where buffers are leased; default `bs_memory.default_pool()`.
        wire_dtype: Send K and V in this dtype instead, rounded once: bfloat16 or float16, half the bytes of float32; or
            float8_e4m3fn, with a float32 scale for each row of K and of V, a quarter and a little.
        hop_timeout: Seconds to wait for one transfer before the ring is given up; must be longer than any callback
            takes on another rank. Agreeing on whom to blame takes up to as long again, and 5 s at most.
        channel: Tells rings of one group apart that run in different threads; gloo needs a channel per thread, NCCL a
            group per thread.

    Attributes:
        plan: The plan.
        rank: This rank.
        grad_dtype: Of gradients on the wire and in the result: float32, or float64 for float64 inputs.
        traffic: Planned payload bytes of one forward and one backward.

    Raises:
        RingMismatchError: The ranks do not agree; on every rank, before any data moves.
        RingPeerError: A peer did not answer, or a ring of this group has failed before: `regroup`, or a new group.
        TypeError: An argument has the wrong type.
        ValueError: The group's size is not the plan's, or an argument is out of range.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        *,
        batch: int,
        head_dim: int,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Any = None,
        pool: BufferPool | None = None,
        wire_dtype: torch.dtype | None = None,
        hop_timeout: float = DEFAULT_HOP_TIMEOUT,
        channel: int = 0,
    ) -> None:
        if not isinstance(plan, ExchangePlan):
            raise TypeError(f"plan: expected an ExchangePlan, got {type(plan).__name__}")
        if plan.is_transposed or plan.is_stage:
            raise ValueError(f"plan: expected a direct forward ExchangePlan, got {plan!r}")
        self.plan = plan
        if plan.num_steps > STEPS:
            raise ValueError(f"plan: expected at most {STEPS} steps, got {plan.num_steps}")
        self._batch = integer("batch", batch)
        key_dim = integer("head_dim", head_dim)
        self._dims = (key_dim, key_dim if value_head_dim is None else integer("value_head_dim", value_head_dim))
        self._dtype = _floating("dtype", dtype)
        self._wire_dtype = dtype if wire_dtype is None else _floating("wire_dtype", wire_dtype, FLOAT8)
        self.grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._device = torch.device(device)
        self._timeout = positive("hop_timeout", hop_timeout)
        channel = integer("channel", channel, low=0, high=CHANNELS - 1)
        self.rank, _, self._group = membership(group, plan.world_size)
        check_usable(self._group)
        self.traffic: Traffic = plan.traffic(
            head_dim, self._dims[1], batch=batch, kv_itemsize=self._wire_dtype.itemsize,
            kv_row_bytes=scale_bytes(self._wire_dtype), grad_itemsize=self.grad_dtype.itemsize,
        )  # fmt: skip
        self._in_use = threading.Lock()
        self._failure: RingPeerError | None = None
        self._closed = False
        self._calls = 0
        self._health, serial = _health_of(self._group, channel, self.rank, plan.world_size)
        self._transport = Transport(self._group, self.rank, plan.world_size, channel, self._timeout, self._health)
        with self._watched("header"):
            if plan.world_size > 1:
                sizes = [batch, *self._dims, self._dtype, self._wire_dtype, channel, serial]
                agree(self._transport, plan.digest, sizes, self._device)
        self._wires = wires_of(plan, self.rank, self._device)
        self._q_start, self._kv_starts = _positions(plan, self.rank, self._wires)
        self._buffers = PackedBuffers(
            default_pool() if pool is None else pool, self._wires,
            batch=batch, heads=plan.kv_heads, dims=self._dims, dtype=self._dtype, wire_dtype=self._wire_dtype,
            grad_dtype=self.grad_dtype, device=self._device,
        )  # fmt: skip

    # ------------------------------------------------------------------ the two passes

    @torch.no_grad()
    def forward(self, k: Tensor, v: Tensor, on_arrival: OnArrival, *, keep: bool = False) -> Kept | None:
        """Show every key block that this rank's queries read to ``on_arrival``, own blocks first, then step by step.

        Args:
            k: ``[B, S, H, D]``, this rank's shard in the order of `Placement.positions`.
            v: ``[B, S, H, E]``.
            on_arrival: Called once per arrival that holds something to read; not called for empty ones.
            keep: Return copies of what came in, so that `backward` need not fetch it again: memory for bytes. The same
                on every rank.

        Returns:
            What came in, with ``keep``; else None.

        Raises:
            RingPeerError: A peer failed; on every survivor, also on those that have seen all their arrivals.
            ValueError: Tensors of another shape, dtype or device than the ring was made for.
        """
        came: Kept | None = {} if boolean("keep", keep) else None

        def show(arrival: Arrival) -> None:
            if came is not None and arrival.step:
                came[arrival.step] = (arrival.k.clone(), arrival.v.clone())
            on_arrival(arrival)

        with self._call("forward"):
            self._exchange("forward", self._operand("k", k, 0), self._operand("v", v, 1), show, None, None)
        return came

    @torch.no_grad()
    def backward(
        self, k: Tensor, v: Tensor, on_arrival: OnArrival, *, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """Show every arrival again, and bring the gradients that ``on_arrival`` returns home to the owners.

        Args:
            k: ``[B, S, H, D]``, as in `forward`.
            v: ``[B, S, H, E]``.
            on_arrival: Returns (dk ``[B, T, H, D]``, dv ``[B, T, H, E]``) in ``grad_dtype`` for the arrival.
            kept: What `forward` returned with ``keep``: only gradients travel then. All ranks give it, or none.

        Returns:
            (dk ``[B, S, H, D]``, dv ``[B, S, H, E]``) in ``grad_dtype``: own share first, then the peers' in step
            order, so the sums have the same bits every time.

        Raises:
            RingPeerError: As in `forward`.
            ValueError: As in `forward`, or gradients of another shape or dtype.
        """
        with self._call("backward"):
            k, v = self._operand("k", k, 0), self._operand("v", v, 1)
            came = [wire.step for wire in self._wires if wire.receive is not None]
            if kept is not None and sorted(kept) != came:
                raise ValueError(f"kept: expected arrivals of steps {came}, as forward gave them, got {sorted(kept)}")
            dk, dv = (torch.zeros(x.shape, dtype=self.grad_dtype, device=self._device) for x in (k, v))
            self._exchange("backward", k, v, on_arrival, (dk, dv), kept)
        return dk, dv

    def _exchange(
        self,
        phase: str,
        k: Tensor,
        v: Tensor,
        on_arrival: OnArrival,
        home: tuple[Tensor, Tensor] | None,
        kept: Kept | None,
    ) -> None:
        """Run all steps. With ``home``, gradients are collected there; with ``kept``, nothing is fetched."""
        fetched: dict[int, tuple[Hop | None, Hop | None]] = {}
        returned: dict[int, tuple[Hop | None, Hop | None]] = {}
        steps = len(self._wires) - 1
        posted = 0

        def fetch_up_to(step: int) -> None:
            nonlocal posted
            while kept is None and posted < min(step, steps):
                posted += 1
                fetched[posted] = self._fetch(posted, k, v, phase)

        fetch_up_to(2 if self._joins(2) else 1)
        if self._reads(0):
            shares = on_arrival(self._arrival(0, k, v))
            if home is not None:
                for total, share in zip(home, self._gradients(shares, k, v), strict=True):
                    total.add_(share)
        for step in range(1, steps + 1):
            got, put = fetched.pop(step, (None, None))
            self._transport.wait(got, phase)
            fetch_up_to(step + 1)
            shares = None
            if self._wires[step].receive is not None:
                arrived = self._buffers.unpack(step) if kept is None else kept[step]
                shares = on_arrival(self._arrival(step, *arrived))
                if home is not None:
                    shares = self._gradients(shares, *arrived)
            if home is not None:
                self._welcome(step - 2, returned, home)
                returned[step] = self._send_home(step, shares)
            self._transport.wait(put, phase)
            if self._joins(step + 2):
                fetch_up_to(step + 2)
        if home is not None:
            self._welcome(steps - 1, returned, home)
            self._welcome(steps, returned, home)
        self._commit(phase, kept is not None)

    def _joins(self, step: int) -> bool:
        """Whether a step's messages travel beside those of the step before, and not after them.

        Large messages that share a link all come late, and senders that share a receiver hold one another up; so they
        follow one another, but for the second one where there is much to compute before the first is looked at.
        """
        if step > self.plan.num_steps:
            return False
        wire, sizes = self._wires[step], self.traffic.forward
        sent = 0 if wire.send is None else int(sizes[self.rank, wire.send.peer])
        received = 0 if wire.receive is None else int(sizes[wire.receive.peer, self.rank])
        if max(sent, received) <= _SMALL_MESSAGE:
            return True
        first, work = self._wires[1].receive, self.plan.work
        return step == 2 and (first is None or work[self.rank, self.rank] > 2 * work[first.peer, self.rank])

    def _fetch(self, step: int, k: Tensor, v: Tensor, phase: str) -> tuple[Hop | None, Hop | None]:
        """Pack and post the way out of a step."""
        wire, buffers = self._wires[step], self._buffers
        receive = None if wire.receive is None else (wire.receive.peer, buffers.inbox(step))
        send = None if wire.send is None else (wire.send.peer, buffers.pack(step, k, v))
        return self._transport.post(KV, step, receive, send, phase)

    def _send_home(self, step: int, shares: tuple[Tensor, Tensor] | None) -> tuple[Hop | None, Hop | None]:
        """Pack and post the way home of a step: what came in goes out, and the other way round."""
        wire, buffers = self._wires[step], self._buffers
        receive = None if wire.send is None else (wire.send.peer, buffers.inbox_home(step))
        send = None
        if wire.receive is not None and shares is not None:
            send = (wire.receive.peer, buffers.pack_home(step, shares))
        return self._transport.post(GRAD, step, receive, send, "backward")

    def _welcome(self, step: int, returned: dict[int, Any], home: tuple[Tensor, Tensor]) -> None:
        """Wait for a step's way home and add what it brought."""
        if step in returned:
            got, put = returned.pop(step)
            self._transport.wait(got, "backward")
            if got is not None:
                self._buffers.add_home(step, home)
            self._transport.wait(put, "backward")

    def _commit(self, phase: str, is_kept: bool) -> None:
        """Return only once every rank has finished: all have the result, or all raise."""
        self._calls += 1
        if self.plan.world_size > 1:
            word = torch.tensor([self._calls, phase == "backward", is_kept], device=self._device)
            words = self._transport.gather(word, "commit")
            if not bool((words == word).all()):
                raise RuntimeError(
                    f"{phase}: expected every rank to make the same calls in the same order, got (number of the call, "
                    f"backward, kept) = {words.tolist()}"
                )

    # ------------------------------------------------------------------ arrivals

    def _reads(self, step: int) -> bool:
        """Whether the own queries read anything of an arrival."""
        wire = self._wires[step]
        if self.plan.layout is None:
            return len(wire.blocks) > 0 and len(self._q_start) > 0
        return wire.layout is not None and wire.layout.nnz > 0

    def _arrival(self, step: int, k: Tensor, v: Tensor) -> Arrival:
        wire = self._wires[step]
        peer = self.rank if wire.receive is None else wire.receive.peer
        return Arrival(step, peer, k, v, wire.blocks, self._kv_starts[step], self._q_start, wire.layout)

    def _gradients(self, shares: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(shares, tuple) or len(shares) != 2:
            raise TypeError(f"on_arrival: expected (dk, dv) in a backward pass, got {type(shares).__name__}")
        for name, share, like in zip(("dk", "dv"), shares, (k, v), strict=True):
            if share.shape != like.shape or share.dtype != self.grad_dtype or share.device != like.device:
                raise ValueError(
                    f"on_arrival: expected {name} of shape {tuple(like.shape)}, {self.grad_dtype} on {like.device}, "
                    f"got {tuple(share.shape)}, {share.dtype} on {share.device}"
                )
        return shares[0].contiguous(), shares[1].contiguous()

    def _operand(self, name: str, x: Tensor, which: int) -> Tensor:
        tokens = int(self.plan.kv_placement.lengths[self.rank])
        shape = (self._batch, tokens, self.plan.kv_heads, self._dims[which])
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if tuple(x.shape) != shape or x.dtype != self._dtype or x.device.type != self._device.type:
            raise ValueError(
                f"{name}: expected shape {shape}, {self._dtype} on {self._device}, got {tuple(x.shape)}, {x.dtype} on "
                f"{x.device}"
            )
        return x.contiguous()

    # ------------------------------------------------------------------ life

    @contextmanager
    def _call(self, phase: str) -> Iterator[None]:
        if self._closed:
            raise RuntimeError(f"{phase}: expected an open ring, got a closed one")
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(f"{phase}: expected one call at a time, got a second; use a ring and channel per thread")
        try:
            if self._failure is not None:
                raise self._failure
            with self._watched(phase):
                yield
        finally:
            self._in_use.release()

    @contextmanager
    def _watched(self, phase: str) -> Iterator[None]:
        """Turn a failed hop into the error that all survivors raise, and tell them of a failure of our own."""
        try:
            yield
        except HopFailed as failed:
            patience = 0.0 if failed.is_broken else min(PATIENCE, self._timeout)
            self._failure = self._health.conclude(failed.report, patience).error()
            note_failure(self._group, self._failure)
            self._give_up()
            raise self._failure from None
        except BaseException as error:
            if self.plan.world_size > 1 and not isinstance(error, RingMismatchError):
                mine = Report(self.rank, 0, 0, phase, f"{type(error).__name__} on this rank: {error}"[:300])
                self._failure = mine.error()
                if self._transport.in_flight:
                    note_failure(self._group, self._failure)
                self._health.report(mine)
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Stop using buffers that a peer may still write into, and connections that a thread may wait in."""
        buffers: PackedBuffers | None = getattr(self, "_buffers", None)  # None: the header failed.
        if buffers is not None and self.plan.world_size > 1:
            buffers.quarantine()
        self._transport.give_up()

    def close(self) -> None:
        """Give the buffers back. Every rank may do this on its own; calls after it raise."""
        if not self._closed:
            self._closed = True
            self._buffers.release()
            self._transport.close()
            self._health.close()

    def __enter__(self) -> PackedRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ counters

    @property
    def sent_bytes(self) -> dict[str, Int64]:
        """Bytes sent since construction, by receiver: ``{"kv": int64[world], "grad": …}``."""
        return {"kv": self._transport.sent_bytes[KV].copy(), "grad": self._transport.sent_bytes[GRAD].copy()}

    @property
    def received_bytes(self) -> dict[str, Int64]:
        """Bytes that arrived since construction, by sender."""
        return {"kv": self._transport.received_bytes[KV].copy(), "grad": self._transport.received_bytes[GRAD].copy()}

    @property
    def wait_seconds(self) -> float:
        """Time this rank was blocked waiting for others since construction (host waits only; 0 with NCCL)."""
        return self._transport.wait_seconds


def _floating(name: str, dtype: Any, *more: torch.dtype) -> torch.dtype:
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *more)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {dtype!r}")
    if dtype not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {dtype}")
    return dtype


def _health_of(group: Any, channel: int, rank: int, world: int) -> tuple[Health, int]:
    """Health over the group's own store, under keys that no earlier ring of the group used."""
    if group is None:
        return Health(None, "", rank, world), 0
    serials = _serials.setdefault(group, {})
    serials[channel] = serial = serials.get(channel, 0) + 1
    return Health(group.get_group_store(), f"bs_comm/{channel}/{serial}", rank, world), serial


def _positions(plan: ExchangePlan, rank: int, wires: list[StepWire]) -> tuple[Int64, list[Int64]]:
    """Absolute first positions: of the own query blocks, and of the key blocks of every step."""
    shift = plan.seq_len[1] - plan.seq_len[0]
    queries = plan.placement.blocks(rank, block_size=plan.block_size[0]) * plan.block_size[0] + shift
    return queries, [wire.blocks * plan.block_size[1] for wire in wires]
