"""Workers get one job after the other; what a dead one leaves is done by another; the search ends when all is done."""

import json

import pytest

from autorank import seats
from autorank.errors import SweepError
from autorank.job import Job
from autorank.seats import MAX_FAILURES, MAX_STILLBORN, Seats
from autorank.stopping import StopSignal
from autorank.strategies import WAIT
from autorank.types import Fidelity, Plan, TrialRecord


class Queue:
    """Stands where a schedule does: so many jobs, `lookahead` of them in flight."""

    def __init__(self, jobs: int, lookahead: int = 100) -> None:
        self.left = [Job(number, Plan(), Fidelity()) for number in range(jobs)]
        self.lookahead, self.asked, self.told = lookahead, 0, []

    def next(self) -> object:
        if not self.left:
            return None
        if self.asked - len(self.told) >= self.lookahead:
            return WAIT
        self.asked += 1
        return self.left.pop(0)

    def done(self, record: TrialRecord) -> None:
        self.told.append(record)

    def stop(self) -> None:
        self.left.clear()


class Room:
    """Seats with workers that are numbers; keeps what is told to anybody."""

    def __init__(self, jobs: int, lookahead: int = 100, timeout: float | None = None) -> None:
        self.queue, self.said, self.killed = Queue(jobs, lookahead), [], []
        self.stop = StopSignal(None)
        self.taken: list[TrialRecord] = []
        self.seats = Seats(self.queue, self.taken.append, self.stop, timeout, self.said.append, self.killed.append)

    def fill(self, workers: int) -> list[str]:
        """Let as many workers in as are wanted, at most so many."""
        names = []
        while len(names) < workers and self.seats.wanted():
            names.append(f"seat {len(names)}")
            self.seats.sit(names[-1])
        return names

    def rounds(self, count: int) -> None:
        """Let the driver go round so often."""
        for _ in range(count):
            self.seats.begin_round()

    def turn(self, name: str, number: int) -> list[dict]:
        """Let a worker give back the record of a job; return what it is given, with how many records were kept then."""
        given: list[dict] = []
        record = TrialRecord(number=number, plan=Plan(), fidelity=Fidelity(), status="complete", score=1.0)
        result = {"record": json.dumps(record.to_json()), "done": False}
        self.seats.turn(name, name, result, lambda what: given.append({**what, "kept": len(self.taken)}))
        return given

    def finish(self, name: str, number: int) -> None:
        record = TrialRecord(number=number, plan=Plan(), fidelity=Fidelity(), status="complete", score=1.0)
        self.seats.result(name, {"record": json.dumps(record.to_json()), "done": False})


def number_of(given: dict) -> int:
    return given["job"]["number"]


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "GRACE_S", -1.0)


@pytest.mark.parametrize(("jobs", "workers", "seats"), [(10, 3, 3), (2, 5, 2), (0, 3, 0)])
def test_no_more_workers_start_than_there_are_jobs(jobs: int, workers: int, seats: int) -> None:
    assert len(Room(jobs).fill(workers)) == seats


def test_no_worker_starts_for_what_must_wait() -> None:
    room = Room(10, lookahead=2)
    assert len(room.fill(5)) == 2


def test_all_jobs_are_done_once_in_their_order() -> None:
    room = Room(7)
    names = room.fill(2)
    running = {name: room.seats.free(name, name) for name in names}
    while running:
        name, given = next(iter(running.items()))
        assert not room.seats.over
        room.finish(name, number_of(given))
        del running[name]
        if given := room.seats.free(name, name):
            running[name] = given
    assert [record.number for record in room.taken] == [record.number for record in room.queue.told] == list(range(7))
    assert room.seats.over
    assert room.seats.failure is None


def test_a_worker_waits_while_an_outcome_must_come_first() -> None:
    room = Room(3, lookahead=2)
    first, second = room.fill(2)
    assert number_of(room.seats.free(first, first)) == 0
    assert number_of(room.seats.free(second, second)) == 1
    room.queue.lookahead = 1
    room.finish(second, 1)
    waits = room.seats.free(second, second)
    assert 0 < waits["wait"] <= 1
    room.finish(first, 0)
    assert number_of(room.seats.free(second, second)) == 2


def test_a_worker_has_its_next_job_before_its_record_is_dealt_with() -> None:
    room = Room(4)
    (name,) = room.fill(1)
    room.seats.free(name, name)
    (first,) = room.turn(name, 0)  # nothing was asked for beforehand: the record is safe before a strategy thinks
    assert (number_of(first), first["kept"]) == (1, 1)
    (second,) = room.turn(name, 1)
    assert (number_of(second), second["kept"]) == (2, 1)
    assert [record.number for record in room.taken] == [0, 1]
    (third,) = room.turn(name, 2)
    assert number_of(third) == 3
    assert room.turn(name, 3) == [{"kept": 4}]
    assert room.seats.over
    assert [record.number for record in room.taken] == [0, 1, 2, 3]


def test_a_job_asked_for_beforehand_is_not_begun_after_a_stop() -> None:
    room = Room(10)
    (name,) = room.fill(1)
    room.seats.free(name, name)
    room.turn(name, 0)
    room.stop.interrupt()
    assert room.turn(name, 1) == [{"kept": 2}]
    assert [record.number for record in room.taken] == [0, 1]
    assert room.seats.over


