"""Sweeps made up on disk for the tests of the dashboard: finished, growing, and many of them at once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from autorank.journal import FILE_NAME, Journal
from autorank.types import FrontPoint, Plan, SweepHeader, TrialRecord
from tests.sweep_samples import DENSE, header, points, records

BEGAN = 1_700_000_000.0
"""When the first of the sweeps was started; each further one an hour later."""


def sweep_header(sweep_id: str, trials: int = 40, created: float = BEGAN, **settings: object) -> SweepHeader:
    """A header that says how many trials there are to be; more settings change the configuration."""
    made = header(sweep_id)
    return replace(made, created=created, config={**made.config, "trials": trials, **settings})


def widened(record: TrialRecord, layers: int) -> TrialRecord:
    """The record with its layers repeated under new names until there are so many, as deep networks have."""
    if not record.plan.layers:
        return record
    choices = [choice for _, choice in record.plan.layers]
    named = {f"layer{i // 3}.{i % 3}.conv{i}": choices[i % len(choices)] for i in range(layers)}
    results = record.layers and tuple(
        replace(record.layers[i % len(record.layers)], name=name, choice=choice)
        for i, (name, choice) in enumerate(named.items())
    )
    return replace(record, plan=Plan.of(named), layers=results)


def front_points(head: SweepHeader, done: tuple[TrialRecord, ...]) -> tuple[FrontPoint, ...]:
    """The front with its final measurements."""
    return points(head, done)


def write_sweep(
    directory: Path,
    count: int,
    *,
    sweep_id: str = "",
    seed: int = 0,
    layers: int = 0,
    ended: str = "all trials done",
    measured: bool = True,
    created: float = BEGAN,
    **settings: object,
) -> tuple[SweepHeader, tuple[TrialRecord, ...]]:
    """Write the journal of a sweep of `count` trials; with `layers` so many layers instead of nine.

    Without a reason in `ended` it looks like one that was killed, without `measured` like one whose front was not.
    """
    head = sweep_header(sweep_id or directory.name, count, created, **settings)
    done = records(head, count, seed)
    if layers:
        done = tuple(widened(record, layers) for record in done)
    with Journal(directory) as journal:
        journal.write_header(head)
        for record in done:
            journal.write_trial(record)
        if measured and done:
            journal.write_front(front_points(head, done), DENSE)
        if ended:
            journal.write_end(ended, {"prepare": 2.0, "search": 30.0, "front": 1.5})
    return head, done


def write_many(root: Path, sweeps: int, large: int, small: int, layers: int = 0) -> tuple[Path, ...]:
    """Write `sweeps` sweeps, the oldest with `large` trials and the others with `small`; return their directories.

    The small ones are copies of one under names of their own: to write each would sync every line to disk.
    """
    write_sweep(root / "sweep-00", large, seed=1, layers=layers)
    second = BEGAN + 3600
    write_sweep(root / "sweep-01", small, seed=2, layers=layers, created=second)
    text = (root / "sweep-01" / FILE_NAME).read_text(encoding="utf-8")
    for number in range(2, sweeps):
        directory = Path(shutil.copytree(root / "sweep-01", root / f"sweep-{number:02}"))
        renamed = text.replace("sweep-01", directory.name).replace(str(second), str(BEGAN + 3600 * number))
        (directory / FILE_NAME).write_text(renamed, encoding="utf-8")
    return tuple(root / f"sweep-{number:02}" for number in range(sweeps))


class Growing:
    """A sweep that runs: as long as this is open its directory is held, and trials come when they are asked for."""

    def __init__(self, directory: Path, count: int, *, sweep_id: str = "", seed: int = 0) -> None:
        self.directory = directory
        self.header = sweep_header(sweep_id or directory.name, count)
        self.records = records(self.header, count, seed)
        self.done = 0
        self.journal = Journal(directory)

    def __enter__(self) -> Growing:
        """Hold the directory; the header is written by `begin`."""
        self.journal.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go, as a killed process does."""
        self.journal.close()

    def begin(self) -> None:
        """Write the header: the preparation is over."""
        self.journal.write_header(self.header)

    def grow(self, count: int = 1) -> None:
        """Write the next trials."""
        for record in self.records[self.done : self.done + count]:
            self.journal.write_trial(record)
        self.done = min(self.done + count, len(self.records))

    def end(self, reason: str = "all trials done") -> None:
        """Write the measured front and the reason, and let go."""
        done = self.records[: self.done]
        self.journal.write_front(front_points(self.header, done), DENSE)
        self.journal.write_end(reason, {"search": 30.0})
        self.journal.close()
