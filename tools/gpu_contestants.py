"""What `bench_gpu` measures: settings and their layouts, contestants, and the clock of a device."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bs_kernels import LayoutPlan, TokenMask, block_sparse_attention
from bs_patterns import BlockLayout

__all__ = [
    "DENSE",
    "Device",
    "Setting",
    "any_mod",
    "block_mask_of",
    "causal_mod",
    "contestants_of",
    "decoders_of",
    "dense_pairs",
    "kept_pairs",
    "layout_of",
    "operands",
]

#: Dense kernels inside torch.
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Dense kernels of packages that may be installed, on [B, S, H, D]: name, module.
PACKAGES = {"flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}
#: Before every timed call, so much is overwritten (more than any L2) and the device idles for so many clocks, in which
#: the host gets ahead of it: what is timed finds no operand in the cache and includes no launching.
_SWEPT_BYTES, _IDLE_CLOCKS = 256 << 20, 2_000_000
#: A forward and a backward.
Runs = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    """What is measured: sizes, and the kind of layout. ``queries`` are the last ones; 0 for as many as tokens."""

    layout: str = "random"
    density: float = 0.1
    tokens: int = 32768
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    block: int = 128
    causal: bool = False
    dtype: str = "bfloat16"
    batch: int = 1
    queries: int = 0


# -- the device --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A GPU, or, for a dry run, Triton's interpreter on the CPU: all happens once and no number means a thing."""

    dry: bool = False

    @property
    def name(self) -> str:
        """As torch knows it."""
        return "cpu" if self.dry else "cuda"

    def synchronize(self) -> None:
        """Wait until everything is done."""
        if not self.dry:
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], Any]) -> float:
        """MiB that ``run`` allocates at most, above what is there before; 0 in a dry run."""
        if self.dry:
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def take_turns(
        self, contestants: dict[str, Callable[[], Any]], budget_ms: float = 600.0
    ) -> dict[str, dict[str, float]]:
        """Median and quartiles in milliseconds of device time, contestants interleaved, warmed up, caches cold."""
        cost = {}
        for name, run in contestants.items():
            for _ in range(1 if self.dry else 2):  # the last one counts
                begin = time.perf_counter()
                run()
                self.synchronize()
                cost[name] = (time.perf_counter() - begin) * 1e3
        if self.dry:
            return {name: dict.fromkeys(("ms", "q1", "q3"), ms) for name, ms in cost.items()}
        rounds = int(min(30, max(5, budget_ms / max(sum(cost.values()), 1e-3))))
        swept = torch.empty(_SWEPT_BYTES, dtype=torch.int8, device=self.name)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, run in contestants.items():
                begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                swept.zero_()
                torch.cuda._sleep(_IDLE_CLOCKS)
                begin_event.record()
                run()
                end_event.record()
                events[name].append((begin_event, end_event))
        torch.cuda.synchronize()
        found = {}
        for name, pairs in events.items():
            low, mid, high = statistics.quantiles([a.elapsed_time(b) for a, b in pairs], n=4)
            found[name] = {"ms": mid, "q1": low, "q3": high}
        return found


# -- layouts -----------------------------------------------------------------------------------------------------------


