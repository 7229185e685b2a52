"""The driver of a sweep: one process that asks, journals, tracks and measures the front."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from autorank import strategies
from autorank.artifacts import reason
from autorank.config import SweepConfig, whole
from autorank.errors import EmptyFrontError, SweepError
from autorank.finish import measure_front
from autorank.growth import GrowingFront
from autorank.job import job_of
from autorank.journal import Journal
from autorank.prepare import Prepared, prepare
from autorank.privacy import hidden
from autorank.progress import Reporter
from autorank.reuse import borrowed
from autorank.scene import pick
from autorank.schedule import Schedule
from autorank.stopping import StopSignal, interrupts
from autorank.tasks import Task
from autorank.trial import TrialRunner
from autorank.trialfiles import carrier_file, weights_file
from autorank.trouble import listening
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

KEPT_OF_CHAINS = 32
"""Trials whose weights are kept a while where later ones may start from them."""


@dataclass(frozen=True)
class Outcome:
    """What one run of the driver leaves; the same fields as in `autorank.sweep.SearchResult`."""

    header: SweepHeader
    records: tuple[TrialRecord, ...]
    points: tuple[FrontPoint, ...]
    ended: str
    seconds: Mapping[str, float]
    dense: DenseFigures | None
    ui_command: str


class Driver:
    """Runs one sweep in this process; the only writer of its journal and of MLflow."""

    def __init__(
        self,
        task: Task,
        config: SweepConfig,
        directory: Path,
        reporter: Reporter,
        journal: Journal,
        header: SweepHeader | None,
        workers: int = 1,
    ) -> None:
        self.workers = workers
        self.task, self.config, self.directory = task, config, directory
        self.reporter, self.journal = reporter, journal
        self.resumed = header
        self.before = journal.contents()
        if header is None and self.before.header is not None:  # another process was quicker
            raise SweepError(f"{directory} already holds a sweep; `autorank resume {directory}` goes on with it")
        self.records: dict[int, TrialRecord] = {record.number: record for record in self.before.records}
        self.stop = StopSignal(config.max_time)
        self._kept: dict[int, tuple[Path, Path]] = {}
        self._holders: Counter[Path] = Counter()
        self._latest: list[TrialRecord] = []
        self.dense: DenseFigures | None = None

    def run(self) -> Outcome:
        """Prepare, search, measure the front.

        Raises
        ------
        AutorankError
            What a person can mend, the disk included; all trials that finished before are in the journal.
        """
        try:
            with ExitStack() as self._scratch, listening(lambda text: self.reporter.say(f"note: {text}")):
                return self._run()
        except (OSError, SafetensorError) as error:
            said = getattr(error, "strerror", None) or str(error)
            named = getattr(error, "filename", None) or self.directory
            raise SweepError(
                f"{named}: {said}; what finished is saved: once that is mended, `autorank resume {self.directory}`"
            ) from None

    def _run(self) -> Outcome:
        config = self.config
        times = [time.perf_counter()]
        if self.journal.mended:
            self.reporter.say(f"note: {self.journal.mended}")
        if self.resumed is not None and not self.before.ended:
            self.reporter.say(
                f"note: the sweep was cut off, perhaps killed; the {len(self.records)} trials that finished are kept, "
                "and what was running runs again"
            )
        with interrupts(self.stop, self.reporter.say):
            prepared = prepare(
                self.task, config, self.directory, _Interruptible(self.reporter, self.stop), self.resumed
            )
            self.header = prepared.header
            self._front = GrowingFront(self.header.objectives, self.header.constraints, self.records.values())
            self._probes = sum(record.probe for record in self.records.values())
            schedule = self._schedule(prepared)
            if self.resumed is None:
                self.journal.write_header(prepared.header)
            for warning in _doubts(self.task, prepared.header):
                self.reporter.say(f"note: {warning}")
            self.tracker = self._tracker(prepared.header)
            try:
                times.append(time.perf_counter())
                ended = self._search(prepared, schedule)
                times.append(time.perf_counter())
                points = self._finish(prepared)
                times.append(time.perf_counter())
                parts = zip(("prepare", "search", "front"), pairwise(times), strict=True)
                seconds = {name: round(end - begin, 3) for name, (begin, end) in parts}
                self.journal.write_end(ended, seconds)
            finally:
                if self.tracker is not None:
                    self.tracker.close()
        return Outcome(
            self.header,
            tuple(self.records.values()),
            points,
            ended,
            seconds,
            self.dense,
            self.tracker.ui_command if self.tracker is not None else "",
        )

    def _schedule(self, prepared: Prepared) -> Schedule:
        config, header = self.config, prepared.header
        strategy = strategies.make(
            config.strategy.name,
            prepared.space,
            header.objectives,
            header.constraints,
            config.seed,
            config.strategy.options,
            dense=header.dense,
            fidelity=prepared.context.full_fidelity,
        )
        self._keep_latest = KEPT_OF_CHAINS if strategy.chains else 0
        return Schedule(
            strategy,
            trials=config.trials,
            fidelity=prepared.context.full_fidelity,
            known=self.records.values(),
            borrowed=borrowed(config.reuse, header) if config.reuse else (),
            on_borrowed=self._on_record,
            lookahead=config.lookahead or 1,
            objectives=header.objectives,
            gate_patience=config.pruning.patience,
            gate_margin=config.pruning.margin,
        )

    def _tracker(self, header: SweepHeader) -> Any:
        if not self.config.tracking or self.config.executor == "inline":
            return None
        from autorank.tracking import Tracker

        tracker = Tracker(whole({"uri": self.config.tracking_uri})["uri"], self.directory, self.config.experiment)
        tracker.start(header, [(str(x.dtype).removeprefix("torch."), tuple(x.shape)) for x in self.task.example_inputs])
        if self.records:
            tracker.catch_up(header, tuple(self.records.values()), ())
        return tracker

    def _search(self, prepared: Prepared, schedule: Schedule) -> str:
        config = self.config
        self._schedule_now = schedule
        self._show(None)
        if config.executor == "inline":
            from autorank import inline

            inline.run(schedule, prepared.context, self._on_record, self.stop, config.trial_timeout)
        else:
            from autorank import orchestrate

            orchestrate.run(
                schedule,
                prepared.context,
                self._on_record,
                self.stop,
                workers=min(self.workers, config.lookahead or self.workers),
                cpus=config.cpus,
                gpus=config.gpus(prepared.context.device),
                cluster=config.cluster is not None,
                trial_timeout=config.trial_timeout,
                say=self.reporter.say,
            )
        if self.stop.reason:
            return self.stop.reason
        if schedule.exhausted:
            return schedule.ended or "the whole search space was tried"
        return f"all {config.trials} trials done"

    def _on_record(self, record: TrialRecord) -> None:
        record = replace(record, reason=hidden(record.reason))
        self.journal.write_trial(record)
        self.records[record.number] = record
        self._probes += record.probe
        self._front.add(record)
        if self.tracker is not None:
            self.tracker.log(record)
        self._drop_dominated(record, self._front.members)
        self._show(record)

    def _show(self, record: TrialRecord | None) -> None:
        points = len(self.records) - self._probes
        self.reporter.trials(points, self.config.trials, record, self._front.members, self._probes)

    def _drop_dominated(self, fresh: TrialRecord, front: Sequence[TrialRecord]) -> None:
        """Delete the weights of models that no one will pick or start from; they can always be made again."""
        self._latest = [*self._latest, fresh][-self._keep_latest :] if self._keep_latest else []
        wanted = {record.number: record for record in (*front, *self._latest, *self._schedule_now.parents)}
        for record in (*wanted.values(), fresh):
            if record.number not in self._kept:
                paths = weights_file(self.directory, record), carrier_file(self.directory, record)
                self._kept[record.number] = paths
                self._holders.update(paths)
        for number in self._kept.keys() - wanted:
            for path in self._kept.pop(number):
                self._holders[path] -= 1
                if not self._holders[path]:  # else the same plan is there under another number
                    del self._holders[path]
                    path.unlink(missing_ok=True)

    def _finish(self, prepared: Prepared) -> tuple[FrontPoint, ...]:
        """Measure the front; what was measured before is kept, and nothing is measured when a person stops the sweep.

        So the test split is read once for a point, however often a sweep is stopped and resumed.
        """
        front = self._front.members
        if self.stop.interrupted:
            return tuple(FrontPoint(record) for record in front)
        if not front:
            why = self._why_empty()
            self.journal.write_end(why)
            raise EmptyFrontError(why)
        if self.tracker is not None:
            # Its thread must be idle while latencies are measured.
            self.tracker.catch_up(self.header, tuple(self.records.values()), ())
        points, dense = measure_front(
            front,
            prepared.context,
            self.reporter,
            records=self.records,
            batch=self.config.latency.batch,
            threads=self.config.latency.threads,
            known=self.before.measured,
            known_dense=self.before.dense,
        )
        self.dense = dense
        self.journal.write_front(points, dense)
        if self.tracker is not None:
            self.tracker.finish(points, dense=dense, state="stopped" if self.stop.interrupted else "finished")
            if not self.stop.interrupted:
                self._register(prepared, points)
        return points

    def _register(self, prepared: Prepared, points: Sequence[FrontPoint]) -> None:
        """Put the recommended model into MLflow's registry, unless it is there; a failure is one line."""
        from autorank.registry import pack, package_key

        chosen = pick(self.header, [point.record for point in points])
        point = next((point for point in points if chosen is not None and point.record.number == chosen.number), None)
        if point is None or self.tracker.problem or self.tracker.registered == package_key(point):
            return
        what = "the recommended model into MLflow's registry"
        self.reporter.step(what, 0, 3)
        try:
            model = TrialRunner(prepared.context).model(job_of(point.record, self.records))
            folder = Path(self._scratch.enter_context(TemporaryDirectory(prefix="autorank-model-")))
            package = pack(
                self.task, self.header, point, model, folder, lambda done, total: self.reporter.step(what, done, total)
            )
        except Exception as error:
            self.reporter.step(what, 3, 3)
            self.reporter.say(f"note: the recommended model is not in MLflow's registry: {reason(error)}")
            return
        called = self.tracker.register(package)
        self.reporter.step(what, 3, 3)
        if called:
            self.reporter.say(f"registered in MLflow: {called}")

    def _why_empty(self) -> str:
        said = self._schedule_now.ended
        if said and not any(not record.probe for record in self.records.values()):
            return f"strategy {self.config.strategy.name} proposed no plan: {said}"
        if not self.records:
            return (
                f"{self.stop.reason or 'the search ended'} before a trial finished; `autorank resume {self.directory}`"
            )
        failed = [record for record in self.records.values() if record.status == "failed"]
        if failed and len(failed) == len(self.records):
            return f"all {len(failed)} trials failed; the last one: {failed[-1].reason}"
        bounds = ", ".join(map(str, self.header.constraints))
        pruned = sum(record.status == "pruned" for record in self.records.values())
        none = f"none of the {len(self.records)} trials ({len(failed)} failed, {pruned} stopped early) "
        none += f"meets {bounds}" if bounds else "was completed"
        return f"{none}; run more with `autorank resume {self.directory} --trials {2 * self.config.trials}`" + (
            ", or loosen the constraint" if bounds else ""
        )


