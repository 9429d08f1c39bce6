"""How good is the byte model of `bsattn train` under each attention, over density? One command, JSON and a page.

    python tools/bench_quality.py                # all of it; stop it and run it again: finished runs are kept
    python tools/bench_quality.py --seeds 3      # one seed more
    python tools/bench_quality.py --page         # the page and the plot from what the JSON holds

One model learns with dense attention, first on short and then on long sequences of the running Python's standard
library, by the trainer of `bsattn train`. From its weights every contestant takes the same number of steps on the same
batches with its own attention, and is scored on held-out files. Nothing depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
import torch

from bs_modules.lm.build import build_model
from bs_modules.lm.compare import train_once
from bs_modules.lm.data import Corpus, load_corpus
from bs_modules.lm.errors import InputError
from bs_modules.lm.run import Run
from bs_modules.lm.settings import Settings

FIXED = ("local_window", "dilated_sparse", "global_local")
KINDS = (*FIXED, "hierarchical", "adaptive", "adaptive_distilled", "adaptive_window")
STARTS = ("start", "extended")
_BACKEND = "native"


class Lines:
    """A line now and then: what the trainer asks of a progress bar."""

    def step(self, step: int, steps: int, bits_per_byte: float, tokens_per_second: float) -> None:
        """After every step."""
        if step % max(steps // 4, 1) == 0:
            print(f"    step {step} of {steps}: {bits_per_byte:.3f}", flush=True)


def settings_of(kind: str, density: float, seed: int, args: argparse.Namespace) -> Settings:
    """The run of one contestant, of the model that learns on short sequences (`"start"`), or of what that becomes on
    long ones with dense attention (`"extended"`)."""
    values: dict[str, Any] = {"seed": seed, "device": "cpu", "dtype": args.dtype, "threads": args.threads}
    # At density 1 a window is dense attention, by the same kernel as all the others.
    dense = {"pattern": "local_window", "density": 1.0}
    if kind == "start":
        sizes = {"context": args.short, "batch": args.context * args.batch // args.short, "steps": args.start_steps}
        return Settings(**values, **sizes, **dense, cooldown=0.0)
    values |= {"context": args.context, "batch": args.batch}
    if kind == "extended":
        start = str(args.work / "start")
        return Settings(**values, **dense, steps=args.extend_steps, cooldown=0.0, start_from=start)
    values |= {"steps": args.steps, "cooldown": 1.0, "start_from": str(args.work / "extended")}
    values["validation_bytes"] = args.validation_bytes
    if kind == "dense":
        return Settings(**values, **dense)
    values |= {"density": density, "block_size": args.block}
    if kind in FIXED:
        return Settings(**values, pattern=kind)
    if kind == "hierarchical":
        return Settings(**values, attention="hierarchical")
    values |= {"query_block_size": args.query_block, "temperatures": args.temperatures, "gate_lr": args.gate_rate}
    if kind != "adaptive":
        values |= {"distill_rows": args.distill_rows, "distillation_weight": args.distillation_weight}
    if kind == "adaptive_window":  # half of what a row keeps on average, as the hierarchy's near level
        values["window_size"] = max(round(density * args.context / 4), 1)
    return Settings(**values, attention="adaptive")


def check_backend(settings: Settings) -> None:
    """Raises unless every layer computes a training step of this run on the native backend."""
    model = build_model(settings)
    shape = (settings.batch, settings.context, model.config.heads, model.config.head_dim)
    q, k, v = (torch.randn(shape, dtype=model.compute_dtype, requires_grad=True) for _ in range(3))
    for block in model.blocks:
        attention: Any = block.attention
        ran = attention.explain(q, k, v, is_causal=True).backend
        if ran != _BACKEND:
            raise RuntimeError(f"expected the {_BACKEND} backend, {ran} would run: {settings}")


def trained(name: str, settings: Settings, corpus: Corpus, work: Path) -> dict[str, Any]:
    """The results of a run, from its folder as far as it got there."""
    folder = work / name
    if (folder / "config.toml").exists():
        run = Run.open(folder)
        if run.settings != settings or run.facts.get("text") != corpus.digest:
            raise InputError(f"work: {folder} holds a run of other settings or on another text; remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        run = Run.create(folder, settings, {"text": corpus.digest, "source": corpus.description})
    check_backend(settings)
    return train_once(run, corpus, Lines(), lambda: False)


def contests(args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """(kind, density, seed) of all runs, all seeds of a density before the next."""
    yield "start", 1.0, 0
    yield "extended", 1.0, 0
    yield from (("dense", 1.0, seed) for seed in range(args.seeds))
    for density in args.densities:
        yield from ((kind, density, seed) for seed in range(args.seeds) for kind in args.kinds)


def key(row: dict[str, Any]) -> tuple[str, float, int]:
    """What names a row."""
    return row["kind"], row["asked"], row["seed"]


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Takes the runs that the JSON lacks, and writes it after each."""
    corpus = load_corpus((), args.context)
    facts = {"text": corpus.digest, "source": corpus.description, "validated": len(corpus.validation)}
    names = ("context", "batch", "steps", "short", "start_steps", "extend_steps", "block", "query_block")
    names += (
        "temperatures",
        "gate_rate",
        "validation_bytes",
        "distill_rows",
        "distillation_weight",
        "dtype",
        "threads",
    )
    settings = {name: getattr(args, name) for name in names}
    machine = results.machine() | {"backend": _BACKEND}
    if found and (found["settings"] != settings or found["text"] != facts):
        raise SystemExit(f"{args.out} holds runs of other settings or on another text; give another --out")
    found.update({"machine": machine, "text": facts, "settings": settings, "rows": found.get("rows", [])})
    found["plan"] = {"seeds": args.seeds, "densities": args.densities, "kinds": args.kinds}
    done = {key(row) for row in found["rows"]}
    for kind, density, seed in contests(args):
        name = kind if kind in STARTS else f"{kind}-{density:g}-seed-{seed}"
        if (kind, density, seed) in done and (kind not in STARTS or (args.work / name / "results.json").exists()):
            continue
        if args.collect and not (args.work / name / "results.json").exists():
            continue
        print(name, flush=True)
        result = trained(name, settings_of(kind, density, seed, args), corpus, args.work)
        validation = result["validation"]
        row = {"kind": kind, "asked": density, "met": result["density_met"], "seed": seed}
        row |= {"bits_per_byte": validation["bits_per_byte"], "by_position": validation["by_position"]}
        row |= {name: result[name] for name in ("steps", "tokens", "parameters")} | {"scored": validation["scored"]}
        print(f"  {density:g}, met {row['met']:.4f}: {row['bits_per_byte']:.4f} bits per byte", flush=True)
        found["rows"] = [other for other in found["rows"] if key(other) != key(row)] + [row]
        results.save(args.out, found)
        if kind not in STARTS:
            report(found, args.out)


