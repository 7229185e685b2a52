"""Interactive figures of layers and of single trials as dictionaries: the rank map, fine-tune curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autorank.captions import clean, plan_text, unit_of, value_name
from autorank.layermap import layer_map
from autorank.plotting_base import Figure, axis, emptiness, escaped, figure_of, joined
from autorank.scene import OKABE_ITO
from autorank.types import FrontPoint, SweepHeader, TrialRecord

_MOST_WRITTEN = 30  # members; with more the numbers in the cells of a rank map are too small to read, and slow to draw
_DASHES = ("solid", "dash", "dot", "dashdot")


def rank_map_figure(header: SweepHeader, front: Sequence[TrialRecord | FrontPoint]) -> Figure:
    """Return the heat map of what each layer keeps: layers × members of the front, ordered by cost.

    The cells' x is ``#number``, their `customdata` the number of the trial.
    """
    shown = layer_map(header, front)
    trace = {
        "type": "heatmap",
        "x": [f"#{number}" for number in shown.numbers],
        "y": list(range(len(shown.layers))),
        "z": [[cell.kept for cell in row] for row in shown.rows],
        "text": [[cell.text for cell in row] for row in shown.rows],
        "hovertext": [[joined(cell.hover) for cell in row] for row in shown.rows],
        "customdata": [list(shown.numbers) for _ in shown.rows],
        "texttemplate": "%{text}" if len(shown.numbers) <= _MOST_WRITTEN else "",
        "textfont": {"size": 10},
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": True,
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": escaped(shown.label), "side": "right"}, "thickness": 14, "outlinewidth": 0},
    }
    empty = [] if shown.numbers else [emptiness("no point on the front yet")]
    rows = len(shown.layers)
    named = [escaped(name) for name in shown.layers]
    places: dict[str, Any] = {"tickmode": "array", "tickvals": list(range(rows)), "ticktext": named}
    layout: dict[str, Any] = {
        "xaxis": axis("trial, cheapest first", note=shown.note, type="category", showgrid=False),
        "yaxis": axis("layer, in the order of the network", rows - 0.5, -0.5, showgrid=False, **places),
        "annotations": empty,
    }
    if rows > 24:
        layout["height"] = 190 + 18 * rows
    return figure_of([trace] if shown.numbers else [], shown.title, shown.subtitle, **layout)


def curve_figure(header: SweepHeader, records: Sequence[TrialRecord]) -> Figure:
    """Return the fine-tune loss over steps, one line per record that has a curve."""
    drawn = [record for record in records if record.curve]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"#{record.number}",
            "x": [step for step, _ in record.curve],
            "y": [loss if math.isfinite(loss) else None for _, loss in record.curve],
            "text": joined((f"trial {record.number} · {plan_text(record.plan)}", *_scores(header, record))),
            "hovertemplate": "step %{x}: loss %{y:.4g}<br>%{text}<extra></extra>",
            "line": {"width": 2, "color": OKABE_ITO[i % 5], "dash": _DASHES[i // 5 % len(_DASHES)]},
            "marker": {"size": 5, "color": OKABE_ITO[i % 5]},
        }
        for i, record in enumerate(drawn)
    ]
    note = f"{len(records) - len(drawn)} without a fine-tune" if 0 < len(drawn) < len(records) else ""
    last = max([step for r in drawn for step, _ in r.curve], default=1) * 1.02 or 1
    subtitle = clean(header.sweep_id, 60)
    if len(records) == 1:
        subtitle = " · ".join((f"trial {records[0].number}", *_scores(header, records[0])))
    return figure_of(
        traces,
        "fine-tune loss",
        subtitle,
        xaxis=axis("fine-tune step", 0, last, note),
        yaxis=axis("fine-tune loss", rangemode="tozero"),
        showlegend=len(drawn) > 1,
        annotations=[] if drawn else [emptiness("no fine-tune ran")],
    )


def _scores(header: SweepHeader, record: TrialRecord) -> tuple[str, ...]:
    """Return the score after each phase, in words."""
    phases = (
        ("decomposed", record.score_before),
        ("with batch-norm statistics", record.score_bn),
        ("after recovery", record.score),
    )
    name, unit = value_name(header, "score"), unit_of(header)
    return tuple(f"{name} {phase} {score:.4g} {unit}".rstrip() for phase, score in phases if score is not None)