def _doubts(task: Task, header: SweepHeader) -> list[str]:
    """Return what may make the sweep's figures worthless, for accuracies only: no other metric has a known scale."""
    if header.metric != "accuracy":
        return []
    found = []
    classes = getattr(task, "classes", 0)
    if classes and header.dense.score < 1.5 * 100 / classes:
        found.append(
            f"the dense model scores {header.dense.score:.1f} %, about chance for {classes} classes: "
            "are its trained weights loaded (--weights)?"
        )
    allowed = float(header.config["max_drop"] or 0.0)
    if header.dense.examples and 100 / header.dense.examples > allowed:
        found.append(
            f"the validation split has {header.dense.examples} examples, so one of them is worth "
            f"{100 / header.dense.examples:.1f} points: a drop of {allowed:g} cannot be told from chance; "
            "a larger split (--validation) can"
        )
    return found


class _Interruptible:
    """A reporter that ends the preparation when a person asks to stop: there is nothing yet to finish."""

    def __init__(self, reporter: Reporter, stop: StopSignal) -> None:
        self._reporter, self._stop = reporter, stop

    def say(self, text: str) -> None:
        """Pass it on."""
        self._reporter.say(text)

    def step(self, what: str, done: int, total: int) -> None:
        """Pass it on, or stop."""
        if self._stop.interrupted:
            raise SweepError(f"stopped during {what}, before the search; the same command starts it again")
        self._reporter.step(what, done, total)

    def trials(
        self, done: int, total: int, record: TrialRecord | None, front: Sequence[TrialRecord], probes: int = 0
    ) -> None:
        """Pass it on."""
        self._reporter.trials(done, total, record, front, probes)
