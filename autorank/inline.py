"""The inline executor: one process, one trial after the other, nothing imported but what a trial needs."""

from __future__ import annotations

from collections.abc import Callable

from autorank.schedule import Job, Schedule
from autorank.stopping import StopSignal
from autorank.trial import TrialContext, TrialRunner
from autorank.types import TrialRecord


def run(
    schedule: Schedule,
    context: TrialContext,
    on_record: Callable[[TrialRecord], None],
    stop: StopSignal,
) -> None:
    """Run the schedule's jobs in this process until it has none left or a stop is asked for.

    Parameters
    ----------
    schedule : Schedule
    context : TrialContext
    on_record : callable
        Called with every finished record before the schedule hears of it.
    stop : StopSignal
    """
    runner = TrialRunner(context)
    while not stop.reason:
        job = schedule.next()
        if not isinstance(job, Job):
            return
        record = runner.run(job)
        on_record(record)
        schedule.done(record)
