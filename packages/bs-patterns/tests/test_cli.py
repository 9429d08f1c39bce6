"""`python -m bs_patterns show`: every pattern by name, honest figures, one clear line for every mistake."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import bs_patterns
from bs_patterns import (
    BigBird,
    BlockLayout,
    Difference,
    DilatedSparse,
    Fixed,
    GlobalLocal,
    Hierarchical,
    HierarchicalLevel,
    Intersection,
    LocalWindow,
    LongNetSegments,
    Union,
)
from bs_patterns.cli import main
from bs_patterns.options import canonical, pattern_classes
from bs_patterns.ordering import group_rows, hilbert_order, locality, row_order
from bs_patterns.render import render_text


def show(capsys, *words, status=0):
    """Run `show` and return what it printed; errors and notes are one line each."""
    found = main(["show", *map(str, words)])
    out, err = capsys.readouterr()
    assert found == status, err
    assert all(line.startswith(("python -m bs_patterns: error: ", "note: ")) for line in err.splitlines())
    if status:
        assert out == ""
        assert len(err.splitlines()) == 1
    return err if status else out


def figure(out, label):
    return re.search(rf"^{re.escape(label)}  +(.*)$", out, re.M)[1]


@pytest.mark.parametrize("name", sorted(pattern_classes()))
def test_every_pattern_is_shown_by_name(capsys, name):
    out = show(capsys, name, "--tokens", 1000, "--causal", "--density", 0.3)
    assert figure(out, "requested") == "0.3"
    assert float(figure(out, "density")) == pytest.approx(0.3, abs=0.2)


def test_every_pattern_class_that_words_can_describe_is_offered():
    composed = {"Custom", "Difference", "Intersection", "PerHead", "Union"}
    classes = {name for name in bs_patterns.__all__ if dataclasses.is_dataclass(getattr(bs_patterns, name))}
    patterns = {name for name in classes if issubclass(getattr(bs_patterns, name), bs_patterns.Pattern)}
    assert {cls.__name__ for cls in pattern_classes().values()} == patterns - composed
    for name, cls in pattern_classes().items():
        assert canonical(cls.__name__) == canonical(name.replace("_", "-")) == name


@pytest.mark.parametrize(
    ("line", "pattern", "options"),
    [
        ("local_window", LocalWindow(256), {}),
        ("LocalWindow --window-size 1K --causal", LocalWindow(1024), {"causal": True}),
        ("global-local --global-tokens 100 --block-size 32,64", GlobalLocal(100, 256), {"block_size": (32, 64)}),
        ("dilated_sparse --dilation-rates 2 4,8", DilatedSparse([2, 4, 8]), {}),
        (
            "hierarchical --levels 1:128:64 4:-1:64",
            Hierarchical([HierarchicalLevel(1, 128, 64), HierarchicalLevel(4, -1, 64)]),
            {},
        ),
        (
            "bigbird --seed 7 --different-layout-per-head --heads 3",
            BigBird(seed=7, different_layout_per_head=True),
            {"heads": 3},
        ),
        ("big_bird --attention unidirectional --density 0.2", BigBird(attention="unidirectional"), {"density": 0.2}),
        (
            "fixed --density 0.2 --segment-lengths 512 1K --segment-rates 1,2",
            Fixed(),
            {"density": 0.2, "candidates": LongNetSegments([512, 1024], [1, 2])},
        ),
        (
            "local_window --union global-local --union dilated_sparse\\ --dilation-rates\\ 16 --density 0.4",
            Union([LocalWindow(256), GlobalLocal(64, 256), DilatedSparse([16])]),
            {"density": 0.4},
        ),
        (
            "local_window --window-size 1K --difference local_window\\ --window-size\\ 256",
            Difference([LocalWindow(1024), LocalWindow(256)]),
            {},
        ),
        (
            "local_window --intersection dilated_sparse\\ --dilation-rates\\ 2",
            Intersection([LocalWindow(256), DilatedSparse([2])]),
            {},
        ),
        (
            "hierarchical --auto-levels --density 0.1 --block-size 32 --causal",
            Hierarchical.auto(2000, 0.1, block_size=32),
            {"density": 0.1, "block_size": 32, "causal": True},
        ),
    ],
    ids=str,
)
def test_options_are_the_fields_of_the_pattern(capsys, line, pattern, options):
    out = show(capsys, *shlex.split(line), "--tokens", 2000, "--width", 64)
    layout = pattern.layout(2000, **options)
    assert out.startswith(render_text(layout, width=64))
    assert figure(out, "active blocks") == f"{layout.nnz:,} of {layout.allowed:,} allowed"


def test_lengths_and_blocks_of_queries_and_keys_may_differ(capsys):
    out = show(capsys, "local_window", "--tokens", "100,4K", "--block-size", 32)
    assert "1 head, 4 × 128 blocks of 32 × 32 tokens" in out


def test_figures_are_those_of_the_layout(capsys):
    layout = LocalWindow(300).layout(1000, block_size=64, heads=2, causal=True)
    out = show(
        capsys, "local_window", "--window-size", 300, "--tokens", 1000, "--causal",
        "--heads", 2, "--head-dim", 128, "--dtype", "float32",
    )  # fmt: skip
    stats = layout.stats()
    assert float(figure(out, "density")) == pytest.approx(layout.density, rel=1e-5)
    per_row = np.diff(layout.indptr, axis=1)
    assert figure(out, "blocks per row") == f"{per_row.min()} min, {np.median(per_row):g} median, {per_row.max()} max"
    assert figure(out, "reach") == f"{stats['reach']:,} tokens"
    assert figure(out, "index") == f"{stats['bytes']:,} B"
    assert figure(out, "K/V touched") == "2.0 MiB of 2.0 MiB"  # 2 heads × 1000 keys × K and V × 128 × 4 bytes
    assert figure(out, "FLOPs").endswith(f"dense ({stats['flops_ratio']:.4g})")
    assert "head dim 128 in float32" in out


def test_only_the_keys_that_some_query_sees_are_counted(capsys, tmp_path):
    file = tmp_path / "layout.npz"
    BlockLayout.from_coo(0, [0, 1, 1], [0, 0, 3], block_size=64, seq_len=(128, 200)).save(file)
    out = show(capsys, file, "--head-dim", 1, "--dtype", "float16")
    assert figure(out, "K/V touched") == "288 B of 800 B"  # 64 and 8 of 200 keys, 2 × 2 bytes each


def test_orders_are_measured(capsys):
    out = show(capsys, "dense", "--tokens", 2048, "--order", "hilbert", "--cache-blocks", 16, "--block-size", 32)
    layout = pattern_classes()["dense"]().layout(2048, block_size=32)
    own = hilbert_order(layout)
    misses = [locality(layout, order, 16).misses for order in (own, group_rows(layout, own), row_order(layout))]
    assert (
        "misses of 4,096 loads, LRU cache of 16 key blocks: hilbert {:,}, hilbert row by row {:,}, row {:,}".format(
            *misses
        )
        in out
    )
    assert out.rstrip().endswith("unavoidable 64")
    assert misses[0] < misses[2] / 4


def test_layouts_are_compared(capsys):
    out = show(
        capsys, "local_window", "--density", 0.2, "--tokens", 1024, "--compare", "big_bird --seed 3", "--width", 90
    )
    left = LocalWindow(256).layout(1024, density=0.2)
    right = BigBird(seed=3).layout(1024, block_size=64, density=0.2)
    assert out.startswith(render_text(left, right, width=90, titles=("local_window", "big_bird")))
    assert re.search(r"^requested +0\.2 +0\.2$", out, re.M)
    out = show(capsys, "local_window", "--tokens", 1024, "--compare", "local_window --density 0.5")
    assert re.search(r"^ +local_window +local_window --density 0\.5$", out, re.M)


def test_saved_layouts_are_shown(capsys, tmp_path):
    layout = GlobalLocal(64, 256).layout(3000, causal=True)
    layout.save(tmp_path / "mine.npz")
    assert show(capsys, tmp_path / "mine.npz", "--width", 40).startswith(render_text(layout, width=40))
    show(capsys, tmp_path / "mine.npz", "--compare", "dilated_sparse --density 0.2")
    assert "unrecognized arguments: --density" in show(capsys, tmp_path / "mine.npz", "--density", 0.5, status=2)


def test_images_are_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    show(capsys, "local_window", "--png", tmp_path / "a.png", "--svg", tmp_path / "b.svg", "--compare", "dense")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "b.svg").read_bytes()


def test_segments_restrict_and_say_what_was_met(capsys):
    words = ["local_window", "--tokens", "1000", "--density", "0.5", "--segment-lengths", "128", "--segment-rates", "1"]
    assert main(["show", *words]) == 0
    out, err = capsys.readouterr()
    assert figure(out, "density") == "0.125"
    assert err.startswith("note: candidates: only 32 of 256 allowed blocks")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a PATTERN, got nothing"),
        (["--tokens", "9"], "expected a PATTERN first, got '--tokens'"),
        (["nonsense"], "unknown pattern 'nonsense'; expected one of big_bird, bs_longformer, "),
        (["dense", "--union", "nonsense"], "--union: unknown pattern 'nonsense'"),
        (["dense", "--union", "fixed --blok 3"], "--union fixed: unrecognized arguments: --blok 3"),
        (["dense", "--union", "fixed", "--difference", "fixed"], "--difference: expected one kind"),
        (["dense", "--union", "hierarchical --auto-levels"], "--union: --auto-levels works for the first"),
        (["hierarchical", "--auto-levels"], "--auto-levels: expected --density beside it, got none"),
        (["hierarchical", "--auto-levels", "--density", "0.1", "--levels", "1:64:64"], "expected no --levels"),
        (["local_window", "--dilation-rates", "1", "2"], "local_window: unrecognized arguments: --dilation-rates 1 2"),
        (["local_window", "--window", "9"], "unrecognized arguments: --window 9"),
        (["local_window", "extra"], "unrecognized arguments: extra"),
        (
            ["local_window", "--window-size", "wide"],
            "--window-size: expected an integer such as 4096 or 64K, got 'wide'",
        ),
        (["local_window", "--window-size", "0"], "window_size: expected an integer ≥ 1, got 0"),
        (["local_window", "--density", "0"], "density: expected a number in (0, 1], got 0.0"),
        (["local_window", "--density", "nan"], "density: expected a number in (0, 1], got nan"),
        (["local_window", "--density", "much"], "--density: expected a number, got 'much'"),
        (["local_window", "--tokens", "0"], "--tokens: expected N or N,M, each at least 1, got 0"),
        (["local_window", "--tokens", "-4"], "--tokens: expected N or N,M, each at least 1, got -4"),
        (["local_window", "--tokens", "1,2,3"], "--tokens: expected N or N,M, each at least 1, got 1,2,3"),
        (["local_window", "--block-size", "0"], "--block-size: expected N or N,M"),
        (["local_window", "--tokens", "9" * 30], "seq_len"),
        (["local_window", "--heads", "0"], "heads: expected an integer ≥ 1, got 0"),
        (["local_window", "--head", "1"], "head: expected an integer in [0, 0], got 1"),
        (["local_window", "--width", "2"], "width: expected an integer in [16, 1000], got 2"),
        (["local_window", "--head-dim", "0"], "head_dim: expected an integer ≥ 1, got 0"),
        (["local_window", "--order", "random"], "--order: invalid choice: 'random'"),
        (["local_window", "--cache-blocks", "4"], "--cache-blocks: expected --order beside it, got none"),
        (["local_window", "--order", "row", "--cache-blocks", "0"], "cache_blocks: expected an integer ≥ 1, got 0"),
        (["local_window", "--segment-lengths", "64"], "--segment-lengths, --segment-rates: expected both or neither"),
        (
            ["local_window", "--segment-lengths", "64", "--segment-rates", "1", "2"],
            "expected equally many, got 1 and 2",
        ),
        (["dilated_sparse"], "dilation_rates: expected rates ≥ 2 when there is neither density nor candidates"),
        (["hierarchical", "--levels", "1:2"], "--levels: expected stride:window_size:block_size, got '1:2'"),
        (["big_bird", "--seed", "-1"], "seed: expected an integer ≥ 0, got -1"),
        (["local_window", "--compare", "nonsense"], "argument --compare: unknown pattern 'nonsense'"),
        (["local_window", "--compare", "'"], "argument --compare: No closing quotation"),
        (["local_window", "--compare", ""], "argument --compare: unknown pattern ''"),
        (["local_window", "--compare", "dense --png x.png"], "--compare: dense: unrecognized arguments: --png x.png"),
        (["local_window", "--compare", "dense --tokens 99"], "other: expected a layout of the same grid"),
        (["local_window", "--png", "picture.jpg"], "--png: expected a file name that ends in .png, got 'picture.jpg'"),
        (["local_window", "--svg", "picture.png"], "--svg: expected a file name that ends in .svg, got 'picture.png'"),
        (["missing.npz"], "No such file or directory: 'missing.npz'"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_mistakes_are_one_clear_line_and_status_2(capsys, words, message):
    assert message in show(capsys, *words, status=2)


def test_a_damaged_file_and_an_unwritable_image_are_refused(capsys, tmp_path):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 not a layout")
    assert "expected a layout file written by BlockLayout.save" in show(capsys, damaged, status=2)
    pytest.importorskip("matplotlib")
    image = tmp_path / "nowhere" / "x.png"
    assert f"No such file or directory: '{image}'" in show(capsys, "local_window", "--png", image, status=2)


@pytest.mark.parametrize("words", [[], ["--help"], ["show", "--help"], ["show", "bigbird", "--help"]], ids=" ".join)
def test_help(capsys, words):
    assert main(words, prog="anything") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: anything show")
    assert "window" in out


def test_other_commands_are_refused(capsys):
    assert main(["draw", "local_window"], prog="anything") == 2
    assert capsys.readouterr().err == "anything: error: expected the command 'show', got 'draw'\n"


def run(words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "bs_patterns", *words],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_as_a_program_on_any_terminal():
    words = ["show", "local_window", "--tokens", "256", "--causal"]
    status, out, err = run(words, PYTHONIOENCODING="utf-8")
    assert (status, err) == (0, b"")
    assert "██" in out.decode()
    status, out, err = run(words, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, b"")
    assert b"##" in out
    assert run([*words, "--help"], PYTHONIOENCODING="ascii")[0] == 0
    status, out, err = run(["show", "what"])
    assert (status, out) == (2, b"")
    assert err.count(b"\n") == 1
    assert b"Traceback" not in err


def test_a_reader_that_stops_early_is_no_error():
    program = (
        f"{sys.executable} -m bs_patterns show local_window --width 1000 --tokens 1M | head -1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", f"{program} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == b"0"
    assert done.stderr == b""
