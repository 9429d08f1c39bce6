"""Measures bs-patterns at scale; writes docs/benchmarks/patterns.json and a page of tables beside it.

    python tools/bench_patterns.py                       # everything; some minutes
    python tools/bench_patterns.py --only layouts curve  # some of it
    python tools/bench_patterns.py --out other.json --rounds 3

Every case runs in a process of its own, so that peak memory is that of the case: the process's peak resident set minus
what it was after the imports. Times are of the first call ("cold", page faults included) and the best of the rounds, by
the clock and in processor time, which neighbours on a busy machine change less.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import results

import bs_patterns as b

TOKENS, BLOCK, DENSITY = 2**20, 64, 0.01
SEGMENTS = ([2048, 8192, 2**20], [1, 2, 8])
CURVE = [2**n for n in range(10, 25, 2)]
BLOCKS_PER_ROW = 64

#: Seconds (and MiB) that a figure should stay under at 1,048,576 tokens. Judged by processor time: all is one thread.
BUDGET = {"layouts": (1.0, 400), "LocalWindow": (0.1, 400), "operations": (0.5, None), "orders": (0.5, None)}


def patterns() -> dict[str, Any]:
    return {
        "LocalWindow": b.LocalWindow(4096),
        "DilatedSparse": b.DilatedSparse([1, 2, 4, 8]),
        "GlobalLocal": b.GlobalLocal(1024, 4096),
        "Hierarchical": b.Hierarchical(),
        "Hierarchical.auto": b.Hierarchical.auto(TOKENS, DENSITY),
        "Butterfly": b.Butterfly(),
        "BigBird": b.BigBird(num_random_blocks=64),
        "Fixed": b.Fixed(),
        "Variable": b.Variable(num_random_blocks=2),
        "BSLongformer": b.BSLongformer(),
        "LocalSlidingWindow": b.LocalSlidingWindow(attention="bidirectional"),
        "Dense": b.Dense(),
        "Union of 3": b.Union([b.LocalWindow(4096), b.DilatedSparse([4]), b.Butterfly()]),
        "Custom": b.Custom(lambda rows, cols, head: range(-82, 83)),
    }


def layout_case(name: str, causal: bool, segments: bool) -> Callable[[], Any]:
    pattern = patterns()[name]
    candidates = b.LongNetSegments(*SEGMENTS) if segments else None
    return lambda: pattern.layout(TOKENS, block_size=BLOCK, density=DENSITY, causal=causal, candidates=candidates)


def operation_case(name: str) -> Callable[[], Any]:
    a = b.DilatedSparse([2, 4, 8]).layout(TOKENS, block_size=BLOCK, density=DENSITY)
    other = b.BigBird(num_random_blocks=64).layout(TOKENS, block_size=BLOCK, density=DENSITY)
    stream, coo = io.BytesIO(), a.to_coo()
    a.save(stream)

    def fresh() -> b.BlockLayout:
        """The same layout without anything cached."""
        return b.BlockLayout(a.block_size, a.seq_len, a.indptr, a.indices, a.causal)

    return {
        "digest": lambda: fresh().digest,
        "T": lambda: fresh().T,
        "|": lambda: a | other,
        "&": lambda: a & other,
        "-": lambda: a - other,
        "<=": lambda: a <= other,
        "validate": lambda: fresh().validate(),
        "as_causal": lambda: a.as_causal(),
        "rows_at": lambda: a.rows_at(TOKENS // 2, TOKENS),
        "stats": lambda: a.stats(),
        "from_coo": lambda: b.BlockLayout.from_coo(*coo, block_size=BLOCK, seq_len=TOKENS),
        "save": lambda: a.save(io.BytesIO()),
        "load": lambda: b.BlockLayout.load(io.BytesIO(stream.getvalue())),
    }[name]


OPERATIONS = [
    "digest",
    "T",
    "|",
    "&",
    "-",
    "<=",
    "validate",
    "as_causal",
    "rows_at",
    "stats",
    "from_coo",
    "save",
    "load",
]
ORDERS = ["hilbert_order", "morton_order", "row_order", "longest_first_order", "locality", "hilbert_tokens"]


def order_case(name: str) -> Callable[[], Any]:
    if name == "hilbert_tokens":
        return lambda: b.hilbert_tokens((1024, 1024))
    rows = TOKENS // BLOCK
    layout = b.BigBird(num_random_blocks=20).layout(TOKENS, block_size=BLOCK, density=1_000_000 / rows**2)
    assert abs(layout.nnz - 1_000_000) < rows
    if name == "locality":
        order = b.hilbert_order(layout)
        return lambda: b.locality(layout, order, cache_blocks=256)
    return lambda: getattr(b, name)(layout)


def curve_case(name: str, tokens: int) -> Callable[[], Any]:
    density = min(1.0, BLOCKS_PER_ROW * BLOCK / tokens)
    pattern = b.Hierarchical.auto(tokens, density) if name == "Hierarchical.auto" else patterns()[name]
    return lambda: pattern.layout(tokens, block_size=BLOCK, density=density)


def measure(case: list[Any], rounds: int) -> dict[str, Any]:
    """Run one case in this process."""
    kind, *arguments = case
    make = {"layouts": layout_case, "operations": operation_case, "orders": order_case, "curve": curve_case}[kind]
    run = make(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def timed() -> tuple[float, float, Any]:
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        return time.perf_counter() - start, time.process_time() - cpu, result

    cold, cold_cpu, result = timed()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds, cpu = [cold], [cold_cpu]
    for _ in range(rounds):
        again = timed()
        seconds.append(again[0])
        cpu.append(again[1])
    found = {"cold_s": cold, "best_s": min(seconds), "cpu_s": min(cpu), "peak_mib": peak}
    if hasattr(result, "nnz"):
        found |= {"nnz": result.nnz, "density": result.density}
    return found


def in_child(case: list[Any], rounds: int) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case), "--rounds", str(rounds)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{case}: {result.stderr.strip()}")
    found = json.loads(result.stdout)
    print(f"{case}: {found['best_s']:.4f} s, CPU {found['cpu_s']:.4f} s, {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return {"case": case, **found}


def imports(rounds: int) -> dict[str, float]:
    """Milliseconds of processor time that importing numpy takes, and bs_patterns on top of it."""
    code = (
        "import time; a = time.process_time(); import numpy; b = time.process_time(); import bs_patterns;"
        "print(1e3 * (b - a), 1e3 * (time.process_time() - b))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    runs = []
    for _ in range(rounds + 1):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        runs.append([float(item) for item in result.stdout.split()])
    return {"numpy_ms": min(run[0] for run in runs[1:]), "bs_patterns_ms": min(run[1] for run in runs[1:])}


def records(kind: str, rounds: int) -> Iterator[dict[str, Any]]:
    """All cases of a kind."""
    if kind == "imports":
        yield imports(rounds)
        return
    cases: dict[str, list[list[Any]]] = {
        "layouts": [["layouts", name, causal, False] for name in patterns() for causal in (False, True)]
        + [["layouts", name, False, True] for name in patterns() if name != "Custom"],
        "operations": [["operations", name] for name in OPERATIONS],
        "orders": [["orders", name] for name in ORDERS],
        "curve": [
            ["curve", name, tokens]
            for name in ("LocalWindow", "DilatedSparse", "Hierarchical.auto", "BigBird")
            for tokens in CURVE
        ],
    }
    yield from (in_child(case, rounds) for case in cases[kind])


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    lines = [
        "# Patterns and layouts at scale",
        "",
        "Made by `python tools/bench_patterns.py`, each case in a process of its own; the raw figures are in "
        "`patterns.json`. Everything here runs on one core. *Cold* is the first call of the process, page faults of "
        "fresh memory included; *best* is the best of several more, *CPU* the least processor time; *peak* is the "
        "growth of the resident set over the imports.",
    ]

    def heading(kind: str, title: str) -> list[dict[str, Any]]:
        section = found[kind]
        about = f"{results.described(section['machine'])}. {section['rounds']} calls after the first."
        lines.extend(["", f"## {title}", "", about, ""])
        return section["records"]

    if "layouts" in found:
        measured = heading("layouts", f"Making a layout of {TOKENS:,} tokens, block {BLOCK}, density {DENSITY:.0%}")
        lines += [
            f"{TOKENS // BLOCK:,} × {TOKENS // BLOCK:,} blocks. With segments: `LongNetSegments{SEGMENTS}`.",
            "",
            "| pattern | | active blocks | density met | cold s | best s | CPU s | peak MiB |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in measured:
            _, name, causal, segments = row["case"]
            kind = "segments" if segments else "causal" if causal else ""
            lines.append(
                f"| `{name}` | {kind} | {row['nnz']:,} | {row['density']:.6f} | {row['cold_s']:.3f} | "
                f"{row['best_s']:.3f} | {row['cpu_s']:.3f} | {row['peak_mib']:.0f} |"
            )
    short = ["cold s", "best s", "CPU s", "peak MiB"]
    if "operations" in found:
        rows = [_row(row) for row in heading("operations", "Working with such layouts")]
        lines += results.table(["operation", *short], rows)
    if "orders" in found:
        rows = [_row(row) for row in heading("orders", "Orders of a layout of 1,000,000 active blocks")]
        lines += ["`locality`: a cache of 256 blocks, in Hilbert order. `hilbert_tokens`: 1024 × 1024 tokens.", ""]
        lines += results.table(["order", *short], rows)
    if "curve" in found:
        rows = []
        for row in heading("curve", f"Cost grows with the active blocks: {BLOCKS_PER_ROW} per row, 1K to 16M tokens"):
            _, name, tokens = row["case"]
            each = 1e9 * row["cpu_s"] / row["nnz"]
            times = [f"{row['best_s']:.4f}", f"{row['cpu_s']:.4f}", f"{each:.0f}", f"{row['peak_mib']:.0f}"]
            rows.append([f"`{name}`", f"{tokens:,}", f"{row['nnz']:,}", *times])
        header = ["pattern", "tokens", "active blocks", "best s", "CPU s", "CPU ns per active block", "peak MiB"]
        lines += results.table(header, rows)
    if "imports" in found:
        (row,) = heading("imports", "Importing")
        lines.append(
            f"`import numpy` takes {row['numpy_ms']:.0f} ms of processor time, `import bs_patterns` "
            f"{row['bs_patterns_ms']:.0f} ms more, at best."
        )
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> list[str]:
    name = row["case"][1].replace("|", "\\|")
    return [f"`{name}`", *(f"{row[what]:.3f}" for what in ("cold_s", "best_s", "cpu_s")), f"{row['peak_mib']:.0f}"]


def over_budget(measured: dict[str, Any]) -> list[str]:
    """The cases whose processor time or peak memory is over what was promised."""
    found = []
    for kind in ("layouts", "operations", "orders"):
        for row in measured.get(kind, {"records": []})["records"]:
            restricted = kind == "layouts" and row["case"][3]
            seconds, mib = BUDGET[kind] if restricted else BUDGET.get(row["case"][1], BUDGET[kind])
            judged = kind != "orders" or row["case"][1].endswith("_order")
            if judged and (row["cpu_s"] > seconds or (mib is not None and row["peak_mib"] > mib)):
                found.append(f"{row['case']}: CPU {row['cpu_s']:.3f} s, {row['peak_mib']:.0f} MiB")
    for row in measured.get("imports", {"records": []})["records"]:
        if row["bs_patterns_ms"] > 50:
            found.append(f"import: {row['bs_patterns_ms']:.0f} ms")
    return found


def main() -> int:
    kinds = ["layouts", "operations", "orders", "curve", "imports"]
    parser = results.parser(__doc__, "patterns.json", kinds)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="calls of a case after the first")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            print(json.dumps(measure(json.loads(options.case), options.rounds)))
        return 0
    for kind in () if options.page else options.only:
        results.keep(options.out, kind, records(kind, options.rounds), page, rounds=options.rounds)
    found = results.load(options.out)
    results.save(options.out, found, page)
    over = over_budget(found)
    print("\n".join(["over budget:", *over]) if over else "every figure is within its budget")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
