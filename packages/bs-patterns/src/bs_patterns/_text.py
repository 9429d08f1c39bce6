"""Layouts as text: shades on a grid with axes in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._coverage import Coverage, coverage
from ._grid import Blocks, Grid

Cells = NDArray[np.str_]

#: Characters inside the frame, unless told otherwise.
WIDTH = 64


class Glyphs(NamedTuple):
    """What cells and frames are drawn with.

    `shades`: nothing allowed, nothing active, then four steps up to the fullest cell. `changes`: nothing allowed,
    neither, both, left only, right only, some of each.
    """

    shades: str
    changes: str
    frame: str  # corner ×4, horizontal, vertical, tick above, tick at the left
    times: str
    up_to: str
    more: str


UNICODE = Glyphs(" ·░▒▓█", " ·░-+±", "┌┐└┘─│┴┤", "×", "≤", "…")
ASCII = Glyphs(" .:=%#", " .:-+x", "++++-|++", "x", "<=", "~")


@dataclass(frozen=True)
class _Canvas:
    """The cells of a picture: how many, how many characters each is wide, and the ticks by position."""

    lines: int
    columns: int
    stretch: int
    ruler: str
    x_ticks: frozenset[int]
    y_ticks: dict[int, str]

    @property
    def width(self) -> int:
        return self.columns * self.stretch


def summary(blocks: Blocks, times: str) -> str:
    """One line: sizes, causality, density."""
    grid, heads = blocks.grid, blocks.heads
    (rows, cols), (block_q, block_k) = grid.shape, grid.block_size
    return (
        f"{heads} head{'s' * (heads > 1)}, {rows:,} {times} {cols:,} blocks of {block_q:,} {times} {block_k:,} tokens, "
        f"{'causal' if grid.causal else 'not causal'}, density {blocks.density:.4g} ({len(blocks.indices):,} active)"
    )


def picture(blocks: Blocks, heads: Sequence[int], width: int, glyphs: Glyphs) -> list[str]:
    """Lines of a summary, of a framed picture of some heads over one another, and of its legend."""
    canvas = _canvas(blocks.grid, width)
    view = coverage(blocks, heads, canvas.lines, canvas.columns)
    top = float(view.share.max())
    out = _framed(canvas, [("", _shaded(view, top, glyphs))], glyphs)
    return [summary(blocks, glyphs.times), *out, *_legend(blocks.grid, view, top, len(heads), glyphs)]


def pictures_of_change(
    parts: Sequence[Blocks], heads: Sequence[int], width: int, titles: tuple[str, str], glyphs: Glyphs
) -> list[str]:
    """Lines of the summaries of two layouts, of both and their difference side by side, and of the legend.

    Args:
        parts: Those of either layout, those of the left alone, of the right alone, and of both.
        heads: The heads to draw.
        width: Characters of all panels together.
        titles: Of either layout.
        glyphs: To draw with.
    """
    canvas = _canvas(parts[0].grid, (width - 2) // 3)
    views = [coverage(part, [0] if part.heads == 1 else heads, canvas.lines, canvas.columns) for part in parts]
    top = max(float(view.share.max()) for view in views[:2])
    left, right, both = (view.active > 0 for view in views[2:])
    change = np.select([left & right, left, right, both, views[0].allowed > 0], [5, 3, 4, 2, 1], 0)
    panels = [(title, _shaded(view, top, glyphs)) for title, view in zip(titles, views, strict=False)]
    panels.append(("difference", np.array(list(glyphs.changes))[change]))
    meanings = zip(glyphs.changes[2:], ("in both", "left only", "right only", "some of each"), strict=True)
    out = [f"{title}: {summary(part, glyphs.times)}" for title, part in zip(titles, parts, strict=False)]
    out += [*_framed(canvas, panels, glyphs), *_legend(parts[0].grid, views[0], top, len(heads), glyphs)]
    return [*out, "difference: " + "  ".join(f"{glyph} {meaning}" for glyph, meaning in meanings)]


def _canvas(grid: Grid, width: int) -> _Canvas:
    """Two characters a block if all blocks fit; else one per cell, whose height is twice its width in tokens."""
    rows, cols = grid.shape
    if 2 * cols <= width and rows <= width:
        lines, columns, stretch = rows, cols, 2
    else:
        columns, stretch = min(cols, width), 1
        height = columns * grid.seq_len[0] / grid.seq_len[1] / 2
        lines = min(rows, max(1, round(height)), width)
    y_labels = _labels(lines, rows, grid.block_size[0], grid.seq_len[0])
    y_ticks = next((ticks for ticks in y_labels if lines >= 2 * (len(ticks) - 1)), y_labels[-1])
    for ticks in _labels(columns, cols, grid.block_size[1], grid.seq_len[1]):
        ticks = {at * stretch: label for at, label in ticks.items()}
        ruler = _ruler(ticks, columns * stretch)
        if ruler is not None:
            return _Canvas(lines, columns, stretch, ruler, frozenset(ticks), y_ticks)
    return _Canvas(lines, columns, stretch, " " * (columns * stretch + 2), frozenset(), y_ticks)


def _labels(cells: int, blocks: int, block_size: int, length: int) -> list[dict[int, str]]:
    """Ticks by cell, the finest choice first: eighths, quarters, halves, ends of the axis."""
    choices = []
    for parts in (8, 4, 2, 1):
        cuts = [cells * n // parts for n in range(parts + 1)]
        if parts == 1 or len(set(cuts)) == len(cuts):
            choices.append({cut: f"{min(cut * blocks // cells * block_size, length):,}" for cut in cuts})
    return choices


def _ruler(ticks: dict[int, str], width: int) -> str | None:
    """Labels centred on their ticks above a frame `width` wide inside; None if they do not fit."""
    line, end = "", -1
    for at, label in ticks.items():
        begin = min(max(at + 1 - len(label) // 2, 0), width + 2 - len(label))
        if begin <= end:
            return None
        line = line.ljust(begin) + label
        end = begin + len(label)
    return line.ljust(width + 2)


def _shaded(view: Coverage, top: float, glyphs: Glyphs) -> Cells:
    """The fullest cell of the picture has the darkest shade, in four even steps."""
    step = np.ceil(view.share / (top or 1.0) * 4 - 1e-9).astype(np.intp)
    number = np.where(view.active > 0, 1 + np.maximum(step, 1), np.where(view.allowed > 0, 1, 0))
    return np.array(list(glyphs.shades))[number]


def _framed(canvas: _Canvas, panels: Sequence[tuple[str, Cells]], glyphs: Glyphs) -> list[str]:
    """Panels side by side: key tokens above, query tokens at the left."""
    top_left, top_right, low_left, low_right, dash, bar, tick, side = glyphs.frame
    count, width = len(panels), canvas.width
    margin = max(map(len, canvas.y_ticks.values()))
    top = "".join(tick if at in canvas.x_ticks else dash for at in range(width))
    out = []
    if count > 1:
        titles = [title if len(title) <= width else title[: width - 1] + glyphs.more for title, _ in panels]
        out.append(("", " ".join(title.center(width + 2) for title in titles)))
    out.append(("", " ".join([canvas.ruler] * count)))
    out.append(("", " ".join([top_left + top + top_right] * count)))
    for line in range(canvas.lines):
        label = canvas.y_ticks.get(line, "")
        body = " ".join(bar + "".join(np.repeat(cells[line], canvas.stretch)) + bar for _, cells in panels)
        out.append((label, side + body[1:] if label else body))
    out.append((canvas.y_ticks.get(canvas.lines, ""), " ".join([low_left + dash * width + low_right] * count)))
    return [f"{label:>{margin}} {text}".rstrip() for label, text in out]


def _legend(grid: Grid, view: Coverage, top: float, heads: int, glyphs: Glyphs) -> list[str]:
    shades = glyphs.shades
    if view.is_exact:
        out = [f"{shades[5]} active  {shades[1]} not active"]
    elif not top:
        out = [f"{shades[1]} no block is active"]
    else:
        steps = "  ".join(f"{shade} {glyphs.up_to} {25 * top * n:.3g} %" for n, shade in enumerate(shades[2:], 1))
        of_heads = f" of {heads} heads" if heads > 1 else ""
        cell = f"{_span(view.row_edges)} {glyphs.times} {_span(view.column_edges)} blocks{of_heads}"
        out = [f"active share of a cell ({cell}): {shades[1]} none  {steps}"]
    if grid.causal and (view.allowed == 0).any():
        out.append("blank: keys after the query")
    return out


def _span(edges: NDArray[np.int64]) -> str:
    sizes = np.diff(edges)
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low}" if low == high else f"{low} to {high}"
