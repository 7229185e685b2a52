"""Looks after trials that run on Ray: how long they take, workers that die, and a Ray of our own that dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autorank.errors import SweepError

MAX_FAILURES = 2
"""How often a trial is started again whose worker died."""

_PARTS = ("raylet", "gcs_server")


@contextmanager
def unheard() -> Iterator[None]:
    """Keep Ray from printing the tail of its logs when a part of it dies: we say so in one line."""
    from ray._private import worker as module

    worker: Any = module
    printed = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *given, **more: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


def watcher(timeout: float | None, say: Callable[[str], None]) -> Any:
    """Return a callback for Ray Tune; it has `why`, the reason why a trial without result has failed.

    Parameters
    ----------
    timeout : float or None
        Seconds that a trial may take; the worker of one that takes longer is killed, and the trial not run again.
    say : callable
        Told in one line of every worker that died.
    """
    import ray
    from ray import tune

    class Watcher(tune.Callback):
        """Acts between the steps of Tune's loop, of which there are several in a second."""

        def __init__(self) -> None:
            self._begun: dict[Any, float] = {}
            self._late: set[str] = set()

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return dict, ()  # Tune pickles it into the run's folder; nothing of that is ever read again

        def why(self, trial_id: str) -> str:
            """Say why a trial gave no result."""
            if trial_id in self._late:
                return f"took longer than {timeout:g} s"
            return f"its worker process died {MAX_FAILURES + 1} times (out of memory, or killed from outside)"

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._begun[trial] = time.monotonic()

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            self._begun.pop(trial, None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._begun.pop(trial, None)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._begun.pop(trial, None)
            number = trial.config["job"]["number"]
            say(
                f"note: the worker of trial {number} died (out of memory, or killed from outside); the trial is "
                f"started again ({trial.num_failures} of {MAX_FAILURES})"
            )

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if part := gone(ray):
                raise SweepError(f"Ray's {part} died")  # Tune would wait for it for ever
            now = time.monotonic()
            for trial, begun in list(self._begun.items()):
                if timeout is not None and now - begun > timeout:
                    del self._begun[trial]
                    self._late.add(trial.trial_id)
                    trial.max_failures = 0
                    ray.kill(trial.temporary_state.ray_actor)

    return Watcher()


def gone(ray: Any) -> str:
    """Return which part of a Ray that this process has started is no more; empty when all is well."""
    node = ray._private.worker.global_worker.node
    for part in _PARTS:
        for started in node.all_processes.get(part, ()) if node is not None else ():
            if started.process.poll() is not None:
                return part
    return ""
