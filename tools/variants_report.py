"""The page of tables that shows what `bench_variants.py` measured."""

from __future__ import annotations

from typing import Any

import results
from results import shown, shown_ratio, table

_INTRODUCTION = """\
# Variants, measured

Made by `python tools/bench_variants.py`; the raw figures, quartiles included, are in `variants.json`. Everything that
is compared takes turns in one process, and ratios are medians of the ratios within a round (least to most, where they
were recorded). Each variant ran on the backend that is named, through its public module, or the run would have failed.
“Both” is forward and backward. Load is the machine's load average when a section began.
"""


def page(found: dict[str, Any]) -> str:
    """The page of tables of the sections that were measured."""
    lines = [_INTRODUCTION]
    for name, write in (
        ("variants", _variants),
        ("training", _training),
        ("equal", _equal),
        ("hilbert", _hilbert),
    ):
        if name in found:
            section = found[name]
            lines += [*write(section, results.described(section["machine"]) + ".", found), ""]
    if not found:
        lines.append("Not yet measured.")
    return "\n".join(lines).rstrip() + "\n"


def _ratio(found: dict[str, Any], digits: int = 2) -> str:
    """The ratio, with its range in files that have one."""
    return shown_ratio([found["ratio"], *found.get("ratio_range", [found["ratio"]] * 2)], digits)


def _settings(section: dict[str, Any]) -> str:
    s = section["settings"]
    return (
        f"Causal, {s['heads']} heads of {s['head_dim']}, {s['dtype']}, blocks of {s['block_size']}, density "
        f"{s['density']} asked for where one can be."
    )


def _variants(section: dict[str, Any], where: str, found: dict[str, Any]) -> list[str]:
    memory = {(r["variant"], r["tokens"]): r for r in found.get("memory", {}).get("records", [])}
    header = [
        "variant", "density asked", "met", "forward, ms", "× base", "both, ms", "× base",
        "peak forward, MiB", "peak both, MiB", "backend",
    ]  # fmt: skip
    lines = ["## Every variant", "", where, "", _settings(section)]
    lines += [
        "Peak memory is what a call needs above its inputs, its caches warm, in a process of its own. The multihead",
        "module includes its projections. The dilated variant is exact LongNet with the branches of the paper, whose",
        "density is its own and counts pairs, those that two branches share twice. Distributed ran at world size 1.",
        "Dense is torch's own attention.",
    ]
    for tokens in dict.fromkeys(record["tokens"] for record in section["records"]):
        rows = []
        for r in section["records"]:
            if r["tokens"] != tokens:
                continue
            peak = memory.get((r["variant"], tokens), {})
            rows.append(
                [
                    r["variant"],
                    "–" if r["asked"] is None else r["asked"],
                    f"{r['met']:.4f}",
                    *(x for p in ("forward", "both") for x in (shown(r[p]["ms"]), _ratio(r[p]))),
                    shown(peak.get("forward_mib")),
                    shown(peak.get("both_mib")),
                    r["backend"],
                ]
            )
        lines += ["", f"### {tokens:,} tokens", "", *table(header, rows)]
    return lines


def _training(section: dict[str, Any], where: str, found: dict[str, Any]) -> list[str]:
    del found
    records = section["records"]
    first = records[0]
    header = ["variant", "density met", "loss before", f"after {first['steps']} steps", "ms a step", "backend"]
    rows = [
        [r["variant"], f"{r['met']:.4f}", r["losses"][0], r["losses"][-1], shown(r["step_ms"]), r["backend"]]
        for r in records
    ]
    what = (
        "Embeddings, one attention and an output layer fit one sequence of "
        f"{first['tokens']:,} tokens, the target being the token four places back, under bf16 autocast with AdamW. "
        "It shows that every parameter gets a gradient and that the loss falls, no more."
    )
    return ["## Training steps", "", where, "", what, "", *table(header, rows)]


def _equal(section: dict[str, Any], where: str, found: dict[str, Any]) -> list[str]:
    del found
    header = ["preset", "tokens", "block", "density", "base's", "forward, ms", "× base", "both, ms", "× base"]
    rows = [
        [
            r["preset"],
            f"{r['tokens']:,}",
            r["block_size"],
            f"{r['density']:.4f}",
            f"{r['base_density']:.4f}",
            *(x for p in ("forward", "both") for x in (shown(r[p]["preset"]["ms"]), _ratio(r[p]["preset"]))),
        ]
        for r in section["records"]
    ]
    what = (
        "Levels decide a preset's density unless one is asked for; the base is asked for the same one. A ratio above 1 "
        "is a loss."
    )
    return ["## Levels beside the base at equal density", "", where, "", what, "", *table(header, rows)]


def _hilbert(section: dict[str, Any], where: str, found: dict[str, Any]) -> list[str]:
    del found
    records = section["records"]
    tiles, tokens = ([r for r in records if key in r] for key in ("pattern", "grid"))
    orders = list(tiles[0]["misses"])
    header = ["pattern", "figure", *orders]
    rows = []
    for r in tiles:
        rows.append([r["pattern"], "misses", *(f"{r['misses'][o]:,}" for o in orders)])
        for p in ("forward", "both"):
            rows.append(["", f"{p}, × row", *(_ratio(r[p][o], 3) for o in orders)])
    lines = ["## Hilbert order", "", where, "", "### Of tiles, on a line of tokens", ""]
    lines += [
        f"{tiles[0]['tokens']:,} tokens, density 0.1, not causal: the same blocks in another order. Misses are loads "
        f"of key blocks that an LRU cache of {tiles[0]['cache_blocks']} does not hold. A ratio above 1 is a loss.",
        "",
        *table(header, rows),
        "",
        "### Of tokens, on a grid",
        "",
    ]
    orders = list(tokens[0]["blocks"])
    rows = []
    for r in tokens:
        name = f"{' × '.join(map(str, r['grid']))}, radius {r['radius']}"
        rows.append([name, "active blocks", *(f"{r['blocks'][o]:,}" for o in orders)])
        rows.append(["", "density", *(f"{r['density'][o]:.4f}" for o in orders)])
        rows.append(["", "misses", *(f"{r['misses'][o]:,}" for o in orders)])
        for p in ("forward", "both"):
            rows.append(["", f"{p}, ms", *(shown(r[p][o]["ms"]) for o in orders)])
            rows.append(["", f"{p}, × row", *(_ratio(r[p][o], 3) for o in orders)])
    what = (
        "Tokens of an image or a video, stored in row-major order or along a curve; every token attends to the blocks "
        "of all tokens within the radius along each axis. Here the order decides how many blocks there are."
    )
    return [*lines, what, "", *table(["grid", "figure", *orders], rows)]
