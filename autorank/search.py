"""A whole sweep: prepare, search, measure the front, and what a caller gets back."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorank import strategies
from autorank.config import SweepConfig, make_config, merged
from autorank.errors import ConfigError, EmptyFrontError, SweepError
from autorank.finish import measure_front
from autorank.front import Recommendation, front_of, recommend, select
from autorank.journal import FILE_NAME, Journal, read
from autorank.prepare import Prepared, prepare
from autorank.progress import Reporter, Silent, open_reporter
from autorank.schedule import Schedule
from autorank.stopping import StopSignal, interrupts
from autorank.tasks import Task, load_task
from autorank.trial import TrialRunner, job_of, weights_file
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from autorank.export import ExportResult


@dataclass(frozen=True)
class SearchResult:
    """What a sweep found.

    Attributes
    ----------
    directory : Path
        Sweep directory; everything is in it.
    header : SweepHeader
    records : tuple of TrialRecord
        All finished trials.
    points : tuple of FrontPoint
        The front, best score first, with test scores and latencies where they were measured.
    ended : str
        Why the search ended.
    dense : DenseFigures or None
        The dense model, measured beside the front.
    ui_command : str
        The command that opens MLflow on the sweep; empty without tracking.
    """

    directory: Path
    header: SweepHeader
    records: tuple[TrialRecord, ...]
    points: tuple[FrontPoint, ...]
    ended: str
    dense: DenseFigures | None = None
    ui_command: str = ""
    _task: Task | None = None

    @property
    def front(self) -> pd.DataFrame:
        """The front as a table, a row per point."""
        from autorank.figures import front_table

        return front_table(self.measured_header, self.points)

    @property
    def measured_header(self) -> SweepHeader:
        """The header with the measured latency of the dense model, where there is one."""
        if self.dense is None:
            return self.header
        return replace(self.header, dense_cost=replace(self.header.dense_cost, latency_ms=self.dense.latency_ms))

    @property
    def recommended(self) -> Recommendation:
        """The recommended point and why; EmptyFrontError when there is no point."""
        return recommend(
            [point.record for point in self.points],
            self.header.dense.score,
            self.header.direction,
            float(self.header.config.get("max_drop", 1.0)),
            self.header.objectives,
        )

    def best(
        self,
        *,
        point: int | str | None = None,
        max_drop: float | None = None,
        min_score: float | None = None,
        max_macs: float | None = None,
    ) -> FrontPoint:
        """Return the point of the front that a rule picks; without a rule the recommended one.

        Parameters
        ----------
        point : int or str, optional
            Trial number, plan id, or ``best``, ``cheapest``, ``knee``.
        max_drop : float, optional
            Cheapest point that loses at most this many points against the dense model.
        min_score : float, optional
            Cheapest point with at least this score.
        max_macs : float, optional
            Best point with at most this share of the dense MACs.

        Raises
        ------
        EmptyFrontError
            No point fits; the message names the nearest.
        """
        if point is None and max_drop is None and min_score is None and max_macs is None:
            chosen = self.recommended.record
            return next(p for p in self.points if p.record.number == chosen.number)
        return select(
            self.points,
            dense=self.header.dense,
            direction=self.header.direction,
            objectives=self.header.objectives,
            point=point,
            max_drop=max_drop,
            min_score=min_score,
            max_macs=max_macs,
        )

    def model(self, point: FrontPoint | None = None) -> nn.Module:
        """Return the recovered compressed model of a point (by default the recommended one), on the CPU."""
        point = point or self.best()
        task = self._need_task()
        prepared = prepare(task, _config_of(self.header), self.directory, Silent(), self.header)
        return TrialRunner(prepared.context).model(job_of(point.record), point.record).cpu()

    def export(
        self,
        directory: Path | str | None = None,
        *,
        formats: Sequence[str] = ("safetensors", "pt2", "onnx"),
        overwrite: bool = False,
        say: Callable[[str], None] | None = None,
        **rule: Any,
    ) -> ExportResult:
        """Write the chosen point as files that other programs load, each checked after writing.

        Parameters
        ----------
        directory : path, optional
            By default ``exports/<number>`` in the sweep directory.
        formats : sequence of str
        overwrite : bool
            Replace an earlier export.
        say : callable, optional
            Gets a line per file.
        **rule
            As for `best`.
        """
        from autorank.export import export

        point = self.best(**rule)
        target = Path(directory) if directory is not None else self.directory / "exports" / str(point.record.number)
        return export(
            self._need_task(),
            self.measured_header,
            point,
            self.model(point),
            target,
            formats=tuple(formats),
            overwrite=overwrite,
            say=say,
        )

    def _need_task(self) -> Task:
        if self._task is not None:
            return self._task
        return task_of(_config_of(self.header))


def search(
    task: Task | None = None,
    *,
    progress: bool | Reporter = True,
    **settings: Any,
) -> SearchResult:
    """Search for smaller and faster copies of the task's model.

    Parameters
    ----------
    task : Task, optional
        Model, data and metric; may be left out when the settings name `model` and `data`.
    progress : bool
        Show a progress bar on standard error.
    **settings
        The fields of `autorank.config.SweepConfig`: space, strategy, trials, max_time, objectives, constraints, seed,
        device, executor, workers, sweep_dir, recovery, pruning, …

    Returns
    -------
    SearchResult

    Raises
    ------
    AutorankError
        One line that says what is wrong, where, and what would be right.
    """
    config = make_config({key: value for key, value in settings.items() if value is not None})
    directory = new_directory(config)
    if (directory / FILE_NAME).exists() and read(directory).header is not None:
        raise SweepError(f"{directory} already holds a sweep; `autorank resume {directory}` goes on with it")
    return _run(task, config, directory, progress, None)


def resume(
    directory: Path | str, task: Task | None = None, *, progress: bool | Reporter = True, **settings: Any
) -> SearchResult:
    """Go on with a sweep after any stop; nothing that finished is run again.

    Parameters
    ----------
    directory : path
        Sweep directory.
    task : Task, optional
        Needed when the sweep was started from Python with a task of its own.
    progress : bool
    **settings
        ``trials``, ``max_time``, ``workers``, ``executor``, ``tracking_uri``, … may be given anew; what shapes the results may not.
    """
    directory = Path(directory)
    header = read(directory).header
    if header is None:
        raise SweepError(
            f"{directory} was stopped before its first trial; start it again with `autorank search` "
            f"and another sweep directory, or delete it"
        )
    free = {"trials", "max_time", "workers", "executor", "tracking", "tracking_uri", "max_drop", "device", "experiment"}
    wrong = {key for key, value in settings.items() if value is not None} - free
    if wrong:
        raise ConfigError(
            f"{sorted(wrong)[0]} cannot change when a sweep is resumed; only {', '.join(sorted(free))} can"
        )
    config = make_config(merged(header.config, settings), f"{directory}/{FILE_NAME}")
    return _run(task, config, directory, progress, header)


def open_sweep(directory: Path | str, task: Task | None = None) -> SearchResult:
    """Return what a sweep has found so far, from its journal alone; works while it runs."""
    directory = Path(directory)
    contents = read(directory)
    if contents.header is None:
        raise SweepError(f"{directory} has no trials yet: it was stopped while its dense model was measured")
    header = contents.header
    measured = {point.record.number: point for point in contents.front_points()}
    front = front_of(contents.records, header.objectives, header.constraints)
    points = tuple(measured.get(record.number, FrontPoint(record)) for record in front)
    return SearchResult(directory, header, contents.records, points, contents.ended, contents.dense, _task=task)


def task_of(config: SweepConfig) -> Task:
    """Return the task that the settings name; ConfigError when they name none."""
    if config.model is None or config.data is None:
        missing = "model" if config.model is None else "data"
        raise ConfigError(
            f"no {missing} given: name it (--{missing} on the command line, {missing}: in a sweep file), "
            "or pass the task with which the sweep was started from Python"
        )
    return load_task(
        model=config.model,
        weights=config.weights,
        data=config.data,
        model_args=config.model_args,
        data_args=config.data_args,
        validation=config.validation if config.validation < 1 else round(config.validation),
        seed=config.seed,
    )


def new_directory(config: SweepConfig) -> Path:
    """Return the sweep directory of the settings, or a new name under ``sweeps/``."""
    if config.sweep_dir is not None:
        return Path(config.sweep_dir)
    name = re.sub(r"[^A-Za-z0-9]+", "-", (config.model or "sweep").rsplit(":", 1)[-1]).strip("-").lower()
    return Path("sweeps") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


def _config_of(header: SweepHeader) -> SweepConfig:
    return make_config(header.config, "the sweep's settings")


def _run(
    task: Task | None,
    config: SweepConfig,
    directory: Path,
    progress: bool | Reporter,
    header: SweepHeader | None,
) -> SearchResult:
    with ExitStack() as stack:
        if isinstance(progress, bool):
            reporter = stack.enter_context(open_reporter(progress))
        else:
            reporter = progress
        given = task
        task = task or task_of(config)
        journal = stack.enter_context(Journal(directory))
        driver = _Driver(task, config, directory, reporter, journal, header)
        result = driver.run()
        return replace(result, _task=given)


class _Driver:
    """Runs one sweep in this process; the only writer of its journal and of MLflow."""

    def __init__(
        self,
        task: Task,
        config: SweepConfig,
        directory: Path,
        reporter: Reporter,
        journal: Journal,
        header: SweepHeader | None,
    ) -> None:
        self.task, self.config, self.directory = task, config, directory
        self.reporter, self.journal = reporter, journal
        self.before = journal.contents() if header is not None else None
        self.records: dict[int, TrialRecord] = {r.number: r for r in (self.before.records if self.before else ())}
        self.stop = StopSignal(config.max_time)
        self.dense: DenseFigures | None = None

    def run(self) -> SearchResult:
        """Prepare, search, measure the front."""
        config = self.config
        with interrupts(self.stop, self.reporter.say):
            prepared = prepare(
                self.task, config, self.directory, self.reporter, self.before.header if self.before else None
            )
            self.header = prepared.header
            schedule = self._schedule(prepared)
            if self.before is None:
                self.journal.write_header(prepared.header)
            self.tracker = self._tracker(prepared.header)
            try:
                ended = self._search(prepared, schedule)
                points = self._finish(prepared)
                self.journal.write_end(ended)
            finally:
                if self.tracker is not None:
                    self.tracker.close()
        return SearchResult(
            self.directory,
            self.header,
            tuple(self.records.values()),
            points,
            ended,
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
        )
        return Schedule(
            strategy,
            trials=config.trials,
            fidelity=prepared.context.full_fidelity,
            known=self.records.values(),
            lookahead=config.lookahead,
            objectives=header.objectives,
            gate_patience=config.pruning.patience,
            gate_margin=config.pruning.margin,
        )

    def _tracker(self, header: SweepHeader) -> Any:
        if not self.config.tracking or self.config.executor == "inline":
            return None
        from autorank.tracking import Tracker

        tracker = Tracker(self.config.tracking_uri, self.directory, self.config.experiment)
        tracker.start(header)
        if self.records:
            tracker.catch_up(header, tuple(self.records.values()), ())
        return tracker

    def _search(self, prepared: Prepared, schedule: Schedule) -> str:
        config = self.config
        self.reporter.trials(len(self.records), config.trials, None, self._front())
        if config.executor == "inline":
            from autorank import inline

            inline.run(schedule, prepared.context, self._on_record, self.stop)
        else:
            from autorank import orchestrate

            workers = config.workers or orchestrate.default_workers(
                prepared.context.device, config.threads, config.lookahead
            )
            orchestrate.run(schedule, prepared.context, self._on_record, self.stop, workers=workers)
        if self.stop.reason:
            return self.stop.reason
        return "the whole search space was tried" if schedule.exhausted else f"all {config.trials} trials done"

    def _on_record(self, record: TrialRecord) -> None:
        self.journal.write_trial(record)
        self.records[record.number] = record
        if self.tracker is not None:
            self.tracker.log(record)
        front = self._front()
        self._drop_dominated(record, front)
        self.reporter.trials(len(self.records), self.config.trials, record, front)

    def _front(self) -> tuple[TrialRecord, ...]:
        return front_of(self.records.values(), self.header.objectives, self.header.constraints)

    def _drop_dominated(self, fresh: TrialRecord, front: Sequence[TrialRecord]) -> None:
        """Delete the weights of models that no one will pick; a plan's weights can always be made again."""
        on_front = {weights_file(self.directory, record).name for record in front}
        for path in (self.directory / "models").glob("*.safetensors"):
            if path.name not in on_front and path.name in self._finished_files():
                path.unlink(missing_ok=True)

    def _finished_files(self) -> set[str]:
        return {weights_file(self.directory, record).name for record in self.records.values()}

    def _finish(self, prepared: Prepared) -> tuple[FrontPoint, ...]:
        """Measure the front, unless a person asked to stop now."""
        front = self._front()
        if not front:
            if self.stop.interrupted:
                return ()
            raise EmptyFrontError(self._why_empty())
        points, dense = measure_front(
            front,
            prepared.context,
            self.reporter,
            batch=self.config.latency.batch,
            threads=self.config.latency.threads,
        )
        self.dense = dense
        self.journal.write_front(points, dense)
        if self.tracker is not None:
            self.tracker.finish(points, [])
        return points

    def _why_empty(self) -> str:
        failed = [record for record in self.records.values() if record.status == "failed"]
        if failed and len(failed) == len(self.records):
            return f"all {len(failed)} trials failed; the last one: {failed[-1].reason}"
        bounds = ", ".join(map(str, self.header.constraints))
        return (
            f"none of the {len(self.records)} trials meets {bounds or 'the front'}; "
            f"run more with `autorank resume {self.directory} --trials {2 * self.config.trials}`, or loosen the constraint"
        )

