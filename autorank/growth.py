"""How the front of a sweep and its hypervolume grow, against trials and against time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_not

from autorank.captions import clean, plan_text, value_name
from autorank.front import best_first, eligible, hypervolume, reference_point, values
from autorank.pareto import covers, minimised
from autorank.types import Constraint, Fidelity, Objective, SweepHeader, TrialRecord

_UNITS = (("seconds", 1.0, 120.0), ("minutes", 60.0, 120 * 60.0), ("hours", 3600.0, 72 * 3600.0))


@dataclass(frozen=True, slots=True)
class Growth:
    """The hypervolume of the front after each finished trial.

    Attributes
    ----------
    title, subtitle : str
    volumes : tuple of float
        In the order in which the trials finished.
    times : tuple of float
        When each finished, since the sweep began, in `unit`; they never go back, whatever the workers' clocks say.
    unit : str
        seconds, minutes, hours or days.
    hover : tuple of tuple of str
        Plain lines on each trial.
    """

    title: str
    subtitle: str
    volumes: tuple[float, ...]
    times: tuple[float, ...]
    unit: str
    hover: tuple[tuple[str, ...], ...]

    @property
    def panels(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """Label and values of the horizontal axis of both panels."""
        trials = tuple(float(i) for i in range(1, len(self.volumes) + 1))
        return ("finished trials", trials), (f"time since the sweep began ({self.unit})", self.times)


class GrowingFront:
    """The front of a sweep, brought up to date record by record: what is once beaten stays beaten.

    Its `members` are always those of `front_of` over all records so far.

    Parameters
    ----------
    objectives : sequence of Objective
    constraints : sequence of Constraint
    records : iterable of TrialRecord
        To begin with.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        records: Iterable[TrialRecord] = (),
    ) -> None:
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)
        self._directions = [o.direction for o in objectives]
        self._fidelity: Fidelity | None = None
        self._points: dict[int, tuple[float, ...]] = {}
        self.members: tuple[TrialRecord, ...] = ()
        for record in records:
            self.add(record)

    def add(self, record: TrialRecord) -> bool:
        """Take one more record; return whether the front is another one now."""
        before = self.members
        if record.status != "complete" or record.probe:
            return False
        if self._fidelity is None or record.fidelity > self._fidelity:
            self._fidelity, self.members, self._points = record.fidelity, (), {}
        if eligible([record], self._constraints, self._fidelity):
            self._enter(record, minimised(values(record, self._objectives), self._directions))
        return self.members != before

    def _enter(self, record: TrialRecord, point: tuple[float, ...] | None) -> None:
        """Put a record where it belongs, if that is on the front; of equal ones the first stays."""
        if point is None:
            return
        for member in self.members:
            other = self._points[member.number]
            if covers(other, point) and (other != point or member.number < record.number):
                return
        self._points[record.number] = point
        left = [member for member in self.members if not covers(point, self._points[member.number])]
        self.members = best_first([*left, record], self._objectives)
        self._points = {member.number: self._points[member.number] for member in self.members}


class GrowingVolume:
    """The hypervolume of the front after each record, gone on with where more records have come.

    Parameters
    ----------
    header : SweepHeader

    Attributes
    ----------
    header : SweepHeader
    """

    def __init__(self, header: SweepHeader) -> None:
        self.header = header
        self._begin()

    def _begin(self) -> None:
        self._seen: list[TrialRecord] = []
        self._volumes: list[float] = []
        self._front = GrowingFront(self.header.objectives, self.header.constraints)

    def of(self, records: Sequence[TrialRecord]) -> tuple[float, ...]:
        """Return the hypervolume after each record, in the order given."""
        if len(records) < len(self._seen) or any(map(is_not, self._seen, records)):
            self._begin()
        objectives = self.header.objectives
        directions = [o.direction for o in objectives]
        corner = reference_point(objectives, self.header.dense)
        for record in records[len(self._seen) :]:
            volume = self._volumes[-1] if self._volumes else 0.0
            if self._front.add(record):
                volume = hypervolume([values(r, objectives) for r in self._front.members], corner, directions)
            self._seen.append(record)
            self._volumes.append(volume)
        return tuple(self._volumes)


def hypervolumes(header: SweepHeader, records: Sequence[TrialRecord]) -> tuple[float, ...]:
    """Return the hypervolume of the front after each record, in the order given."""
    return GrowingVolume(header).of(records)


def ended(header: SweepHeader, record: TrialRecord) -> float:
    """Return when a trial finished, in seconds since the sweep began; 0 for one taken from an earlier sweep."""
    return max(0.0, record.started + sum(record.seconds.values()) - header.created)


def growth(header: SweepHeader, records: Sequence[TrialRecord]) -> Growth:
    """Work out what the figure of the hypervolume shows; `records` in the order in which the trials finished."""
    volumes = hypervolumes(header, records)
    seconds = tuple(itertools.accumulate((ended(header, record) for record in records), max))
    last = seconds[-1] if seconds else 0.0
    unit, size = next(((name, size) for name, size, end in _UNITS if last < end), ("days", 86400.0))
    times = tuple(value / size for value in seconds)
    hover = tuple(
        (
            f"after {i} trials, {time:.3g} {unit}: {volume:.4g}",
            f"trial {record.number}, {record.status} · {plan_text(record.plan)}",
        )
        for i, (volume, time, record) in enumerate(zip(volumes, times, records, strict=True), 1)
    )
    objectives = " × ".join(value_name(header, o.name) for o in header.objectives)
    now = f" · now {volumes[-1]:.4g}" if volumes else ""
    subtitle = f"{clean(header.sweep_id, 60)} · {objectives}{now}"
    return Growth("hypervolume over trials and time", subtitle, volumes, times, unit, hover)
