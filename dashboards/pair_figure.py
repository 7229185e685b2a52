"""The fronts of two sweeps in one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autorank.captions import clean, cost_label, hover, score_label, unit_of
from autorank.plotting_base import axis, escaped, figure_of, joined
from autorank.scene import OKABE_ITO
from autorank.types import FrontPoint, SweepHeader

from . import drawings

if TYPE_CHECKING:
    from .library import SweepView

LOOKS = ((OKABE_ITO[0], "●"), (OKABE_ITO[4], "■"))
"""Colour and sign of the first and of the second."""

_SYMBOLS, _DASHES = ("circle", "square"), ("solid", "dash")


def fronts(one: SweepView, two: SweepView) -> drawings.Drawing:
    """Return the figure of both fronts: score against MACs kept, or the change of score where scores do not compare."""
    views = (one, two)
    shows = ("pair", *((v.key, tuple(p.record.number for p in v.points), v.header and v.header.dense) for v in views))
    return drawings.Drawing(shows, f"{one.key} {two.key}", lambda: _draw(one, two))


def _draw(one: SweepView, two: SweepView) -> drawings.Figure:
    known = [(view, view.header) for view in (one, two) if view.header is not None]
    headers = [header for _, header in known if header is not None]
    if not any(view.points for view in (one, two)):
        return drawings.nothing("No point on either front yet.")
    label, value = _scale(headers)
    traces: list[dict[str, Any]] = []
    for i, view in enumerate((one, two)):
        if view.header is not None and view.points:
            traces.append(_trace(view, view.header, i, value))
    values = [y for trace in traces for y in trace["y"]]
    costs = [x for trace in traces for x in trace["x"]]
    dense = [value(header, header.dense.score) for header in headers]
    low, high = min([*values, *dense]), max([*values, *dense])
    room = 0.06 * (high - low) or 1.0
    if len(set(dense)) == 1:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "dense model",
                "meta": "ink",
                "x": [1.0],
                "y": [dense[0]],
                "hovertemplate": "dense model<extra></extra>",
                "marker": {"symbol": "cross", "size": 12, "color": "rgba(0,0,0,0)", "line": {"width": 2}},
            }
        )
    figure = figure_of(
        traces,
        "",
        "",
        xaxis=axis(cost_label("macs_kept"), 0.0, max([1.0, *costs]) * 1.04),
        yaxis=axis(label, low - room, high + room),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return drawings.fitted(figure)


def _scale(headers: list[SweepHeader]) -> tuple[str, Any]:
    """Return the label of the vertical axis, and what stands on it for a score."""
    first = headers[0]
    if all((h.metric, h.direction) == (first.metric, first.direction) for h in headers):
        if all(h.dense.score == first.dense.score for h in headers):
            return score_label(first), lambda _header, score: score
        unit = "points" if unit_of(first) == "%" else unit_of(first)
        named = f"change of {clean(first.metric, 40)} against dense"
        return named + (f" ({unit})" if unit else ""), lambda header, score: score - header.dense.score

    def relative(header: SweepHeader, score: float) -> float:
        sign = 1 if header.direction == "max" else -1
        return 100 * sign * (score - header.dense.score) / (abs(header.dense.score) or 1.0)

    return "change of score against dense (% of the dense score; above 0 is better)", relative


def _trace(view: SweepView, header: SweepHeader, place: int, value: Any) -> dict[str, Any]:
    """Return the members of a front, from cheap to dear, and the line through them."""
    found: list[tuple[float, float, FrontPoint]] = sorted(
        (
            (kept, value(header, point.record.score), point)
            for point in view.points
            if (kept := point.record.kept.get("macs_kept")) is not None and point.record.score is not None
        ),
        key=lambda item: item[:2],
    )
    colour = LOOKS[place][0]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escaped(clean(view.name, 60)),
        "x": [x for x, _, _ in found],
        "y": [y for _, y, _ in found],
        "text": [joined((clean(view.name, 60), *hover(header, point.record, point))) for _, _, point in found],
        "customdata": [[view.key, point.record.number] for _, _, point in found],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"shape": "hv", "width": 2, "color": colour, "dash": _DASHES[place]},
        "marker": {"size": 9, "symbol": _SYMBOLS[place], "color": colour},
    }
