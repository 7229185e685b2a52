"""What a figure of the front shows, worked out once for both kinds of picture; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from autorank.captions import group_of, hover, not_drawn, sweep_text, value_label, value_name
from autorank.errors import ConfigError, EmptyFrontError
from autorank.front import (
    COSTS,
    knee,
    non_dominated,
    recommended,
    values,
)
from autorank.types import Direction, Fidelity, FrontPoint, Objective, SweepHeader, TrialRecord

Kind = Literal["full", "partial", "pruned"]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00")
"""Colours that colour-blind people can tell apart (Okabe and Ito, 2008), those that show on white and on black."""

MIXED = "#CC79A7"
GREY = "#8A8A8A"

AXES = ("score", *COSTS.values())
"""The values of a record that may stand on an axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the value it shows, its label with the unit, the range drawn at first, and where better is."""

    name: str
    label: str
    low: float
    high: float
    direction: Direction = "min"

    def place(self, value: float) -> float:
        """Return where `value` lies: 0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Mark:
    """One trial as a point: `size` is 0..1 along the third objective (0.5 without one), `explain` makes `hover`."""

    number: int
    x: float
    y: float
    size: float
    group: str
    colour: str
    kind: Kind
    on_front: bool
    explain: Callable[[], tuple[str, ...]] = field(compare=False, repr=False)

    @property
    def hover(self) -> tuple[str, ...]:
        """Lines that explain the trial, as plain text; worked out when asked for, as it takes longer than the rest."""
        return self.explain()


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a Pareto figure shows.

    Attributes
    ----------
    title, subtitle, note : str
        Plain text; `note` says which trials cannot be drawn.
    x, y : Axis
    third : str
        Label of the third objective, which the size of the marks shows; empty where there are two.
    marks : tuple of Mark
        In the order in which the trials finished; `on_front` says who is on the front of the sweep's own objectives.
    line : tuple of (x, y)
        Corners of the staircase through the members of the front that no other member beats in these two axes.
    dense : (x, y)
    knee, recommended : Mark or None
    """

    title: str
    subtitle: str
    note: str
    x: Axis
    y: Axis
    third: str
    marks: tuple[Mark, ...]
    line: tuple[tuple[float, float], ...]
    dense: tuple[float, float]
    knee: Mark | None = None
    recommended: Mark | None = None

    @property
    def labels(self) -> tuple[tuple[Mark, str], ...]:
        """The marks that carry a name, and the name."""
        knee, best = self.knee, self.recommended
        if best is not None and knee is not None and best.number == knee.number:
            return ((best, f"#{best.number} recommended, knee"),)
        named = ((best, "recommended"), (knee, "knee"))
        return tuple((mark, f"#{mark.number} {word}") for mark, word in named if mark is not None)

    def free_side(self, mark: Mark) -> tuple[int, int]:
        """Return the direction (right, up) from `mark` where a label hides least: beyond the front, not at the edge."""
        right, up = (1 if axis.direction == "max" else -1 for axis in (self.x, self.y))
        across = self.x.place(mark.x)
        if (across if right < 0 else 1 - across) > 0.25:
            return right, up
        return -right, -up if 0.12 < self.y.place(mark.y) < 0.88 else 0

    @property
    def groups(self) -> dict[str, str]:
        """Group of formats → colour, in order of first appearance."""
        return {mark.group: mark.colour for mark in self.marks}


def records_of(front: Sequence[TrialRecord | FrontPoint]) -> tuple[TrialRecord, ...]:
    """Return the records of a front that may already carry the final measurements."""
    return tuple(p.record if isinstance(p, FrontPoint) else p for p in front)


def pick(header: SweepHeader, front: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the recommended record of a front; None for a front without a score."""
    try:
        return recommended(header, front).record
    except EmptyFrontError:
        return None


def _axes(header: SweepHeader, axes: tuple[str, str] | None) -> tuple[Objective, Objective, Objective | None]:
    """Return what x, y and the size show: what is asked for, else the first cost and the score; then what is left."""
    if axes is None:
        costs = [o.name for o in header.objectives if o.name != "score"] or ["macs_kept"]
        scored = any(o.name == "score" for o in header.objectives) or len(costs) == 1
        axes = (costs[0], "score" if scored else costs[1])
    if len(axes) != 2 or axes[0] == axes[1] or not set(axes) <= set(AXES):
        raise ConfigError(
            f"axes: {', '.join(map(repr, axes))} given; two different ones of {', '.join(AXES)} are needed"
        )
    across, up = (Objective(name, header.direction if name == "score" else "min") for name in axes)
    return across, up, next((o for o in header.objectives if o.name not in axes), None)


def _axis(header: SweepHeader, shown: Objective, wanted: Sequence[float], seen: Sequence[float]) -> Axis:
    """Return an axis over all of `wanted`, and over what of `seen` does not squeeze it."""
    step = 0.02 * (abs(header.dense.score) or 1.0) if shown.name == "score" else 0.05
    return Axis(shown.name, value_label(header, shown.name), *_range(wanted, seen, step), shown.direction)


