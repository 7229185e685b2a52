"""The schedule: an order of ask and tell that no worker's speed changes, replay of a journal, the gate."""

from __future__ import annotations

import random

import pytest

from autorank.schedule import Gate, Job, Schedule
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


@pytest.mark.parametrize(
    ("score", "macs", "stopped"),
    [
        (50.0, 0.9, True),
        (50.0, 0.45, False),
        (88.5, 0.9, False),
        (float("-inf"), 0.5, True),
    ],
    ids=["beaten by three", "beaten by two only", "within the margin", "worst at equal cost"],
)
def test_gate_stops_what_enough_cheaper_trials_beat_clearly(score: float, macs: float, stopped: bool) -> None:
    gate = Gate(((90.0, (0.3,)), (89.0, (0.4,)), (90.0, (0.5,))), ("macs_kept",), patience=3, margin=2.0)
    reason = gate.hopeless(score, {"macs_kept": macs})
    assert bool(reason) is stopped


def test_gate_with_a_metric_where_less_is_better() -> None:
    gate = Gate(((1.0, (0.3,)), (1.2, (0.4,))), ("macs_kept",), patience=2, margin=0.5, direction="min")
    assert gate.hopeless(3.0, {"macs_kept": 0.4})
    assert not gate.hopeless(1.5, {"macs_kept": 0.4})


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
