"""Figures and tables of a sweep, from its header and records alone; pure.

Interactive figures (`plotting`) are one self-contained HTML file each (`figures_html`), still ones PNG (`figures_png`);
what they show is worked out once for both, as in `scene`. All take the records in the order in which the trials
finished, and any number of them, none included. Names of layers, formats and metrics are shown as text, never as
markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autorank.captions import clean, plan_text
from autorank.growth import growth
from autorank.importance import Importance, importance_of
from autorank.layermap import layer_map
from autorank.layerrows import layer_rows
from autorank.plotting import hypervolume_figure, importance_figure, pareto_figure, rank_map_figure
from autorank.scene import scene
from autorank.types import FrontPoint, SweepHeader, TrialRecord

if TYPE_CHECKING:
    from pandas import DataFrame

FRONT_COLUMNS = (
    "number",
    "plan_id",
    "score",
    "drop",
    "test_score",
    "macs_kept",
    "params_kept",
    "bytes_kept",
    "bops_kept",
    "latency_ms",
    "latency_kept",
    "formats",
    "slower_layers",
)
LAYER_COLUMNS = (
    "layer",
    "format",
    "rank",
    "options",
    "macs",
    "macs_kept",
    "params",
    "params_kept",
    "weight_error",
    "output_error",
    "sensitivity",
    "latency_ms",
    "latency_kept",
)


def pareto_html(header: SweepHeader, records: Sequence[TrialRecord], front: Sequence[TrialRecord | FrontPoint]) -> str:
    """Return the interactive Pareto figure as one HTML file.

    Parameters
    ----------
    header : SweepHeader
    records : sequence of TrialRecord
    front : sequence of TrialRecord or FrontPoint
        Members of the front; a FrontPoint adds test score and measured latency to the hover text.

    Returns
    -------
    str
        About 4.7 MB: plotly.js is in it, and the page may load nothing else.
    """
    from autorank.figures_html import figure_page

    shown = scene(header, records, front)
    return figure_page(pareto_figure(shown), f"{shown.title} — {shown.subtitle}")


def pareto_png(header: SweepHeader, records: Sequence[TrialRecord], front: Sequence[TrialRecord | FrontPoint]) -> bytes:
    """Return the Pareto figure as PNG; parameters as for `pareto_html`."""
    from autorank.figures_png import pareto_image

    return pareto_image(scene(header, records, front))


def hypervolume_html(header: SweepHeader, records: Sequence[TrialRecord]) -> str:
    """Return the hypervolume of the front against finished trials and against time, as one HTML file."""
    from autorank.figures_html import figure_page

    return figure_page(hypervolume_figure(header, records), f"hypervolume — {clean(header.sweep_id, 60)}")


def hypervolume_png(header: SweepHeader, records: Sequence[TrialRecord]) -> bytes:
    """Return the hypervolume of the front against finished trials and against time, as PNG."""
    from autorank.figures_png import hypervolume_image

    return hypervolume_image(growth(header, records))


def rank_map_html(header: SweepHeader, front: Sequence[TrialRecord | FrontPoint]) -> str:
    """Return the heat map of the rank kept, layers × members of the front, as one HTML file."""
    from autorank.figures_html import figure_page

    return figure_page(rank_map_figure(header, front), f"rank kept — {clean(header.sweep_id, 60)}")


def rank_map_png(header: SweepHeader, front: Sequence[TrialRecord | FrontPoint]) -> bytes:
    """Return the heat map of the rank kept, layers × members of the front, as PNG."""
    from autorank.figures_png_layers import rank_map_image

    return rank_map_image(layer_map(header, front))


def importance_html(header: SweepHeader, records: Sequence[TrialRecord], found: Importance | None = None) -> str:
    """Return which choices the score depends on, as one HTML file.

    Takes seconds, unless what `importance_of` returned for these records is given as `found`.
    """
    from autorank.figures_html import figure_page

    found = found or importance_of(header, records)
    return figure_page(importance_figure(found), f"importance — {clean(header.sweep_id, 60)}")


def importance_png(header: SweepHeader, records: Sequence[TrialRecord], found: Importance | None = None) -> bytes:
    """Return which choices the score depends on, as PNG; parameters as for `importance_html`."""
    from autorank.figures_png_layers import importance_image

    return importance_image(found or importance_of(header, records))


def layers_html(header: SweepHeader, point: TrialRecord | FrontPoint) -> str:
    """Return the layers of a point before and after as a table in one HTML file; a FrontPoint tells the slower ones."""
    from autorank.figures_html_table import layers_page

    return layers_page(layer_rows(header, point))


def layers_png(header: SweepHeader, point: TrialRecord | FrontPoint) -> bytes:
    """Return the layers of a point before and after as a table in a PNG; parameters as for `layers_html`."""
    from autorank.figures_png_layers import layers_image

    return layers_image(layer_rows(header, point))


def front_table(header: SweepHeader, points: Sequence[FrontPoint]) -> DataFrame:
    """Return the front as a table, one row per point in the order given.

    Parameters
    ----------
    header : SweepHeader
        With the latency of the dense model in `dense_cost`, where the points have one.
    points : sequence of FrontPoint

    Returns
    -------
    DataFrame
        Columns `FRONT_COLUMNS`. ``drop`` is how much worse than dense the validation score is (negative: better).
        ``latency_kept`` is measured where `latency_ms` and a dense latency are there, else predicted. A value that is
        not there is missing (NaN).
    """
    from pandas import DataFrame

    dense_ms = header.dense_cost.latency_ms
    sign = 1.0 if header.direction == "max" else -1.0
    rows = []
    for point in points:
        record = point.record
        kept = record.kept.get("latency_kept")
        if point.latency_ms is not None and dense_ms:
            kept = point.latency_ms / dense_ms
        rows.append(
            (
                record.number,
                record.plan_id,
                record.score,
                None if record.score is None else sign * (header.dense.score - record.score),
                point.test_score,
                record.kept.get("macs_kept"),
                record.kept.get("params_kept"),
                record.kept.get("bytes_kept"),
                record.kept.get("bops_kept"),
                point.latency_ms,
                kept,
                plan_text(record.plan),
                ", ".join(point.slower_layers),
            )
        )
    table = DataFrame(rows, columns=list(FRONT_COLUMNS))
    floats = [c for c in FRONT_COLUMNS if c not in ("number", "plan_id", "formats", "slower_layers")]
    return table.astype({"number": "int64", **dict.fromkeys(floats, "float64")})


def layer_table(record: TrialRecord) -> DataFrame:
    """Return what became of each decomposed layer, one row per layer in the order of the record.

    Returns
    -------
    DataFrame
        Columns `LAYER_COLUMNS`; ratios are compressed ÷ dense, errors relative; what was not measured is missing (NaN).
        A ``latency_kept`` above 1 is a layer that got slower.
    """
    from pandas import DataFrame

    rows = [
        (
            layer.name,
            layer.choice.called,
            "×".join(map(str, layer.choice.rank)),
            ", ".join(f"{key}={value}" for key, value in layer.choice.options),
            layer.macs,
            layer.macs / max(layer.macs_dense, 1),
            layer.params,
            layer.params / max(layer.params_dense, 1),
            layer.weight_error,
            layer.output_error,
            layer.sensitivity,
            layer.latency_ms,
            layer.latency_ms / layer.latency_dense_ms
            if layer.latency_ms is not None and layer.latency_dense_ms
            else None,
        )
        for layer in record.layers
    ]
    table = DataFrame(rows, columns=list(LAYER_COLUMNS))
    whole = ("macs", "params")
    floats = [c for c in LAYER_COLUMNS if c not in ("layer", "format", "rank", "options", *whole)]
    return table.astype({**dict.fromkeys(whole, "int64"), **dict.fromkeys(floats, "float64")})
