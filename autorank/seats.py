"""Who runs which trial: workers sit on seats, and get one job after the other while they live.

A trial of Ray Tune is a seat: a worker that stays, whose steps are our trials. Tune's own trials come with a worker
each, which it gives to another trial only when one waits at that very moment: with many short trials in flight it
mostly starts workers, each of which takes seconds to load what it needs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autorank.errors import SweepError
from autorank.job import Job
from autorank.schedule import Schedule
from autorank.stopping import StopSignal
from autorank.trial import failed
from autorank.trouble import tell
from autorank.types import TrialRecord

MAX_FAILURES = 2
"""How often a trial is started again whose worker died."""

MAX_STILLBORN = 3
"""How often all workers may die one after the other while they start; after that the search ends."""

PATIENCE_S = 60.0
"""Seconds without a single worker after which it is said that the trials wait."""

GRACE_S = 1.0
"""Seconds that a trial has beyond its limit, in which the driver looks whether its result is there already."""

IDLE_SHARE, IDLE_S = 0.02, (0.02, 1.0)
"""A worker without a job asks again after this share of a trial's time, within these seconds."""


@dataclass
class Seat:
    """A worker, and what it does."""

    actor: Any = None
    job: Job | None = None
    begun: float = 0.0
    overdue: tuple[int, float] | None = None
    late: bool = False


