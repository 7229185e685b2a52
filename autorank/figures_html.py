"""The interactive figures: one HTML file each, with everything inlined, that draws with no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.scene import GREY, OKABE_ITO, Kind, Mark, Scene

_SYMBOLS: dict[Kind, str] = {"full": "circle", "partial": "square-open", "pruned": "x-thin-open"}
_KINDS: dict[Kind, str] = {
    "full": "full fidelity",
    "partial": "lower fidelity",
    "pruned": "stopped early",
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# The policy forbids every request: what is not in the file cannot be loaded, by our page or by plotly.js.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
html, body {{ height: 100%; margin: 0; background: #ffffff; color: #1f2328; font-family: {font}; }}
@media (prefers-color-scheme: dark) {{ html, body {{ background: #14171c; color: #e6e8eb; }} }}
#figure {{ width: 100%; height: 100vh; min-height: 420px; }}
</style>
<script>{plotly}</script>
</head>
<body>
<div id="figure" role="img" aria-label="{title}"></div>
<script>
const figure = {figure};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const node = document.getElementById("figure");
function theme() {{
  const ink = dark.matches ? "#e6e8eb" : "#1f2328";
  const grid = dark.matches ? "#2c323a" : "#e7e9ec";
  const ground = dark.matches ? "#14171c" : "#ffffff";
  Plotly.relayout(node, {{"font.color": ink, "paper_bgcolor": ground, "plot_bgcolor": ground,
    "xaxis.gridcolor": grid, "yaxis.gridcolor": grid, "xaxis.linecolor": grid, "yaxis.linecolor": grid,
    "hoverlabel.bgcolor": ground, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": ink}});
  const inked = figure.data.map((trace, i) => trace.meta === "ink" ? i : -1).filter(i => i >= 0);
  if (inked.length) Plotly.restyle(node, {{"marker.line.color": ink, "line.color": ink}}, inked);
}}
Plotly.newPlot(node, figure.data, figure.layout, {{responsive: true, displaylogo: false,
  typesetMath: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d"], toImageButtonOptions: {{scale: 2}}}}).then(theme);
dark.addEventListener("change", theme);
</script>
</body>
</html>
"""


def _embedded(value: object) -> str:
    """Return JSON that may stand inside a <script> element whatever the strings in it say."""
    text = json.dumps(value, allow_nan=False)  # ASCII only, so the line separators of JavaScript are escaped as well
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(title: str, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    figure = {"data": list(traces), "layout": layout}
    return _PAGE.format(title=html.escape(title), font=_FONT, plotly=get_plotlyjs(), figure=_embedded(figure))


def _escaped(text: str) -> str:
    """Return `text` for plotly, which reads a little HTML in its texts but not the names of quotes."""
    return html.escape(text, quote=False)


def _text(lines: Sequence[str]) -> str:
    """Join plain lines for plotly, each escaped."""
    return "<br>".join(_escaped(line) for line in lines)


def _size(mark: Mark) -> float:
    # The area grows with the value, as the eye compares areas.
    base = (36 + 2 * mark.size * (144 - 36)) ** 0.5 if mark.kind == "full" else 8.0
    return base + (2.0 if mark.on_front else 0.0)


def _axis(label: str, low: float, high: float) -> dict[str, Any]:
    return {
        "title": {"text": _escaped(label), "standoff": 12},
        "range": [low, high],
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "rgba(0,0,0,0)",
        "automargin": True,
    }


def _layout(title: str, subtitle: str, x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": {
            "text": f"<b>{_escaped(title)}</b>",
            "subtitle": {"text": _escaped(subtitle), "font": {"size": 12}},
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 17},
        },
        "font": {"family": _FONT, "size": 13},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"size": 12}, "namelength": 0},
        "xaxis": x,
        "yaxis": y,
        "autosize": True,
        "margin": {"l": 70, "r": 20, "t": 84, "b": 86},
    }


def _trial_traces(scene: Scene) -> list[dict[str, Any]]:
    """One trace per group of formats and kind; a click on the legend hides a group."""
    traces: list[dict[str, Any]] = []
    listed: set[str] = set()
    for group, colour in scene.groups.items():
        for kind in _SYMBOLS:
            marks = [m for m in scene.marks if m.group == group and m.kind == kind]
            if not marks:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": _escaped(group),
                    "legendgroup": _escaped(group),
                    "showlegend": group not in listed,
                    "x": [m.x for m in marks],
                    "y": [m.y for m in marks],
                    "text": [_text(m.hover) for m in marks],
                    "customdata": [m.number for m in marks],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {
                        "symbol": _SYMBOLS[kind],
                        "color": colour,
                        "size": [_size(m) for m in marks],
                        "opacity": [1.0 if m.on_front else 0.75 if m.kind == "full" else 0.5 for m in marks],
                        "line": {"width": 1.5 if kind != "full" else 0, "color": colour},
                    },
                }
            )
            listed.add(group)
    return traces


