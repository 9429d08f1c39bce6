"""What the GPU benchmark does without a GPU: its layouts, its arithmetic and its page."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import bench_gpu

        yield bench_gpu
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize("kind", ["random", "window", "skewed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_layouts_have_about_the_density_asked_for(bench, kind, causal, density):
    setting = bench.Setting(layout=kind, density=density, tokens=64 * 64, block=64, heads=4, kv_heads=4, causal=causal)
    layout = bench.layout_of(setting)
    assert layout.causal == causal
    assert layout.density == pytest.approx(density, rel=0.25)
    rows = layout.to_dense().sum(-1)
    assert rows.min() > 0
    if kind == "skewed" and density < 0.5:
        assert layout.to_dense().sum(1).max() > 3 * layout.to_dense().sum(1).mean()


def test_pairs_are_counted_token_by_token(bench):
    for causal in (False, True):
        setting = bench.Setting(density=0.3, tokens=256, block=32, heads=4, kv_heads=2, causal=causal)
        layout = bench.layout_of(setting)
        exact = layout.token_mask().sum() * setting.heads / layout.heads
        assert bench.kept_pairs(layout, setting.heads) == exact
        full = replace(setting, density=1.0)
        assert bench.kept_pairs(bench.layout_of(full), setting.heads) == bench.dense_pairs(full)


def test_records_say_what_follows_from_the_times(bench):
    setting = bench.Setting(tokens=1024, head_dim=64, heads=2, kv_heads=2)
    pairs = bench.dense_pairs(setting) / 4
    times = {
        "triton": {"forward": 1.0, "backward": 4.0},
        "dense cudnn": {"forward": 3.0, "backward": 8.0},
        "dense flash": {"forward": 5.0},
        "flex": {"forward": 1.5},
    }
    record = bench.record_of(setting, pairs, times)
    assert record["share"] == 0.25
    assert record["tflops_forward"] == pytest.approx(pairs * 4 * 64 / 1e-3 / 1e12)
    assert record["tflops_backward"] == pytest.approx(pairs * 10 * 64 / 4e-3 / 1e12)
    assert record["eta_forward"] == 0.75
    assert record["best_dense_forward"] == "cudnn"
    assert record["eta_backward"] == 0.5
    assert record["over_flex_forward"] == 1.5
    assert "over_flex_backward" not in record


def test_sections_ask_for_what_the_command_line_says(bench):
    args = bench.parse(["--densities", "0.1", "--head-dims", "64", "--tokens", "2048", "4096", "--dtype", "float16"])
    speed = list(bench.settings("speed", args))
    assert [(s.head_dim, s.causal, s.density, s.dtype) for s in speed] == [
        (64, False, 0.1, "float16"),
        (64, True, 0.1, "float16"),
    ]
    assert [(s.tokens, s.causal) for s in bench.settings("length", args)] == [
        (2048, True),
        (2048, False),
        (4096, True),
        (4096, False),
    ]
    decode = list(bench.settings("decode", args))
    assert {(s.tokens, s.batch, s.queries) for s in decode} == {(n, b, 1) for n in (2048, 4096) for b in (1, 8)}
    for section in bench.SECTIONS:
        assert list(bench.settings(section, args))
    for bad in (["--tokens", "1000"], ["--densities", "0"], ["--only", "nothing"], ["--dry"]):
        with pytest.raises(SystemExit):
            bench.parse(bad)


@pytest.mark.usefixtures("bench")
def test_flex_gets_the_same_blocks():
    import gpu_contestants as bench

    setting = bench.Setting(density=0.3, tokens=512, block=128, heads=2, kv_heads=2, causal=True)
    layout = bench.layout_of(setting)
    mask = bench.block_mask_of(layout, bench.causal_mod, "cpu")
    dense = torch.from_numpy(layout.to_dense())
    assert torch.equal(mask.to_dense()[0].bool(), dense)
    assert int(mask.kv_num_blocks.sum()) == int(dense.diagonal(dim1=1, dim2=2).sum())


def test_a_page_without_measurements_says_so_and_nothing_else(bench, tmp_path):
    bench.gpu_report.write(tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert text == "# Kernels on GPUs\n\nNot yet measured.\n"


def test_a_page_shows_every_device_and_what_is_missing(bench, tmp_path):
    setting = bench.Setting(causal=True)
    record = bench.record_of(setting, 1e9, {"triton": {"forward": 2.0}, "dense cudnn": {"forward": 9.0}})
    device = {"name": "GPU of a test", "processors": 1, "memory_gib": 1, "torch": "t", "triton": "r", "cuda": "c"}
    found = {"device": device, "checked_cases": 3, "speed": [record]}
    for name in ("a", "b"):
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(found))
    bench.gpu_report.write(tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("## GPU of a test\n") == 2
    assert f"{record['tflops_forward']:.0f}" in text
    assert text.count("Not yet measured.") == 2 * 6
    assert "η" in bench.gpu_report.line(record)


def test_the_committed_page_is_that_of_the_committed_files(bench, tmp_path):
    folder = ROOT / "docs" / "benchmarks"
    files = sorted(folder.glob("gpu-*.json"))
    assert (folder / "gpu.md").read_text() == bench.gpu_report.page([json.loads(f.read_text()) for f in files])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_gpu.py")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    assert "torch sees no GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tuner_tries_valid_tiles(bench):
    pytest.importorskip("triton")
    import gpu_tune

    for extent, tiles in (((128, 512), {64, 128}), ((64, 64), {32, 64}), ((7, 5), {16})):
        tried = list(gpu_tune.choices(extent))
        assert {size for c in tried for size in (c.tile_m, c.tile_n)} == tiles
        assert len(set(tried)) == len(tried) == len(tiles) ** 2 * 4


def test_the_tuner_asks_for_descriptors_on_hopper_alone(bench):
    pytest.importorskip("triton")
    import gpu_tune

    from bs_kernels.backends.triton.config import Config

    best = Config(64, 64, 4, 2)
    assert list(gpu_tune.variants(best, hopper=False, decoding=False)) == [best]
    assert {c.descriptors for c in gpu_tune.variants(best, hopper=True, decoding=False)} == {False, True}
    assert {c.waves for c in gpu_tune.variants(best, hopper=False, decoding=True)} == {0, 1, 2, 4}


INTERPRETED = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, gpu_tune
from bs_kernels.backends.triton.config import Config
for decoding in (False, True):
    shrink = 2048 if decoding else 512
    call, dout = gpu_tune.call_of(16, 16, torch.float16, decoding=decoding, device="cpu", shrink=shrink)
    for run in gpu_tune.runs_of(call, dout, decoding=decoding).values():
        run(Config(16, 16, 4, 1))
"""


