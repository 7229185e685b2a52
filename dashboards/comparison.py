"""Two sweeps or two points side by side, as rows of text that a page sets as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autorank.captions import COST_LABELS, clean, unit_of, value_name
from autorank.front import hypervolume, reference_point, score_text, values
from autorank.privacy import without_secrets
from autorank.progress import duration
from autorank.types import Direction, FrontPoint, SweepHeader, TrialRecord, tally

from .library import SweepView

NOTHING = "–"
_WIDTH = 120
_OWN = {"sweep_dir"}  # different for any two sweeps


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes
    ----------
    name : str
    values : tuple of two str
        Plain text of the left and of the right one.
    better : {0, 1, None}
        Which of them is better; None where neither is, or nobody can say.
    """

    name: str
    values: tuple[str, str]
    better: Literal[0, 1] | None = None


@dataclass(frozen=True)
class Comparison:
    """What there is to say of two things side by side.

    Attributes
    ----------
    names : tuple of two str
    figures : tuple of Row
        Key figures, equal or not.
    differences : tuple of Row
        What differs: of sweeps the settings, of points the choices for layers.
    equal : int
        How many settings or layers are the same.
    note : str
        Why figures do not compare, in one line; empty when they do.
    """

    names: tuple[str, str]
    figures: tuple[Row, ...] = ()
    differences: tuple[Row, ...] = ()
    equal: int = 0
    note: str = ""


@dataclass(frozen=True)
class _Figure:
    """A key figure: its text and, where one can be better than another, its value and which way is better."""

    text: str
    value: float | None = None
    direction: Direction = "max"


def compare_sweeps(one: SweepView, two: SweepView) -> Comparison:
    """Compare what two sweeps found, and list the settings that differ; secrets are masked."""
    names = (one.name, two.name)
    left, right = one.contents.header, two.contents.header
    if left is None or right is None:
        missing = [view.name for view in (one, two) if view.contents.header is None]
        return Comparison(names, note=f"{' and '.join(missing)}: nothing is known yet")
    note = _doubt(left, right)
    figures = _side_by_side(_of_sweep(one, left), _of_sweep(two, right), note)
    differences, equal = _differences(_settings(left), _settings(right), NOTHING)
    return Comparison(names, figures, differences, equal, note)


def compare_points(one: SweepView, first: int, two: SweepView, second: int) -> Comparison | None:
    """Compare two trials, of one sweep or of two, by their numbers; None when one of them is not there."""
    left, right = one.contents.header, two.contents.header
    records = one.record(first), two.record(second)
    if left is None or right is None or records[0] is None or records[1] is None:
        return None
    same = one.key == two.key
    names = (f"#{first}", f"#{second}") if same else (f"#{first} of {one.name}", f"#{second} of {two.name}")
    note = "" if same else _doubt(left, right)
    figures = _side_by_side(_of_point(one, left, records[0]), _of_point(two, right, records[1]), note)
    differences, equal = _differences(_choices(left, records[0]), _choices(right, records[1]), "dense")
    return Comparison(names, figures, differences, equal, note)


def _side_by_side(left: Mapping[str, _Figure], right: Mapping[str, _Figure], doubt: str) -> tuple[Row, ...]:
    rows = []
    for name in dict.fromkeys([*left, *right]):
        a, b = left.get(name, _Figure(NOTHING)), right.get(name, _Figure(NOTHING))
        better: Literal[0, 1] | None = None
        if not doubt and a.value is not None and b.value is not None and a.text != b.text:
            better = 0 if (a.value > b.value) == (a.direction == "max") else 1
        rows.append(Row(name, (a.text, b.text), better))
    return tuple(rows)


def _differences(left: Mapping[str, str], right: Mapping[str, str], without: str) -> tuple[tuple[Row, ...], int]:
    """Return what is not the same on both sides, and how much is."""
    names = dict.fromkeys([*left, *right])
    pairs = [(name, left.get(name, without), right.get(name, without)) for name in names]
    found = tuple(Row(clean(name, 80), _clipped(a, b)) for name, a, b in pairs if a != b)
    return found, len(pairs) - len(found)


def _clipped(a: str, b: str) -> tuple[str, str]:
    """Return two texts that differ, cut so that the difference is seen."""
    start = 0
    if max(len(a), len(b)) > _WIDTH:
        equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = max(0, equal - 20)
    begun = "…" if start else ""
    return begun + clean(a[start:], _WIDTH), begun + clean(b[start:], _WIDTH)


