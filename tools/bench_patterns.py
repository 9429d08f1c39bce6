"""Measures bs-patterns at scale; writes docs/benchmarks/patterns.json and a page of tables beside it.

    python tools/bench_patterns.py                       # everything; some minutes
    python tools/bench_patterns.py --only layouts curve  # some of it
    python tools/bench_patterns.py --out /tmp/patterns.json --rounds 3

Every case runs in a process of its own, so that peak memory is that of the case: the process's peak resident set minus
what it was after the imports. Times are of the first call ("cold", page faults included) and the best of the rounds, by
the clock and in processor time, which neighbours on a busy machine change less.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "patterns.json"
TOKENS, BLOCK, DENSITY = 2**20, 64, 0.01
SEGMENTS = ([2048, 8192, 2**20], [1, 2, 8])
CURVE = [2**n for n in range(10, 25, 2)]
BLOCKS_PER_ROW = 64

#: Seconds (and MiB) that a figure should stay under at 1,048,576 tokens. Judged by processor time: all is one thread.
BUDGET = {"layouts": (1.0, 400), "LocalWindow": (0.1, 400), "operations": (0.5, None), "orders": (0.5, None)}


def patterns() -> dict[str, Any]:
    import bs_patterns as b

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
    from bs_patterns import LongNetSegments

    pattern = patterns()[name]
    candidates = LongNetSegments(*SEGMENTS) if segments else None
    return lambda: pattern.layout(TOKENS, block_size=BLOCK, density=DENSITY, causal=causal, candidates=candidates)


def operation_case(name: str) -> Callable[[], Any]:
    import io

    from bs_patterns import BigBird, BlockLayout, DilatedSparse

    a = DilatedSparse([2, 4, 8]).layout(TOKENS, block_size=BLOCK, density=DENSITY)
    b = BigBird(num_random_blocks=64).layout(TOKENS, block_size=BLOCK, density=DENSITY)
    stream, coo = io.BytesIO(), a.to_coo()
    a.save(stream)

    def fresh() -> BlockLayout:
        """The same layout without anything cached."""
        return BlockLayout(a.block_size, a.seq_len, a.indptr, a.indices, a.causal)

    return {
        "digest": lambda: fresh().digest,
        "T": lambda: fresh().T,
        "|": lambda: a | b,
        "&": lambda: a & b,
        "-": lambda: a - b,
        "<=": lambda: a <= b,
        "validate": lambda: fresh().validate(),
        "as_causal": lambda: a.as_causal(),
        "rows_at": lambda: a.rows_at(TOKENS // 2, TOKENS),
        "stats": lambda: a.stats(),
        "from_coo": lambda: BlockLayout.from_coo(*coo, block_size=BLOCK, seq_len=TOKENS),
        "save": lambda: a.save(io.BytesIO()),
        "load": lambda: BlockLayout.load(io.BytesIO(stream.getvalue())),
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
    import bs_patterns as b

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
    import bs_patterns as b

    density = min(1.0, BLOCKS_PER_ROW * BLOCK / tokens)
    pattern = b.Hierarchical.auto(tokens, density) if name == "Hierarchical.auto" else patterns()[name]
    return lambda: pattern.layout(tokens, block_size=BLOCK, density=density)


def measure(case: list[Any], rounds: int) -> dict[str, Any]:
    """Run one case in this process."""
    import bs_patterns  # noqa: F401 - part of the baseline

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


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] if (
        info.exists()
    ) else []  # fmt: skip
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
    }


def run_all(only: list[str], rounds: int) -> dict[str, Any]:
    cases = {
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
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds}
    results["settings"] = {
        "tokens": TOKENS,
        "block": BLOCK,
        "density": DENSITY,
        "segments": SEGMENTS,
        "curve_blocks_per_row": BLOCKS_PER_ROW,
    }
    for kind in only:
        results[kind] = imports(rounds) if kind == "imports" else [in_child(case, rounds) for case in cases[kind]]
    return results


def page(results: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    host = results["machine"]
    lines = [
        "# Patterns and layouts at scale",
        "",
        "Measured by `python tools/bench_patterns.py`, each case in a process of its own, on "
        f"{host['cpu']}, {host['cpus']} CPUs (load {host['load_at_start']} when it began), Python {host['python']}, "
        f"numpy {host['numpy']}. Everything here runs on one core. *Cold* is the first call of the process, page "
        f"faults of fresh memory included; *best* is the best of {results['rounds']} more, *CPU* the least "
        "processor time; *peak* is the growth of the resident set over the imports. The raw figures are in "
        "`patterns.json`.",
    ]
    if "layouts" in results:
        lines += [
            "",
            f"## Making a layout of {TOKENS:,} tokens, block {BLOCK}, density {DENSITY:.0%}",
            "",
            f"{TOKENS // BLOCK:,} × {TOKENS // BLOCK:,} blocks. With segments: `LongNetSegments{SEGMENTS}`.",
            "",
            "| pattern | | active blocks | density met | cold s | best s | CPU s | peak MiB |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in results["layouts"]:
            _, name, causal, segments = row["case"]
            kind = "segments" if segments else "causal" if causal else ""
            lines.append(
                f"| `{name}` | {kind} | {row['nnz']:,} | {row['density']:.6f} | {row['cold_s']:.3f} | "
                f"{row['best_s']:.3f} | {row['cpu_s']:.3f} | {row['peak_mib']:.0f} |"
            )
    if "operations" in results:
        lines += [
            "",
            "## Working with such layouts",
            "",
            "| operation | cold s | best s | CPU s | peak MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [_row(row) for row in results["operations"]]
    if "orders" in results:
        lines += [
            "",
            "## Orders of a layout of 1,000,000 active blocks",
            "",
            "`locality`: a cache of 256 blocks, in Hilbert order. `hilbert_tokens`: 1024 × 1024 tokens.",
            "",
            "| order | cold s | best s | CPU s | peak MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [_row(row) for row in results["orders"]]
    if "curve" in results:
        lines += [
            "",
            f"## Cost grows with the active blocks: {BLOCKS_PER_ROW} per row, 1K to 16M tokens",
            "",
            "| pattern | tokens | active blocks | best s | CPU s | CPU ns per active block | peak MiB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in results["curve"]:
            _, name, tokens = row["case"]
            each = 1e9 * row["cpu_s"] / row["nnz"]
            lines.append(
                f"| `{name}` | {tokens:,} | {row['nnz']:,} | {row['best_s']:.4f} | {row['cpu_s']:.4f} | {each:.0f} | "
                f"{row['peak_mib']:.0f} |"
            )
    if "imports" in results:
        found = results["imports"]
        lines += [
            "",
            "## Importing",
            "",
            f"`import numpy` takes {found['numpy_ms']:.0f} ms of processor time, `import bs_patterns` "
            f"{found['bs_patterns_ms']:.0f} ms more (best of {results['rounds']}).",
        ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    name = row["case"][1].replace("|", "\\|")
    return f"| `{name}` | {row['cold_s']:.3f} | {row['best_s']:.3f} | {row['cpu_s']:.3f} | {row['peak_mib']:.0f} |"


def over_budget(results: dict[str, Any]) -> list[str]:
    """The cases whose processor time or peak memory is over what was promised."""
    found = []
    for kind in ("layouts", "operations", "orders"):
        for row in results.get(kind, []):
            restricted = kind == "layouts" and row["case"][3]
            seconds, mib = BUDGET[kind] if restricted else BUDGET.get(row["case"][1], BUDGET[kind])
            judged = kind != "orders" or row["case"][1].endswith("_order")
            if judged and (row["cpu_s"] > seconds or (mib is not None and row["peak_mib"] > mib)):
                found.append(f"{row['case']}: CPU {row['cpu_s']:.3f} s, {row['peak_mib']:.0f} MiB")
    if "imports" in results and results["imports"]["bs_patterns_ms"] > 50:
        found.append(f"import: {results['imports']['bs_patterns_ms']:.0f} ms")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kinds = ["layouts", "operations", "orders", "curve", "imports"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="measure these alone")
    parser.add_argument("--rounds", type=int, default=5, help="calls per case")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file; the page is written beside it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            print(json.dumps(measure(json.loads(options.case), options.rounds)))
        return 0
    results = run_all(options.only, options.rounds)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(results))
    over = over_budget(results)
    print("\n".join(["over budget:", *over]) if over else "every figure is within its budget")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
