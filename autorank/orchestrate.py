"""Ray Tune runs the trials."""

from __future__ import annotations

import atexit
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from autorank.cluster import on_loopback, quiet, signals_kept
from autorank.errors import SweepError, describe
from autorank.reaper import Reaper
from autorank.remotefiles import TOKEN_FILE, serve, write_token
from autorank.schedule import Schedule
from autorank.seats import Seats
from autorank.stopping import StopSignal
from autorank.tasks.memory import default_cache
from autorank.trainable import trainable, versions_here
from autorank.trial import TrialContext
from autorank.types import TrialRecord
from autorank.watching import gone, grouped, unheard

_STARTS = 3


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
        seats = Seats(schedule, on_record, stop, trial_timeout, say, ray.kill)
        searcher, callback, stopper = _tuner_parts(ray, seats)
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
                reuse_actors=False,
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch.resolve()),
                verbose=0,
                callbacks=[callback],
                stop=stopper,
                failure_config=tune.FailureConfig(max_failures=0),  # a worker that died has a successor
                # By default one is written at a trial's end, into a directory that all nodes would have to share.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
        if seats.failure is not None:
            raise seats.failure


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
        with signals_kept(), on_loopback(), reaper.marking(), grouped(reaper.group):
            _start(ray, cpus, gpus)
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


def _start(ray: Any, cpus: int, gpus: int) -> None:
    """Start Ray; again where it fails, as when another Ray took the port that it had found free."""
    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                configure_logging=False,
            )
            return
        except Exception as error:
            with suppress(Exception):
                ray.shutdown()
            if not left:
                raise SweepError(
                    f"Ray does not start on this machine: {describe(error)}; --executor inline runs without it"
                ) from None


def _tuner_parts(ray: Any, seats: Seats) -> tuple[Any, Any, Any]:
    """Return the searcher, the callback and the stopper through which Ray Tune and the seats speak."""
    from ray import tune
    from ray.tune.search import Searcher

    class _Forgotten:
        def __reduce__(self) -> tuple[type, tuple[()]]:
            # Tune pickles its parts into the run's folder at the start; nothing of that is ever read again.
            return dict, ()

    class SeatSearcher(_Forgotten, Searcher):
        """Asks for another worker as long as there is something to do."""

        def __init__(self) -> None:
            super().__init__(metric="done", mode="max")

        def set_search_properties(self, *args: object, **spec: object) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            if seats.over:
                return str(Searcher.FINISHED)
            if not seats.wanted():
                return None
            seats.sit(trial_id)
            return {}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if error:
                seats.lost(trial_id)

        def save(self, checkpoint_path: str) -> None:
            """Save nothing: the journal is the truth."""

        def restore(self, checkpoint_path: str) -> None:
            """Restore nothing: a sweep is resumed by replaying its journal."""

    class SeatCallback(_Forgotten, tune.Callback):
        """Takes what a worker gives back, and gives it its next job before Tune lets it go on."""

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            actor = trial.temporary_state.ray_actor
            seats.turn(trial.trial_id, actor, result, actor.give.remote)

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if part := gone(ray):
                raise SweepError(f"Ray's {part} died")  # Tune would wait for it for ever
            seats.begin_round()

    class SeatStopper(_Forgotten, tune.Stopper):
        """Ends the run, and with it workers that still wait for their place."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return seats.over

    return SeatSearcher(), SeatCallback(), SeatStopper()