# -- the page ---------------------------------------------------------------------------------------------


def report(found: dict[str, Any], out: Path) -> None:
    """Writes the page and the plot beside the JSON."""
    results.write(out.with_suffix(".md"), page(found))
    plot(found, out.with_suffix(".svg"))


def grouped(found: dict[str, Any]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Rows by (kind, density asked), densest first, seeds in order."""
    rows = sorted((row for row in found["rows"] if row["kind"] not in STARTS), key=lambda row: row["seed"])
    order = ["dense", *KINDS]
    cases = sorted({(row["kind"], row["asked"]) for row in rows}, key=lambda c: (-c[1], order.index(c[0])))
    return {case: [row for row in rows if (row["kind"], row["asked"]) == case] for case in cases}


def page(found: dict[str, Any]) -> str:
    """Settings, plot, table and what follows from it."""
    s, text, machine = found["settings"], found["text"], found["machine"]
    extended = [row for row in found["rows"] if row["kind"] == "extended"]
    start_tokens = (s["start_steps"] + s["extend_steps"]) * s["context"] * s["batch"]
    scored = max(row["scored"] for row in found["rows"] if row["kind"] not in STARTS)
    block, context = s["block"], f"{s['context']:,}"
    text = f"""# Quality of the byte language model

Made by `python tools/bench_quality.py`; the raw figures are in `quality.json`. Its companion on associative recall,
where the answer lies outside every window, is [A learned gate](adaptive.md).

Model, optimizer and batches are those of [`bsattn train`](../guide/train.md) (width 128, 4 layers, 2 heads of 64); the
text is {text["source"].split(";")[0]}, of which {text["validated"]:,} bytes are held out, by file.
One model learns with dense attention: {s["start_steps"]:,} steps at {s["short"]:,} tokens, then {s["extend_steps"]} at
{context} tokens, {start_tokens:,} tokens in all, at the full learning rate. From its weights every contestant takes
{s["steps"]:,} steps of {s["batch"]} × {context} tokens with its own attention, the learning rate falling to zero, and
is scored on {scored:,} held-out bytes at {context} tokens. A seed stands for the batches, the same for all contestants,
and for the noise and the first weights of the gate. Steps are equal, not seconds. A start that attended densely favours
what is nearest to dense.

Fixed and hierarchical patterns have blocks of {block} by {block}. The hierarchy has two levels that share the density:
near by, and all before in wide strides. The gate picks key blocks of {block} for query blocks of {s["query_block"]}, at
temperatures from {s["temperatures"][0]:g} to {s["temperatures"][1]:g}, its scorer learning at {s["gate_rate"]:g};
`adaptive_distilled` adds distillation ({s["distill_rows"]} query blocks a step, weight {s["distillation_weight"]:g});
`adaptive_window` is that with half of the blocks in a window that is always kept. All rows keep the same number of
blocks (`row_budget="even"`).
The defaults of the gate are the best of a few shorter trials, scored on an eighth of the same held-out text; no setting
of the others was tuned.
All in {s["dtype"]} on the `{machine["backend"]}` backend (the tool fails if another would run; dense attention is the
same kernel at density 1), torch {machine["torch"]}, Python {machine["python"]}.

![bits per byte over density](quality.svg)
"""
    cases = grouped(found)
    places = list(dict.fromkeys(place for rows in cases.values() for row in rows for place in row["by_position"]))
    columns = ["attention", "density asked", "met", "bits per byte", "worse than dense", *places, "seeds"]
    lines = [
        f"| {' | '.join(columns)} |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(places)}---:|",
    ]
    for (kind, asked), rows in cases.items():
        met = statistics.mean(row["met"] for row in rows)
        gaps = gap(rows, cases.get(("dense", 1.0), []))
        at = " | ".join(f"{statistics.mean(row['by_position'][place] for row in rows):.4f}" for place in places)
        lines.append(f"| {kind} | {asked:g} | {met:.4f} | {spread(rows)} | {gaps} | {at} | {len(rows)} |")
    before = f"The model that all start from: {extended[0]['bits_per_byte']:.4f} bits per byte."
    asked = "Means over seeds (least to most); *worse than dense* compares runs of the same seed."
    end = [*verdicts(cases), "", *missing(found)]
    return "\n".join([text, f"{before} {asked}", "", *lines, "", *end]).rstrip() + "\n"


def missing(found: dict[str, Any]) -> list[str]:
    """What the plan holds and no one has measured yet."""
    done, lines = {key(row) for row in found["rows"]}, []
    for density in found["plan"]["densities"]:
        seeds_of: dict[str, list[str]] = {}
        for kind in found["plan"]["kinds"]:
            left = [str(seed) for seed in range(found["plan"]["seeds"]) if (kind, density, seed) not in done]
            if left:
                seeds_of[kind] = left
        if seeds_of:
            told = ", ".join(f"{kind} (seed {' and '.join(left)})" for kind, left in seeds_of.items())
            lines.append(f"- density {density:g}: {told}.")
    return ["Not yet measured; the same command goes on with these:", "", *lines] if lines else []


def spread(rows: list[dict[str, Any]]) -> str:
    """Mean, least and most of the bits per byte."""
    values = [row["bits_per_byte"] for row in rows]
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def differences(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """How much worse the first is than the second, seed by seed, in bits per byte."""
    of_seed = {row["seed"]: row["bits_per_byte"] for row in others}
    return [row["bits_per_byte"] - of_seed[row["seed"]] for row in rows if row["seed"] in of_seed]


def gap(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The differences as text."""
    found = differences(rows, others)
    return f"{statistics.mean(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})" if found else "–"


def verdicts(cases: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """Per density, hierarchical and gates against the fixed pattern that does best there: gains and losses."""
    lines = ["Against the best fixed pattern of the same density, by mean (negative is better), seed by seed:", ""]
    for density in sorted({asked for _, asked in cases if asked < 1}):
        fixed = {kind: cases[kind, density] for kind in FIXED if (kind, density) in cases}
        if not fixed:
            continue
        best = min(fixed, key=lambda kind: statistics.mean(row["bits_per_byte"] for row in fixed[kind]))
        told = [
            f"{kind} {gap(cases[kind, density], fixed[best])}"
            for kind in KINDS
            if kind not in FIXED and (kind, density) in cases
        ]
        lines.append(f"- density {density:g}, best fixed is {best}: {'; '.join(told)}.")
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Bits per byte over density, a line per attention, bars from the least to the most over seeds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bs-modules"
    cases = grouped(found)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for kind in KINDS:
        points = []
        for (name, _), rows in cases.items():
            if name == kind:
                values = [row["bits_per_byte"] for row in rows]
                mean = statistics.mean(values)
                met = statistics.mean(row["met"] for row in rows)
                points.append((met, mean, mean - min(values), max(values) - mean))
        if points:
            x, y, below, above = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=(below, above), marker="o", markersize=4, capsize=3, label=kind)
    dense = [row["bits_per_byte"] for row in cases.get(("dense", 1.0), [])]
    if dense:
        axis.axhspan(min(dense), max(dense), color="0.85")
        axis.axhline(statistics.mean(dense), color="0.3", linestyle="--", label="dense")
    axis.set(xscale="log", xlabel="density met", ylabel="bits per byte, held out")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = results.parser(__doc__, "quality.json")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_quality"), metavar="FOLDER", help="of the runs")
    parser.add_argument("--collect", action="store_true", help="take the runs that are finished, train nothing")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="how many")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.25], metavar="X", help="asked for")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="contestants")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of a long sequence")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="long sequences per step")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of every contestant")
    parser.add_argument("--short", type=int, default=1024, metavar="N", help="context of the model all start from")
    parser.add_argument("--start-steps", type=int, default=800, metavar="N", help="dense, over short sequences")
    parser.add_argument("--extend-steps", type=int, default=100, metavar="N", help="dense, over long sequences, before")
    parser.add_argument("--validation-bytes", type=int, default=2**19, metavar="N", help="to score on, held out")
    parser.add_argument("--block", type=int, default=16, metavar="N", help="tokens per block")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    gate = parser.add_argument_group("the gate")
    gate.add_argument("--gate-rate", type=float, default=1e-2, metavar="X", help="of learning, of the scorer")
    gate.add_argument("--query-block", type=int, default=4, metavar="N", help="queries that share their picks")
    gate.add_argument("--temperatures", type=float, nargs=2, default=[0.1, 0.02], metavar="X", help="from, to")
    gate.add_argument("--distill-rows", type=int, default=64, metavar="N", help="query blocks that teach, per step")
    gate.add_argument("--distillation-weight", type=float, default=1.0, metavar="X", help="in the loss")
    return parser.parse_args()


def main() -> None:
    """Measures what is missing and writes the page."""
    args = parse()
    torch.set_num_threads(args.threads)
    found = results.load(args.out)
    if not args.page:
        measure(args, found)
    report(found, args.out)


if __name__ == "__main__":
    main()
