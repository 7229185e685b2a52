"""A whole sweep: prepare, search, measure the front, and what a caller gets back."""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorank.cluster import check_address, code_directory, joined
from autorank.config import RESUMABLE, SweepConfig, make_config, merged, rooted, whole
from autorank.driver import Driver
from autorank.errors import ConfigError, SweepError
from autorank.front import Recommendation, front_of, recommended, select
from autorank.job import job_of
from autorank.journal import FILE_NAME, Journal, read
from autorank.mirror import Mirror
from autorank.prepare import default_workers, prepare, resolve_device
from autorank.privacy import remember, to_keep
from autorank.progress import Reporter, Silent, open_reporter
from autorank.remotedir import have, opened, send_export, shown, url_of
from autorank.remotestore import is_url
from autorank.tasks import Task, load_task
from autorank.tasks.factories import extend_path
from autorank.trial import TrialRunner
from autorank.trialfiles import load_weights, weights_file
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
    seconds : mapping
        Wall time of the last run: prepare, search, front.
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
    seconds: Mapping[str, float] = field(default_factory=dict)
    dense: DenseFigures | None = None
    ui_command: str = ""
    _task: Task | None = None

    @property
    def front(self) -> pd.DataFrame:
        """The front as a table, a row per point."""
        from autorank.figures import front_table

        return front_table(self.header.measured(self.dense), self.points)

    @property
    def recommended(self) -> Recommendation:
        """The recommended point and why; EmptyFrontError when there is no point."""
        return recommended(self.header, [point.record for point in self.points])

    def __str__(self) -> str:
        """Return what the command line prints at the end: the front, the recommendation, what to do next."""
        from autorank.show import summary

        return summary(self)

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
        kept = weights_file(self.directory, point.record)
        have(self.directory, kept)
        model = load_weights(task.model(), point.record.plan, kept)
        if model is not None:
            return model
        # Its weights are gone: the trial is run again, for which all that trials share is needed.
        config = self.config.model_copy(update={"device": _device_here(self.config.device)})
        opened(self.directory, everything=True)
        prepared = prepare(task, config, self.directory, Silent(), self.header)
        records = {record.number: record for record in self.records}
        return TrialRunner(prepared.context).model(job_of(point.record, records)).cpu()

    def export(
        self,
        directory: Path | str | None = None,
        *,
        formats: Sequence[str] = ("safetensors", "pt2", "onnx"),
        overwrite: bool = False,
        say: Callable[[str], None] | None = None,
        point: int | str | None = None,
        max_drop: float | None = None,
        min_score: float | None = None,
        max_macs: float | None = None,
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
        point, max_drop, min_score, max_macs
            As for `best`.
        """
        from autorank.export import export

        chosen = self.best(point=point, max_drop=max_drop, min_score=min_score, max_macs=max_macs)
        task = self._need_task()
        target = Path(directory) if directory is not None else self.directory / "exports" / str(chosen.record.number)
        result = export(
            task,
            self.header.measured(self.dense),
            chosen,
            replace(self, _task=task).model(chosen),
            target,
            formats=tuple(formats),
            overwrite=overwrite,
            say=say,
            dense=self.dense,
            records=self.records,
        )
        send_export(self.directory, target)
        return result

    @property
    def config(self) -> SweepConfig:
        """The settings with which the sweep was started."""
        return make_config(self.header.config, "the sweep's settings")

    def _need_task(self) -> Task:
        return self._task if self._task is not None else task_of(self.config, self.header.started_in)


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
        space : str or mapping, a shipped name, a YAML file, or what it would hold ("default");
        strategy : name, or {"name": …, "options": {…}} ("auto");
        trials : int (40); max_time, trial_timeout : seconds or text such as "30m"; seed : int (0);
        objectives : two or three names ("score,macs"); constraints : texts such as "macs_kept<=0.5";
        recovery : the fine-tune, a mapping of `autorank.recover.Recovery`'s fields (steps 100, lr 0.02, …);
        quantization : for layers with bits, a mapping of `autorank.quant.QuantSettings`' fields;
        pruning : {"patience": 3, "margin": 2.0}; latency : {"batch": 1, "threads": 1};
        calibration : examples for layer statistics (512); predictions : "curvature", or "measured" (slower);
        reuse : directory of an earlier sweep whose trials are not run again;
        max_drop : score that the recommended point may lose;
        device : "auto", "cpu", "cuda"; executor : "ray" or "inline"; workers, threads : int;
        address : "auto" or "host:port" of a Ray cluster to join; cpus_per_trial, gpus_per_trial : numbers or fractions;
        sweep_dir : path, or an fsspec URL such as "s3://bucket/sweeps/net";
        tracking_uri, experiment : where MLflow's runs go; tracking : False for none.
        Without a task also model, weights, data, model_args, data_args and validation.
        docs/sweepfile.md says of each what it is, and its default.

    Returns
    -------
    SearchResult

    Raises
    ------
    AutorankError
        One line that says what is wrong, where, and what would be right.
    """
    if task is not None and not isinstance(task, Task):
        raise ConfigError(
            f"search takes a task, not a {type(task).__name__}; wrap a model and its data: "
            "autorank.ClassificationTask(model, train=..., test=...)"
        )
    if task is None and ("model" not in settings or "data" not in settings):
        raise ConfigError(
            "no task given: pass one, autorank.ClassificationTask(model, train=...), or name model= and data= "
            "(--model and --data on the command line, model: and data: in a sweep file)"
        )
    config = make_config(rooted({key: value for key, value in settings.items() if value is not None}, Path.cwd()))
    if task is not None:
        of_the_task = {"model", "model_args", "weights", "data", "data_args", "validation"}
        given = sorted(config.model_fields_set & of_the_task)
        if given:
            raise ConfigError(f"{given[0]} has no effect beside a task of your own; make the task with it instead")
    if config.executor == "inline" and config.tracking_uri is not None:
        raise ConfigError(
            "tracking_uri has no effect with executor: inline, which writes no MLflow; give one of the two"
        )
    if config.executor == "inline" and config.address is not None:
        raise ConfigError("address has no effect with executor: inline, which runs in one process; give one of the two")
    directory = new_directory(config)
    if (directory / FILE_NAME).exists() and read(directory).header is not None:
        name = shown(directory)
        raise SweepError(f"{name} already holds a sweep; `autorank resume {name}` goes on with it")
    return _run(task, config, directory, progress, None)


def resume(
    directory: Path | str, task: Task | None = None, *, progress: bool | Reporter = True, **settings: Any
) -> SearchResult:
    """Go on with a sweep after any stop; nothing that finished is run again.

    Parameters
    ----------
    directory : path
        Sweep directory, or its URL.
    task : Task, optional
        Needed when the sweep was started from Python with a task of its own.
    progress : bool
    **settings
        ``trials``, ``max_time``, ``workers``, ``executor``, ``tracking_uri``, … may be given anew; what shapes the
        results may not.
    """
    directory = opened(directory, everything=True)
    contents = read(directory)
    header, finished = contents.header, sum(not record.probe for record in contents.records)
    if header is None:
        raise SweepError(f"{directory} was stopped before its search began; the same `autorank search` starts it again")
    if settings.get("trials") is not None and settings["trials"] < finished:
        raise ConfigError(f"trials: {settings['trials']} is fewer than the {finished} that the sweep has; give more")
    wrong = {key for key, value in settings.items() if value is not None} - RESUMABLE
    if wrong:
        raise ConfigError(
            f"{sorted(wrong)[0]} cannot change when a sweep is resumed; only {', '.join(sorted(RESUMABLE))} can"
        )
    config = make_config(merged(header.config, settings), f"{directory}/{FILE_NAME}")
    if config.workers is not None and config.lookahead is not None and config.workers > config.lookahead:
        raise ConfigError(
            f"workers: {config.workers} is more than the {config.lookahead} trials in flight with which the sweep was "
            f"started, and on which its results depend; give at most {config.lookahead}"
        )
    return _run(task, config, directory, progress, header)


def _with_lookahead(config: SweepConfig, workers: int) -> SweepConfig:
    """Return the settings with the look-ahead filled in: at least 4, and some more than there are workers.

    A worker waits for the oldest trial in flight only when all of the look-ahead beyond it is done.
    """
    if config.lookahead is None:
        return config.model_copy(update={"lookahead": max(4, workers + workers // 4)})
    if config.workers is not None and config.workers > config.lookahead:
        raise ConfigError(f"workers: {config.workers} is more than lookahead: {config.lookahead}; leave lookahead out")
    return config


def _device_here(name: str) -> str:
    """Return the device of a sweep, or the CPU where this machine has no such device."""
    try:
        return resolve_device(name)
    except ConfigError:
        return "cpu"


def open_sweep(directory: Path | str, task: Task | None = None) -> SearchResult:
    """Return what a sweep has found so far, from its journal alone; works while it runs."""
    directory = opened(directory)
    contents = read(directory)
    if contents.header is None:
        raise SweepError(f"{directory} has no trials yet: it was stopped while its dense model was measured")
    header = contents.header
    front = front_of(contents.records, header.objectives, header.constraints)
    points = tuple(map(contents.point, front))
    return SearchResult(
        directory, header, contents.records, points, contents.ended, contents.seconds, contents.dense, _task=task
    )


def task_of(config: SweepConfig, started_in: str = "") -> Task:
    """Return the task that the settings name; ConfigError when they name none.

    Functions of the user's are looked for where the sweep was started, so that it can be used from anywhere.
    """
    if config.model is None or config.data is None:
        missing = "model" if config.model is None else "data"
        raise ConfigError(
            f"no {missing} given: name it (--{missing} on the command line, {missing}: in a sweep file); a sweep of a "
            "task made in Python goes on in Python: autorank.resume(DIR, task), autorank.open_sweep(DIR, task)"
        )
    if os.path.isdir(started_in) and any(name.startswith("python:") for name in (config.model, config.data)):
        extend_path(os.getcwd())
        extend_path(started_in)  # goes before it
    named = {key: getattr(config, key) for key in ("model", "weights", "data", "model_args", "data_args")}
    return load_task(
        **whole(named),
        validation=config.validation if config.validation < 1 else round(config.validation),
        seed=config.seed,
    )


def new_directory(config: SweepConfig) -> Path:
    """Return the sweep directory of the settings, or a new name under ``sweeps/``."""
    if config.sweep_dir is not None:
        return opened(config.sweep_dir, everything=True, new=is_url(config.sweep_dir))
    name = re.sub(r"[^A-Za-z0-9]+", "-", (config.model or "sweep").rsplit(":", 1)[-1]).strip("-").lower()
    return Path("sweeps") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


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
        device = resolve_device(config.device)
        if config.cluster not in (None, "auto"):
            check_address(config.cluster)  # before anything that takes long
        remember(config.model_dump())
        if config.tracking and config.executor != "inline":
            whole({"tracking_uri": config.tracking_uri})
        task = task or task_of(config, header.started_in if header else "")
        if config.cluster is None:
            workers = config.workers or default_workers(device, math.ceil(config.cpus), config.gpus(device))
        else:
            named = (None,) if given is not None else (config.model, config.data)
            code = code_directory(named, header.started_in if header else "")
            found = stack.enter_context(joined(config, device, code))
            workers = config.workers or found.trials
            if found.busy:
                reporter.say(f"note: {found.busy}")
        if header is None:
            config = _with_lookahead(config, workers)
        journal = stack.enter_context(Journal(directory))
        if (url := url_of(directory)) is not None:
            stack.enter_context(Mirror(journal, url, reporter.say))
        if header is not None:
            kept = to_keep(config.model_dump(mode="json"))
            changed = {k: v for k, v in kept.items() if header.config.get(k) != v}
            if changed:
                journal.write_settings(changed)
                header = replace(header, config={**header.config, **changed})
        outcome = Driver(task, config, directory, reporter, journal, header, workers).run()
        return SearchResult(
            directory,
            outcome.header,
            outcome.records,
            outcome.points,
            outcome.ended,
            outcome.seconds,
            outcome.dense,
            outcome.ui_command,
            _task=given,
        )
