"""The page of tables and the plots that show what `bench_cpu.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results
from results import shown, shown_ratio, table

_INTRODUCTION = """\
# Kernels on a CPU, measured

Made by `python tools/bench_cpu.py`; the raw figures are in `cpu.json`. Dense is `scaled_dot_product_attention` on
head-major contiguous tensors; everything compared takes turns in one process. η = density × t_dense / t_sparse: 1 means
that every skipped block is time saved. Times are medians over rounds; η is the median over rounds
(least to most), each round against its own dense run. “Both” is forward and backward. Load is the machine's load
average when a section began.

Results of tens of megabytes take the memory of earlier results (at most 1 GiB), and ask for large pages. Fresh memory
would cost as much as the attention itself at low density, above all on a virtual machine that hands free pages back to
its host meanwhile. Timed by hand with four seconds between calls (float32, D = 128, 8,192 tokens, 5 %, blocks of 128),
nine forward and backward passes took 200 to 286 ms with fresh memory, 126 to 152 ms with that of earlier results.
"""


def page(found: dict[str, Any]) -> str:
    """The page of tables."""
    lines = [_INTRODUCTION]
    for name, write in (
        ("speed", _speed_table),
        ("length", _length_table),
        ("engines", _engines_table),
        ("masks", _masks_table),
        ("small", _small_table),
        ("plan", _plan_table),
        ("memory", _memory_table),
    ):
        section = found.get(name)
        if section:
            lines += [*write(section["records"], results.described(section["machine"]) + "."), ""]
    return "\n".join(lines).rstrip() + "\n"


def _speed_table(records: list[dict[str, Any]], where: str) -> list[str]:
    lines = ["## η over density", "", where, "", "![η over density](cpu_eta.svg)"]
    contestants = list(dict.fromkeys(name for record in records for name in record["eta"]))
    header = ["dtype", "D", "KV heads", "layout", "block", "density", "dense forward, ms", "dense both, ms"]
    rows = [
        [
            r["dtype"],
            r["head_dim"],
            f"{r['kv_heads']} of {r['heads']}",
            r["layout"],
            r["block"],
            r["density"],
            *(shown(r["times"][name]["ms"]) for name in ("dense forward", "dense both")),
            *(shown_ratio(r["eta"].get(name)) for name in contestants),
        ]
        for r in records
    ]
    first = records[0]
    what = f"{first['tokens']:,} tokens, {first['heads']} heads, {'causal' if first['causal'] else 'not causal'}."
    return [*lines, "", what, *_summary(records), "", *table(header + [f"η {name}" for name in contestants], rows)]


def _summary(records: list[dict[str, Any]]) -> list[str]:
    """η of the native backend over density, in a few rows; nothing where it was not measured."""
    first = records[0]
    same = ("layout", "block", "kv_heads")
    chosen = [r for r in records if all(r[x] == first[x] for x in same) and "native both" in r["eta"]]
    if not chosen:
        return []
    cells = {(r["dtype"], r["head_dim"], r["density"]): r["eta"] for r in chosen}
    densities = sorted({density for _, _, density in cells})
    rows = []
    for dtype, dim in dict.fromkeys(key[:2] for key in cells):
        found = [cells.get((dtype, dim, density)) for density in densities]
        both = [f"{eta['native forward'][0]:.2f} / {eta['native both'][0]:.2f}" if eta else "" for eta in found]
        rows.append([f"{dtype}, D = {dim}", *both])
    about = f"In short, `native`, forward / both, over density ({first['layout']} layouts, blocks of {first['block']}):"
    return ["", about, "", *table(["", *map(str, densities)], rows), "", "All of it:"]


def _length_table(records: list[dict[str, Any]], where: str) -> list[str]:
    lines = ["## Time and η over length", "", where, "", "![time over length](cpu_length.svg)", ""]
    lines += [
        "Random layouts, blocks of 64, head dim 64. Where η has no range there was one round, and dense attention ran "
        "in it unwarmed: a round of 65,536 tokens takes minutes.",
        "",
    ]
    kinds = list(dict.fromkeys(record["layout"] for record in records))
    for kind in kinds:
        chosen = [record for record in records if record["layout"] == kind]
        contestants = list(chosen[0]["times"])
        rows = [
            [
                r["dtype"],
                r["tokens"],
                r["density"],
                *(shown(r["times"][name]["ms"]) for name in contestants),
                *(shown_ratio(eta) for eta in r["eta"].values()),
            ]
            for r in chosen
        ]
        header = [*(f"{name}, ms" for name in contestants), *(f"η {name}" for name in chosen[0]["eta"])]
        title = f"### {kind.replace('16', '16 blocks')}" if "row" in kind else f"### Density {kind}"
        lines += [title, "", *table(["dtype", "tokens", "density", *header], rows), ""]
    return lines[:-1]


def _engines_table(records: list[dict[str, Any]], where: str) -> list[str]:
    lines = ["## Instruction sets of the native core", "", where, ""]
    lines += [
        "Each in a process of its own. For `avx2` and `portable` torch, oneDNN and MKL were told to use no newer "
        "instructions either (MKL takes such a limit as a hint), so that dense attention is that of such a machine.",
        "",
    ]
    rows = [
        [
            r["isa"],
            r["dtype"],
            r["head_dim"],
            r["density"],
            *(shown(r["times"][x]["ms"]) for x in ("dense forward", "dense both", "native forward", "native both")),
            *(shown_ratio(r["eta"][name]) for name in ("native forward", "native both")),
        ]
        for r in records
    ]
    header = ["engine", "dtype", "D", "density", "dense forward, ms", "dense both, ms"]
    header += ["native forward, ms", "native both, ms", "η forward", "η both"]
    if records:
        lines += [f"{records[0]['tokens']} tokens, {records[0]['heads']} heads, random, blocks of 64, causal.", ""]
    return lines + table(header, rows)


def _masks_table(records: list[dict[str, Any]], where: str) -> list[str]:
    rows = [
        [r["dtype"], r["backend"], r["mask"], shown_ratio(r.get("cost_range", [r["cost_per_block"]] * 3))]
        for r in records
    ]
    header = ["dtype", "backend", "mask", "cost per active block, relative"]
    return ["## Masks inside blocks, forward and backward", "", where, "", *table(header, rows)]


def _small_table(records: list[dict[str, Any]], where: str) -> list[str]:
    names = list(records[0]["times"])
    rows = [[r["tokens"], r["heads"], *(round(r["times"][name]["best"] * 1e3) for name in names)] for r in records]
    header = ["tokens", "heads", *(f"{name}, µs" for name in names)]
    note = "“Bare” is the backend alone; forward minus bare is what the call costs above the arithmetic. Best of 200."
    return ["## Tiny inputs", "", where, "", note, "", *table(header, rows)]


def _plan_table(records: list[dict[str, Any]], where: str) -> list[str]:
    rows = []
    for r in records:
        sizes = [shown(r["tokens"]), r["heads"], shown(r["blocks"])]
        rows.append(sizes + [shown(r["times"][name]["ms"]) for name in ("build", "look up")])
    return ["## Plans", "", where, "", *table(["tokens", "heads", "blocks", "build, ms", "look up, ms"], rows)]


def _memory_table(records: list[dict[str, Any]], where: str) -> list[str]:
    names = list(dict.fromkeys(r["name"] for r in records))
    sizes = list(dict.fromkeys((r["tokens"], r["heads"]) for r in records))
    found = {(r["tokens"], r["heads"], r["name"]): r for r in records}

    def cell(size: tuple[int, int], name: str, what: str) -> str:
        record = found.get((*size, name))
        return "not run" if record is None else "failed" if "failed" in record else shown(record[what])

    rows = [
        [shown(size[0]), size[1], *(cell(size, name, what) for what in ("peak_mib", "seconds") for name in names)]
        for size in sizes
    ]
    note = (
        "Peak above the inputs and seconds of one forward and backward, in a process of its own; bfloat16, "
        "head dim 64, causal, 16 blocks of 64 per row. “Explicit” holds the scores, which from 32,768 tokens on take "
        "16 GiB and more, several times over: it was not run there. “Dense” is `scaled_dot_product_attention`, "
        "which holds none."
    )
    header = ["tokens", "heads", *(f"{name}, MiB" for name in names), *(f"{name}, s" for name in names)]
    last = [r for r in records if r["tokens"] == sizes[-1][0] and "failed" not in r]
    in_all = ", ".join(f"{r['name']} {r['total_mib']:,} MiB" for r in last)
    whole = f"At the longest, the whole process with inputs and torch itself: {in_all}."
    return ["## Memory over length", "", where, "", note, "", *table(header, rows), "", whole]


def plots(found: dict[str, Any], folder: Path) -> None:
    """η over density and time over length, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bs-kernels"
    if "speed" in found:
        records = [r for r in found["speed"]["records"] if r["kv_heads"] == r["heads"]]
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for axis, phase in zip(axes, ("forward", "both"), strict=True):
            series: dict[str, list[tuple[float, float]]] = {}
            for r in records:
                for name, eta in r["eta"].items():
                    if name.endswith(phase) and r["layout"] == "random" and r["block"] == 64:
                        key = f"{name.split()[0]} {r['dtype']} D={r['head_dim']}"
                        series.setdefault(key, []).append((r["density"], eta[0]))
            for key, points in series.items():
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=key)
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(xscale="log", xlabel="density", title="forward" if phase == "forward" else "forward and backward")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("η = density × t_dense / t_sparse")
        axes[1].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / "cpu_eta.svg", metadata={"Date": None})
    if "length" in found:
        figure, axis = plt.subplots(figsize=(6, 4))
        series = {}
        for r in (r for r in found["length"]["records"] if r.get("layout") == "16 per row"):
            for name, times in r["times"].items():
                if name.endswith("both"):
                    series.setdefault(f"{name.split()[0]} {r['dtype']}", []).append((r["tokens"], times["ms"]))
        for key, points in series.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=key)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward and backward")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / "cpu_length.svg", metadata={"Date": None})
