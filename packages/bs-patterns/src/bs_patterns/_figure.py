"""Layouts as matplotlib figures: one panel per head, or left, right and difference."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._coverage import Coverage, coverage
from .layout import BlockLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rgb = NDArray[np.float64]

_FORBIDDEN, _IDLE = np.array([1.0, 1.0, 1.0]), np.array([0.925, 0.937, 0.957])
_FAINT, _DARK = np.array([0.66, 0.76, 0.92]), np.array([0.10, 0.20, 0.45])
#: Orange and teal differ in brightness too, so the difference can be read without colour vision.
_LEFT, _RIGHT, _BOTH = np.array([0.85, 0.37, 0.01]), np.array([0.05, 0.56, 0.52]), np.array([0.62, 0.66, 0.74])
#: Grid lines between blocks are drawn up to this many blocks a side.
_LINED = 48
#: Ticks fall on powers of two and their like.
_STEPS = [1, 1.024, 1.28, 1.6, 2.048, 2.56, 3.2, 4.096, 5.12, 6.4, 8.192, 10]
_INK, _TEXT, _LINE = "#1f2a44", "#3b4560", "#8a93a6"


class Panel(NamedTuple):
    """A picture and its title, on the grid of `layout`."""

    title: str
    layout: BlockLayout
    view: Coverage
    rgb: Rgb
    top: float | None


def figure_of_heads(layout: BlockLayout, heads: Sequence[int], cells: int, title: str) -> Figure:
    """One panel per head, in rows of four."""
    panels = []
    for head in heads:
        view = coverage(layout._blocks, [head], cells, cells)
        active = int(view.active.sum())
        share = active / max(int(view.allowed.sum()), 1)
        top = float(view.share.max())
        name = f"head {head}: {active:,} blocks, density {share:.3g}" if layout.heads > 1 else ""
        panels.append(Panel(name, layout, view, _shaded(view, top), top))
    return _grid_of(panels, min(len(panels), 4), title)


def figure_of_change(
    layout: BlockLayout, other: BlockLayout, heads: Sequence[int], cells: int, titles: tuple[str, str]
) -> Figure:
    """Per head a row of three panels: left, right, and what only one of them has."""
    only_left, only_right, both = layout - other, other - layout, layout & other
    panels = []
    for head in heads:
        parts = [layout, other, only_left, only_right, both]
        views = [coverage(part._blocks, [0 if part.heads == 1 else head], cells, cells) for part in parts]
        top = max(float(view.share.max()) for view in views[:2])
        name = f"head {head}, " if max(layout.heads, other.heads) > 1 else ""
        for part, view, label in zip(parts, views[:2], titles, strict=False):
            share = view.active.sum() / max(int(view.allowed.sum()), 1)
            panels.append(Panel(f"{name}{label}: density {share:.3g}", part, view, _shaded(view, top), top))
        counts = [int(view.active.sum()) for view in views[2:]]
        note = f"{name}only left {counts[0]:,}, only right {counts[1]:,}, both {counts[2]:,}"
        panels.append(Panel(note, layout, views[0], _changed(views[2:], top), None))
    figure = _grid_of(panels, 3, f"{titles[0]}  |  {titles[1]}  |  difference")
    _colour_key(figure)
    return figure


def _base(view: Coverage) -> Rgb:
    return np.where((view.allowed > 0)[..., None], _IDLE, _FORBIDDEN)


def _shaded(view: Coverage, top: float) -> Rgb:
    """From faint (one block) to dark (the fullest cell of the picture)."""
    depth = (view.share / (top or 1.0))[..., None]
    return np.where((view.active > 0)[..., None], _FAINT + (_DARK - _FAINT) * depth, _base(view))


def _changed(views: Sequence[Coverage], top: float) -> Rgb:
    """Colours of the parts, mixed by their counts, over the base by how full the cell is."""
    counts = np.stack([view.active for view in views], axis=-1).astype(np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    mixed = (counts / np.maximum(total, 1)) @ np.stack([_LEFT, _RIGHT, _BOTH])
    full = total / np.maximum(views[0].allowed, 1)[..., None] / (top or 1.0)
    base = _base(views[0])
    return np.where(total > 0, base + (mixed - base) * np.clip(0.35 + 0.65 * full, 0, 1), base)


def _grid_of(panels: Sequence[Panel], columns: int, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    side = 6.4 if len(panels) == 1 else 4.2
    height = (side - 0.6) * _aspect(panels[0].layout)
    size = (columns * side + 0.6, rows * (height + 0.6) + 0.5)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_axis_off()
    for number, (axis, panel) in enumerate(zip(axes.ravel(), panels, strict=False)):
        _draw(axis, panel, is_left=number % columns == 0, is_low=number + columns >= len(panels))
    figure.suptitle(fill(title, int(12 * size[0])), fontsize=11, fontweight="bold", color=_INK)
    shaded = [panel for panel in panels if panel.top is not None]
    if any(not panel.view.is_exact for panel in shaded):
        _shade_key(figure, axes, {panel.top for panel in shaded})
    return figure


def _aspect(layout: BlockLayout) -> float:
    """Height / width of a panel: that of the token rectangle, within reason."""
    return min(max(layout.seq_len[0] / layout.seq_len[1], 0.25), 2.5)


def _draw(axis: Axes, panel: Panel, *, is_left: bool, is_low: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    block_q, block_k = panel.layout.block_size
    len_q, len_k = panel.layout.seq_len
    _, rows, cols = panel.layout.shape
    axis.imshow(
        panel.rgb, extent=(0, cols * block_k, rows * block_q, 0), interpolation="nearest", aspect="auto", origin="upper"
    )
    if max(rows, cols) <= _LINED:
        axis.hlines(np.arange(1, rows) * block_q, 0, len_k, color="white", linewidth=0.7)
        axis.vlines(np.arange(1, cols) * block_k, 0, len_q, color="white", linewidth=0.7)
    axis.set_xlim(0, len_k)
    axis.set_ylim(len_q, 0)
    axis.set_box_aspect(_aspect(panel.layout))
    axis.set_title(panel.title, fontsize=9, color=_INK)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(4, steps=_STEPS, integer=True, min_n_ticks=1))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(labelsize=8, color=_LINE, labelcolor=_TEXT, length=3)
    for spine in axis.spines.values():
        spine.set_color(_LINE)
        spine.set_linewidth(0.8)
    if is_left:
        axis.set_ylabel("query token", fontsize=9, color=_TEXT)
    if is_low:
        axis.set_xlabel("key token", fontsize=9, color=_TEXT)


def _shade_key(figure: Figure, axes: NDArray[np.object_], tops: set[float | None]) -> None:
    """A colour bar of shares; relative when the panels' darkest shades differ."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    top = tops.pop() if len(tops) == 1 else None
    shades = LinearSegmentedColormap.from_list("share", [tuple(_FAINT), tuple(_DARK)])
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 100 * top if top else 1), shades), ax=axes, shrink=0.6, aspect=30, pad=0.01
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=8, color=_LINE, labelcolor=_TEXT)
    label = "active blocks of a cell, %" if top else "active blocks of a cell, relative to the head's fullest"
    bar.set_label(label, fontsize=8, color=_TEXT)


def _colour_key(figure: Figure) -> None:
    from matplotlib.patches import Patch

    names = (("only left", _LEFT), ("only right", _RIGHT), ("both", _BOTH), ("neither", _IDLE))
    patches = [Patch(facecolor=tuple(colour), edgecolor=_LINE, linewidth=0.5, label=name) for name, colour in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
