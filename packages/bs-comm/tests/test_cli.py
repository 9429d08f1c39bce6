"""``python -m bs_comm plan``: what it prints is the plan, and bad input is one line and status 2."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from bs_comm import CostModel, ExchangePlan, hiding_bandwidth, step_time
from bs_comm._units import bandwidth, duration, flops, show_bytes, show_seconds
from bs_comm.cli import main
from bs_patterns import BlockLayout, LocalWindow

WINDOW = ["plan", "local_window", "--window-size", "128", "--tokens", "4K", "--world-size", "4", "--causal"]


def record(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_the_plan(capsys):
    got = record(capsys, *WINDOW, "--q-heads", "4", "--kv-heads", "2", "--head-dim", "16", "--placement", "zigzag",
                 "--bandwidth", "1GB/s", "--latency", "2ns", "--flops", "1G", "--scaling", "1,3")  # fmt: skip
    layout = LocalWindow(128).layout(4096, causal=True)
    plan = ExchangePlan.build(layout, 4, "zigzag", 2)
    model = CostModel(1e9, 2e-9, 1e9)
    traffic = plan.traffic(16)
    assert got["digest"] == plan.digest
    assert got["forward_bytes"] == got["forward_bound_bytes"] == traffic.forward.sum()
    assert got["backward_bytes"] == 2 * got["forward_bytes"]
    assert got["forward_bytes_by_pair"] == traffic.forward.tolist()
    assert got["time"]["seconds"] == step_time(plan, model, 16, q_heads=4).seconds
    assert got["hiding_bandwidth"] == hiding_bandwidth(plan, model, 16, q_heads=4)
    assert 0 < got["hiding_bandwidth"] < math.inf
    assert [point["world_size"] for point in got["scaling"]] == [1, 3]


def test_nodes_are_counted(capsys):
    found = record(capsys, *WINDOW, "--ranks-per-node", "2")
    got, staged = found["node_rows"], found["hierarchical"]
    plan = ExchangePlan.build(LocalWindow(128).layout(4096, causal=True), 4, kv_heads=8)
    assert got["within"] + got["across"] == plan.rows.sum()
    assert 0 < got["across_once"] == got["across"] < got["within"]
    assert (staged["across_rows"], staged["within_rows"]) == (got["across_once"], got["within"])
    assert staged["steps"] == [1, 1]
    assert staged["transfer_seconds"]["forward"] > 0
    assert record(capsys, *WINDOW)["hierarchical"] is None
    assert main([*WINDOW, "--ranks-per-node", "2"]) == 0
    assert "in two stages" in capsys.readouterr().out


def test_a_float8_wire_pays_for_its_scales(capsys):
    got = record(capsys, *WINDOW, "--kv-heads", "2", "--dtype", "fp8", "--head-dim", "32")
    plan = ExchangePlan.build(LocalWindow(128).layout(4096, causal=True), 4, kv_heads=2)
    assert got["forward_bytes"] == plan.rows.sum() * (2 * 32 + 2 * 4)
    sizes = {"kv_itemsize": 1, "kv_row_bytes": 8}
    time = step_time(plan, CostModel(50e9, 1e-5, 4e14), 32, q_heads=8, **sizes)
    assert got["time"]["seconds"] == pytest.approx(time.seconds, rel=1e-12)


def test_json_has_no_infinity(capsys):
    assert record(capsys, *WINDOW, "--latency", "1s")["hiding_bandwidth"] is None


def test_text_shows_table_picture_and_curve(capsys):
    assert main(WINDOW) == 0
    out = capsys.readouterr().out
    plan = ExchangePlan.build(LocalWindow(128).layout(4096, causal=True), 4, kv_heads=8)
    for part in (
        "LocalWindow(window_size=128), causal",
        show_bytes(plan.traffic(128).forward_bound),
        "1 (a dense ring takes 3)",
        "│  ██    │",
        "communication stops hiding behind compute",
    ):
        assert part in out, part


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "dense", "--tokens", "1000", "--world-size", "3", "--placement", "stripe", "--block-size", "8"],
        ["plan", "dense", "--tokens", "256", "--world-size", "1", "--forward-only"],
        ["plan", "dilated_sparse", "--tokens", "3K", "--world-size", "5", "--placement", "cost_balanced",
         "--density", "0.1"],
        ["plan", "DilatedSparse", "--dilation-rates", "2,4", "8", "--tokens", "3K", "--world-size", "5"],
        ["plan", "hierarchical", "--tokens", "8K", "--world-size", "3", "--causal"],
        ["plan", "local_window", "--tokens", "2K", "--world-size", "2", "--segment-lengths", "512", "1024",
         "--segment-rates", "1", "2"],
        ["plan", "global_local", "--tokens", "256K", "--world-size", "256", "--scaling", "256", "--ranks-per-node", "8",
         "--node-bandwidth", "25GB/s", "--node-latency", "20us", "--keep-kv", "--batch", "2", "--dtype", "fp8"],
        [*WINDOW, "--per-head", "--q-heads", "6", "--kv-heads", "3", "--value-head-dim", "64"],
        [*WINDOW, "--flops", "1e18", "--latency", "1s", "--width", "4"],
    ],
    ids=lambda argv: " ".join(argv[1:6]),
)  # fmt: skip
def test_plans_anything(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().err == ""
    assert record(capsys, *argv)["forward_bytes"] >= 0


def test_reads_a_layout_file(tmp_path, capsys):
    layout = BlockLayout.from_dense(np.tri(8, dtype=bool), block_size=4, seq_len=31, causal=True)
    layout.save(tmp_path / "mine.npz")
    got = record(capsys, "plan", str(tmp_path / "mine.npz"), "--world-size", "2", "--kv-heads", "1")
    assert got["digest"] == ExchangePlan.build(layout, 2, kv_heads=1).digest


def test_ascii_terminals_get_ascii():
    done = subprocess.run(
        [sys.executable, "-m", "bs_comm", *WINDOW],
        capture_output=True, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}, check=True,
    )  # fmt: skip
    assert done.stdout.isascii()
    assert b"|  ##    |" in done.stdout


def test_plans_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from bs_comm.cli import main\nraise SystemExit(main({WINDOW!r}))"
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


DENSE = ["plan", "dense", "--tokens", "64", "--world-size", "2"]
BAD = [
    ([], "expected a PATTERN, got nothing"),
    (["show"], "expected the command 'plan', got 'show'"),
    (["plan"], "expected a PATTERN, got nothing"),
    (["plan", "--causal"], "expected a PATTERN first, got '--causal'"),
    (["plan", "spiral", "--tokens", "8"], "unknown pattern 'spiral'; expected dense, FILE.npz or one of"),
    (["plan", "dense", "--world-size", "2"], "the following arguments are required: --tokens"),
    (["plan", "dense", "--tokens", "8"], "the following arguments are required: --world-size"),
    (["plan", "dense", "--tokens", "many", "--world-size", "2"], "argument --tokens: expected an integer such as"),
    (["plan", "dense", "--tokens", "64", "--world-size", "two"], "argument --world-size: expected an integer such as"),
    (["plan", "dense", "--tokens", "64", "--world-size", "0"], "--world-size: expected an integer ≥ 1, got 0"),
    (["plan", "dense", "--tokens", "-4", "--world-size", "2"], "seq_len: expected an integer ≥ 1, got -4"),
    ([*DENSE, "--density", "0.5"], "unrecognized arguments: --density 0.5"),
    ([*DENSE, "--placement", "diagonal"], "argument --placement: invalid choice: 'diagonal'"),
    ([*DENSE, "--placement", "cost_balanced"], "placement: 'cost_balanced' expected a layout"),
    ([*WINDOW, "--density", "1.5"], "density: expected a number in (0, 1], got 1.5"),
    ([*WINDOW, "--global-tokens", "4"], "unrecognized arguments: --global-tokens 4"),
    ([*WINDOW, "--window-size", "wide"], "argument --window-size: expected an integer such as"),
    ([*WINDOW, "--segment-lengths", "64"], "--segment-lengths, --segment-rates: expected both or neither, got one"),
    ([*WINDOW, "--bandwidth", "fast"], "--bandwidth: expected a number with a unit"),
    ([*WINDOW, "--bandwidth", "5 parsec"], "--bandwidth: expected bytes or bits per second"),
    ([*WINDOW, "--latency", "5 years"], "--latency: expected a duration such as 5us"),
    ([*WINDOW, "--flops", "0"], "flops: expected a finite number > 0, got 0.0"),
    ([*WINDOW, "--flops", "4 horses"], "--flops: expected operations per second such as 400T"),
    ([*WINDOW, "--node-bandwidth", "1G"], "node_bandwidth: expected None without ranks_per_node"),
    ([*WINDOW, "--scaling", "1;2"], "argument --scaling: expected an integer such as"),
    ([*WINDOW, "--scaling", "0"], "world_size: expected an integer ≥ 1, got 0"),
    ([*WINDOW, "--forward-only", "--keep-kv"], "keep_kv: expected False without a backward pass"),
    ([*WINDOW, "--kv-heads", "3"], "q_heads: expected a multiple of 3 kv heads, got 8"),
    ([*WINDOW, "--head-dim", "0"], "head_dim: expected an integer ≥ 1, got 0"),
    ([*WINDOW, "--width", "1"], "--width: expected an integer ≥ 2, got 1"),
    (["plan", "missing.npz", "--world-size", "2"], "No such file or directory: 'missing.npz'"),
    (["plan", "missing.npz", "--world-size", "2", "--tokens", "9"], "unrecognized arguments: --tokens 9"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    assert main(["plan", str(tmp_path / "bad.npz"), "--world-size", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "PATTERN is dense, a layout saved as FILE.npz, or one of"),
        (["plan", "-h"], "examples:"),
        (["plan", "local_window", "--help"], "--window-size"),
    ],
)
def test_help_is_status_0(argv, text, capsys):
    assert main(argv) == 0
    assert text in capsys.readouterr().out


def test_units():
    assert bandwidth("b", "400Gbit/s") == bandwidth("b", "50GB/s") == bandwidth("b", "50G") == 50e9
    assert duration("d", "5us") == duration("d", "5 µs") == pytest.approx(5e-6)
    assert flops("f", "400TFLOP/s") == flops("f", "4e14") == 4e14
    assert [show_bytes(n) for n in (0, 999, 1000, 66_060_288)] == ["0 B", "999 B", "1 kB", "66.1 MB"]
    assert [show_seconds(s) for s in (0, 2e-9, 1.5e-3, 2, 4321)] == ["0 s", "2 ns", "1.5 ms", "2 s", "4,321 s"]