def test_an_outcome_that_a_strategy_waits_for_is_told_before_it_is_asked() -> None:
    room = Room(3, lookahead=1)
    (name,) = room.fill(1)
    room.seats.free(name, name)
    assert number_of(room.turn(name, 0)[0]) == 1
    assert number_of(room.turn(name, 1)[0]) == 2


def test_the_job_of_a_dead_worker_is_done_by_the_next_that_is_free() -> None:
    room = Room(3)
    first, second = room.fill(2)
    room.seats.free(first, first)
    room.seats.free(second, second)
    room.seats.lost(first)
    assert [line.split(";")[0] for line in room.said] == [
        "note: the worker of trial 0 died (out of memory, or killed from outside)"
    ]
    room.finish(second, 1)
    assert number_of(room.seats.free(second, second)) == 0
    assert not room.seats.over


def test_a_dead_worker_is_replaced_although_the_schedule_has_nothing_more() -> None:
    room = Room(1)
    (name,) = room.fill(3)
    room.seats.free(name, name)
    assert not room.seats.wanted()
    room.seats.lost(name)
    assert not room.seats.over
    assert room.seats.wanted()


def test_a_job_whose_workers_always_die_fails() -> None:
    room = Room(1)
    for _ in range(MAX_FAILURES + 1):
        (name,) = room.fill(1)
        room.seats.free(name, name)
        room.seats.lost(name)
    assert [(record.status, record.reason) for record in room.taken] == [
        ("failed", "its worker process died 3 times (out of memory, or killed from outside)")
    ]
    room.fill(1)
    assert room.seats.over


def test_a_trial_that_takes_too_long_fails_and_is_not_run_again() -> None:
    room = Room(1, timeout=-1.0)
    (name,) = room.fill(1)
    room.seats.free(name, "actor")
    room.rounds(4)
    assert room.killed == ["actor"]
    room.seats.lost(name)
    assert room.taken[0].reason == "took longer than -1 s"
    assert not room.seats.wanted()
    assert room.seats.over


def test_workers_that_die_while_they_start_end_the_search() -> None:
    room = Room(5)
    for _ in range(MAX_STILLBORN):
        for name in room.fill(2):
            room.seats.lost(name)
    assert isinstance(room.seats.failure, SweepError)
    assert room.seats.over


def test_a_trial_that_was_done_while_the_driver_was_busy_is_not_too_late() -> None:
    room = Room(3, timeout=-1.0)
    first, second = room.fill(2)
    room.seats.free(first, "first")
    room.seats.free(second, "second")
    room.rounds(2)  # in each of these a result may have been taken
    room.finish(first, 0)
    room.finish(second, 1)
    room.rounds(9)
    assert room.killed == []
    assert [record.status for record in room.taken] == ["complete", "complete"]


def test_nothing_that_waits_is_started_after_a_stop() -> None:
    room = Room(2)
    names = room.fill(2)
    assert not room.seats.wanted()  # all jobs are handed out, and none has begun
    room.stop.interrupt()
    room.seats.look()
    assert room.seats.over
    assert room.seats.free(names[0], names[0]) == {}


def test_the_job_of_a_worker_that_died_last_does_not_outlive_a_stop() -> None:
    room = Room(1)
    (name,) = room.fill(1)
    room.seats.free(name, name)
    room.seats.lost(name)
    room.stop.interrupt()
    room.seats.look()
    assert room.seats.over
    assert not room.seats.wanted()


def test_a_wish_to_stop_lets_the_running_trials_end_and_starts_none() -> None:
    room = Room(9)
    first, second, _ = room.fill(3)
    room.seats.free(first, first)
    room.stop.interrupt()
    room.seats.look()
    assert room.seats.free(second, second) == {}
    assert not room.seats.over
    room.finish(first, 0)
    assert room.seats.free(first, first) == {}
    assert room.seats.over
    assert [record.number for record in room.taken] == [0]


@pytest.mark.parametrize("where", ["record", "trouble", "schedule"])
def test_what_cannot_go_on_ends_the_search_and_is_kept(where: str) -> None:
    room = Room(9)
    (name,) = room.fill(1)
    if where == "schedule":
        room.queue.next = lambda: 1 / 0
        room.seats.free(name, name)
        room.finish(name, 0)
        assert room.seats.free(name, name) == {}
    else:
        room.seats.free(name, name)
        if where == "record":
            room.queue.done = lambda record: 1 / 0
            room.finish(name, 0)
        else:
            room.seats.result(name, {"trouble": "host: no module", "done": True})
    assert isinstance(room.seats.failure, SweepError if where == "trouble" else ZeroDivisionError)
    assert room.seats.over


def test_it_is_said_once_that_no_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "PATIENCE_S", -1.0)
    room = Room(5)
    (name,) = room.fill(1)
    for _ in range(5):
        room.seats.look()
    assert [line.split(":")[1].strip() for line in room.said] == ["no worker has started for -1 s"]
    room.seats.free(name, name)
    room.seats.look()
    assert len(room.said) == 1
    room.seats.lost(name)
    for _ in range(5):
        room.seats.look()
    assert [line.split()[1] for line in room.said] == ["no", "the", "no"]


def test_a_late_result_does_not_make_the_next_trial_late() -> None:
    """Its worker was killed when the result was on its way already."""
    room = Room(2, timeout=-1.0)
    (name,) = room.fill(1)
    room.seats.free(name, "actor")
    room.rounds(4)
    room.finish(name, 0)
    assert number_of(room.seats.free(name, "actor")) == 1
    room.seats.lost(name)
    assert [record.status for record in room.taken] == ["complete"]
    assert room.seats.wanted()
