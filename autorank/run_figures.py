"""The figures and tables that the run of a sweep holds: name of the file → its content."""

from __future__ import annotations

from collections.abc import Sequence

from autorank import figures
from autorank.importance import importance_of
from autorank.scene import pick
from autorank.types import FrontPoint, SweepHeader, TrialRecord

Files = dict[str, str | bytes]


def light(header: SweepHeader, records: Sequence[TrialRecord], front: Sequence[FrontPoint]) -> Files:
    """Return what is drawn again and again while a sweep runs; parameters as for `figures.pareto_html`."""
    table = figures.front_table(header, front)
    files: Files = {
        "pareto.html": figures.pareto_html(header, records, front),
        "pareto.png": figures.pareto_png(header, records, front),
        "hypervolume.html": figures.hypervolume_html(header, records),
        "hypervolume.png": figures.hypervolume_png(header, records),
        "rank_map.html": figures.rank_map_html(header, front),
        "rank_map.png": figures.rank_map_png(header, front),
        "front.json": table.to_json(orient="split", index=False),
        "front.csv": table.to_csv(index=False),
    }
    chosen = pick(header, [point.record for point in front])
    if chosen is not None:
        point = next(point for point in front if point.record.number == chosen.number)
        layers = figures.layer_table(point.record)
        files |= {
            "layers.html": figures.layers_html(header, point),
            "layers.png": figures.layers_png(header, point),
            "layers.json": layers.to_json(orient="split", index=False),
        }
    return files


def heavy(header: SweepHeader, records: Sequence[TrialRecord]) -> Files:
    """Return what takes seconds of computing, to be drawn rarely."""
    found = importance_of(header, records)
    return {
        "importance.html": figures.importance_html(header, records, found),
        "importance.png": figures.importance_png(header, records, found),
    }
