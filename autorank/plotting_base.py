"""What the interactive figures share: plain dictionaries for plotly, texts that it cannot read as markup, themes."""

from __future__ import annotations

import copy
import html
from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
"""``{"data": [...], "layout": {...}}`` as plotly.js takes it: JSON's types only."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

THEMES = {
    False: {"ink": "#1f2328", "soft": "#5f6670", "ground": "#ffffff", "grid": "#e7e9ec"},
    True: {"ink": "#e6e8eb", "soft": "#a3abb5", "ground": "#14171c", "grid": "#2c323a"},
}
"""Dark or not → the colours of lines and text, of what steps back, of the paper and of the grid."""

INK = "ink"
"""The `meta` of traces that are drawn in the colour of the text."""


def escaped(text: str) -> str:
    """Return `text` for plotly, which reads a little HTML in its texts but not the names of quotes."""
    return html.escape(text, quote=False)


def joined(lines: Sequence[str]) -> str:
    """Join plain lines for plotly, each escaped."""
    return "<br>".join(escaped(line) for line in lines)


def axis(
    label: str, low: float | None = None, high: float | None = None, note: str = "", **more: Any
) -> dict[str, Any]:
    """Return an axis from `low` to `high` (without them plotly finds the range).

    `note` is a remark in a line of its own below the label; `more` are plotly's own attributes.
    """
    below = f'<br><span style="font-size:12px">{escaped(note)}</span>' if note else ""
    ends = {} if low is None or high is None else {"range": [low, high]}
    return {
        "title": {"text": escaped(label) + below, "standoff": 12},
        **ends,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "rgba(0,0,0,0)",
        "automargin": True,
        **more,
    }


def figure_of(traces: Sequence[dict[str, Any]], title: str, subtitle: str, **layout: Any) -> Figure:
    """Return a figure with title, font and margins; `layout` holds the axes and all else."""
    return {
        "data": list(traces),
        "layout": {
            "title": {
                "text": f"<b>{escaped(title)}</b>",
                "subtitle": {"text": escaped(subtitle), "font": {"size": 12}},
                "x": 0.01,
                "xanchor": "left",
                "font": {"size": 17},
            },
            "font": {"family": FONT, "size": 13},
            "hovermode": "closest",
            "hoverlabel": {"align": "left", "font": {"size": 12}, "namelength": 0},
            "autosize": True,
            "margin": {"l": 70, "r": 20, "t": 84, "b": 86},
            **layout,
        },
    }


def emptiness(text: str) -> dict[str, Any]:
    """Return the annotation in the middle of a figure that has nothing to show."""
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    return {"text": escaped(text), **place, "showarrow": False, "font": {"size": 15}}


def theme_changes(figure: Figure, dark: bool) -> dict[str, Any]:
    """Return what a theme sets.

    Returns
    -------
    dict
        ``layout``: dotted name of an attribute of the layout → its colour; ``traces``: the same for the traces whose
        numbers are in ``inked``.
    """
    colours = THEMES[dark]
    ink, ground, grid = colours["ink"], colours["ground"], colours["grid"]
    layout = {"font.color": ink, "paper_bgcolor": ground, "plot_bgcolor": ground}
    layout |= {"hoverlabel.bgcolor": ground, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": ink}
    for name in figure["layout"]:
        if name.startswith(("xaxis", "yaxis")):
            layout |= {f"{name}.gridcolor": grid, f"{name}.linecolor": grid}
    inked = [i for i, trace in enumerate(figure["data"]) if trace.get("meta") == INK]
    return {"layout": layout, "inked": inked, "traces": {"marker.line.color": ink, "line.color": ink}}


def themed(figure: Figure, dark: bool) -> Figure:
    """Return a copy of a figure with the colours of text, paper, grid and lines set, for a page that knows them."""
    changes = theme_changes(figure, dark)
    layout = copy.deepcopy(figure["layout"])
    for name, colour in changes["layout"].items():
        _set(layout, name, colour)
    data = [dict(trace) for trace in figure["data"]]
    for i in changes["inked"]:
        data[i] = copy.deepcopy(data[i])
        for name, colour in changes["traces"].items():
            if name.partition(".")[0] in data[i]:
                _set(data[i], name, colour)
    return {"data": data, "layout": layout}


def _set(target: dict[str, Any], dotted: str, value: str) -> None:
    *path, last = dotted.split(".")
    for name in path:
        target = target.setdefault(name, {})
    target[last] = value
