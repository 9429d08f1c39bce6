"""What `bench_comm.py` and `bench_slow_link.py` measured: kept in comm.json, shown as tables in comm.md."""

from typing import Any

import results

#: Title and, where the columns do not say it all, a paragraph; in the order of the page.
SECTIONS: dict[str, tuple[str, str]] = {
    "bytes": ("Bytes sent by 4 ranks, 16,384 tokens, causal, float32, against a dense ring", ""),
    "links": ("Overlap over slow links, and what the planner says", ""),
    "slow_link": (
        "Network namespaces with a limited bandwidth",
        """\
Made by `python tools/bench_slow_link.py` (as root). Every rank lives in a network namespace of its own, behind a
token bucket of the given rate in each direction; no delay is added. Steps of attention on the native kernels,
float32, 8,192 tokens, 4 query and 2 kv heads of 64, contiguous, one thread per rank. More than two ranks share the
two cores of this machine, so their seconds in kernels are not those of a machine per rank.

The packed ring moves what the layout reads, the dense ring passes all of K and V around, the all-gather collects
them first and reduce-scatters the gradients (of which gloo's implementation moves more than it has to); all three
fetch K and V again in the backward pass. Random layouts are drawn per head; at such densities a rank's rows together
read nearly every key block, so they leave little to save.

“Sent” is what the frames of all ranks weighed, headers and acknowledgements included, “overhead” its excess over the
payload planned. “Transfer” is the exchange alone, “compute” the busiest rank's time in kernels, “hidden” the share
of the transfer that passed behind them: with little to compute, little can hide. The planner is told the rate, the
latency that was measured and the compute that was measured, and knows no headers. Results are held to twice the
error of one process, both against float64, or the run fails; “error of limit” is how much of that was used.""",
    ),
    "module": ("A training step of the distributed module, 8,192 tokens, 1 thread per rank, native kernels", ""),
    "packing": ("One packed message against separate K and V, both directions at once", ""),
    "wire": (
        "What a narrower wire costs",
        """\
4 ranks, 2,048 tokens, dilated 1, 2, 4, 8 at density 0.1, causal, striped so that most of what is read travels; K and
V are float32 and normal. Errors are norms of the difference to dense float64 attention over the norm of that. Bytes
are those of K and V, which travel twice (forward, and again in the backward pass); gradients go home in float32
whatever the wire.""",
    ),
    "hooks": (
        "Training with compressed gradients",
        """\
A regression of 10,384 parameters in several buckets under DDP. The payload of top-k holds indices and values; every
rank hears every other, so its bytes grow with the ranks, where those of an all-reduce hardly do. PowerSGD starts at
the third step, and its payload is a share of what it compresses since then.""",
    ),
    "plans": ("Time to plan 1,048,576 tokens over 64 ranks", ""),
}
_HEAD = """\
# bs-comm, measured

Made by `python tools/bench_comm.py`; the raw figures are in `comm.json`. All ranks are gloo processes on one
machine. Load is the machine's load average when a section (of the slow links: its last piece) began; above 3 other
work ran beside it and took cores, so that seconds of compute, and speedups at 8 ranks, are worse than they would be
alone; bytes and errors are not touched by that. Not measured: NCCL, several machines.
"""


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    text = [_HEAD]
    for name, (title, about) in SECTIONS.items():
        if name in found:
            machine = results.described(found[name]["machine"])
            text += [f"## {title}\n", *([about + "\n"] if about else []), f"{machine}.\n"]
            text.append(table(found[name]["rows"]) + "\n")
    return "\n".join(text)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column per key of the first row."""
    heads = list(rows[0])
    cells = [[_show(row[key]).replace("_", " ") for key in heads] for row in rows]
    left = sum(not isinstance(value, int | float) for value in rows[0].values())
    return "\n".join(results.table([key.replace("_", " ") for key in heads], cells, max(left, 1)))


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