class Seats:
    """Hands the schedule's jobs to the workers on their seats, and their records to the driver.

    Parameters
    ----------
    schedule : Schedule
    on_record : callable
        Called with every finished record before the schedule hears of it.
    stop : StopSignal
    timeout : float or None
        Seconds that a trial may take; its worker is killed then, and the trial not run again.
    say : callable
        Told in one line of every worker that died.
    kill : callable
        Ends an actor.

    Attributes
    ----------
    over : bool
        Nothing is left to do.
    failure : Exception or None
        Why the search cannot go on.
    """

    def __init__(
        self,
        schedule: Schedule,
        on_record: Callable[[TrialRecord], None],
        stop: StopSignal,
        timeout: float | None,
        say: Callable[[str], None],
        kill: Callable[[Any], None],
    ) -> None:
        self._schedule, self._on_record, self._stop = schedule, on_record, stop
        self._timeout, self._say, self._kill = timeout, say, kill
        self._seats: dict[str, Seat] = {}
        self._waiting: list[Job] = []
        self._deaths: dict[int, int] = {}
        self._stillborn, self._most = 0, 0
        self._ended = False
        self._round = 0
        self._mean = 0.0
        self._alone_since: float | None = None
        self.failure: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether no job is left, waiting or running."""
        return self._ended and not self._waiting and not self._running()

    def _running(self) -> list[Seat]:
        return [seat for seat in self._seats.values() if seat.job is not None]

    def wanted(self) -> bool:
        """Return whether a job waits for which no worker is on its way."""
        self.look()
        starting = sum(seat.actor is None for seat in self._seats.values())
        if len(self._waiting) <= starting and isinstance(job := self._ask(), Job):
            self._waiting.append(job)
        return len(self._waiting) > starting

    def _ask(self) -> object:
        """Ask the schedule for a job; whatever goes wrong there ends the search."""
        if self._ended:
            return None
        try:
            job = self._schedule.next()
        except Exception as error:
            self.fail(error)
            return None
        self._ended = job is None
        return job

    def look(self) -> None:
        """Notice a wish to stop, and trials that take too long."""
        if self._stop.reason and (self._waiting or not self._ended):
            self._end()
        now = time.monotonic()
        self._tell_of_waiting(now)
        for seat in self._running():
            if self._timeout is not None and now - seat.begun > self._timeout and not seat.late:
                seat.overdue = seat.overdue or (self._round, now)
                since, then = seat.overdue
                # While the driver was busy the result may have come: all that had is taken in so many rounds.
                if self._round - since > len(self._seats) and now - then > GRACE_S:
                    seat.late = True
                    self._kill(seat.actor)

    def begin_round(self) -> None:
        """Look, and count the rounds in each of which the driver takes at most one result."""
        self._round += 1
        self.look()

    def _tell_of_waiting(self, now: float) -> None:
        """Say once that no worker starts, when that has gone on for long; say so again after there was one."""
        if not self._waiting or any(seat.actor is not None for seat in self._seats.values()):
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > PATIENCE_S:
            self._alone_since = math.inf
            self._say(
                f"note: no worker has started for {PATIENCE_S:g} s: the CPUs may be taken by others, or the cluster's "
                "nodes gone; the trials wait until there is room"
            )

    def sit(self, name: str) -> None:
        """Take a worker in that is about to start."""
        self._seats[name] = Seat()
        self._most = max(self._most, len(self._seats))

    def turn(self, name: str, actor: Any, result: dict[str, Any], give: Callable[[dict[str, Any]], None]) -> None:
        """Take what a worker gave back, and give it what it does next.

        When a job waits, the worker has it before its record is dealt with. It is asked for beforehand, when nothing is
        unsaved: a strategy may think for seconds.
        """
        before = self._leave(name)
        going, given = not result["done"], False
        if going:
            self.look()
            if given := bool(self._waiting):
                give(self.free(name, actor))
        self._receive(before, result)
        if going and not given:
            give(self.free(name, actor))
        if not self._waiting and isinstance(job := self._ask(), Job):
            self._waiting.append(job)

    def free(self, name: str, actor: Any) -> dict[str, Any]:
        """Return what the worker on a seat shall do next: a job, ``wait`` seconds, or nothing more."""
        seat = self._seats[name]
        seat.actor = actor
        self._stillborn = 0
        self.look()
        job = self._waiting.pop(0) if self._waiting else self._ask()
        if isinstance(job, Job):
            seat.job, seat.begun, seat.overdue, seat.late = job, time.monotonic(), None, False
            return {"job": job.to_json()}
        if job is None:
            del self._seats[name]
            return {}
        idle = sum(other.job is None for other in self._seats.values())
        # All idle workers together ask so often, however many they are.
        return {"wait": idle * min(max(IDLE_SHARE * self._mean, IDLE_S[0]), IDLE_S[1])}

    def _end(self) -> None:
        """Let what runs come to its end, and start nothing more."""
        self._ended = True
        self._waiting.clear()
        self._schedule.stop()

    def result(self, name: str, result: dict[str, Any]) -> None:
        """Take what a worker gave back for its job."""
        self._receive(self._leave(name), result)

    def _leave(self, name: str) -> tuple[Job | None, float]:
        """Take the job from a worker; return it with the seconds that it took."""
        seat = self._seats.get(name) or Seat()
        job, seat.job = seat.job, None
        return job, time.monotonic() - seat.begun

    def _receive(self, before: tuple[Job | None, float], result: dict[str, Any]) -> None:
        job, taken = before
        if "trouble" in result:
            self.fail(SweepError(f"a worker cannot run the task; what finished is saved. On {result['trouble']}"))
        if "record" not in result or job is None:
            return
        self._mean = taken if not self._mean else 0.9 * self._mean + 0.1 * taken
        try:
            for text in json.loads(result.get("notes", "[]")):
                tell(text)
            record = TrialRecord.from_json(json.loads(result["record"]))
        except Exception as error:
            self.fail(error)
            return
        self._take(record)

    def _take(self, record: TrialRecord) -> None:
        try:
            self._on_record(record)
            self._schedule.done(record)
        except Exception as error:
            # Tune would swallow it and go on without the record: end the search, and raise it after that.
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the search for this reason; the first one counts."""
        self.failure = self.failure or error
        self._end()

    def lost(self, name: str) -> None:
        """Take note of a worker that died; its job is done by another, at most `MAX_FAILURES` times."""
        seat = self._seats.pop(name, None)
        if seat is None:
            return
        if seat.job is None:
            self._stillborn += seat.actor is None
            if self._stillborn >= MAX_STILLBORN * self._most:
                self.fail(SweepError("the worker processes die while they start; what finished is saved"))
            return
        job = seat.job
        if seat.late:
            self._take(failed(job, f"took longer than {self._timeout:g} s"))
            return
        count = self._deaths[job.number] = self._deaths.get(job.number, 0) + 1
        if count > MAX_FAILURES:
            self._take(failed(job, f"its worker process died {count} times (out of memory, or killed from outside)"))
        elif not (self._stop.reason or self.failure):
            self._waiting.insert(0, job)
            self._say(
                f"note: the worker of trial {job.number} died (out of memory, or killed from outside); the trial is "
                f"started again ({count} of {MAX_FAILURES})"
            )
