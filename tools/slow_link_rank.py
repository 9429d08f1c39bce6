"""What one rank of `bench_slow_link.py` does in its network namespace: attention over three kinds of exchange."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bs_comm import ExchangePlan, PackedRing
from bs_kernels import LayoutPlan, TokenMask, attention_delta, merge_attention, partial_backward, partial_forward
from bs_patterns import BlockLayout, DilatedSparse, LocalWindow

TOKENS, BLOCK, Q_HEADS, KV_HEADS, DIM = 8192, 64, 4, 2, 64
LAYOUTS = ("local window 1,024", "dilated at density 0.1", "random 5 %", "random 12.5 %")
EXCHANGES = ("packed ring", "dense ring", "all-gather")
Pair = tuple[Tensor, Tensor]
#: Given (owner of the keys, or −1 for all of them; k; v); in a backward pass it returns (dk, dv).
OnPart = Callable[[int, Tensor, Tensor], Any]


def layout_of(name: str) -> BlockLayout:
    """Window and dilated are causal and the same for all heads; random ones are neither."""
    if name.startswith("local"):
        return LocalWindow(1024).layout(TOKENS, block_size=BLOCK, causal=True)
    if name.startswith("dilated"):
        return DilatedSparse((1, 2, 4, 8)).layout(TOKENS, block_size=BLOCK, causal=True, density=0.1)
    density, blocks = float(name.split()[1]) / 100, TOKENS // BLOCK
    mask = np.random.default_rng(0).random((Q_HEADS, blocks, blocks)) < density
    return BlockLayout.from_dense(mask | np.eye(blocks, dtype=bool), block_size=BLOCK, seq_len=TOKENS)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the gradient of the output: the same on every rank."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, TOKENS, heads, DIM, generator=g).to(dtype) for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)
    ]


# ---------------------------------------------------------------------- three ways to bring keys to queries


class Exchange(Protocol):
    """Shows all keys that a rank's queries read, part by part, and brings their gradients home."""

    def forward(self, k: Tensor, v: Tensor, on_part: OnPart) -> None: ...

    def backward(self, k: Tensor, v: Tensor, on_part: OnPart) -> Pair: ...


class Packed:
    """`PackedRing`: what the layout reads, straight from its owner."""

    def __init__(self, plan: ExchangePlan) -> None:
        self.ring = PackedRing(plan, batch=1, head_dim=DIM)

    def forward(self, k: Tensor, v: Tensor, on_part: OnPart) -> None:
        self.ring.forward(k, v, lambda a: on_part(a.peer, a.k, a.v))

    def backward(self, k: Tensor, v: Tensor, on_part: OnPart) -> Pair:
        return self.ring.backward(k, v, lambda a: on_part(a.peer, a.k, a.v))


