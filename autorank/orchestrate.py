"""Ray Tune runs the trials."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from autorank.cluster import on_loopback, quiet, signals_kept
from autorank.errors import SweepError
from autorank.reaper import Reaper
from autorank.remotefiles import TOKEN_FILE, serve, write_token
from autorank.schedule import Job, Schedule
from autorank.stopping import StopSignal
from autorank.tasks.memory import default_cache
from autorank.trainable import trainable, versions_here
from autorank.trial import TrialContext, failed
from autorank.trouble import tell
from autorank.types import TrialRecord
from autorank.watching import MAX_FAILURES, gone, unheard, watcher


def run(
    schedule: Schedule,
    context: TrialContext,
    on_record: Callable[[TrialRecord], None],
    stop: StopSignal,
    *,
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    cluster: bool = False,
    trial_timeout: float | None = None,
    say: Callable[[str], None] = lambda text: None,
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
    cpus, gpus : float
        What Ray sets aside for a trial. Without GPUs it hides none: trials share what PyTorch sees.
    cluster : bool
        Whether this process has joined a cluster (`autorank.cluster.joined`); else a Ray of its own is started.
    trial_timeout : float, optional
        Seconds that a trial may take: a worker that takes longer is ended.
    say : callable
        Told in a line of each worker that died.
    """
    quiet()
    import cloudpickle  # type: ignore[import-untyped]
    import numpy as np
    import ray
    from ray import tune

    scratch = context.directory / "ray"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback((context.directory / TOKEN_FILE).unlink, missing_ok=True)
        if not cluster:
            stack.enter_context(_own(ray, math.ceil(workers * cpus), math.ceil(workers * gpus), context.directory))
        watch = watcher(trial_timeout, say)
        searcher = _searcher(schedule, on_record, stop, watch.why)
        data = default_cache().absolute()
        worker = tune.with_parameters(
            trainable(),
            # Bytes: a worker unpickles them when it has what they refer to, and can say so when it has not.
            context=np.frombuffer(cloudpickle.dumps(context), np.uint8),
            paths=tuple(sys.path),
            versions=versions_here(),
            sweep=str(context.directory),
            data=str(data),
            token=write_token(context.directory) if cluster else "",
            server=serve(context.directory, data) if cluster else None,
        )
        tuner = tune.Tuner(
            tune.with_resources(worker, {"cpu": cpus, **({"gpu": gpus} if gpus else {})}),
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
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                # By default one is written at a trial's end, into a directory that all nodes would have to share.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
        if searcher.failure is not None:
            raise searcher.failure


@contextmanager
def _own(ray: Any, cpus: int, gpus: int, directory: Path) -> Iterator[None]:
    """Have a Ray of our own on this machine; a cluster that happens to run here is left alone."""
    if ray.is_initialized():
        raise SweepError(
            "Ray already runs in this process; call ray.shutdown() before the search, or use executor='inline'"
        )
    reaper = Reaper(
        "error: the sweep was ended from outside (it was killed, or Ray was); what finished is saved: "
        f"`autorank resume {directory}`"
    )
    try:
        with signals_kept(), on_loopback(), reaper.marking():
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                configure_logging=False,
            )
        with unheard():
            try:
                yield
            except Exception:
                if part := gone(ray):  # whatever else went wrong then, went wrong for that
                    raise SweepError(
                        f"Ray's {part} died (killed from outside, or out of memory); what finished is saved: "
                        f"`autorank resume {directory}`"
                    ) from None
                raise
            finally:
                if not gone(ray):
                    ray.shutdown()
                else:  # it would wait for what is no more
                    atexit.unregister(ray.shutdown)
    finally:
        reaper.close()


def _searcher(
    schedule: Schedule, on_record: Callable[[TrialRecord], None], stop: StopSignal, why: Callable[[str], str]
) -> Any:
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
            if result is not None and "trouble" in result and not error:
                self.failure = self.failure or SweepError(
                    f"a worker cannot run the task; what finished is saved. On {result['trouble']}"
                )
                schedule.stop()
                return
            for text in json.loads((result or {}).get("notes", "[]")):
                tell(text)
            if result is not None and "record" in result and not error:
                record = TrialRecord.from_json(json.loads(result["record"]))
            else:
                record = failed(job, why(trial_id))
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
