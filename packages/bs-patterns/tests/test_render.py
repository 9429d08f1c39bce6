"""Pictures of layouts: what a cell shows is counted, frames are straight, files are whole or absent."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_patterns import BlockLayout
from bs_patterns._coverage import coverage
from bs_patterns.render import render_figure, render_text, save_image


def band(rows, cols, width=1, *, causal=False, heads=1, block=64, short=0):
    offset = np.abs(np.arange(rows)[:, None] - np.arange(cols))
    mask = np.stack([offset <= width + head for head in range(heads)])
    return BlockLayout.from_dense(mask, block_size=block, seq_len=(rows * block, cols * block - short), causal=causal)


@st.composite
def layouts(draw, heads=3, side=25):
    shape = draw(st.tuples(st.integers(1, heads), st.integers(1, side), st.integers(1, side)))
    mask = draw(hnp.arrays(np.bool_, shape))
    seq_len = (shape[1] * 6 - draw(st.integers(0, 5)), shape[2] * 10 - draw(st.integers(0, 9)))
    return BlockLayout.from_dense(mask, block_size=(6, 10), seq_len=seq_len, causal=draw(st.booleans()))


def body(text):
    """The characters inside the frame of a single picture, line by line."""
    return [line.split("│")[1] if line.count("│") == 2 else line.split("┤")[1].rstrip("│") for line in framed(text)]


def framed(text):
    lines = text.splitlines()
    top = next(n for n, line in enumerate(lines) if "┌" in line)
    low = next(n for n, line in enumerate(lines) if "└" in line)
    return lines[top + 1 : low]


@given(layouts(), st.integers(1, 30), st.integers(1, 30))
def test_coverage_counts_active_and_allowed_blocks(layout, lines, columns):
    heads = list(range(layout.heads))
    view = coverage(layout._blocks, heads, lines, columns)
    every = BlockLayout.from_dense(
        np.ones(layout.shape, bool), block_size=layout.block_size, seq_len=layout.seq_len, causal=layout.causal
    )
    for counts, source in ((view.active, layout), (view.allowed, every)):
        dense = source.to_dense().sum(axis=0)
        for line in range(counts.shape[0]):
            for column in range(counts.shape[1]):
                rows, cols = view.row_edges[line : line + 2], view.column_edges[column : column + 2]
                assert counts[line, column] == dense[rows[0] : rows[1], cols[0] : cols[1]].sum()
    assert view.row_edges[-1] == layout.shape[1]
    assert view.column_edges[-1] == layout.shape[2]
    assert len(view.row_edges) == min(lines, layout.shape[1]) + 1
    assert (np.diff(view.row_edges) > 0).all()


@given(layouts(heads=1, side=16))
def test_small_layouts_are_drawn_block_by_block(layout):
    glyphs = {"██": 1, "··": 0, "  ": -1}
    drawn = [[glyphs[line[k : k + 2]] for k in range(0, len(line), 2)] for line in body(render_text(layout))]
    allowed = layout._grid.allowed_per_row()[:, None] > np.arange(layout.shape[2])
    assert np.array_equal(drawn, np.where(allowed, layout.to_dense()[0].astype(int), -1))


@given(layouts(side=60), st.integers(16, 80), st.booleans())
def test_frames_are_straight_at_any_width(layout, width, ascii_only):
    text = render_text(layout, width=width, ascii_only=ascii_only)
    assert text.isascii() or not ascii_only
    lines = text.splitlines()
    low = next(n for n, line in enumerate(lines) if n > 2 and re.fullmatch(r"[\d, ]*[└+][─-]+[┘+]", line))
    length = len(lines[low])
    margin = re.search("[└+]", lines[low]).start()
    assert all(len(line) == length for line in lines[2 : low + 1])
    assert length - margin - 2 <= width
    assert f"{layout.seq_len[0]:,}" in lines[low]
    ticks = lines[2].count("+") - 2 if ascii_only else lines[2].count("┴")
    assert len(lines[1].split()) in ({ticks + 1} if ticks else {0})


def test_text_of_a_causal_band():
    assert render_text(band(5, 5, causal=True, block=16, short=3)) == (
        "1 head, 5 × 5 blocks of 16 × 16 tokens, causal, density 0.6 (9 active)\n"
        "    0  32    77\n"
        "   ┌┴───┴─────┐\n"
        " 0 ┤██        │\n"
        "   │████      │\n"
        "32 ┤··████    │\n"
        "   │····████  │\n"
        "   │······████│\n"
        "80 └──────────┘\n"
        "█ active  · not active\n"
        "blank: keys after the query"
    )


def test_shades_follow_the_share_of_active_blocks():
    mask = np.zeros((1, 64, 64), bool)
    mask[0, :, :16] = True  # all, three quarters, a half, none of each pair of rows and pair of columns
    mask[0, :, 16:32] = np.indices((64, 16)).sum(axis=0) % 4 != 0
    mask[0, :, 32:48] = np.indices((64, 16))[0] % 2 == 0
    layout = BlockLayout.from_dense(mask, block_size=8, seq_len=512)
    text = render_text(layout, width=16)
    assert body(text) == ["████▓▓▓▓▒▒▒▒····"] * 8
    assert "(8 × 4 blocks): · none  ░ ≤ 25 %  ▒ ≤ 50 %  ▓ ≤ 75 %  █ ≤ 100 %" in text


def test_a_single_active_block_among_millions_is_seen():
    layout = BlockLayout.from_coo(0, [7000], [123], block_size=64, seq_len=2**20)
    text = render_text(layout)
    assert sum(line.count("█") for line in body(text)) == 1
    assert "1,048,576" in text


def test_heads_are_drawn_together_or_one_by_one():
    layout = band(8, 8, 0, heads=3)
    together = body(render_text(layout))
    assert together[0][:6] == "██▓▓▒▒"
    assert body(render_text(layout, head=1))[0][:6] == "████··"
    with pytest.raises(ValueError, match=r"head: expected an integer in \[0, 2\], got 3"):
        render_text(layout, head=3)


def test_two_layouts_and_their_difference_stand_side_by_side():
    left, right = band(6, 6, 0), BlockLayout.from_dense(np.eye(6, dtype=bool)[None, ::-1], block_size=64, seq_len=384)
    text = render_text(left, right, titles=("main", "anti"))
    assert text.splitlines()[0].startswith("main: 1 head, 6 × 6 blocks")
    first = framed(text)[0]
    assert [part for part in first.split("┤")[1].replace("│ │", "│").split("│") if part] == [
        "██··········",
        "··········██",
        "--········++",
    ]
    shared = render_text(band(4, 4, 0, heads=2), band(4, 4, 0))
    assert "░ in both  - left only  + right only  ± some of each" in shared


def test_print_draws_the_layout():
    layout = band(300, 200, 3, causal=True)
    assert str(layout) == render_text(layout)
    assert "BlockLayout(" in repr(layout)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 3}, ValueError, r"width: expected an integer in \[16, 1000\], got 3"),
        ({"width": "wide"}, TypeError, "width"),
        ({"ascii_only": 1}, TypeError, "ascii_only: expected True or False"),
        ({"head": 1}, ValueError, r"head: expected an integer in \[0, 0\], got 1"),
        ({"titles": ("a", "b")}, ValueError, "titles: expected None without a second layout"),
        ({"other": 5}, TypeError, "other: expected a BlockLayout or None, got 5"),
        ({"other": band(5, 4)}, ValueError, "other: expected a layout of the same grid"),
        ({"other": band(4, 4), "titles": "ab"}, TypeError, "titles: expected a pair of strings"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        render_text(band(4, 4), **options)
    with pytest.raises(TypeError, match="layout: expected a BlockLayout"):
        render_text(np.eye(3))


class TestImages:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize(
        ("layout", "other", "panels"),
        [
            (band(9, 9, causal=True), None, 1),
            (band(30, 300, 4, heads=6), None, 6),
            (band(1, 1), None, 1),
            (band(700, 90, 9, heads=2), band(700, 90, 2), 6),
            (BlockLayout.from_dense(np.zeros((1, 3, 3), bool), block_size=4, seq_len=12), None, 1),
        ],
        ids=["causal", "heads", "one-block", "change", "empty"],
    )
    def test_figures_have_a_panel_per_head(self, layout, other, panels, tmp_path):
        figure = render_figure(layout, other, cells=64)
        drawn = [axis for axis in figure.axes if axis.get_images()]
        assert len(drawn) == panels
        for axis in drawn:
            assert axis.get_xlim() == (0, layout.seq_len[1])
            assert axis.get_ylim() == (layout.seq_len[0], 0)
            assert max(axis.get_images()[0].get_array().shape[:2]) <= 64
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            file = tmp_path / f"picture{suffix}"
            save_image(file, layout, other, cells=64)
            assert file.read_bytes().startswith(magic)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "picture.svg"]

    def test_pixels_say_which_blocks_are_active(self):
        mask = np.zeros((1, 4, 4), bool)
        mask[0, 1, 2] = True
        layout = BlockLayout.from_dense(mask, block_size=8, seq_len=32, causal=False)
        pixels = render_figure(layout).axes[0].get_images()[0].get_array()
        darkness = 1 - np.asarray(pixels).mean(axis=-1)
        assert np.unravel_index(darkness.argmax(), (4, 4)) == (1, 2)
        assert len(np.unique(darkness.round(6))) == 2
        causal = render_figure(layout.as_causal()).axes[0].get_images()[0].get_array()
        assert np.array_equal((np.asarray(causal) == 1).all(axis=-1), np.triu(np.ones((4, 4), bool), 1))

    def test_heads_can_be_chosen_and_must_be_few(self, tmp_path):
        layout = band(4, 4, heads=70)
        assert len(render_figure(layout, heads=[0, 69]).axes) == 2
        with pytest.raises(ValueError, match="heads: expected at most 64 to draw, got 70"):
            render_figure(layout)
        with pytest.raises(ValueError, match=r"heads: expected an integer in \[0, 69\], got 70"):
            save_image(tmp_path / "x.png", layout, heads=[70])
        assert not list(tmp_path.iterdir())

    def test_bad_files_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"file: expected a name that ends in \.png or \.svg"):
            save_image(tmp_path / "picture.jpg", band(3, 3))
        with pytest.raises(FileNotFoundError, match=r"x\.png'$"):
            save_image(tmp_path / "nowhere" / "x.png", band(3, 3))
        with pytest.raises(ValueError, match="title: expected None with a second layout"):
            render_figure(band(3, 3), band(3, 3), title="two")
        with pytest.raises(TypeError, match="title: expected a string or None, got 5"):
            render_figure(band(3, 3), title=5)
        assert not list(tmp_path.iterdir())


def test_without_matplotlib_text_works_and_images_say_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
import numpy as np
from bs_patterns import BlockLayout
from bs_patterns.render import save_image
layout = BlockLayout.from_dense(np.eye(3, dtype=bool)[None], block_size=4, seq_len=12)
print(layout)
try:
    save_image("never.png", layout)
except ImportError as error:
    assert "bs-patterns[plot]" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
