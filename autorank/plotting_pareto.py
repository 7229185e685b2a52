"""The interactive Pareto figure as a dictionary."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from autorank.plotting_base import INK, Figure, axis, escaped, figure_of, joined
from autorank.scene import GREY, Kind, Mark, Scene

_SYMBOLS: dict[Kind, str] = {"full": "circle", "partial": "square-open", "pruned": "x-thin-open"}
_KINDS: dict[Kind, str] = {"full": "full fidelity", "partial": "lower fidelity", "pruned": "stopped early"}


def _size(mark: Mark) -> float:
    # The area grows with the value, as the eye compares areas.
    base = (36 + 2 * mark.size * (144 - 36)) ** 0.5 if mark.kind == "full" else 8.0
    return base + (2.0 if mark.on_front else 0.0)


def _trial_traces(scene: Scene, told: Container[int]) -> list[dict[str, Any]]:
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
                    "name": escaped(group),
                    "legendgroup": escaped(group),
                    "showlegend": group not in listed,
                    "x": [m.x for m in marks],
                    "y": [m.y for m in marks],
                    "text": ["" if m.number in told else joined(m.hover) for m in marks],
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
        "meta": INK,
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
                "meta": INK,
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
            "meta": INK,
            "legend": "legend2",
            "x": [scene.dense[0]],
            "y": [scene.dense[1]],
            "text": [
                joined(
                    ["dense model", f"{scene.y.label}: {scene.dense[1]:.4g}", f"{scene.x.label}: {scene.dense[0]:.4g}"]
                )
            ],
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


def pareto_figure(scene: Scene, told: Container[int] = ()) -> Figure:
    """Return the Pareto figure; the `customdata` of the trials' marks are the numbers of the trials.

    Parameters
    ----------
    scene : Scene
    told : container of int
        Trials whose marks get no text to hover, as whoever shows the figure has it already.
    """
    labels = [_label(mark, text, *scene.free_side(mark)) for mark, text in scene.labels]
    notes = [text for text in (f"marker area: {scene.third}" if scene.third else "", scene.note) if text]
    return figure_of(
        [*_trial_traces(scene, told), *_marking_traces(scene)],
        scene.title,
        scene.subtitle,
        xaxis=axis(scene.x.label, scene.x.low, scene.x.high, " · ".join(notes)),
        yaxis=axis(scene.y.label, scene.y.low, scene.y.high),
        annotations=labels,
        # The first legend grows downwards, the second upwards, so that they meet only when there are very many formats.
        legend={
            "title": {"text": "format of most MACs", "font": {"size": 13}},
            "tracegroupgap": 0,
            "y": 1,
            "yanchor": "top",
            "itemsizing": "constant",
        },
        legend2={"y": 0, "yanchor": "bottom", "itemsizing": "constant"},
    )
