"""Interactive figures as plain dictionaries, the same for a page of their own and for a page that holds several.

None of them says what a theme looks like: `themed` does, for a page that knows it; `figures_html` follows the reader's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autorank.growth import growth
from autorank.plotting_base import Figure, axis, emptiness, figure_of, joined, themed
from autorank.plotting_importance import importance_figure
from autorank.plotting_layers import curve_figure, rank_map_figure
from autorank.plotting_pareto import pareto_figure
from autorank.scene import OKABE_ITO
from autorank.types import SweepHeader, TrialRecord

__all__ = [
    "Figure",
    "curve_figure",
    "hypervolume_figure",
    "importance_figure",
    "pareto_figure",
    "rank_map_figure",
    "themed",
]

NOTHING = "no finished trial yet"


def hypervolume_figure(header: SweepHeader, records: Sequence[TrialRecord]) -> Figure:
    """Return the hypervolume of the front against finished trials (left) and against time (right).

    Parameters
    ----------
    header : SweepHeader
    records : sequence of TrialRecord
        In the order in which the trials finished.
    """
    shown = growth(header, records)
    traces: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    for number, (label, values) in zip(("", "2"), shown.panels, strict=True):
        domain = [0.0, 0.48] if not number else [0.52, 1.0]
        axes[f"xaxis{number}"] = axis(label, 0, max([*values, 1e-9]) * 1.02, domain=domain, anchor=f"y{number}")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(values) <= 100 else "lines",
                "x": list(values),
                "y": list(shown.volumes),
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "text": [joined(lines) for lines in shown.hover],
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"shape": "hv", "width": 2, "color": OKABE_ITO[0]},
                "marker": {"size": 5, "color": OKABE_ITO[0]},
                "showlegend": False,
            }
        )
    up = axis("hypervolume of the front", 0, max([*shown.volumes, 1e-9]) * 1.06)
    axes |= {"yaxis": up, "yaxis2": {**up, "title": {}, "anchor": "x2", "matches": "y", "showticklabels": False}}
    empty = [] if shown.volumes else [emptiness(NOTHING)]
    return figure_of(traces, shown.title, shown.subtitle, **axes, annotations=empty)
