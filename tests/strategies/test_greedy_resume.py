"""The greedy rules behind the schedule of a sweep, stopped in the middle and resumed from its records."""

from dataclasses import replace

import pytest

from autorank import strategies
from autorank.job import Job
from autorank.schedule import WAIT, Schedule
from autorank.testing.strategies import MADE_UP_DENSE, MADE_UP_FULL, TWO, made_up_record, made_up_space
from autorank.types import Proposal

SPACE = made_up_space(6)


def schedule_of(name, known=(), borrowed=()):
    strategy = strategies.make(name, SPACE, TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL)
    return Schedule(
        strategy, trials=15, fidelity=MADE_UP_FULL, known=known, borrowed=borrowed, lookahead=4, objectives=TWO
    )


def proposal_of(job):
    return Proposal(job.plan, job.fidelity, job.parent and proposal_of(job.parent), job.pull, job.probe, job.want)


def record_of(job):
    parent = job.parent.number if job.parent else None
    record = made_up_record(SPACE, proposal_of(job), job.number)
    return replace(record, parent=parent, lineage=job.lineage, target=job.fidelity)


def played(schedule, limit=10_000):
    """The records of all jobs that were handed out, at most `limit`, with four of them running at a time."""
    running, records = [], []
    while len(records) < limit:
        job = schedule.next() if len(running) < 4 else WAIT
        if isinstance(job, Job):
            running.append(job)
        elif running:
            records.append(record_of(running.pop(0)))
            schedule.done(records[-1])
        else:
            assert job is None
            break
    return records


@pytest.mark.parametrize("name", ["greedy-one-step", "greedy-multi-step"])
def test_a_resumed_sweep_goes_on_where_it_stopped(name):
    whole = played(schedule_of(name))
    assert 10 < sum(not r.probe for r in whole) <= 15
    for stopped_at in (3, len(whole) // 2, len(whole) - 5):
        begun = played(schedule_of(name), stopped_at)
        rest = played(schedule_of(name, known=begun))
        assert [*begun, *rest] == whole


@pytest.mark.parametrize("name", ["greedy-one-step", "greedy-multi-step"])
def test_a_second_sweep_runs_nothing_that_the_first_has_answered(name):
    whole = played(schedule_of(name))
    assert played(schedule_of(name, borrowed=whole)) == []
