"""The memory section of `bench_cpu.py`: every case in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_cases import operands
from cpu_turns import only
from torch.nn.functional import scaled_dot_product_attention

from bs_kernels import block_sparse_attention
from bs_patterns import BlockLayout

__all__ = ["memory"]

#: Tokens up to which a contestant is run: explicit scores of 32,768 tokens take 16 GiB, and several copies.
LONGEST = {"explicit": 16384}


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak memory of one forward and backward above the inputs', each in a process of its own."""
    cases: list[tuple[str, int, int]] = [
        (name, tokens, 8)
        for tokens in args.memory_lengths
        for name in ("explicit", "dense", *args.backends)
        if tokens <= LONGEST.get(name, tokens)
    ]
    cases += [(name, args.longest, 4) for name in args.backends if args.longest]
    for name, tokens, heads in cases:
        print(f"  {name} {tokens} × {heads} × 64: ", end="", flush=True)
        command = [sys.executable, __file__, name, str(tokens), str(heads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        record: dict[str, Any] = {"name": name, "tokens": tokens, "heads": heads}
        if done.returncode:
            print(f"failed with status {done.returncode}\n{done.stderr[-2000:]}", flush=True)
            yield record | {"failed": done.returncode}
            continue
        record = json.loads(done.stdout.splitlines()[-1]) | record
        print("{peak_mib} MiB above, {total_mib} in all, {seconds} s".format(**record), flush=True)
        yield record


def resident(*, forget_peak: bool = False) -> float:
    """MiB of this process at its peak, or, if the peak so far is to be forgotten, now."""
    refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if forget_peak:
        refs.write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def prepared(name: str, tokens: int, heads: int) -> Callable[[], object]:
    """A forward and backward in bfloat16, causal, 16 blocks of 64 per row, its inputs made."""
    tensors, cotangent = operands(tokens, heads, heads, 64, torch.bfloat16)
    n, per_row = tokens // 64, 16
    row = np.repeat(np.arange(n), per_row)
    column = np.minimum(np.random.default_rng(0).integers(0, 1 << 30, len(row)) % (row + 1), row)
    layout = BlockLayout.from_coo(0, row, column, block_size=64, seq_len=tokens, causal=True)

    def attend() -> torch.Tensor:
        if name not in ("explicit", "dense"):
            return block_sparse_attention(*tensors, layout, backend=name)  # pyright: ignore[reportCallIssue]
        q, k, v = (x.transpose(1, 2) for x in tensors)
        if name == "dense":
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        scores = (q @ k.transpose(-1, -2)) / 8
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
        return (torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v).transpose(1, 2)

    def both() -> None:
        with nullcontext() if name in ("explicit", "dense") else only(name):
            torch.autograd.grad(attend(), tensors, cotangent)

    return both


def child(name: str, tokens: int, heads: int) -> None:
    """Peak and seconds of one forward and backward, as JSON; a tiny one before it loads what a first call loads."""
    prepared(name, 128, heads)()
    both = prepared(name, tokens, heads)
    before, begin = resident(forget_peak=True), time.perf_counter()
    both()
    peak, seconds = resident(), round(time.perf_counter() - begin, 2)
    print(json.dumps({"peak_mib": round(peak - before), "total_mib": round(peak), "seconds": seconds}))


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
