"""Brings the runs of a sweep in line with its records: what should stand there against what does.

Nothing here knows MLflow: the runs are reached through `Runs`. Every step compares before it writes and a trial's run
is ended last, so a writing that was broken off anywhere is completed by the next, and one too many writes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autorank import run_figures, run_values
from autorank.front import front_of
from autorank.growth import GrowingVolume
from autorank.run_inputs import DataInput, Example, ModelInput, Package, datasets, dense_model
from autorank.run_values import NUMBER, PARENT, RECOMMENDED, REGISTERED, REGISTERED_AS, ROLE, STATE, SWEEP_ID, RunValues
from autorank.scene import pick
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

_HEADER = "autorank.header"
_DENSE = "autorank.dense_model"
_FIGURES = "autorank.figures"
_OPEN = ("RUNNING", "SCHEDULED")
_STATUS = {"running": "RUNNING", "finished": "FINISHED"}

Metric = tuple[str, float, int, int]
"""Key, value, step, Unix time in milliseconds."""


@dataclass(slots=True)
class Run:
    """A run as it stands in the store."""

    id: str
    status: str
    start: int
    tags: dict[str, str]
    metrics: dict[str, float]


class Runs(Protocol):
    """The store of runs; every method may raise when the store is away."""

    def find(self, tags: Mapping[str, str]) -> list[Run]:
        """Return the runs that carry all of `tags`."""

    def steps(self, run: Run, metric: str) -> int:
        """Return how many values of `metric` the run has."""

    def create(self, values: RunValues, tags: Mapping[str, str]) -> Run:
        """Make a run that has the tags of `values` and `tags`."""

    def write(self, run: Run, metrics: Sequence[Metric], tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        """Add metrics, tags and params; values that stand there already are not doubled."""

    def dense(self, run: Run, model: ModelInput) -> str:
        """Return the id under which the store names the dense model of the sweep of `run`; it is named once."""

    def inputs(self, run: Run, data: Sequence[DataInput], model: str) -> None:
        """Name the data and the model (an id, or empty) that a run starts from; doing so again changes nothing."""

    def register(self, run: Run, child: Run, package: Package) -> str:
        """Register a model that the trial `child` of the sweep `run` made, and return how it is called there."""

    def drop_tag(self, run: Run, tag: str) -> None:
        """Take a tag away."""

    def files(self, run: Run, files: Mapping[str, str | bytes | Path], folder: str = "") -> None:
        """Write artifacts, given by content or as files to copy."""

    def set_status(self, run: Run, status: str, when: int) -> None:
        """End the run at `when` (milliseconds), or open it again with the status RUNNING."""

    def delete(self, run: Run) -> None:
        """Delete a run."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What should stand in the store.

    Attributes
    ----------
    header : SweepHeader
    records : tuple of TrialRecord
        In the order in which the trials finished.
    points : tuple of FrontPoint or None
        The measured front; None until it has been measured.
    dense : DenseFigures or None
        The dense model measured beside it.
    files : tuple of Path
        More files to keep with the sweep.
    state : str
        ``running``, ``finished`` or ``stopped``.
    example : sequence of (type, shape)
        Of the network's inputs.
    package : Package or None
        The recommended model, to be registered.
    """

    header: SweepHeader
    records: tuple[TrialRecord, ...] = ()
    points: tuple[FrontPoint, ...] | None = None
    dense: DenseFigures | None = None
    files: tuple[Path, ...] = ()
    state: str = "running"
    example: Example = ()
    package: Package | None = None

    def front(self) -> tuple[FrontPoint, ...]:
        """Return the measured front, else the present one, not yet measured."""
        if self.points is not None:
            return self.points
        found = front_of(self.records, self.header.objectives, self.header.constraints)
        return tuple(FrontPoint(record) for record in found)

    def shown(self) -> str:
        """Return a short hash of what figures, tables and files show."""
        parts: list[object] = [[(r.number, r.plan_id) for r in self.records], self.dense]
        parts += [point.to_json() for point in self.points or ()]
        parts += [(path.name, path.stat().st_size) for path in self.files if path.is_file()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class SweepRuns:
    """The runs of one sweep, read from the store once and then kept in step with what is written.

    Attributes
    ----------
    touched : set of str
        Ids of the runs that were made or changed.
    """

    def __init__(self, runs: Runs, header: SweepHeader) -> None:
        self.runs = runs
        self.touched: set[str] = set()
        self.children: dict[int, Run] = {}
        self.volumes = 0
        self._growing = GrowingVolume(header)
        self._weighed = 0  # trials in the importance that was drawn last
        found = runs.find({ROLE: "sweep", SWEEP_ID: header.sweep_id})
        if found:
            self.parent = found[0]
            self.volumes = runs.steps(self.parent, "hypervolume")
            for child in runs.find({PARENT: self.parent.id}):
                if child.tags.get(NUMBER, "").isdecimal():
                    self.children[int(child.tags[NUMBER])] = child
        else:
            self.parent = self._create(run_values.sweep_values(header), {})

    def sync(self, wanted: Wanted, draw: bool) -> None:
        """Write whatever of `wanted` is not there; with `draw`, figures and tables too when they have changed."""
        if _HEADER not in self.parent.tags:
            values = run_values.sweep_values(wanted.header)
            self._files(self.parent, values.files)
            model = self.runs.dense(self.parent, dense_model(wanted.header))
            self.runs.inputs(self.parent, datasets(wanted.header, wanted.example), model)
            self._write(self.parent, _at(values), {_HEADER: "written", _DENSE: model}, values.params)
        volumes = self._new_volumes(wanted)
        for index, record in enumerate(wanted.records):
            self._sync_trial(record, wanted, volumes[index] if volumes else None)
        self._sync_volumes(wanted, volumes)
        front = wanted.front()
        self._sync_front(wanted, front)
        if draw and self.parent.tags.get(_FIGURES) != (shown := wanted.shown()):
            self._draw(wanted, front)
            self._write(self.parent, tags={_FIGURES: shown})
        self._sync_state(wanted)
        self._register(wanted.package)

    @property
    def registered(self) -> str:
        """Key of the package that was registered last; empty when none was."""
        return self.parent.tags.get(REGISTERED, "")

    @property
    def registered_as(self) -> str:
        """How it is loaded."""
        return self.parent.tags.get(REGISTERED_AS, "")

    def _register(self, package: Package | None) -> None:
        if package is None or package.key == self.registered or package.number not in self.children:
            return
        name = self.runs.register(self.parent, self.children[package.number], package)
        self._write(self.parent, tags={REGISTERED: package.key, REGISTERED_AS: name})

    def _create(self, values: RunValues, tags: Mapping[str, str]) -> Run:
        run = self.runs.create(values, tags)
        self.touched.add(run.id)
        return run

    def _write(
        self,
        run: Run,
        metrics: Sequence[Metric] = (),
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        if metrics or tags or params:
            self.runs.write(run, metrics, tags or {}, params or {})
            self.touched.add(run.id)
            run.tags |= tags or {}
            run.metrics |= {name: value for name, value, _, _ in metrics}

    def _update(self, run: Run, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Write those values that differ from what is there; the clock makes the last writing the one that counts."""
        now = run_values.milliseconds(time.time())
        changed = [(name, value, 0, now) for name, value in metrics.items() if run.metrics.get(name) != value]
        self._write(run, changed, {name: value for name, value in tags.items() if run.tags.get(name) != value})

    def _files(self, run: Run, files: Mapping[str, str | bytes | Path], folder: str = "") -> None:
        if files:
            self.runs.files(run, files, folder)
            self.touched.add(run.id)

    def _sync_trial(self, record: TrialRecord, wanted: Wanted, volume: float | None) -> None:
        child = self.children.get(record.number)
        if child is not None and child.status not in _OPEN:
            if child.tags.get("plan_id") == record.plan_id and child.start == run_values.milliseconds(record.started):
                return
            # The journal was mended by hand and the trial run again: what stands here is no longer true.
            self.runs.delete(self.children.pop(record.number))
            child = None
        values = run_values.trial_values(record, wanted.header.sweep_id, volume)
        if child is None:
            child = self.children[record.number] = self._create(values, {PARENT: self.parent.id})
        self._write(child, _at(values), values.tags, values.params)
        self._files(child, values.files)
        used = [data for data in datasets(wanted.header, wanted.example) if data.context != "test"]
        self.runs.inputs(child, used, self.parent.tags.get(_DENSE, ""))
        self._set_status(child, values.status, values.end)

    def _set_status(self, run: Run, status: str, when: int) -> None:
        self.runs.set_status(run, status, when)
        run.status = status
        self.touched.add(run.id)

    def _new_volumes(self, wanted: Wanted) -> Sequence[float]:
        """Return the hypervolume after each record; nothing where all of them stand there already."""
        ended = sum(child.status not in _OPEN for child in self.children.values())
        behind = min(self.volumes, ended) < len(wanted.records)
        if self._growing.header != wanted.header:
            self._growing = GrowingVolume(wanted.header)
        return self._growing.of(wanted.records) if behind else ()

    def _sync_volumes(self, wanted: Wanted, volumes: Sequence[float]) -> None:
        series = [
            ("hypervolume", volume, step, run_values.end_of(record))
            for step, (volume, record) in enumerate(zip(volumes, wanted.records, strict=False), 1)
            if step > self.volumes
        ]
        self._write(self.parent, series)
        self.volumes = max(self.volumes, len(wanted.records))

    def _sync_front(self, wanted: Wanted, front: Sequence[FrontPoint]) -> None:
        choice = pick(wanted.header, [point.record for point in front])
        self._mark("front", {point.record.number for point in front}, "on_front")
        self._mark("recommended", {choice.number} if choice else set())
        self._update(self.parent, {}, {RECOMMENDED: str(choice.number)} if choice else {})
        for point in wanted.points or ():
            child = self.children.get(point.record.number)
            if child is not None:
                self._update(child, *run_values.point_values(point, wanted.dense))
        if wanted.dense is not None:
            dense = {"dense_test_score": wanted.dense.test_score, "dense_latency_ms": wanted.dense.latency_ms}
            self._update(self.parent, dict(run_values.finite(dense)), {})

    def _mark(self, tag: str, numbers: Iterable[int], metric: str = "") -> None:
        """Let exactly the trials with `numbers` carry `tag`, and 1 as the `metric`: MLflow's list sorts by metrics."""
        for number, child in self.children.items():
            if number in numbers:
                self._update(child, {metric: 1.0} if metric else {}, {tag: "true"})
            elif tag in child.tags:
                self.runs.drop_tag(child, tag)
                del child.tags[tag]
                self._update(child, {metric: 0.0} if metric else {}, {})
                self.touched.add(child.id)

    def _draw(self, wanted: Wanted, front: Sequence[FrontPoint]) -> None:
        header, records = wanted.header.measured(wanted.dense), wanted.records
        self._files(self.parent, run_figures.light(header, records, front))
        # Half as many trials again change an importance; the end of a sweep has the last word.
        if wanted.points is not None or len(records) >= 1.5 * self._weighed:
            self._files(self.parent, run_figures.heavy(header, records))
            self._weighed = len(records)
        self._files(self.parent, {path.name: path for path in wanted.files if path.is_file()}, "files")

    def _sync_state(self, wanted: Wanted) -> None:
        status = _STATUS.get(wanted.state, "KILLED")
        self._update(self.parent, {}, {STATE: wanted.state})
        if self.parent.status != status:
            ends = [run_values.end_of(record) for record in wanted.records]
            self._set_status(self.parent, status, max([run_values.milliseconds(wanted.header.created), *ends]))


def _at(values: RunValues) -> list[Metric]:
    """Return the metrics with the run's own time: taken from the record, so that writing twice writes the same."""
    return [(name, value, step, values.end) for name, value, step in values.metrics]
