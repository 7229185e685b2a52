"""How the hypervolume of a sweep grows, against trials and against time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from autorank.captions import clean, plan_text, value_name
from autorank.front import eligible, front_of, hypervolume, point_dominates, reference_point, values
from autorank.types import Fidelity, SweepHeader, TrialRecord

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


def hypervolumes(header: SweepHeader, records: Sequence[TrialRecord]) -> tuple[float, ...]:
    """Return the hypervolume of the front after each record, in the order given.

    Equal to the hypervolume of `front_of` over every prefix, but one pass: what is once beaten stays beaten.
    """
    directions = [o.direction for o in header.objectives]
    corner = reference_point(header.objectives, header.dense)
    front: tuple[TrialRecord, ...] = ()
    highest: Fidelity | None = None
    volume, volumes = 0.0, []

    def beaten(record: TrialRecord) -> bool:
        point = values(record, header.objectives)
        return any(point_dominates(values(other, header.objectives), point, directions) for other in front)

    for record in records:
        if record.status == "complete":
            if highest is None or record.fidelity > highest:
                highest, front, volume = record.fidelity, (), 0.0
            if eligible([record], header.constraints, highest) and not beaten(record):
                grown = front_of([*front, record], header.objectives, header.constraints, highest)
                if grown != front:
                    front = grown
                    volume = hypervolume([values(r, header.objectives) for r in front], corner, directions)
        volumes.append(volume)
    return tuple(volumes)


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