def layout_of(setting: Setting, seed: int = 0) -> BlockLayout:
    """A layout at about ``setting.density`` of the allowed blocks, the diagonal always among them.

    "random" differs per head; "window" is a band; "skewed" gives half of its blocks to a few global columns and rows,
    so that lists differ in length by orders of magnitude. For the last queries of a cache: one row, that of all heads.
    """
    n = -(-setting.tokens // setting.block)
    if setting.queries:
        row = np.random.default_rng(seed).random(n) < max(0.0, (setting.density * n - 1) / max(n - 1, 1))
        row[-1] = True
        lengths = (setting.queries, setting.tokens)
        return BlockLayout.from_dense(row[None, None], block_size=setting.block, seq_len=lengths)
    i = np.arange(n)
    allowed = np.tril(np.ones((n, n), bool)) if setting.causal else np.ones((n, n), bool)
    budget = setting.density * allowed.sum()
    if setting.density >= 1:
        mask = allowed[None]
    elif setting.layout == "random":
        chance = max(0.0, (budget - n) / max(allowed.sum() - n, 1))
        mask = np.random.default_rng(seed).random((setting.heads, n, n)) < chance
    else:
        few = 0
        if setting.layout == "skewed":
            few = max(1, round(budget / 2 / (n if setting.causal else 2 * n)))
        spread = max(0.0, budget - few * (n if setting.causal else 2 * n))
        reach = max(0, round(spread / n) - 1) if setting.causal else max(0, round((spread / n - 1) / 2))
        mask = (np.abs(i[:, None] - i) <= reach)[None]
        mask = mask | ((i < few) | ((i[:, None] < few) & (not setting.causal)))[None]
    mask = (mask | np.eye(n, dtype=bool)) & allowed
    return BlockLayout.from_dense(mask, block_size=setting.block, seq_len=setting.tokens, causal=setting.causal)


def kept_pairs(layout: BlockLayout, heads: int) -> float:
    """(query, key) pairs that ``heads`` query heads keep; lengths are multiples of the block here."""
    block = layout.block_size[0]
    pairs = layout.nnz * block * min(block, layout.seq_len[0])
    if layout.causal:
        _, row, column = layout.to_coo()
        pairs -= int((row == column).sum()) * block * (block - 1) / 2
    return pairs * heads / layout.heads


def dense_pairs(setting: Setting) -> float:
    """Pairs that a dense kernel computes."""
    n = setting.tokens
    return setting.heads * (n * (n + 1) / 2 if setting.causal else n * (setting.queries or n))


# -- contestants -------------------------------------------------------------------------------------------------------


def operands(setting: Setting, device: Device) -> tuple[torch.Tensor, ...]:
    """q, k, v and dout, [batch, tokens, heads, head_dim]."""
    torch.manual_seed(0)
    dtype, dim = getattr(torch, setting.dtype), setting.head_dim

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(setting.batch, tokens, heads, dim, device=device.name, dtype=dtype)

    q, dout = (normal(setting.queries or setting.tokens, setting.heads) for _ in range(2))
    k, v = (normal(setting.tokens, setting.kv_heads) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def block_mask_of(layout: BlockLayout, mask_mod: Callable[..., Any], device: str = "cuda") -> Any:
    """FlexAttention's form of a layout: blocks on the diagonal of a causal one are partial, others full."""
    from torch.nn.attention.flex_attention import BlockMask

    dense = torch.from_numpy(layout.to_dense()).to(device)[None]
    n = dense.shape[-1]
    partial = dense & torch.eye(n, dtype=torch.bool, device=device) if layout.causal else torch.zeros_like(dense)

    def lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(dense & ~partial), BLOCK_SIZE=layout.block_size[0], mask_mod=mask_mod
    )


def causal_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def any_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= 0


_flex: list[Any] = []


def flex_runner(setting: Setting, layout: BlockLayout, device: Device) -> Callable[..., torch.Tensor]:
    """Compiled FlexAttention over the same blocks; compiled once per shape."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex:
        # One compilation per shape; past the limit it would silently run uncompiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        _flex.append(torch.compile(flex_attention, dynamic=False))
    mask = block_mask_of(layout, causal_mod if setting.causal else any_mod, device.name)
    grouped = setting.heads != setting.kv_heads
    return lambda q, k, v: _flex[0](q, k, v, block_mask=mask, enable_gqa=grouped)


def _dense(setting: Setting, inputs: tuple[torch.Tensor, ...]) -> tuple[dict[str, Callable[[], Any]], list[Any], Any]:
    """Dense kernels by name, and what they differentiate: operands of their own and the gradient of the output."""
    q, k, v, dout = inputs
    qh, kh, vh = heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    grouped = setting.heads != setting.kv_heads
    causal = setting.causal and not setting.queries

    def inside(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(qh, kh, vh, is_causal=causal, enable_gqa=grouped)

    return (
        {f"dense {name}": partial(inside, kernel) for name, kernel in DENSE.items()},
        heads_first,
        dout.transpose(1, 2).contiguous(),
    )


def _packages(setting: Setting, inputs: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Dense kernels of packages that are installed; whether one works shows when it is run."""
    q, k, v, _ = inputs

    def run(module: str) -> torch.Tensor:
        out = importlib.import_module(module).flash_attn_func(q, k, v, causal=setting.causal)
        return out[0] if isinstance(out, tuple) else out

    present = {name: module for name, module in PACKAGES.items() if importlib.util.find_spec(module) is not None}
    return {f"dense {name}": partial(run, module) for name, module in present.items()}


def contestants_of(
    setting: Setting, layout: BlockLayout, device: Device, *, flex: bool
) -> tuple[dict[str, Runs], list[str]]:
    """Forward and backward of everything that is compared, and why something is missing.

    Raises whatever the backend that is measured raises; that another one fails is only noted.
    """
    q, k, v, dout = inputs = operands(setting, device)
    plan = LayoutPlan.build(layout, TokenMask(setting.causal), device.name)
    found: dict[str, Runs] = {}
    notes: list[str] = []

    def add(name: str, forward: Callable[[], torch.Tensor], wanted: list[torch.Tensor], grad: torch.Tensor) -> None:
        try:
            out = forward()
            backward = lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)  # noqa: E731
            backward()
            device.synchronize()
        except Exception as error:  # a kernel that this device or shape does not have; compilers raise anything
            if name.startswith("triton"):
                raise
            notes.append(_note(name, error))
            return
        found[name] = (forward, backward)

    own = partial(block_sparse_attention, q, k, v, plan, backend="triton")
    add("triton", own, [q, k, v], dout)
    add("triton any order", partial(own, deterministic=False), [q, k, v], dout)
    dense, heads_first, dout_first = _dense(setting, inputs)
    for name, run in dense.items():
        add(name, run, heads_first, dout_first)
    for name, run in _packages(setting, inputs).items():
        add(name, run, [q, k, v], dout)
    if flex:
        runner: list[Callable[..., torch.Tensor]] = []

        def run_flex() -> torch.Tensor:
            if not runner:
                runner.append(flex_runner(setting, layout, device))
            return runner[0](*heads_first)

        add("flex", run_flex, heads_first, dout_first)
    return found, notes


def decoders_of(setting: Setting, layout: BlockLayout, device: Device) -> tuple[dict[str, Callable], list[str]]:
    """Forwards without gradients: ours with rows in pieces and without, and dense kernels."""
    from bs_kernels.backends.triton import launch

    inputs = tuple(x.detach() for x in operands(setting, device))
    q, k, v, _ = inputs
    plan = LayoutPlan.build(layout, TokenMask(), device.name)
    own = partial(block_sparse_attention, q, k, v, plan, backend="triton")

    module: Any = launch
    pieces = module.pieces

    def whole() -> Any:
        module.pieces = lambda *_: 1
        try:
            return own()
        finally:
            module.pieces = pieces

    found, notes = {}, []
    for name, run in {"triton": own, "triton in one piece": whole, **_dense(setting, inputs)[0]}.items():
        try:
            run()
            device.synchronize()
            found[name] = run
        except Exception as error:
            if name.startswith("triton"):
                raise
            notes.append(_note(name, error))
    return found, notes


def _note(name: str, error: Exception) -> str:
    """Why a contestant is missing, on one line."""
    return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
