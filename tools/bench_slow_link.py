"""Measures the packed ring over slow links: network namespaces whose rate `tc` limits. Linux, as root.

    python tools/bench_slow_link.py                            # everything, some minutes
    python tools/bench_slow_link.py --rates 100 --ranks 2      # one piece; the others stay as they were measured

Every rank is a process in a namespace of its own, joined to the others by a bridge; a token bucket at both ends of its
cable limits what it sends and what it receives. The packed ring takes turns with a dense ring and an all-gather of K
and V. Results join those of `bench_comm.py` in docs/benchmarks/comm.json and comm.md.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comm_report
import results
import torch
from slow_link_rank import DIM, EXCHANGES, KV_HEADS, LAYOUTS, Q_HEADS, layout_of, tensors

from bs_comm import CostModel, ExchangePlan, StepTime, step_time
from bs_kernels import attention_delta, partial_backward, partial_forward

RANK = Path(__file__).with_name("slow_link_rank.py")
PREFIX, SUBNET, PORT = "bsring", "10.198.51", 29400


class Unavailable(RuntimeError):
    """This machine cannot limit a network's bandwidth."""


# ---------------------------------------------------------------------- the network


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(words)}` failed: {done.stderr.strip()}")


@contextlib.contextmanager
def network(ranks: int, mbits: int) -> Iterator[list[str]]:
    """Names of one namespace per rank, with addresses SUBNET.1 … SUBNET.n on eth0; gone when the block ends."""
    names = [f"{PREFIX}{os.getpid()}-{rank}" for rank in range(ranks)]
    switch = f"{PREFIX}{os.getpid()}-switch"
    # A burst must hold what passes between two ticks of the kernel's clock, and at least one packet of 64 KiB.
    shape = ["root", "tbf", "rate", f"{mbits}mbit", "burst", f"{max(65_536, mbits * 128)}", "latency", "50ms"]
    try:
        command("ip", "netns", "add", switch)
        command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        command("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            command("ip", "netns", "add", name)
            command("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            command("ip", "-n", name, "addr", "add", f"{SUBNET}.{rank + 1}/24", "dev", "eth0")
            command("ip", "-n", name, "link", "set", "lo", "up")
            command("ip", "-n", name, "link", "set", "eth0", "up")
            command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            command("tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape)
            command("tc", "-n", switch, "qdisc", "add", "dev", port, *shape)
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def check_available() -> None:
    """Say why this machine will not do, and clear what a killed run may have left."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"expected the commands ip and tc, found no {' and no '.join(missing)}")
    if os.geteuid() != 0:
        raise Unavailable("expected to run as root, which network namespaces need")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    for name in listed:
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# ---------------------------------------------------------------------- one piece: a rate and a number of ranks


def references(folder: Path, layouts: list[str]) -> dict[str, list[float]]:
    """Leave exact results for the ranks, and return the largest errors of one process in float32."""
    errors = {}
    for name in layouts:
        layout, found = layout_of(name), []
        for dtype in (torch.float64, torch.float32):
            q, k, v, dout = tensors(dtype)
            out, lse = partial_forward(q, k, v, layout)
            got = partial_backward(dout, attention_delta(dout, out, lse), lse, q, k, v, layout)
            found.append([out, got.q, got.k, got.v])
        torch.save(found[0], folder / f"{LAYOUTS.index(name)}.pt")
        bands = [torch.finfo(torch.float32).eps * float(want.abs().max()) for want in found[0]]
        errors[name] = [
            2 * float((got.double() - want).abs().max()) + band for want, got, band in zip(*found, bands, strict=True)
        ]
    return errors


def run_ranks(names: list[str], folder: Path, timeout: float) -> list[dict[str, Any]]:
    """Start a process per namespace and return their answers."""
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ranks = []
    try:
        for rank, name in enumerate(names):
            words = ["ip", "netns", "exec", name, sys.executable, str(RANK), str(rank), str(len(names)), str(folder)]
            ranks.append(subprocess.Popen(words, env={**os.environ, **settings}))
        for rank, process in enumerate(ranks):
            if process.wait(timeout):
                raise RuntimeError(f"rank {rank} ended with status {process.returncode}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads((folder / f"answer{rank}.json").read_text()) for rank in range(len(names))]


def planned(name: str, ranks: int, mbits: int, latency: float, compute: list[float]) -> float:
    """What the cost model says of a step, given the busiest rank's seconds in the kernels of each pass."""
    plan = ExchangePlan.build(layout_of(name), ranks, kv_heads=KV_HEADS)

    def time_at(flops: float) -> StepTime:
        return step_time(plan, CostModel(mbits * 125e3, latency, flops), DIM, q_heads=Q_HEADS, kv_itemsize=4)

    alone = time_at(1.0)  # at one operation per second, compute seconds are operations
    return sum(
        time_at(phase.compute_seconds / seconds).phases[i].seconds
        for i, (phase, seconds) in enumerate(zip(alone.phases, compute, strict=True))
    )


def row_of(name: str, kind: str, mbits: int, cases: list[dict[str, Any]], latency: float, limits: list[float]) -> Any:
    """The slowest rank of a round ends it; the best round has the least of the machine's noise."""
    ranks, rounds = len(cases), len(cases[0]["step"][0])
    best = [min(range(rounds), key=lambda n: max(case["step"][i][n] for case in cases)) for i in (0, 1)]
    step = [max(case["step"][i][best[i]] for case in cases) for i in (0, 1)]
    compute = [max(case["compute"][i][best[i]] for case in cases) for i in (0, 1)]
    transfer = sum(min(max(case["alone"][i][n] for case in cases) for n in range(rounds)) for i in (0, 1))
    payload, sent = sum(sum(case["planned"]) for case in cases), sum(case["sent"] for case in cases)
    excess = max(error / limit for case in cases for error, limit in zip(case["errors"], limits, strict=True))
    if excess > 1:
        raise RuntimeError(f"{name}, {kind}: errors are {excess:.2f} times what one process allows")
    return {
        "Mbit/s": mbits,
        "ranks": ranks,
        "layout": name,
        "exchange": kind,
        "planned_bytes": payload,
        "sent_bytes": sent,
        "overhead": sent / payload - 1,
        "forward_seconds": step[0],
        "step_seconds": sum(step),
        "planner_seconds": planned(name, ranks, mbits, latency, compute) if kind == "packed ring" else None,
        "transfer_seconds": transfer,
        "compute_seconds": sum(compute),
        "hidden": max(0.0, min(1.0, (transfer + sum(compute) - sum(step)) / transfer)),
        "error_of_limit": excess,
    }


def measure(
    folder: Path, limits: dict[str, list[float]], ranks: int, mbits: int, rounds: int
) -> list[dict[str, Any]]:  # fmt: skip
    """All layouts and exchanges of one network."""
    cases = [(name, kind) for name in limits for kind in EXCHANGES]
    spec = {"meeting": f"tcp://{SUBNET}.1:{PORT}", "cases": cases, "rounds": rounds}
    (folder / "spec.json").write_text(json.dumps(spec))
    with network(ranks, mbits) as names:
        answers = run_ranks(names, folder, timeout=600)
    latency = max(answer["latency"] for answer in answers[:2])
    return [
        row_of(name, kind, mbits, [answer["cases"][i] for answer in answers], latency, limits[name])
        for i, (name, kind) in enumerate(cases)
    ]


def merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the place of those measured before, and the others."""
    key = ("Mbit/s", "ranks", "layout", "exchange")
    known = {tuple(row[k] for k in key): row for row in (*before, *rows)}
    order = sorted(known, key=lambda k: (k[0], k[1], LAYOUTS.index(k[2]), EXCHANGES.index(k[3])))
    return [known[k] for k in order]


def main() -> int:
    parser = results.parser(__doc__, "comm.json")
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 1000], metavar="N", help="Mbit/s of every link")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        metavar="LAYOUT",
        help=f"of: {'; '.join(LAYOUTS)}".replace("%", "%%"),
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of which the fastest counts")
    options = parser.parse_args()
    if options.page:
        results.save(options.out, results.load(options.out), comm_report.page)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that namespaces are removed
    try:
        check_available()
        with tempfile.TemporaryDirectory() as made:
            limits = references(Path(made), options.layouts)
            for mbits in options.rates:
                for ranks in options.ranks:
                    machine = results.machine() | {"threads": 1}  # of every rank
                    rows = measure(Path(made), limits, ranks, mbits, options.rounds)
                    print(comm_report.table(rows), "\n", flush=True)
                    found = results.load(options.out)
                    rows = merged(found.get("slow_link", {"rows": []})["rows"], rows)
                    results.save(
                        options.out, found | {"slow_link": {"machine": machine, "rows": rows}}, comm_report.page
                    )
    except Unavailable as error:
        print(f"{Path(__file__).name}: not measured: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
