"""The inline executor: one process, one trial after the other, nothing imported but what a trial needs."""

from __future__ import annotations

from collections.abc import Callable

from autorank.errors import TrialError
from autorank.job import Job
from autorank.schedule import Schedule
from autorank.stopping import StopSignal, time_limit
from autorank.trial import TrialContext, failed
from autorank.types import TrialRecord


def run(
    schedule: Schedule,
    context: TrialContext,
    on_record: Callable[[TrialRecord], None],
    stop: StopSignal,
    trial_timeout: float | None = None,
) -> None:
    """Run the schedule's jobs in this process until it has none left or a stop is asked for.

    Parameters
    ----------
    schedule : Schedule
    context : TrialContext
    on_record : callable
        Called with every finished record before the schedule hears of it.
    stop : StopSignal
    trial_timeout : float, optional
        Seconds that a trial may take. It is ended between two of Python's instructions, so one that hangs inside a
        library is not; with Ray, its process is killed.
    """
    runner = context.runner()
    while not stop.reason:
        job = schedule.next()
        if not isinstance(job, Job):
            return
        try:
            with time_limit(trial_timeout):
                record = runner.run(job)
        except TrialError as error:  # in the very moment in which it was done
            record = failed(job, str(error))
        on_record(record)
        schedule.done(record)
