"""Ray Tune runs the trials: the only file that imports ray."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from autorank.errors import SweepError, describe
from autorank.schedule import Job, Schedule
from autorank.stopping import StopSignal
from autorank.trial import TrialContext, TrialRunner, failed
from autorank.types import TrialRecord

# Before the first import: ray reads these once.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # The driver handles Ctrl-C itself: finish and save on the first, stop on the second.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1e9",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
}
MAX_FAILURES = 2


def run(
    schedule: Schedule,
    context: TrialContext,
    on_record: Callable[[TrialRecord], None],
    stop: StopSignal,
    *,
    workers: int,
) -> None:
    """Run the schedule's jobs on Ray Tune, `workers` at a time.

    A trial whose worker dies is started again up to twice; after that it is a failed record.

    Parameters
    ----------
    schedule : Schedule
    context : TrialContext
        Sent to the workers once, through Ray's object store.
    on_record : callable
        Called in this process with every finished record before the schedule hears of it.
    stop : StopSignal
    workers : int
        Trials at a time.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
    import ray
    from ray import tune

    scratch = context.directory / "ray"
    in_main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM)
    _start(ray, workers)
    if in_main and on_term is not None:
        signal.signal(signal.SIGTERM, on_term)  # ray.init puts its own there, which ends the driver at once
    try:
        searcher = _searcher(schedule, on_record, stop)
        trainable = tune.with_parameters(_trainable(), context=context, paths=list(sys.path))
        tuner = tune.Tuner(
            # GPUs are not Ray's to hand out: it would hide them and renumber the rest; `workers` is the limit.
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=workers,
                reuse_actors=True,
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch.resolve()),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        tuner.fit()
        if searcher.failure is not None:
            raise searcher.failure
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start(ray: Any, workers: int) -> None:
    """Start a Ray of our own on this machine; a cluster that happens to run here is left alone."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        raise SweepError(
            "Ray already runs in this process; call ray.shutdown() before the search, or use executor='inline'"
        )
    ray.init(
        address="local",
        num_cpus=workers,
        num_gpus=0,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        configure_logging=False,
    )


def _searcher(schedule: Schedule, on_record: Callable[[TrialRecord], None], stop: StopSignal) -> Any:
    from ray.tune.search import Searcher

    class ScheduleSearcher(Searcher):
        """Hands the schedule's jobs to Ray Tune and its results back; keeps no state of its own."""

        def __init__(self) -> None:
            super().__init__(metric="score", mode="max")
            self._jobs: dict[str, Job] = {}
            self.failure: Exception | None = None

        def __reduce__(self) -> tuple[type, tuple[()]]:
            # Tune pickles its tuner into the run's folder at the start; nothing of it is ever read again.
            return dict, ()

        def set_search_properties(self, *args: object, **spec: object) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            if stop.reason:
                schedule.stop()
            job = schedule.next()
            if job is None:
                return str(Searcher.FINISHED)
            if not isinstance(job, Job):
                return None
            self._jobs[trial_id] = job
            return {"job": job.to_json()}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            job = self._jobs.pop(trial_id, None)
            if job is None:
                return
            if result is not None and "record" in result and not error:
                record = TrialRecord.from_json(json.loads(result["record"]))
            else:
                record = failed(
                    job,
                    f"its worker process died {MAX_FAILURES + 1} times (out of memory, or killed from outside)",
                )
            try:
                on_record(record)
                schedule.done(record)
            except Exception as error:
                # Tune would swallow it and go on without the record: end the search, and raise it after that.
                self.failure = error
                schedule.stop()

        def save(self, checkpoint_path: str) -> None:
            """Save nothing: the journal is the truth."""

        def restore(self, checkpoint_path: str) -> None:
            """Restore nothing: a sweep is resumed by replaying its journal."""

    return ScheduleSearcher()


def _trainable() -> type:
    from ray import tune

    class TrialTrainable(tune.Trainable):
        """One worker: loads the model, the statistics and the data once, then runs one trial per step."""

        def setup(self, config: dict[str, Any], **shared: Any) -> None:
            sys.path.extend(path for path in shared["paths"] if path not in sys.path)
            self._context = shared["context"]
            self._runner: TrialRunner | None = None
            self._job = Job.from_json(config["job"])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._job = Job.from_json(new_config["job"])
            return True

        def step(self) -> dict[str, Any]:
            try:
                self._runner = self._runner or TrialRunner(self._context)
                record = self._runner.run(self._job)
            except Exception as error:  # the worker cannot even load the task: say so, it would fail again
                record = failed(self._job, f"a worker cannot load the task: {describe(error)}")
            # One text: Tune flattens nested results on their way to the searcher.
            return {"record": json.dumps(record.to_json()), "score": record.score or 0.0, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Keep nothing: a trial is short, and its result is in its record."""

        def load_checkpoint(self, checkpoint: object) -> None:
            """Load nothing."""

    return TrialTrainable
