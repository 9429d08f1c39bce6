"""Pictures of layouts: text for a terminal, PNG and SVG through matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _check, _text
from .layout import BlockLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTHS = (16, 1000)
_MOST_PANELS = 64


def render_text(
    layout: BlockLayout,
    other: BlockLayout | None = None,
    *,
    head: int | None = None,
    width: int = _text.WIDTH,
    ascii_only: bool = False,
    titles: tuple[str, str] | None = None,
) -> str:
    """Draw a layout as text, shrunk to a width, with axes in tokens.

    Queries run down, keys to the right. Where every block fits it is drawn by itself; else a cell's shade says which
    share of its allowed blocks is active, relative to the fullest cell, as the legend below the picture spells out.

    Args:
        layout: Any layout.
        other: A second layout of the same grid, drawn beside the first together with their difference.
        head: The head to draw; by default all heads over one another.
        width: Characters inside the frame (of all panels together, if there are two layouts), 16 … 1000.
        ascii_only: Whether to do without Unicode.
        titles: What to call the two layouts; only with `other`.

    Returns:
        A few lines of text without a newline at the end.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A head or width out of range, layouts of different grids, or titles without a second layout.
    """
    _check_layouts(layout, other)
    width = _check.integer("width", width, low=_WIDTHS[0], high=_WIDTHS[1])
    glyphs = _text.ASCII if _check.boolean("ascii_only", ascii_only) else _text.UNICODE
    heads = _heads("head", layout, other, None if head is None else [head])
    if other is None:
        if titles is not None:
            raise ValueError(f"titles: expected None without a second layout, got {titles!r}")
        return "\n".join(_text.picture(layout._blocks, heads, width, glyphs))
    parts = [part._blocks for part in (layout, other, layout - other, other - layout, layout & other)]
    return "\n".join(_text.pictures_of_change(parts, heads, width, _titles(titles), glyphs))


def render_figure(
    layout: BlockLayout,
    other: BlockLayout | None = None,
    *,
    heads: Sequence[int] | None = None,
    cells: int = 512,
    title: str | None = None,
    titles: tuple[str, str] | None = None,
) -> Figure:
    """Draw a layout as a matplotlib figure, one panel per head, with axes in tokens.

    With a second layout each head gets three panels: left, right, and their difference in colour. The figure belongs
    to no window and no pyplot state.

    Args:
        layout: Any layout.
        other: A second layout of the same grid.
        heads: The heads to draw, at most 64; by default all of them.
        cells: A panel's most cells a side; larger layouts are shrunk, shaded by the share of active blocks.
        title: Heading of the figure, only without `other`; by default a summary of the layout.
        titles: What to call the two layouts; only with `other`.

    Returns:
        The figure, ready for `savefig`.

    Raises:
        ImportError: matplotlib is missing: install ``bs-patterns[plot]``.
        TypeError: An argument has the wrong type.
        ValueError: A head out of range, more than 64 heads, layouts of different grids, or a title that has no place.
    """
    _check_layouts(layout, other)
    cells = _check.integer("cells", cells, low=1, high=4096)
    chosen = _heads("heads", layout, other, None if heads is None else _check.integers("heads", heads, low=0))
    if len(chosen) > _MOST_PANELS:
        raise ValueError(f"heads: expected at most {_MOST_PANELS} to draw, got {len(chosen)}; name the ones to draw")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a string or None, got {title!r} ({type(title).__name__})")
    if title is not None and other is not None:
        raise ValueError(f"title: expected None with a second layout (it has titles), got {title!r}")
    if titles is not None and other is None:
        raise ValueError(f"titles: expected None without a second layout, got {titles!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"figures need matplotlib: pip install 'bs-patterns[plot]' ({error})") from error
    from . import _figure

    if other is None:
        return _figure.figure_of_heads(layout, chosen, cells, title or _text.summary(layout._blocks, "×"))
    return _figure.figure_of_change(layout, other, chosen, cells, _titles(titles))


def save_image(
    file: str | os.PathLike[str], layout: BlockLayout, other: BlockLayout | None = None, **options: Any
) -> None:
    """Draw a layout into a PNG or SVG file; the file appears whole or not at all.

    Args:
        file: A path that ends in .png or .svg.
        layout: Any layout.
        other: A second layout of the same grid.
        **options: As for `render_figure`.

    Raises:
        ImportError: matplotlib is missing: install ``bs-patterns[plot]``.
        OSError: The file cannot be written.
        TypeError: An argument has the wrong type.
        ValueError: The file name ends otherwise, or as for `render_figure`.
    """
    path = os.fspath(file)
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"file: expected a name that ends in .png or .svg, got {path!r}")
    figure = render_figure(layout, other, **options)
    data = io.BytesIO()
    figure.savefig(data, format=kind[1:], dpi=144, metadata={"Date": None} if kind == ".svg" else None)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as handle:
            handle.write(data.getbuffer())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, path) from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _titles(titles: Any) -> tuple[str, str]:
    if titles is None:
        return "left", "right"
    if isinstance(titles, str) or not isinstance(titles, Sequence) or [type(item) for item in titles] != [str, str]:
        raise TypeError(f"titles: expected a pair of strings, got {titles!r}")
    return titles[0], titles[1]


def _check_layouts(layout: Any, other: Any) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {layout!r} ({type(layout).__name__})")
    if other is None:
        return
    if not isinstance(other, BlockLayout):
        raise TypeError(f"other: expected a BlockLayout or None, got {other!r} ({type(other).__name__})")
    if layout._grid != other._grid or 1 != layout.heads != other.heads != 1:
        raise ValueError(f"other: expected a layout of the same grid as {layout!r} (heads may be 1), got {other!r}")


def _heads(name: str, layout: BlockLayout, other: BlockLayout | None, heads: Sequence[int] | None) -> list[int]:
    """The heads to draw, checked; all by default."""
    count = max(layout.heads, other.heads if other is not None else 1)
    if heads is None:
        return list(range(count))
    return [_check.integer(name, head, low=0, high=count - 1) for head in heads]