@pytest.mark.parametrize("tool", ["bench_gpu", "gpu_tune"])
def test_the_tools_go_through_everything_in_the_interpreter(tool, tmp_path):
    pytest.importorskip("triton")
    dry = [str(ROOT / "tools" / "bench_gpu.py"), "--dry", "--no-check", "--out", str(tmp_path)]
    dry += ["--only", "plan", "decode", "--tokens", "32"]
    command = dry if tool == "bench_gpu" else ["-c", INTERPRETED, str(ROOT / "tools")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if tool == "bench_gpu":
        text = (tmp_path / "gpu.md").read_text()
        assert text.count("Not yet measured.") == 5
        assert "| 32 | 1 | 0.1 | 2 (1) | 16 |" in text


def test_names_of_files(bench):
    assert bench.slug("NVIDIA H200 141GB (HBM3e)") == "nvidia-h200-141gb-hbm3e"


def test_runs_add_up_and_one_failure_stops_nothing(bench, tmp_path, monkeypatch):
    def measured(section, setting, device, args):
        if setting.causal:
            raise RuntimeError("as a compiler would")
        return bench.record_of(setting, 1.0, {"triton": {"forward": setting.density, "backward": 1.0}})

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # put back after the test: a dry run sets it
    monkeypatch.setattr(bench, "measured", measured)
    command = ["--dry", "--no-check", "--out", str(tmp_path), "--only", "speed", "--densities"]
    for densities in (["0.5", "0.25"], ["0.25", "1.0"]):
        with pytest.raises(SystemExit, match="2 measurements failed"):
            bench.main([*command, *densities])
    found = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert sorted(record["density"] for record in found["speed"]) == [0.25, 0.5, 1.0]
    assert {failure["density"] for failure in found["failed"]} == {0.25, 1.0}
    assert "unfinished" not in found
