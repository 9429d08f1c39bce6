"""The page that shows what `bench_gpu.py` measured, made from every ``gpu-*.json`` in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import results
from results import table

__all__ = ["line", "page", "write"]

_TITLE = "# Kernels on GPUs"
_INTRODUCTION = f"""\
{_TITLE}

Made by `python tools/bench_gpu.py`, one `gpu-<device>.json` per device beside this page. Before anything is timed, the
`triton` backend is held against the float64 oracle on the device. TFLOP/s count the (query, key) pairs that the layout
keeps, 4 · D per pair forward and 10 · D backward. η = share of pairs × t_dense / t_sparse with the fastest dense kernel
on the device, inside torch or in an installed flash-attn: 1 means that every skipped block is time saved. “over flex”
is the time of compiled FlexAttention over the same blocks divided by ours, “any order” that of a backward with
`deterministic=False` divided by that of ours, “over one piece” that of a decode step whose rows are not cut into pieces
divided by one whose are.
"""


def line(record: dict[str, Any]) -> str:
    """One record, for the terminal."""
    what = "{layout} {density} {tokens} D{head_dim} {heads}/{kv_heads} {dtype}".format(**record)
    what += " causal" if record["causal"] else ""
    if "mib" in record:
        return f"{what}: {', '.join(f'{name} {mib:.0f} MiB' for name, mib in record['mib'].items())}"
    if "host_ms" in record:
        return f"{what}: host {record['host_ms']:.1f} ms, device {record['device_ms']:.2f} ms"
    parts = []
    for phase in ("forward", "backward"):
        if f"tflops_{phase}" in record:
            parts.append(f"{phase} {record[f'tflops_{phase}']:.0f} TFLOP/s, η {_number(record, f'eta_{phase}')}")
    return f"{what}: {'; '.join(parts)}"


def _number(record: dict[str, Any], key: str, digits: int = 2) -> str:
    return f"{record[key]:.{digits}f}" if key in record else "—"


def _speed(records: list[dict[str, Any]]) -> list[str]:
    header = ["layout", "density", "tokens", "D", "heads (keys)", "causal"]
    for phase in ("forward", "backward"):
        header += [f"{phase}, ms", "TFLOP/s", "η", "best dense", "over flex"]
    header.append("any order")
    rows = []
    for r in records:
        row = [r["layout"], r["density"], r["tokens"], r["head_dim"], f"{r['heads']} ({r['kv_heads']})"]
        row.append("yes" if r["causal"] else "no")
        for phase in ("forward", "backward"):
            row += [_number(r["times"].get("triton", {}), phase, 3), _number(r, f"tflops_{phase}", 0)]
            row += [_number(r, f"eta_{phase}"), r.get(f"best_dense_{phase}", "—"), _number(r, f"over_flex_{phase}")]
        rows.append([*row, _number(r, "any_order_backward")])
    return table(header, rows)


def _plan(records: list[dict[str, Any]]) -> list[str]:
    header = ["tokens", "heads", "blocks", "from the host, ms", "on the device, ms", "forward kernel, ms"]
    rows = [
        [r["tokens"], r["heads"], r["blocks"], *(_number(r, f"{name}_ms", 2) for name in ("host", "device", "kernel"))]
        for r in records
    ]
    return table(header, rows)


def _decode(records: list[dict[str, Any]]) -> list[str]:
    header = ["cache", "batch", "density", "heads (keys)", "D", "ms", "over one piece", "η", "best dense"]
    rows = []
    for r in records:
        row = [r["tokens"], r["batch"], r["density"], f"{r['heads']} ({r['kv_heads']})", r["head_dim"]]
        row += [_number(r["times"].get("triton", {}), "forward", 4), _number(r, "over_one_piece")]
        rows.append([*row, _number(r, "eta_forward"), r.get("best_dense_forward", "—")])
    return table(header, rows)


def _memory(records: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for r in records for name in r["mib"]))
    rows = [[r["tokens"], r["density"], *(_number(r["mib"], name, 0) for name in names)] for r in records]
    return table(["tokens", "density", *(f"{name}, MiB" for name in names)], rows)


_SECTIONS = {
    "speed": ("Density", _speed),
    "layouts": ("Windowed and skewed layouts", _speed),
    "length": ("Length", _speed),
    "groups": ("Grouped heads", _speed),
    "plan": ("Plans", _plan),
    "decode": ("One query at the end of a cache", _decode),
    "memory": ("Peak memory above the inputs, forward and backward", _memory),
}


def page(found: list[dict[str, Any]]) -> str:
    """The page for the contents of any number of files."""
    if not found:
        return f"{_TITLE}\n\nNot yet measured.\n"
    lines = [_INTRODUCTION]
    for one in found:
        device = one["device"]
        lines += [
            f"## {device['name']}",
            "",
            f"{device['processors']} processors, {device['memory_gib']} GiB, torch {device['torch']}, "
            f"Triton {device['triton']}, {device['cuda']}. {one['checked_cases']} cases agreed with the oracle first.",
            "",
        ]
        for name, (title, write_table) in _SECTIONS.items():
            records = one.get(name)
            lines += [f"### {title}", "", *(write_table(records) if records else ["Not yet measured."]), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path) -> None:
    """Write ``gpu.md`` from the files of a folder."""
    files = sorted(folder.glob("gpu-*.json"))
    results.write(folder / "gpu.md", page([json.loads(file.read_text()) for file in files]))
