"""Does a learned gate find what fixed patterns miss, and what does it cost? One command, JSON and a page.

    python tools/bench_adaptive.py            # all of it: quality (about 25 minutes on one free core), then overhead
    python tools/bench_adaptive.py --only overhead
    python tools/bench_adaptive.py --densities 0.1 --seeds 3 --out other.json

Quality: multi-query associative recall. A sequence of random tokens holds key-value pairs in its first part and asks
for them in its last, far beyond any local window. Per seed, one two-layer model learns the task with dense attention
over short sequences; every contestant starts from it and trains with its own attention over long ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import results
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bs_modules import (
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
    BlockSparseHierarchical,
    BlockSparseRingDilatedAttention,
    ProgressiveSparsityScheduler,
)

KEYS, VALUES, NOISE = 128, 64, 64
WIDTH, HEADS, LAYERS = 64, 2, 2
Batches = list[tuple[Tensor, Tensor]]
FIXED = ("local_window", "dilated_sparse", "global_local")
LEARNED = ("hierarchical", "adaptive", "adaptive_undistilled", "adaptive_warmed")


def recall_batch(generator: torch.Generator, batch: int, length: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets `[batch, length]`; −100 where nothing is asked.

    Pairs lie in the first 7/16 of the sequence, questions in the last 7/16, so that at least 1/8 of it lies between.
    """
    part, gap = length * 7 // 16, length - length * 7 // 16
    ids = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (batch, length), generator=generator)
    targets = torch.full((batch, length), -100)
    asked = min(6 * pairs, part // 2)
    for b in range(batch):
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = torch.randint(VALUES, (pairs,), generator=generator)
        where = 2 * torch.randperm(part // 2, generator=generator)[:pairs]
        ids[b, where], ids[b, where + 1] = keys, values + KEYS
        which = torch.randint(pairs, (asked,), generator=generator)
        where = gap + 2 * torch.randperm(part // 2, generator=generator)[:asked]
        ids[b, where], targets[b, where] = keys[which], values[which]
    return ids, targets


class Layer(nn.Module):
    """Pre-norm attention and MLP. A key is made of the token before its own, so that a value is found by its key."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        k = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0))
        x = x + self.out(self.attention(q, k, v, True).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Recall(nn.Module):
    """Tokens to logits over values."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES + NOISE, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.Sequential(*(Layer(attention()) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VALUES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(ids))))


def attention_of(kind: str, density: float, args: argparse.Namespace) -> nn.Module:
    """The attention of one contestant; queries of a block of their own wherever blocks are picked by the gate."""
    if kind.startswith("adaptive"):
        config = {
            "base_sparsity": 1 - density,
            "row_budget": args.row_budget,
            "block_size": args.block,
            "query_block_size": args.query_block,
            "hidden_dim": 32,
            "learnable_temperature": False,
            "min_temperature": 0.01,
            "gate": args.gate,
            "distill_rows": args.distill_rows if kind == "adaptive" else 0,
        }
        return BlockSparseAdaptive(sparse_config=config, num_heads=HEADS, head_dim=WIDTH // HEADS)
    if kind == "hierarchical":
        # Half of the blocks near by, half spread over everything, so that levels of this density have a chance.
        size, stride = args.block, max(2, round(1.6 / density))
        levels = [(1, 2 * size, size), (stride, -1, size)]
        names = ("stride", "window_size", "block_size")
        config = {
            "level_configs": [dict(zip(names, level, strict=True)) for level in levels],
            "sparsity_ratio": density,
        }
        return BlockSparseHierarchical(sparse_config=config)
    if kind == "dense":
        config = {"pattern_type": "local_window", "sparsity_ratio": 1.0, "block_size": 64}
    else:
        config = {"pattern_type": kind, "sparsity_ratio": density, "block_size": args.block}
    return BlockSparseRingDilatedAttention(sparse_config=config)


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of questions answered right."""
    model.eval()
    right = asked = 0
    with torch.no_grad():
        for ids, targets in batches:
            where = targets >= 0
            right += int((model(ids)[where].argmax(-1) == targets[where]).sum())
            asked += int(where.sum())
    model.train()
    return right / asked


def train(
    model: nn.Module,
    steps: int,
    shape: tuple[int, int, int],
    rate: float,
    seed: int,
    gate: argparse.Namespace | None = None,
    warm_to: float | None = None,
) -> float:
    """Trains on batches of one shape, gates annealed and distilled as `gate` says; returns process seconds.

    With `warm_to` the gates start nearly dense and fall to this density, colder and with a smaller rate.
    """
    generator = torch.Generator().manual_seed(seed)
    scorers = [p for name, p in model.named_parameters() if "scorer" in name]
    others = [p for name, p in model.named_parameters() if "scorer" not in name]
    groups, rates = [{"params": others}], [rate]
    trainer = None
    if scorers and gate is not None:
        groups.append({"params": scorers})
        rates.append(gate.gate_rate if warm_to is None else gate.warm_rate)
        gates = [module for module in model.modules() if isinstance(module, BlockSparseAdaptive)]
        weight = gate.distillation_weight if gates[0].sparse_config.distill_rows else 0.0
        temperatures = gate.temperatures if warm_to is None else gate.warm_temperatures
        trainer = AdaptiveSparsityTrainer(model, *temperatures, annealing_steps=steps, distillation_weight=weight)
    scheduler = None
    if gate is not None and warm_to is not None:
        falling = int(gate.warm_share * steps)
        scheduler = ProgressiveSparsityScheduler(model, 1 - gate.warm_from, 1 - warm_to, falling, schedule="cosine")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    start = time.process_time()
    for _ in range(steps):
        ids, targets = recall_batch(generator, *shape)
        where = targets >= 0
        loss = F.cross_entropy(model(ids)[where], targets[where])
        if trainer is not None:
            loss = loss + trainer.loss()
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        if trainer is not None:
            trainer.step()
        if scheduler is not None:
            scheduler.step()
    return time.process_time() - start


def base_model(args: argparse.Namespace, seed: int) -> Recall:
    """The model that every contestant starts from: trained with dense attention over short sequences."""
    torch.manual_seed(seed)
    model = Recall(lambda: attention_of("dense", 1.0, args))
    shape = (8 * args.batch, args.length // 8, args.pairs // 8)
    train(model, args.short_steps, shape, 3e-3, 1000 + seed)
    return model


def contest(
    args: argparse.Namespace, base: Recall, kind: str, density: float, seed: int, test: Batches
) -> dict[str, Any]:
    """One contestant's accuracy, before and after training over long sequences."""
    torch.manual_seed(100 + seed)
    model = Recall(lambda: attention_of(kind, density, args))
    model.load_state_dict(base.state_dict(), strict=False)  # a gate has parameters that the dense model lacks
    before = accuracy(model, test)
    warm_to = density if kind == "adaptive_warmed" else None
    seconds = train(model, args.steps, (args.batch, args.length, args.pairs), args.rate, 2000 + seed, args, warm_to)
    after = accuracy(model, test)
    attentions: Any = [layer.attention for layer in model.layers]  # pyright: ignore[reportAttributeAccessIssue]
    met = statistics.mean(attention.get_pattern_stats()["density"] for attention in attentions)
    print(f"  {kind:15} asked {density:.3f} met {met:.4f}  {before:.3f} -> {after:.3f}  {seconds:.0f} s", flush=True)
    return {"kind": kind, "asked": density, "met": met, "before": before, "accuracy": after, "process_seconds": seconds}


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of every contestant, density and seed."""
    contestants: list[tuple[str, float]] = [] if args.add else [("dense", 1.0)]
    contestants += [(kind, density) for density in args.densities for kind in args.kinds]
    held = torch.Generator().manual_seed(10**6)
    test = [recall_batch(held, 8, args.length, args.pairs) for _ in range(args.test)]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        base = base_model(args, seed)
        print(f"seed {seed}: {accuracy(base, test):.3f} after dense training over short sequences", flush=True)
        for kind, density in contestants:
            yield {**contest(args, base, kind, density, seed, test), "seed": seed}


def overhead(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time of a forward over that of the same density with a fixed pattern, interleaved in one process."""
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(1, 8192, 8, 64, generator=generator) for _ in range(3)]
    dtypes, poolings = (torch.float32, torch.bfloat16), ("mean_max", "mean")
    cases: list[tuple[Any, ...]] = [
        *itertools.product(args.overhead_threads, dtypes, args.overhead_densities, poolings)
    ]
    for threads, dtype, density, pooling in cases:
        torch.set_num_threads(threads)
        q, k, v = (x.to(dtype) for x in full)
        config = {"base_sparsity": 1 - density, "pooling": pooling}
        fixed = BlockSparseRingDilatedAttention(sparse_config={"sparsity_ratio": density}, backend="native")
        gated = BlockSparseAdaptive(sparse_config=config, num_heads=8, head_dim=64, backend="native").eval()
        cached = copy.deepcopy(gated)
        cached.cache = True
        for is_causal in (False, True):
            calls = {
                "fixed": partial(fixed.eval(), q, k, v, is_causal),
                "adaptive": partial(gated, q, k, v, is_causal),
                "cached": partial(cached, q, k, v, is_causal),
                "gate": partial(gated.select, q, k, is_causal),
            }
            with torch.no_grad():
                # Threads that wait burn processor time, so that it tells nothing of more than one.
                clock = time.process_time if threads == 1 else time.perf_counter
                times = results.take_turns(calls, args.rounds, clock=clock)
            for module in (fixed, gated):
                ran = module.explain(q, k, v, is_causal).backend
                if ran != "native":
                    raise RuntimeError(f"expected the native backend, {ran} would run")
            ratio, *ratio_range = results.ratio(times["adaptive"], times["fixed"])
            row: dict[str, Any] = {"threads": threads, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"density": density, "pooling": pooling}
            row |= {"causal": is_causal, "met": gated.get_pattern_stats()["density"]}
            row |= {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
            row |= {"ratio": ratio, "ratio_range": ratio_range}
            print({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
            yield row


def page(found: dict[str, Any]) -> str:
    """The page of tables beside the JSON."""
    parts = [
        "# A learned gate",
        "Made by `python tools/bench_adaptive.py`; the raw figures are in `adaptive.json`.",
    ]
    if "quality" in found:
        parts += quality_page(found["quality"])
    if "overhead" in found:
        parts += overhead_page(found["overhead"])
    return "\n\n".join(parts) + "\n"


def quality_page(found: dict[str, Any]) -> list[str]:
    """Accuracy over density."""
    s, rows = found["settings"], found["rows"]
    text = f"""## Associative recall

Sequences of {s["length"]:,} random tokens hold {s["pairs"]} key-value pairs in their first 7/16 and ask for them in
their last 7/16, at least {s["length"] // 8} tokens later. The model has {LAYERS} layers of width {WIDTH} with {HEADS}
heads; a key is made of the token before its own. Per seed, one model learns the task with dense attention over
{s["length"] // 8} tokens ({s["short_steps"]} steps of {8 * s["batch"]} sequences); from it every contestant trains
{s["steps"]} steps of {s["batch"]} long sequences with its own attention. The gate: `{s["gate"]}`, key blocks of
{s["block"]}, query blocks of {s["query_block"]}, temperature {s["temperatures"][0]} to {s["temperatures"][1]},
distillation from {s["distill_rows"]} queries with weight {s["distillation_weight"]}, `row_budget="{s["row_budget"]}"`,
since what is asked for late lies anywhere before. Fixed patterns have blocks of
{s["block"]} by {s["block"]}. Accuracy over {8 * s["test"]} held-out sequences, mean over seeds (least to most).
*Before* is without training over long sequences: for the gate, its ranking by pooled queries and keys alone.
`adaptive_undistilled` is the gate with the gradient of the task alone."""
    if any(row["kind"] == "adaptive_warmed" for row in rows):
        text += f"""
`adaptive_warmed` too, but it starts at a density of {s["warm_from"]}, which falls to the one asked for over
{s["warm_share"]:.0%} of the steps, with the temperature going from {s["warm_temperatures"][0]} to
{s["warm_temperatures"][1]} and a rate of {s["warm_rate"]} for the scorer."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"| attention ({seeds} seeds) | density asked | met | before | accuracy | processor s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    cases = sorted({(row["asked"], row["kind"]) for row in rows}, key=lambda case: (-case[0], case[1]))
    for asked, kind in cases:
        these = [row for row in rows if (row["asked"], row["kind"]) == (asked, kind)]
        scores = [row["accuracy"] for row in these]
        mean = {name: statistics.mean(row[name] for row in these) for name in ("met", "before", "process_seconds")}
        spread = f"{statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"
        seconds = f"{mean['process_seconds']:.0f}"
        lines.append(f"| {kind} | {asked:g} | {mean['met']:.4f} | {mean['before']:.3f} | {spread} | {seconds} |")
    return [text, "\n".join(lines)]


def overhead_page(found: dict[str, Any]) -> list[str]:
    """The price of the gate."""
    settings = found["settings"]
    text = f"""## Overhead

One forward without gradients at 8,192 tokens, 8 heads of 64, blocks of 64, `native` backend: the base module with a
fixed pattern, the gate with its own layouts, and the gate with `cache=True`, interleaved in one process; medians of
{settings["rounds"]}, of processor time on one thread, of wall time on more. *Gate* is `select` alone. The ratio is the
median of adaptive / fixed over the rounds (least to most); the goal is at most 1.25.

{results.described(found["machine"])}."""
    lines = [
        "| threads | dtype | density | | pooling | fixed ms | gate ms | adaptive ms | cached ms | adaptive / fixed |",
        "|---:|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        causal = "causal" if row["causal"] else ""
        times = " | ".join(f"{row[f'{name}_ms']:.1f}" for name in ("fixed", "gate", "adaptive", "cached"))
        ratio = results.shown_ratio([row["ratio"], *row["ratio_range"]])
        case = " | ".join([str(row["threads"]), row["dtype"], f"{row['density']:g}", causal, f"`{row['pooling']}`"])
        lines.append(f"| {case} | {times} | {ratio} |")
    return [text, "\n".join(lines)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = results.parser(__doc__, "adaptive.json", ("quality", "overhead"))
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has of a section")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch, in section quality")
    recall = parser.add_argument_group("section quality")
    recall.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.05], metavar="X", help="asked for")
    kinds = [*FIXED, *LEARNED]
    recall.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help="contestants")
    recall.add_argument("--seeds", type=int, default=2, metavar="N", help="how many")
    recall.add_argument("--first-seed", type=int, default=0, metavar="N", help="from which on")
    recall.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a long sequence")
    recall.add_argument("--pairs", type=int, default=32, metavar="N", help="keys to recall in it")
    recall.add_argument("--batch", type=int, default=2, metavar="N", help="long sequences per step")
    recall.add_argument("--short-steps", type=int, default=300, metavar="N", help="dense, over short sequences")
    recall.add_argument("--steps", type=int, default=250, metavar="N", help="of every contestant")
    recall.add_argument("--rate", type=float, default=1e-3, metavar="X", help="of learning")
    recall.add_argument("--test", type=int, default=4, metavar="N", help="held-out batches of 8 sequences")
    # What is asked for late lies anywhere before, so late queries need more blocks.
    recall.add_argument("--row-budget", choices=("even", "share"), default="share", help="of the gate's rows")
    recall.add_argument("--block", type=int, default=16, metavar="N", help="keys per block, queries too if fixed")
    gate = parser.add_argument_group("the gate of section quality")
    gate.add_argument("--query-block", type=int, default=1, metavar="N", help="queries that share their picks")
    gate.add_argument("--gate", choices=("straight_through", "soft"), default="straight_through", help="its form")
    gate.add_argument("--gate-rate", type=float, default=1e-2, metavar="X", help="of learning, of the scorer")
    gate.add_argument("--temperatures", type=float, nargs=2, default=[0.2, 0.05], metavar="X", help="from, to")
    gate.add_argument("--distill-rows", type=int, default=256, metavar="N", help="queries that teach, per step")
    gate.add_argument("--distillation-weight", type=float, default=2.0, metavar="X", help="in the loss")
    gate.add_argument("--warm-from", type=float, default=0.9, metavar="X", help="density adaptive_warmed starts from")
    gate.add_argument("--warm-share", type=float, default=0.7, metavar="X", help="of the steps, in which it falls")
    gate.add_argument("--warm-rate", type=float, default=3e-3, metavar="X", help="as --gate-rate, of adaptive_warmed")
    gate.add_argument("--warm-temperatures", type=float, nargs=2, default=[0.02, 0.01], metavar="X", help="from, to")
    price = parser.add_argument_group("section overhead")
    price.add_argument("--overhead-densities", type=float, nargs="+", default=[0.1, 0.2], metavar="X", help="asked for")
    price.add_argument("--overhead-threads", type=int, nargs="+", default=[1, 2], metavar="N", help="of torch")
    price.add_argument("--rounds", type=int, default=7, metavar="N", help="of which medians are taken")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "only", "add", "page")}
    measures: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"quality": quality, "overhead": overhead}
    for name in () if args.page else args.only:
        kept = results.load(args.out).get(name, {}).get("rows", []) if args.add else []
        rows = itertools.chain(kept, measures[name](args))
        results.keep(args.out, name, rows, page, key="rows", settings=settings)
    results.save(args.out, results.load(args.out), page)


if __name__ == "__main__":
    main()