def _range(wanted: Sequence[float], seen: Sequence[float], step: float) -> tuple[float, float]:
    """Return the range that shows all of `wanted`, and of `seen` what is not far below or above them."""
    low, high = min(wanted), max(wanted)
    room = max(high - low, step)
    near = [v for v in seen if low - 0.75 * room <= v <= high + 0.75 * room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) if high - low > step else step
    return low - margin, high + margin


def _kind(record: TrialRecord, full: Fidelity) -> Kind:
    if record.status == "pruned":
        return "pruned"
    return "full" if record.fidelity >= full else "partial"


def _colours(groups: Sequence[str]) -> dict[str, str]:
    """Give each group a colour by order of first appearance, so that it keeps it while a sweep grows."""
    named = [group for group in dict.fromkeys(groups) if group not in ("mixed", "dense")]
    palette = {group: OKABE_ITO[i] if i < len(OKABE_ITO) else GREY for i, group in enumerate(named)}
    return {**palette, "mixed": MIXED, "dense": GREY}


def scene(
    header: SweepHeader,
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord | FrontPoint],
    axes: tuple[str, str] | None = None,
) -> Scene:
    """Work out what the Pareto figure shows.

    Parameters
    ----------
    header : SweepHeader
    records : sequence of TrialRecord
        Finished trials in the order in which they ended; may be empty.
    front : sequence of TrialRecord or FrontPoint
        Members of the front; a FrontPoint adds its test score and latency to the hover text.
    axes : (str, str), optional
        What x and y show, two of `AXES`; by default the sweep's first cost and the score. The size of the marks shows
        the first objective that is on no axis.

    Returns
    -------
    Scene

    Raises
    ------
    ConfigError
        `axes` are not two different ones of `AXES`.
    """
    across, up, third = _axes(header, axes)
    members = records_of(front)
    measured = {p.record.number: p for p in front if isinstance(p, FrontPoint)}
    numbers = {record.number for record in members}
    drawn = [
        (r, *at)
        for r in records
        if r.status != "failed" and (at := _finite_pair(r.value(across.name), r.value(up.name))) is not None
    ]
    full = max((r.fidelity for r in records if r.status == "complete"), default=Fidelity())
    groups = [group_of(r) for r, _, _ in drawn]
    colours = _colours(groups)
    sizes = _sizes([r.value(third.name) if third else None for r, _, _ in drawn])
    marks = tuple(
        Mark(
            r.number,
            x,
            y,
            size,
            group,
            colours[group],
            _kind(r, full),
            r.number in numbers,
            partial(hover, header, r, measured.get(r.number)),
        )
        for (r, x, y), size, group in zip(drawn, sizes, groups, strict=True)
    )
    by_number = {mark.number: mark for mark in marks}
    on_front = [mark for mark in marks if mark.on_front]
    dense_x, dense_y = (header.dense.score if o.name == "score" else 1.0 for o in (across, up))
    choice = pick(header, members)
    bend = _knee(header, members)
    return Scene(
        title=f"{value_name(header, up.name)} against {value_name(header, across.name)}",
        subtitle=sweep_text(header, records, len(members)),
        note=not_drawn(records, len(marks)),
        x=_axis(header, across, [*(m.x for m in on_front), dense_x], [m.x for m in marks]),
        y=_axis(header, up, [*(m.y for m in on_front), dense_y], [m.y for m in marks]),
        third=value_label(header, third.name) if third else "",
        marks=marks,
        line=_staircase([(m.x, m.y) for m in on_front], across, up),
        dense=(dense_x, dense_y),
        knee=by_number.get(bend.number) if bend else None,
        recommended=by_number.get(choice.number) if choice else None,
    )


def _finite_pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    return (x, y) if x is not None and y is not None and math.isfinite(x) and math.isfinite(y) else None


def _sizes(values_: Sequence[float | None]) -> list[float]:
    """Scale to 0..1; 0.5 where there is nothing to tell apart."""
    known = [v for v in values_ if v is not None and math.isfinite(v)]
    low, width = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    return [0.5 if v is None or not math.isfinite(v) or not width else (v - low) / width for v in values_]


def _knee(header: SweepHeader, front: Sequence[TrialRecord]) -> TrialRecord | None:
    points = [values(record, header.objectives) for record in front]
    if len(non_dominated(points, [o.direction for o in header.objectives])) < 3:
        return None  # two points have no bend between them
    return front[knee(points, [o.direction for o in header.objectives])]


def _staircase(
    points: Sequence[tuple[float, float]], across: Objective, up: Objective
) -> tuple[tuple[float, float], ...]:
    """Return the corners of what the points attain: on the line a point's other value is had at its worse x as well."""
    kept = sorted({points[i] for i in non_dominated(points, (across.direction, up.direction))})
    corners: list[tuple[float, float]] = []
    for x, y in kept:
        if corners:
            before, level = corners[-1]
            corners.append((x, level) if across.direction == "min" else (before, y))
        corners.append((x, y))
    return tuple(corners)
