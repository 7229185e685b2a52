"""What the still figures share: matplotlib's Agg canvas without its global state, so that any thread may draw."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2328"
SOFT = "#5f6670"
GRID = "#e7e9ec"


def plain(text: str) -> str:
    """Return `text` such that matplotlib reads no mathematics in it and has a glyph for every character."""
    if text.isascii() and text.isprintable():
        return text.replace("$", r"\$")
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in text).replace("$", r"\$")


def canvas(title: str, subtitle: str, x: str, y: str, height: float = 5.6) -> tuple[Figure, Axes]:
    """Return a figure with title and labelled axes; `height` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.115, 0.69, 0.745), facecolor="white")
    figure.text(0.02, 1 - 0.252 / height, plain(title), fontsize=14, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.515 / height, plain(subtitle), fontsize=9, color=SOFT, va="center")
    axes.set_xlabel(plain(x), fontsize=10.5, color=INK, labelpad=7)
    axes.set_ylabel(plain(y), fontsize=10.5, color=INK, labelpad=7)
    styled(axes)
    return figure, axes


def styled(axes: Axes) -> None:
    """Give axes their grid and lines."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c9ced4")


def png(figure: Figure) -> bytes:
    """Return the figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    # The date and the version would make two files of the same data differ.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