def _ring(marks: Sequence[Mark], name: str, symbol: str, extra: float, width: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "meta": "ink",
        "legend": "legend2",
        "hoverinfo": "skip",
        "x": [m.x for m in marks],
        "y": [m.y for m in marks],
        "marker": {
            "symbol": symbol,
            "color": "rgba(0,0,0,0)",
            "size": [_size(m) + extra for m in marks],
            "line": {"width": width, "color": GREY},
        },
    }


def _marking_traces(scene: Scene) -> list[dict[str, Any]]:
    """Return the front line, the dense model, and the rings around members of the front, knee and recommended point."""
    traces: list[dict[str, Any]] = []
    if scene.line:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "front",
                "meta": "ink",
                "legend": "legend2",
                "hoverinfo": "skip",
                "x": [x for x, _ in scene.line],
                "y": [y for _, y in scene.line],
                "line": {"width": 1.5, "color": GREY},
            }
        )
    if members := [m for m in scene.marks if m.on_front]:
        traces.append(_ring(members, "on the front", "circle", 2, 1.5))
    if scene.knee:
        traces.append(_ring([scene.knee], "knee", "diamond", 12, 1.5))
    if scene.recommended:
        traces.append(_ring([scene.recommended], "recommended", "star", 11, 1.8))
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "dense model",
            "meta": "ink",
            "legend": "legend2",
            "x": [scene.dense[0]],
            "y": [scene.dense[1]],
            "text": [_text(["dense model", scene.y.label + f": {scene.dense[1]:.4g}"])],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"symbol": "cross", "size": 13, "color": "rgba(0,0,0,0)", "line": {"width": 2, "color": GREY}},
        }
    )
    kinds = {mark.kind for mark in scene.marks}
    traces += [
        {
            "type": "scatter",
            "mode": "markers",
            "name": words,
            "legend": "legend2",
            "x": [None],
            "y": [None],
            "marker": {"symbol": _SYMBOLS[kind], "size": 8, "color": GREY, "line": {"width": 1.5, "color": GREY}},
        }
        for kind, words in _KINDS.items()
        if kind in kinds and len(kinds) > 1
    ]
    return traces


def _label(mark: Mark, text: str, right: int, up: int) -> dict[str, Any]:
    return {
        "x": mark.x,
        "y": mark.y,
        "text": text,
        "ax": right * 34,
        "ay": up * -34,
        "xanchor": "left" if right > 0 else "right",
        "showarrow": True,
        "arrowhead": 0,
        "arrowwidth": 1,
        "arrowcolor": GREY,
        "standoff": 9,
        "font": {"size": 12},
    }


def pareto_page(scene: Scene) -> str:
    """Return the HTML page of the Pareto figure."""
    layout = _layout(
        scene.title,
        scene.subtitle,
        _axis(scene.x.label, scene.x.low, scene.x.high),
        _axis(scene.y.label, scene.y.low, scene.y.high),
    )
    labels = [_label(mark, text, *scene.free_side(mark)) for mark, text in scene.labels]
    notes = [f"marker area: {scene.third}"] if scene.third else []
    notes += [scene.note] if scene.note else []
    if notes:
        labels.append(
            {
                "text": _escaped(" · ".join(notes)),
                "xref": "paper",
                "yref": "paper",
                "x": 1,
                "y": 0,
                "yshift": -58,
                "xanchor": "right",
                "yanchor": "top",
                "showarrow": False,
                "font": {"size": 12},
            }
        )
    layout["annotations"] = labels
    # The first legend grows downwards, the second upwards, so that they meet only when there are very many formats.
    layout["legend"] = {
        "title": {"text": "format of most MACs", "font": {"size": 13}},
        "tracegroupgap": 0,
        "y": 1,
        "yanchor": "top",
        "itemsizing": "constant",
    }
    layout["legend2"] = {"y": 0, "yanchor": "bottom", "itemsizing": "constant"}
    return _page(f"{scene.title} — {scene.subtitle}", [*_trial_traces(scene), *_marking_traces(scene)], layout)


def hypervolume_page(title: str, subtitle: str, volumes: Sequence[float], hover: Sequence[Sequence[str]]) -> str:
    """Return the HTML page of the hypervolume after each finished trial."""
    top = max([*volumes, 1e-9])
    layout = _layout(
        title,
        subtitle,
        _axis("finished trials", 0, max(len(volumes), 1) * 1.02),
        _axis("hypervolume of the front", 0, top * 1.06),
    )
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(range(1, len(volumes) + 1)),
        "y": list(volumes),
        "text": [_text(lines) for lines in hover],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"shape": "hv", "width": 2, "color": OKABE_ITO[0]},
        "marker": {"size": 5, "color": OKABE_ITO[0]},
        "showlegend": False,
    }
    return _page(f"{title} — {subtitle}", [trace], layout)
