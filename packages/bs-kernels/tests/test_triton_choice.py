"""When the Triton backend refuses, and which tiles it takes. Needs neither a GPU nor Triton's compiler."""

import json
import re
import threading
from dataclasses import replace

import pytest
import torch

from bs_kernels import block_sparse_attention, explain_backends
from bs_kernels.backends.base import Problem
from bs_kernels.backends.native import NativeBackend
from bs_kernels.backends.triton import TritonBackend, config, support
from bs_kernels.backends.triton.config import Config, Shape, Target, candidates
from bs_kernels.dispatch import select
from bs_patterns import LocalWindow

PLAIN = Problem(
    device="cuda",
    dtype=torch.bfloat16,
    batch=1,
    q_heads=2,
    kv_heads=2,
    head_dim=64,
    value_dim=64,
    seq_len=(256, 256),
    block_size=(64, 64),
)
TRITON = TritonBackend()


@pytest.fixture
def gpu(monkeypatch):
    """A machine that claims to have a Hopper GPU and Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(support, "_missing", lambda: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "computes float32, bfloat16 and float16, not float64"),
        ({"head_dim": 320}, "head dims from 1 to 256, not 320"),
        ({"value_dim": 257}, "value head dims from 1 to 256, not 257"),
        ({"block_size": (64, 2048)}, r"blocks of up to 1024 tokens, not \(64, 2048\)"),
        ({"device": "mps"}, "runs on CUDA and ROCm GPUs, not on mps"),
    ],
)
def test_what_is_refused_says_why(gpu, changes, reason):
    assert TRITON.not_supported_reasons(PLAIN) == []
    (found,) = TRITON.not_supported_reasons(replace(PLAIN, **changes))
    assert re.search(reason, found), found


def test_every_reason_is_listed(gpu):
    bad = replace(PLAIN, dtype=torch.float64, head_dim=512, block_size=(2048, 64))
    assert len(TRITON.not_supported_reasons(bad)) == 3


@pytest.mark.parametrize("given", [{"attn_bias": "float", "attn_bias_grad": True}, {"paged": True}], ids=str)
def test_gradients_of_everything(gpu, given):
    assert TRITON.not_supported_reasons(replace(PLAIN, backward=True, **given)) == []


def test_devices_that_cannot(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert TRITON.not_supported_reasons(PLAIN) == ["it needs compute capability 8.0 or higher, this GPU has 7.5"]
    gpu.setattr(torch.version, "hip", "6.3")
    assert TRITON.not_supported_reasons(PLAIN) == []
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert TRITON.not_supported_reasons(PLAIN) == ["torch sees no GPU"]


def test_a_missing_or_broken_triton(gpu):
    gpu.undo()
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu.delenv("TRITON_INTERPRET", raising=False)
    gpu.setattr(support.importlib.util, "find_spec", lambda name: None)
    support._missing.cache_clear()
    try:
        assert TRITON.not_supported_reasons(PLAIN) == ["Triton is not installed"]
    finally:
        support._missing.cache_clear()


def test_the_interpreter_is_for_checking(gpu):
    on_cpu = replace(PLAIN, device="cpu")
    (reason,) = TRITON.not_supported_reasons(on_cpu)
    assert "TRITON_INTERPRET=1" in reason
    gpu.setenv("TRITON_INTERPRET", "1")
    assert TRITON.not_supported_reasons(on_cpu) == []
    (reason,) = TRITON.not_supported_reasons(PLAIN)
    assert "unset it to use the GPU" in reason


def test_auto_never_takes_the_interpreter(gpu):
    gpu.setenv("TRITON_INTERPRET", "1")
    gpu.setattr(NativeBackend, "not_supported_reasons", lambda self, problem: ["out of the way"])
    select.cache_clear()
    try:
        problem = replace(PLAIN, device="cpu")
        assert not TRITON.not_supported_reasons(problem)
        assert select("auto", problem).name != "triton"
        assert select("triton", problem).name == "triton"
    finally:
        select.cache_clear()


def test_a_call_on_a_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layout = LocalWindow(window_size=32).layout(64, block_size=16)
    q = torch.zeros(1, 64, 2, 16)
    with pytest.raises(ValueError, match="'triton' cannot compute this: it runs on GPUs"):
        block_sparse_attention(q, q, q, layout, backend="triton")
    report = next(report for report in explain_backends(q, q, q, layout) if report.name == "triton")
    assert not report.supported
    assert not report.selected


# -- tiles -------------------------------------------------------------------------------------------------------------

HOPPER = Target("H100", "sm90", 227 << 10)
SHAPES = [
    Shape(kernel, dtype, dim, extent)
    for kernel in ("forward", "rows", "columns")
    for dtype in (torch.bfloat16, torch.float32)
    for dim in (16, 64, 128, 256)
    for extent in ((1, 64), (7, 5), (64, 64), (80, 48), (128, 128), (512, 512))
]


@pytest.fixture
def untuned(monkeypatch):
    monkeypatch.setenv("BS_KERNELS_TUNING", "off")
    config._tuned.cache_clear()
    yield
    config._tuned.cache_clear()


@pytest.mark.parametrize("target", [HOPPER, Target("A10", "sm80", 99 << 10), Target("MI300X", "hip", 64 << 10)])
@pytest.mark.usefixtures("untuned")
def test_choices_are_valid_and_only_ever_shrink(target):
    for shape in SHAPES:
        found = list(candidates(target, shape))
        assert found == list(candidates(target, shape))  # a pure function
        for at in found:
            assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in (at.tile_m, at.tile_n)), (shape, at)
            assert at.warps in (1, 2, 4, 8)
            assert at.stages >= 1
        sizes = [(c.tile_m * c.tile_n, c.stages) for c in found]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(found)) == len(found)
        assert (found[-1].tile_m, found[-1].tile_n, found[-1].stages) == (16, 16, 1)
        assert not any(at.descriptors for at in found)  # never unless a measurement chose them


@pytest.mark.parametrize(("extent", "tile"), [(1, 16), (16, 16), (48, 64), (64, 64), (80, 128), (128, 128), (512, 128)])
@pytest.mark.usefixtures("untuned")
def test_tiles_waste_little(extent, tile):
    shape = Shape("forward", torch.bfloat16, 64, (extent, extent))
    assert next(candidates(HOPPER, shape)).tile_m == tile


def test_measured_choices_replace_the_table(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "triton.json"
    monkeypatch.setenv("BS_KERNELS_TUNING", str(path))
    config._tuned.cache_clear()
    shape = Shape("forward", torch.bfloat16, 128, (128, 128))
    assert config.tuned_path() == path
    before = next(candidates(HOPPER, shape))
    chosen = Config(64, 32, 2, 1, descriptors=True, waves=0)
    config.write_tuned(path, HOPPER.name, {shape.key: chosen})
    try:
        assert next(candidates(HOPPER, shape)) == chosen
        assert next(candidates(replace(HOPPER, name="another"), shape)) == before
        config.write_tuned(path, HOPPER.name, {"other": Config(16, 16, 1, 1)})
        assert config.read_tuned(path, HOPPER.name) == {shape.key: chosen, "other": Config(16, 16, 1, 1)}
    finally:
        config._tuned.cache_clear()


def test_files_of_four_numbers_are_read(tmp_path):
    path = tmp_path / "triton.json"
    path.write_text('{"H100": {"x": [16, 32, 4, 1]}}')
    assert config.read_tuned(path, "H100") == {"x": Config(16, 32, 4, 1)}


@pytest.mark.parametrize(
    ("programs", "steps", "expected"),
    [
        (1, 1000, 64),
        (8, 1000, 32),
        (8, 100, 16),
        (100, 1000, 2),
        (264, 1000, 1),
        (10**6, 10**6, 1),
        (1, 3, 1),
        (0, 0, 1),
    ],
)
def test_rows_are_cut_where_programs_are_few(programs, steps, expected):
    device = replace(HOPPER, processors=132)
    assert config.pieces(device, Config(16, 64, 4, 2), programs, steps) == expected
    assert config.pieces(device, Config(16, 64, 4, 2, waves=0), programs, steps) == 1
    assert config.pieces(HOPPER, Config(16, 64, 4, 2), programs, steps) == 1


def test_files_that_make_no_sense_count_as_absent(tmp_path):
    path = tmp_path / "triton.json"
    assert config.read_tuned(path, "H100") == {}
    entries = ("[1, 2]", '["a", 1, 1, 1]', "[17, 16, 4, 1]", "[16, 16, 4, 1.5]", "null", "[16, 16, 4, 1, 2, 2]")
    entries += ("[16, 16, 4, 1, 1]", "[16, 16, 4, 1, 1, -1]")
    for text in ("{", "[]", '{"H100": 3}', *(f'{{"H100": {{"x": {entry}}}}}' for entry in entries)):
        path.write_text(text)
        assert config.read_tuned(path, "H100") == {}, text
        config.write_tuned(path, "H100", {"y": Config(16, 16, 1, 1)})
        assert config.read_tuned(path, "H100")["y"] == Config(16, 16, 1, 1), text


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "triton.json"
    config.write_tuned(path, "H100", {"x": Config(16, 16, 1, 1)})
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(json.loads(path.read_text())["H100"]["x"])

    reader = threading.Thread(target=read)
    reader.start()
    for at in range(100):
        config.write_tuned(path, "H100", {"x": Config(16, 16, 1, 1 + at % 3)})
    done.set()
    reader.join()
    assert seen
    assert all(len(values) == 6 for values in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["triton.json"]
