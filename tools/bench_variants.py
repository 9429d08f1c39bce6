"""Measures every variant of bs-modules; writes docs/benchmarks/variants.json and the page of tables beside it.

    python tools/bench_variants.py                       # everything: under eight minutes on two cores
    python tools/bench_variants.py --tokens 1024 --rounds 3 --out other.json
    python tools/bench_variants.py --only training hilbert
    python tools/bench_variants.py --device cuda --out docs/benchmarks/variants_gpu.json

Variants take turns in one process: a round runs each of them once, the base module among them. Reported are the median
over the rounds with quartiles, and the median of the ratios to the base of the same round. Every backend that runs is
watched: if it is another than the optimised one of the device, the benchmark fails. Peak memory is measured in a
process of its own for each variant and length. Training steps run in bf16 autocast through the public module; they fail
if the loss does not fall or a parameter gets no gradient.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import results
import torch
import variants_orders
import variants_report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from bs_kernels.watch import BackendRun, watch
from bs_modules import create_block_sparse_attention, get_block_sparse_preset

SECTIONS = ("variants", "memory", "training", "equal", "hilbert")
VARIANTS = ("base", "hierarchical", "adaptive", "hilbert", "multihead", "distributed", "dilated")
DENSITY, BLOCK, HEADS, DIM = 0.1, 64, 4, 64
LOW_DENSITY = 0.05  # where levels and base are compared once more
DTYPE = torch.bfloat16
#: The backend that has to run on each kind of device.
OPTIMISED = {"cpu": "native", "cuda": "triton"}
DENSE_UP_TO = 8192  # tokens; a dense backward at 32,768 takes longer than all the rest together


# -- contestants -------------------------------------------------------------------------------------------------------


def make(variant: str) -> nn.Module:
    """The module of a variant at the density of the benchmark, where one can be asked for."""
    if variant == "multihead":
        arguments: dict[str, Any] = {"embed_dim": HEADS * DIM, "num_heads": HEADS, "batch_first": True}
        return create_block_sparse_attention(variant, sparsity_ratio=DENSITY, block_size=BLOCK, **arguments)
    if variant == "dilated":
        return create_block_sparse_attention(variant)
    if variant == "hierarchical":
        return create_block_sparse_attention(variant, sparsity_ratio=DENSITY)
    if variant == "adaptive":
        return create_block_sparse_attention(variant, base_sparsity=1 - DENSITY, block_size=BLOCK)
    return create_block_sparse_attention(variant, sparsity_ratio=DENSITY, block_size=BLOCK)


def asked(variant: str) -> float | None:
    """The density asked for; exact LongNet has its own."""
    return None if variant == "dilated" else DENSITY


def operands(variant: str, tokens: int, device: str) -> list[Tensor]:
    """What the variant is called with: q, k, v, or three times the same x for the multihead module."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, HEADS * DIM) if variant == "multihead" else (1, tokens, HEADS, DIM)
    count = 1 if variant == "multihead" else 3
    made = [torch.randn(shape, generator=generator).to(device, DTYPE).requires_grad_() for _ in range(count)]
    return made * (3 // count)


def runners(variant: str, module: nn.Module, tokens: int, device: str) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and forward with backward, both causal."""
    tensors = operands(variant, tokens, device)
    module.to(device, DTYPE)
    more = {"need_weights": False} if variant == "multihead" else {}

    def call() -> Tensor:
        out = module(*tensors, is_causal=True, **more)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        cotangent = torch.randn(call().shape).to(device, DTYPE)
    wanted = [*dict.fromkeys(tensors), *(p for p in module.parameters() if p.requires_grad)]

    def both() -> None:
        torch.autograd.grad(call(), wanted, cotangent, allow_unused=True)

    return {"forward": torch.no_grad()(call), "both": both}


def dense_runners(tokens: int, device: str) -> dict[str, Callable[[], Any]]:
    """Dense attention of torch on tensors in the layout that is fastest for it."""
    tensors = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in operands("base", tokens, device)]
    cotangent = torch.randn(tensors[0].shape).to(device, DTYPE)

    def call() -> Tensor:
        return scaled_dot_product_attention(*tensors, is_causal=True)  # pyright: ignore[reportArgumentType]

    return {"forward": torch.no_grad()(call), "both": lambda: torch.autograd.grad(call(), tensors, cotangent)}


# -- measuring ---------------------------------------------------------------------------------------------------------


def optimised(device: str) -> str:
    """The backend that has to run on this device."""
    module: Any = create_block_sparse_attention("base")
    probe = module.explain(*operands("base", 256, device), is_causal=True)
    if probe.backend != OPTIMISED[device]:
        raise SystemExit(f"bench_variants: expected {OPTIMISED[device]}, but {probe.backend} would run:\n{probe}")
    return probe.backend


@contextmanager
def only(backend: str, what: str) -> Iterator[None]:
    """Fail if any other backend runs, or none."""
    ran: set[str] = set()

    def note(event: object) -> None:
        if isinstance(event, BackendRun):
            ran.add(event.backend)

    with watch(note):
        yield
    if ran != {backend}:
        raise SystemExit(f"bench_variants: {what}: meant to measure {backend!r}, but {sorted(ran)} ran")


def take_turns(
    contestants: dict[str, Callable[[], Any]], rounds: int, backend: str, against: str
) -> dict[str, dict[str, Any]]:
    """Milliseconds and ratios to one contestant, round by round; one round warms up."""

    def watched(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> None:
            with nullcontext() if name == "dense" else only(backend, name):
                run()
            _wait()

        return inner

    _wait()
    times = results.take_turns({name: watched(name, run) for name, run in contestants.items()}, rounds)
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        values = [x * 1e3 for x in seconds]
        low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        mid_ratio, least, most = results.ratio(seconds, times[against])
        found[name] = {"ms": round(mid, 3), "q1": round(low, 3), "q3": round(high, 3)}
        found[name] |= {"ratio": mid_ratio, "ratio_range": [least, most]}
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def section_variants(options: argparse.Namespace, backend: str) -> Iterator[dict[str, Any]]:
    """Time of every variant, forward and both, beside the base and dense attention."""
    for tokens in options.tokens:
        rounds = options.rounds or (15 if tokens <= 4096 else 9 if tokens <= 16_384 else 5)
        modules = {variant: make(variant) for variant in VARIANTS}
        runs = {variant: runners(variant, module, tokens, options.device) for variant, module in modules.items()}
        if tokens <= DENSE_UP_TO:
            runs["dense"] = dense_runners(tokens, options.device)
        found: dict[str, dict[str, Any]] = {}
        for phase, training in (("forward", False), ("both", True)):
            for module in modules.values():
                module.train(training)
            found[phase] = take_turns({name: run[phase] for name, run in runs.items()}, rounds, backend, "base")
        for name in runs:
            met = 1.0 if name == "dense" else modules[name].get_pattern_stats()["density"]  # pyright: ignore[reportCallIssue]
            print(f"  {tokens:6} {name:12} {found['forward'][name]['ms']:9.2f} {found['both'][name]['ms']:9.2f} ms")
            yield {
                "variant": name,
                "tokens": tokens,
                "rounds": rounds,
                "asked": 1.0 if name == "dense" else asked(name),
                "met": round(float(met), 5),
                "backend": "torch's own" if name == "dense" else backend,
                **{phase: found[phase][name] for phase in ("forward", "both")},
            }


def section_memory(options: argparse.Namespace, backend: str) -> Iterator[dict[str, Any]]:
    """Peak memory of every variant, each in a process of its own."""
    for tokens in options.tokens:
        for variant in VARIANTS:
            words = [sys.executable, __file__, "--device", options.device, "--child", variant, str(tokens), backend]
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise SystemExit(f"bench_variants: the child for {variant} at {tokens} tokens failed:\n{done.stderr}")
            record = json.loads(done.stdout.splitlines()[-1])
            print(f"  {tokens:6} {variant:12} {record}", flush=True)
            yield record


def child(variant: str, tokens: int, backend: str, device: str) -> None:
    """Peak memory over what is there before the call, resident or on the GPU, printed as JSON."""
    torch.manual_seed(0)
    module = make(variant)
    small = runners(variant, module, 512, device)  # loads what a first call loads
    small["forward"]()
    small["both"]()
    tensors = operands(variant, tokens, device)
    run = runners(variant, module, tokens, device)  # its first call builds layout and plan
    found: dict[str, Any] = {"variant": variant, "tokens": tokens}
    held = sum(x.numel() * x.element_size() for x in dict.fromkeys(tensors))
    found["inputs_mib"] = round(held / 2**20, 2)
    for phase in ("forward", "both"):
        module.train(phase == "both")
        gc.collect()
        with only(backend, variant):
            found[f"{phase}_mib"] = (_peak if device == "cpu" else _peak_on_gpu)(run[phase])
    print(json.dumps(found))


def _peak_on_gpu(run: Callable[[], Any]) -> float:
    """MiB above the start, of torch's allocator."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def _peak(run: Callable[[], Any]) -> float | None:
    """MiB above the start; None where the system does not tell."""
    status = Path("/proc/self/status")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls left, which would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return None

    def kib(name: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    before = kib("VmRSS")
    run()
    return round((kib("VmHWM") - before) / 1024, 2)


# -- training ----------------------------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Embeddings of tokens and positions, one attention, and an output layer."""

    def __init__(self, variant: str, tokens: int, vocabulary: int = 64) -> None:
        super().__init__()
        self.variant = variant
        width = HEADS * DIM
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.inward = nn.Identity() if variant == "multihead" else nn.Linear(width, 3 * width)
        self.attention = make(variant)
        self.outward = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight
        if self.variant == "multihead":
            attended = self.attention(x, x, x, is_causal=True, need_weights=False)[0]
        else:
            q, k, v = self.inward(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
            attended = self.attention(q, k, v, is_causal=True).flatten(-2)
        return self.outward(x + attended)


def section_training(options: argparse.Namespace, backend: str) -> Iterator[dict[str, Any]]:
    """Optimizer steps of every variant in bf16."""
    tokens = min(8192, max(options.tokens))
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = Copier(variant, tokens).to(options.device)
        ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1)).to(options.device)
        losses, times, missing = [], [], []
        optimizer = None
        for step in range(options.steps):
            begin = time.perf_counter()
            with only(backend, f"training {variant}"):
                with torch.autocast(options.device, DTYPE):
                    scores = model(ids)
                    loss = cross_entropy(scores[0, 4:].float(), ids[0, :-4])
                # The first call makes the parameters that are lazy.
                optimizer = optimizer or torch.optim.AdamW(model.parameters(), 3e-3)
                optimizer.zero_grad()
                loss.backward()
            if step == 0:
                missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            optimizer.step()
            _wait()
            losses.append(round(float(loss.detach()), 4))
            times.append((time.perf_counter() - begin) * 1e3)
        if missing:
            raise SystemExit(f"bench_variants: training {variant}: no gradient for {', '.join(missing)}")
        if not losses[-1] < losses[0]:
            raise SystemExit(f"bench_variants: training {variant}: the loss did not fall: {losses}")
        step_ms = round(statistics.median(times[1:] or times), 1)
        print(f"  {variant:12} loss {losses[0]:.3f} → {losses[-1]:.3f}, {step_ms} ms a step", flush=True)
        yield {
            "variant": variant,
            "tokens": tokens,
            "steps": options.steps,
            "losses": losses,
            "step_ms": step_ms,
            "backend": backend,
            "met": round(float(model.attention.get_pattern_stats()["density"]), 5),  # pyright: ignore[reportCallIssue]
        }


# -- levels at equal density, orders -----------------------------------------------------------------------------------


def section_equal(options: argparse.Namespace, backend: str) -> Iterator[dict[str, Any]]:
    """Hierarchical attention beside the base at equal density: that of a preset's levels, and one asked for."""
    presets: list[tuple[str, dict[str, Any]]] = [(f"hierarchical_{name}", {}) for name in ("standard", "fine", "long")]
    asked_for = ("hierarchical_standard", {"sparsity_ratio": LOW_DENSITY})
    for tokens in options.tokens:
        if tokens < 1024:
            continue
        for preset_name, more in [*presets, asked_for]:
            preset: Any = get_block_sparse_preset(preset_name, **more)
            name = ", ".join([preset_name, *(f"{field} {value}" for field, value in more.items())])
            density = preset.layout(tokens, True).density
            size = preset.sparse_config.block_size
            base: Any = create_block_sparse_attention("base", sparsity_ratio=density, block_size=size)
            runs = {
                "base": runners("base", base, tokens, options.device),
                name: runners("base", preset, tokens, options.device),
            }
            rounds = options.rounds or (7 if tokens <= 16_384 else 3)
            found = {
                phase: take_turns({who: run[phase] for who, run in runs.items()}, rounds, backend, "base")
                for phase in ("forward", "both")
            }
            print(f"  {tokens:6} {name:44} both × {found['both'][name]['ratio']} of the base's", flush=True)
            yield {
                "preset": name,
                "tokens": tokens,
                "block_size": size,
                "density": round(density, 5),
                "base_density": round(base.layout(tokens, True).density, 5),
                **{phase: {"preset": found[phase][name], "base": found[phase]["base"]} for phase in found},
            }


def section_hilbert(options: argparse.Namespace, backend: str) -> Iterator[dict[str, Any]]:
    """Orders of processing, and orders of tokens; see `variants_orders`."""

    def turns(contestants: dict[str, Callable[[], Any]], against: str) -> dict[str, dict[str, float]]:
        return take_turns(contestants, options.rounds or 9, backend, against)

    return variants_orders.measure(min(8192, max(options.tokens)), turns, HEADS, DIM, DTYPE, options.device)


# -- command -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = results.parser(__doc__, "variants.json", SECTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32_768], metavar="N", help="lengths")
    parser.add_argument("--device", choices=tuple(OPTIMISED), default="cpu", help="where tensors lie")
    parser.add_argument("--rounds", type=int, metavar="N", help="None: 5 to 15, by length")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="training steps of each variant")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child[0], int(options.child[1]), options.child[2], options.device)
        return
    if not options.page:
        torch.manual_seed(0)
        backend = optimised(options.device)
        settings = {"density": DENSITY, "block_size": BLOCK, "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16"}
        for name in options.only:
            print(f"{name}:", flush=True)
            records = globals()[f"section_{name}"](options, backend)
            results.keep(options.out, name, records, variants_report.page, settings=settings)
    results.save(options.out, results.load(options.out), variants_report.page)
    print(f"wrote {options.out} and {options.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
