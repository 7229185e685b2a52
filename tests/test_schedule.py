"""The schedule: an order of ask and tell that no worker's speed changes, replay of a journal, the gate."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autorank.errors import TrialError
from autorank.job import Job, job_of
from autorank.schedule import Schedule
from autorank.strategies import WAIT
from autorank.strategies.base import Strategy
from autorank.types import Choice, Cost, Fidelity, Objective, Plan, Proposal, TrialRecord

FULL = Fidelity(10)
OBJECTIVES = (Objective("score", "max"), Objective("macs_kept", "min"))


class Diary(Strategy):
    """A strategy that proposes from what it has been told, and writes down the order of calls."""

    def __init__(self, wait_after: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.state = 1
        self.asked = 0
        self.told = 0
        self.wait_after = wait_after

    def ask(self) -> Proposal | object | None:
        if self.wait_after is not None and self.asked - self.told >= self.wait_after:
            return WAIT
        self.calls.append(("ask", self.asked))
        self.asked += 1
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return Proposal(Plan.of({"a": Choice("channel_svd", (1 + self.state % 1000,))}, seed=self.asked))

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        assert proposal.plan == record.plan
        self.calls.append(("tell", self.told))
        self.told += 1
        self.state += int(1000 * (record.score or 0.0))


def outcome(job: Job) -> TrialRecord:
    rank = job.plan.choices["a"].rank[0]
    return TrialRecord(job.number, job.plan, job.fidelity, "complete", score=rank / 10, kept={"macs_kept": rank / 1000})


def drive(schedule: Schedule, workers: int, seed: int) -> list[TrialRecord]:
    """Play `workers` workers of random speed."""
    chance = random.Random(seed)
    running: list[Job] = []
    records: list[TrialRecord] = []
    while True:
        job = schedule.next() if len(running) < workers else WAIT
        if isinstance(job, Job):
            running.append(job)
            continue
        if not running:
            assert job is None
            return records
        record = outcome(running.pop(chance.randrange(len(running))))
        records.append(record)
        schedule.done(record)


def schedule_of(strategy: Strategy, **settings: object) -> Schedule:
    return Schedule(strategy, **{"trials": 30, "fidelity": FULL, "lookahead": 4, "objectives": OBJECTIVES, **settings})


@pytest.mark.parametrize("wait_after", [None, 2], ids=["free", "a strategy that waits"])
def test_proposals_do_not_depend_on_workers_or_their_speed(wait_after: int | None) -> None:
    runs = []
    for workers, seed in [(1, 0), (2, 1), (2, 2), (4, 3), (4, 4)]:
        strategy = Diary(wait_after)
        records = drive(schedule_of(strategy), workers, seed)
        runs.append((strategy.calls, sorted((r.number, r.plan_id) for r in records)))
    assert all(run == runs[0] for run in runs[1:])
    assert len(runs[0][1]) == 30


@pytest.mark.parametrize("cut", [0, 1, 7, 29, 30], ids=lambda n: f"{n} finished")
def test_a_resumed_sweep_is_the_undisturbed_one_and_runs_nothing_twice(cut: int) -> None:
    whole = drive(schedule_of(Diary()), 2, 0)
    known = whole[:cut]
    resumed = schedule_of(Diary(), known=known)
    fresh = drive(resumed, 2, 5)
    assert {r.number for r in fresh}.isdisjoint(r.number for r in known)
    assert sorted((r.number, r.plan_id) for r in [*known, *fresh]) == sorted((r.number, r.plan_id) for r in whole)


def test_a_pruned_trial_is_replayed_too() -> None:
    first = schedule_of(Diary(), trials=1)
    job = first.next()
    assert isinstance(job, Job)
    pruned = TrialRecord(0, job.plan, Fidelity(0), "pruned", score_bn=3.0, target=FULL)
    again = schedule_of(Diary(), trials=1, known=[pruned])
    assert again.next() is None
    assert again.finished == 1


def test_stop_hands_out_no_more_jobs() -> None:
    schedule = schedule_of(Diary())
    assert isinstance(schedule.next(), Job)
    schedule.stop()
    assert schedule.next() is None


def test_the_gate_knows_only_trials_outside_the_lookahead_and_survives_json() -> None:
    schedule = schedule_of(Diary(), lookahead=2)
    jobs = []
    for number in range(6):
        job = schedule.next()
        assert isinstance(job, Job)
        jobs.append(job)
        record = outcome(job)
        schedule.done(TrialRecord(**{**_fields(record), "score_bn": float(number), "cost": Cost(1, 1, 1)}))
    assert jobs[5].gate is not None
    assert [score for score, _ in jobs[5].gate.seen] == [0.0, 1.0, 2.0, 3.0]
    assert Job.from_json(jobs[5].to_json()) == jobs[5]


def _fields(record: TrialRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in TrialRecord.__dataclass_fields__}


class Listed(Strategy):
    """A strategy that proposes what it was given, each once its parent was answered."""

    def __init__(self, proposals: list[Proposal]) -> None:
        self.left, self.told = list(proposals), []

    def ask(self) -> Proposal | object | None:
        if not self.left:
            return None
        parent = self.left[0].parent
        if parent is not None and parent not in [proposal for proposal, _ in self.told]:
            return WAIT
        return self.left.pop(0)

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        self.told.append((proposal, record))

    @property
    def ended(self) -> str:
        return "the list is empty"


def plan_of(rank: int) -> Plan:
    return Plan.of({"a": Choice("channel_svd", (rank,))})


def test_probes_do_not_count_as_trials() -> None:
    listed = [Proposal(plan_of(n), probe=n % 3 != 0) for n in range(1, 31)]
    schedule = schedule_of(Listed(listed), trials=4)
    records = drive(schedule, 3, 0)
    assert [r.plan.choices["a"].rank[0] for r in sorted(records, key=lambda r: r.number)] == list(range(1, 13))
    assert schedule.points == 4


def test_a_strategy_says_why_it_ended() -> None:
    schedule = schedule_of(Listed([Proposal(plan_of(1))]))
    assert schedule.ended == ""
    drive(schedule, 1, 0)
    assert schedule.ended == "the list is empty"


def chain() -> list[Proposal]:
    first = Proposal(plan_of(8))
    pulled = Proposal(plan_of(6), Fidelity(3), parent=first, pull=0.5, probe=True, want="distances")
    return [first, pulled, Proposal(plan_of(6), parent=pulled), Proposal(plan_of(6))]


def test_a_job_carries_the_trials_that_it_descends_from() -> None:
    jobs: list[Job] = []
    schedule = schedule_of(Listed(chain()))
    while isinstance(job := schedule.next(), Job):
        jobs.append(Job.from_json(job.to_json()))
        schedule.done(answered(job))
    assert jobs[2].parent == replace(jobs[1], gate=None)
    assert jobs[1].parent is not None
    assert jobs[1].parent.number == 0
    assert (jobs[1].pull, jobs[1].probe, jobs[1].want) == (0.5, True, "distances")
    # The same plan at the same fidelity is another trial where its weights come from elsewhere.
    assert jobs[2].plan == jobs[3].plan
    assert jobs[2].key != jobs[3].key
    assert len({job.key for job in jobs}) == 4
    assert all(job.gate is None for job in jobs[1:3]), "trials of a chain are not stopped early"


def answered(job: Job) -> TrialRecord:
    return replace(
        outcome(job),
        parent=job.parent.number if job.parent else None,
        lineage=job.lineage,
        pull=job.pull,
        probe=job.probe,
        want=job.want,
    )


def test_a_record_tells_its_job_again() -> None:
    schedule = schedule_of(Listed(chain()))
    jobs, records = [], {}
    while isinstance(job := schedule.next(), Job):
        jobs.append(job)
        records[job.number] = TrialRecord.from_json(answered(job).to_json())
        schedule.done(records[job.number])
    for job in jobs:
        found = job_of(records[job.number], records)
        assert found.key == job.key == records[job.number].key
        assert found == replace(job, gate=None, parent=found.parent)
    del records[1]
    with pytest.raises(TrialError, match="started from trial 1"):
        job_of(records[2], records)


def test_a_chain_is_replayed_from_its_journal() -> None:
    schedule = schedule_of(Listed(chain()))
    records = []
    while isinstance(job := schedule.next(), Job):
        records.append(answered(job))
        schedule.done(records[-1])
    again = schedule_of(Listed(chain()), known=records)
    assert again.next() is None
    assert again.finished == 4


def test_answers_of_another_sweep_are_taken_under_this_ones_numbers() -> None:
    records = [answered(job) for job in jobs_of(chain())]
    other = [Proposal(plan_of(3)), *chain()]
    borrowed: list[TrialRecord] = []
    schedule = schedule_of(Listed(other), borrowed=records, on_borrowed=borrowed.append)
    ran = jobs_of(other, schedule)
    assert [job.plan for job in ran] == [plan_of(3)]
    assert [record.number for record in borrowed] == [1, 2, 3, 4]
    assert [record.parent for record in borrowed] == [None, 1, 2, None]
    assert [record.key for record in borrowed] == [record.key for record in records]


def jobs_of(proposals: list[Proposal], schedule: Schedule | None = None) -> list[Job]:
    schedule = schedule or schedule_of(Listed(proposals))
    jobs = []
    while isinstance(job := schedule.next(), Job):
        jobs.append(job)
        schedule.done(answered(job))
    return jobs


def test_a_probe_does_not_answer_a_point() -> None:
    first = [Proposal(plan_of(2), probe=True), Proposal(plan_of(2))]
    assert len(jobs_of(first)) == 2, "a probe keeps no weights"