def _doubt(left: SweepHeader, right: SweepHeader) -> str:
    """Say why the figures of two sweeps do not compare."""
    for what, one, two in (
        ("metrics", (left.metric, left.direction), (right.metric, right.direction)),
        ("dense models or validation data", left.fingerprint, right.fingerprint),
        ("dense models or validation data", left.dense, right.dense),
        ("dense models", left.dense_cost.macs, right.dense_cost.macs),
    ):
        if one != two:
            return f"the {what} differ, so the figures do not compare"
    return ""


def _of_sweep(view: SweepView, header: SweepHeader) -> dict[str, _Figure]:
    contents, best = view.contents, view.points[0] if view.points else None
    axes = " × ".join(value_name(header, o.name) for o in header.objectives)
    volume = hypervolume(
        [values(point.record, header.objectives) for point in view.points],
        reference_point(header.objectives, header.dense),
        [o.direction for o in header.objectives],
    )
    done = f"{view.state.stage}{f', {clean(view.state.reason)}' if view.state.reason else ''}"
    found = {
        "state": _Figure(done),
        "trials": _Figure(f"{tally(contents.records)} of {view.state.total}"),
        "failed, stopped early": _Figure(f"{view.state.failed}, {view.state.pruned}"),
        "dense score": _Figure(_score(header, header.dense.score)),
        "points on the front": _Figure(str(len(view.points))),
        "hypervolume": _Figure(f"{volume:.4g} ({axes})", volume),
        "best score": _scored(header, best.record.score if best else None),
        "recommended": _Figure(f"#{view.recommended.record.number}" if view.recommended else NOTHING),
    }
    if view.recommended is not None:
        found |= {f"recommended: {name}": f for name, f in _results(view, header, view.recommended).items()}
    spent = sum(sum(record.seconds.values()) for record in contents.records)
    found["time spent in trials"] = _Figure(duration(spent))
    if contents.seconds:
        parts = ", ".join(f"{clean(name, 40)} {duration(seconds)}" for name, seconds in contents.seconds.items())
        found["time of the last run"] = _Figure(parts)
    return found


def _of_point(view: SweepView, header: SweepHeader, record: TrialRecord) -> dict[str, _Figure]:
    point = view.point(record.number)
    best = view.recommended is not None and view.recommended.record.number == record.number
    place = ("recommended, " if best else "") + ("on the front" if point else "not on the front")
    return {
        "place": _Figure(place if record.status == "complete" else record.status),
        "fidelity": _Figure(record.fidelity.label),
        "layers decomposed": _Figure(str(len(record.plan.layers))),
        "score before recovery": _scored(header, record.score_before),
        **_results(view, header, point or FrontPoint(record)),
        "time of the trial": _Figure(duration(sum(record.seconds.values()))),
    }


def _results(view: SweepView, header: SweepHeader, point: FrontPoint) -> dict[str, _Figure]:
    """Return what a point scores and costs."""
    record, dense = point.record, view.contents.dense
    lost = None if record.score is None else header.dense.score - record.score
    lost = -lost if lost is not None and header.direction == "min" else lost
    found = {
        "score": _scored(header, record.score),
        "lost against dense": _Figure(NOTHING if lost is None else score_text(lost), lost, "min"),
        "test score": _scored(header, point.test_score),
    }
    for name, label in COST_LABELS.items():
        value = record.kept.get(name)
        if value is not None:
            label = f"{label}, predicted" if name == "latency_kept" else label
            found[label] = _Figure(f"{value:.3f}", value, "min")
    if point.latency_ms is not None:
        kept = f" ({point.latency_ms / dense.latency_ms:.2f} of dense)" if dense and dense.latency_ms else ""
        found["latency, measured"] = _Figure(f"{point.latency_ms:.3g} ms{kept}", point.latency_ms, "min")
    return found


def _score(header: SweepHeader, value: float | None) -> str:
    return NOTHING if value is None else f"{score_text(value)} {unit_of(header)}".rstrip()


def _scored(header: SweepHeader, value: float | None) -> _Figure:
    return _Figure(_score(header, value), value, header.direction)


def _choices(header: SweepHeader, record: TrialRecord) -> dict[str, str]:
    """Return what a plan makes of each layer, in the order of the network, with room for line breaks."""
    known = {str(row.get("name")): "dense" for row in header.layers}
    return known | {name: str(choice).replace(",", ", ") for name, choice in record.plan.layers}


def _settings(header: SweepHeader) -> dict[str, str]:
    """Return everything with which a sweep was started, and on what, one by one and without secrets."""
    settings = without_secrets({k: v for k, v in header.config.items() if k not in _OWN})
    others = {"versions": header.versions, "fingerprint": header.fingerprint}
    return dict(_flat({**settings, **without_secrets(others)}))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + str(name), value if isinstance(value, str) else json.dumps(value, default=str)
