"""The interactive figure of the choices' importance as a dictionary."""

from __future__ import annotations

from typing import Any

from autorank.importance import Importance
from autorank.plotting_base import INK, Figure, axis, emptiness, escaped, figure_of
from autorank.scene import GREY, OKABE_ITO


def importance_figure(found: Importance) -> Figure:
    """Return the bars of the layers' importance, the share of the format beside that of the rank."""
    if found.problem:
        nothing = {"visible": False}
        return figure_of(
            [], found.title, found.subtitle, xaxis=nothing, yaxis=nothing, annotations=[emptiness(found.problem)]
        )
    rows = list(range(len(found.shown)))
    names = [escaped(layer.layer) for layer in found.shown]
    hover = [
        f"{name}<br>rank {layer.rank:.3f}, format {layer.format:.3f}, together {layer.total:.3f} ± {layer.spread:.3f}"
        for name, layer in zip(names, found.shown, strict=True)
    ]
    parts = (
        ("rank (share of MACs kept)", OKABE_ITO[0], [layer.rank for layer in found.shown]),
        ("format", OKABE_ITO[1], [layer.format for layer in found.shown]),
    )
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": words,
            "x": shares,
            "y": rows,
            "text": hover,
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": colour},
        }
        for words, colour, shares in parts
    ]
    whiskers = {
        "type": "scatter",
        "mode": "lines",
        "name": "± spread between halves of the trials",
        "meta": INK,
        "hoverinfo": "skip",
        "x": [x for layer in found.shown for x in (*layer.ends, None)],
        "y": [y for row in rows for y in (row, row, None)],
        "line": {"width": 1.5, "color": GREY},
    }
    places: dict[str, Any] = {"tickmode": "array", "tickvals": rows, "ticktext": names}
    top = max(layer.ends[1] for layer in found.shown)
    return figure_of(
        [*bars, whiskers],
        found.title,
        found.subtitle,
        barmode="stack",
        bargap=0.35,
        xaxis=axis("share of what the choices explain", 0, top * 1.04, found.note),
        yaxis=axis("layer", len(rows) - 0.4, -0.6, showgrid=False, **places),
        legend={"x": 1, "xanchor": "right", "y": 0.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    )