class Dense:
    """The usual ring: all of K and V to the next rank in every hop, the next hop under way while this one computes."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def _pass_on(self, x: Tensor, tag: int) -> tuple[Tensor, list[Any]]:
        got, to, source = torch.empty_like(x), (self.rank + 1) % self.world, (self.rank - 1) % self.world
        ops = [dist.P2POp(dist.irecv, got, source, tag=tag), dist.P2POp(dist.isend, x, to, tag=tag)]
        return got, dist.batch_isend_irecv(ops)

    def forward(self, k: Tensor, v: Tensor, on_part: OnPart) -> None:
        self._rotate(k, v, on_part, None)

    def backward(self, k: Tensor, v: Tensor, on_part: OnPart) -> Pair:
        home = torch.zeros(2, *k.shape)
        return self._rotate(k, v, on_part, home).unbind(0)  # type: ignore[return-value]

    def _rotate(self, k: Tensor, v: Tensor, on_part: OnPart, sums: Tensor | None) -> Any:
        here = torch.stack((k, v))
        leaving, sums_works = sums, []
        for hop in range(self.world):
            is_last = hop == self.world - 1
            following, works = (here, []) if is_last else self._pass_on(here, 0)
            shares = on_part((self.rank - hop) % self.world, here[0], here[1])
            if sums is not None:  # Sums travel one hop behind their keys, and once more to their owner.
                for work in sums_works:
                    work.wait()
                if shares is not None:
                    sums[0] += shares[0]
                    sums[1] += shares[1]
                leaving = sums  # Kept until it has left.
                sums, sums_works = self._pass_on(leaving, 1)
            for work in works:
                work.wait()
            here = following
        for work in sums_works:
            work.wait()
        return sums


class Gather:
    """All of K and V on every rank first; gradients summed over ranks and cut at the end."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def _all(self, x: Tensor) -> Tensor:
        parts = torch.empty(self.world, *x.shape[1:])  # of one sequence
        dist.all_gather_into_tensor(parts, x)
        return parts.flatten(0, 1)[None]

    def forward(self, k: Tensor, v: Tensor, on_part: OnPart) -> None:
        on_part(-1, self._all(k), self._all(v))

    def backward(self, k: Tensor, v: Tensor, on_part: OnPart) -> Pair:
        out = []
        for x in on_part(-1, self._all(k), self._all(v)):
            mine = torch.empty_like(k)
            dist.reduce_scatter_tensor(mine, x.view(self.world, *mine.shape[1:]))
            out.append(mine)
        return out[0], out[1]


def planned_bytes(name: str, plan: ExchangePlan, rank: int) -> tuple[int, int]:
    """Payload that a rank sends forward and backward."""
    if name == "packed ring":
        traffic = plan.traffic(DIM, kv_itemsize=4)
        out, home = int(traffic.forward[rank].sum()), int(traffic.backward[rank].sum())
        return out, out + home
    world, shard = plan.world_size, TOKENS // plan.world_size * KV_HEADS * 2 * DIM * 4
    return (world - 1) * shard, (world - 1) * shard + (world if name == "dense ring" else world - 1) * shard


# ---------------------------------------------------------------------- attention over any of them


class Attention:
    """A rank's queries against the parts that an exchange shows."""

    def __init__(self, layout: BlockLayout, exchange: Exchange, rank: int, plan: ExchangePlan) -> None:
        self.exchange, self.seconds = exchange, 0.0
        rows = plan.placement.blocks(rank)
        mask = layout.to_dense()[:, rows]
        owners = {peer: plan.kv_placement.blocks(peer) for peer in range(plan.world_size)}
        if isinstance(exchange, Packed):  # An arrival holds the blocks that were sent, and not all of its owner's.
            owners = {p: b if p == rank else np.unique(plan.transfer(p, rank)[1]) for p, b in owners.items()}
        owners[-1] = np.arange(mask.shape[2])
        self.plans = {
            owner: self._plan(layout.causal, mask[:, :, blocks], rows, blocks)
            for owner, blocks in owners.items()
            if len(blocks) and mask[:, :, blocks].any()
        }

    @staticmethod
    def _plan(causal: bool, mask: Any, rows: Any, blocks: Any) -> LayoutPlan:
        part = BlockLayout.from_dense(mask, block_size=BLOCK, seq_len=(len(rows) * BLOCK, len(blocks) * BLOCK))
        return LayoutPlan.build(part, TokenMask(causal=causal), q_start=rows * BLOCK, kv_start=blocks * BLOCK)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        parts: list[Pair] = []

        def attend(owner: int, k: Tensor, v: Tensor) -> None:
            if owner in self.plans:
                started = time.perf_counter()
                parts.append(partial_forward(q, k, v, self.plans[owner], backend="native"))
                self.seconds += time.perf_counter() - started

        self.exchange.forward(k, v, attend)
        return merge_attention(parts)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        delta, dq = attention_delta(dout, out, lse), torch.zeros_like(q)

        def differentiate(owner: int, k: Tensor, v: Tensor) -> Pair | None:
            if owner not in self.plans:
                return None
            started = time.perf_counter()
            got = partial_backward(dout, delta, lse, q, k, v, self.plans[owner], backend="native")
            dq.add_(got.q)
            self.seconds += time.perf_counter() - started
            return got.k, got.v

        return [dq, *self.exchange.backward(k, v, differentiate)]


