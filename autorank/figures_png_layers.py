"""The still figures of layers as PNG: the rank map, the importance of choices, the table of one point."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from autorank.captions import clean
from autorank.figures_png_base import INK, SOFT, canvas, plain, png
from autorank.importance import Importance
from autorank.layermap import LayerMap
from autorank.layerrows import Entry, LayerTable
from autorank.scene import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLAG = OKABE_ITO[4]
"""Of what is worse than it was; the words say so too."""


def rank_map_image(shown: LayerMap) -> bytes:
    """Return the heat map of what each layer keeps as PNG."""
    import numpy as np

    rows, columns = len(shown.layers), len(shown.numbers)
    figure, axes = canvas(shown.title, shown.subtitle, "trial, cheapest first", "", max(5.6, 1.5 + 0.2 * rows))
    axes.grid(False)
    if columns:
        height = figure.get_figheight()
        axes.set_position((0.19, 0.75 / height, 0.7, 1 - 1.6 / height))
        kept = np.array([[math.nan if c.kept is None else c.kept for c in row] for row in shown.rows])
        image = axes.imshow(kept, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(rows), [plain(clean(name, 26)) for name in shown.layers], fontsize=8)
        step = -(-columns // 40)
        labels = [f"#{n}" for n in shown.numbers[::step]]
        axes.set_xticks(range(0, columns, step), labels, fontsize=8, rotation=90 if columns > 16 else 0)
        axes.set_xticks([i + 0.5 for i in range(columns - 1)], minor=True)
        axes.set_yticks([i + 0.5 for i in range(rows - 1)], minor=True)
        axes.grid(True, which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        _write_cells(axes, shown)
        scale = figure.add_axes((0.91, 0.75 / height, 0.016, 1 - 1.6 / height))
        figure.colorbar(image, cax=scale).set_label(shown.label, fontsize=9, color=INK)
        scale.tick_params(colors=SOFT, labelsize=8, length=0)
        for spine in scale.spines.values():
            spine.set_visible(False)
    else:
        axes.text(0.5, 0.5, "no point on the front yet", transform=axes.transAxes, ha="center", color=SOFT, fontsize=12)
    figure.text(0.98, 0.02, plain(shown.note), fontsize=8.5, color=SOFT, ha="right")
    return png(figure)


def _write_cells(axes: Axes, shown: LayerMap) -> None:
    for y, row in enumerate(shown.rows):
        for x, cell in enumerate(row):
            if cell.text:
                dark = cell.kept is not None and cell.kept < 0.5
                axes.text(x, y, cell.text, ha="center", va="center", fontsize=7, color="white" if dark else INK)


def importance_image(found: Importance) -> bytes:
    """Return the bars of the layers' importance as PNG."""
    figure, axes = canvas(found.title, found.subtitle, "share of what the choices explain", "")
    axes.set_position((0.19, 0.115, 0.79, 0.745))
    if found.problem:
        axes.set_axis_off()
        axes.text(0.5, 0.5, plain(found.problem), transform=axes.transAxes, ha="center", color=SOFT, fontsize=12)
        return png(figure)
    rows = range(len(found.shown))
    ranks = [layer.rank for layer in found.shown]
    formats = [layer.format for layer in found.shown]
    axes.barh(rows, ranks, 0.65, color=OKABE_ITO[0], label="rank (share of MACs kept)")
    axes.barh(rows, formats, 0.65, left=ranks, color=OKABE_ITO[1], label="format")
    low, high = zip(*(layer.ends for layer in found.shown), strict=True)
    axes.hlines(rows, low, high, color=INK, linewidth=1.3, label="± spread between halves of the trials")
    axes.set_yticks(rows, [plain(clean(layer.layer, 26)) for layer in found.shown], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(high) * 1.04)
    axes.grid(False, axis="y")
    axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=INK)
    figure.text(0.98, 0.02, plain(found.note), fontsize=8.5, color=SOFT, ha="right")
    return png(figure)


def layers_image(table: LayerTable) -> bytes:
    """Return the table of layers as PNG."""
    height = 1.5 + 0.2 * (len(table.rows) + 2)
    figure, axes = canvas(table.title, table.subtitle, "", "", height)
    axes.set_axis_off()
    axes.set_position((0.02, 0.4 / height, 0.96, 1 - 1.2 / height))
    axes.set(xlim=(0, 1), ylim=(len(table.rows) + 1.6, -1))
    lines = [[Entry(column.heading) for column in table.columns], *table.rows, table.total]
    widths = [max(8, *(len(line[i].text) for line in lines)) + 2 for i in range(len(table.columns))]
    left = 0.0
    for i, (column, width) in enumerate(zip(table.columns, widths, strict=True)):
        right = left + width / sum(widths)
        for y, line in enumerate(lines):
            entry, place = line[i], y - 0.5 if y == 0 else y
            bold = y in (0, len(lines) - 1) or entry.flagged
            axes.text(
                right - 0.004 if column.number else left,
                place,
                plain(clean(entry.text, 40)),
                ha="right" if column.number else "left",
                va="center",
                fontsize=min(8.0, 950 / sum(widths)),
                fontweight="bold" if bold else "normal",
                color=FLAG if entry.flagged else INK,
            )
        left = right
    axes.hlines([0.2, len(lines) - 1.5], 0, 1, color=SOFT, linewidth=0.8)
    figure.text(0.98, 0.15 / height, plain(table.note), fontsize=8.5, color=SOFT, ha="right")
    return png(figure)