# ---------------------------------------------------------------------- measuring


def frames_sent() -> int:
    """Bytes that this namespace's interface has sent, frame by frame (an interface counts coalesced packets once)."""
    text = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", "eth0"], capture_output=True, check=True).stdout
    return json.loads(text)[0]["bytes"]


def latency(rank: int, rounds: int = 50) -> float:
    """Seconds that a small message takes between ranks 0 and 1: half of the best round trip."""
    word, best = torch.zeros(8, dtype=torch.uint8), float("inf")
    for _ in range(rounds if rank < 2 else 0):
        started = time.perf_counter()
        for turn in (0, 1):
            (dist.send if turn == rank else dist.recv)(word, 1 - rank)
        best = min(best, time.perf_counter() - started)
    return best / 2


def timed(call: Callable[[], Any]) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def case(rank: int, world: int, name: str, kind: str, rounds: int, exact: list[Tensor]) -> dict[str, Any]:
    """Seconds of both passes, best of the rounds: of the step, of its kernels, of the exchange alone; bytes; errors."""
    layout = layout_of(name)
    plan = ExchangePlan.build(layout, world, kv_heads=KV_HEADS)
    exchange: Any = {"packed ring": lambda: Packed(plan), "dense ring": lambda: Dense(rank, world),
                     "all-gather": lambda: Gather(rank, world)}[kind]()  # fmt: skip
    q, k, v, dout = (plan.placement.shard(x, rank).contiguous() for x in tensors())
    attention = Attention(layout, exchange, rank, plan)
    sizes = {len(plan.kv_placement.blocks(rank)) * BLOCK: (torch.zeros_like(k), torch.zeros_like(v))}

    def zeros(owner: int, k: Tensor, v: Tensor) -> Pair:
        return sizes.setdefault(k.shape[1], (torch.zeros_like(k), torch.zeros_like(v)))

    alone = [
        [timed(lambda call=call: call(k, v, zeros)) for _ in range(rounds)]
        for call in (exchange.forward, exchange.backward)
    ]
    step, compute, weighed = [[], []], [[], []], 0
    out: Any = None
    grads: list[Tensor] = []

    def run(i: int) -> None:
        nonlocal out, grads
        if i == 0:
            out = attention.forward(q, k, v)
        else:
            grads = attention.backward(q, k, v, dout, *out)

    for i in (0, 1):
        run(i)  # The first call of a kernel pays for more than itself.
    for _ in range(rounds):
        dist.barrier()
        before = frames_sent()
        for i in (0, 1):
            attention.seconds = 0.0
            step[i].append(timed(lambda i=i: run(i)))
            compute[i].append(attention.seconds)
        dist.barrier()
        weighed = frames_sent() - before
    errors = [
        float((got.double() - plan.placement.shard(want, rank)).abs().max())
        for got, want in zip((out[0], *grads), exact, strict=True)
    ]
    if isinstance(exchange, Packed):
        exchange.ring.close()
    return {"alone": alone, "step": step, "compute": compute, "sent": weighed, "errors": errors,
            "planned": planned_bytes(kind, plan, rank)}  # fmt: skip


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    spec = json.loads((folder / "spec.json").read_text())
    dist.init_process_group("gloo", init_method=spec["meeting"], rank=rank, world_size=world)
    dist.barrier()
    answer: dict[str, Any] = {"latency": latency(rank), "cases": []}
    for name, kind in spec["cases"]:
        exact = torch.load(folder / f"{LAYOUTS.index(name)}.pt", mmap=True)
        answer["cases"].append(case(rank, world, name, kind, spec["rounds"], exact))
    (folder / f"answer{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
