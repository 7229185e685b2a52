"""The order in which a strategy is asked and told, the same whatever worker was faster, and the replay of a journal."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from autorank.errors import SweepError
from autorank.gate import Seen
from autorank.job import Job
from autorank.strategies import WAIT, Strategy
from autorank.types import Fidelity, Objective, Proposal, TrialRecord

_Asked = tuple[str, bool, str]


def _asked(of: Job | TrialRecord) -> _Asked:
    """Return what tells one question from another; a probe keeps no weights, so it answers no other proposal."""
    return of.key, of.probe, of.want


class Schedule:
    """Asks the strategy for proposals and tells it their outcomes, in an order that no worker's speed can change.

    Before proposal n is asked for, exactly the outcomes of the proposals up to n − `lookahead` are told, so the same
    seed gives the same sweep with one worker or with several, as long as there are at most `lookahead` of them.
    Trials that are already in a journal are answered from it and not run again: a sweep is resumed by replaying it.

    Parameters
    ----------
    strategy : Strategy
    trials : int
        How many proposals to evaluate; probes come on top.
    fidelity : Fidelity
        Used where a proposal names none.
    known : collection of TrialRecord
        Finished trials of the journal.
    borrowed : collection of TrialRecord
        Trials of another sweep on the same model, data and settings: what they answer is not run again.
    on_borrowed : callable, optional
        Called with every borrowed record that answers a proposal, under its number in this sweep.
    lookahead : int
        How many proposals may be in flight.
    objectives : tuple of Objective
    gate_patience : int
        0 switches early stopping off.
    gate_margin : float
        In units of the score.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        trials: int,
        fidelity: Fidelity,
        known: Collection[TrialRecord] = (),
        borrowed: Collection[TrialRecord] = (),
        on_borrowed: Callable[[TrialRecord], None] | None = None,
        lookahead: int = 4,
        objectives: tuple[Objective, ...] = (),
        gate_patience: int = 3,
        gate_margin: float = 2.0,
    ) -> None:
        self._strategy = strategy
        self._trials = trials
        self._fidelity = fidelity
        self._lookahead = max(1, lookahead)
        costs = tuple(o.name for o in objectives if o.name != "score")
        direction = next((o.direction for o in objectives if o.name == "score"), None)
        self._seen: Seen | None = None
        if gate_patience and costs and direction:
            self._seen = Seen(costs, gate_patience, gate_margin, direction)
        self._proposals: list[Proposal] = []
        self._jobs: list[Job] = []
        self._number_of: dict[Proposal, int] = {}
        self._points = 0
        self._done: dict[int, TrialRecord] = {}
        self._told = 0
        self._answers: dict[_Asked, TrialRecord] = {}
        for record in known:
            self._learn(record)
        self._borrowed: dict[_Asked, TrialRecord] = {_asked(r): r for r in borrowed}
        self._on_borrowed = on_borrowed
        self._numbered = {r.number: r for r in known}
        self._exhausted = False
        self._stopped = False

    @property
    def finished(self) -> int:
        """Number of proposals whose outcome is known."""
        return len(self._done)

    @property
    def points(self) -> int:
        """Number of proposals that count as trials."""
        return self._points

    @property
    def exhausted(self) -> bool:
        """Whether the strategy had nothing left to propose."""
        return self._exhausted

    @property
    def ended(self) -> str:
        """What the strategy says about its end; empty while it goes on."""
        return self._strategy.ended if self._exhausted else ""

    @property
    def parents(self) -> tuple[TrialRecord, ...]:
        """Records of the trials with whose weights the latest proposals start."""
        latest = self._jobs[-2 * self._lookahead :]
        return tuple(self._done[job.parent.number] for job in latest if job.parent and job.parent.number in self._done)

    @property
    def in_flight(self) -> int:
        """Number of jobs that were handed out and not yet answered."""
        return len(self._proposals) - len(self._done)

    def stop(self) -> None:
        """Hand out no further jobs."""
        self._stopped = True

    def next(self) -> Job | object | None:
        """Return the next job, ``WAIT`` while an outcome must come first, or None when there is nothing left."""
        while True:
            number = len(self._proposals)
            if self._stopped or self._exhausted or self._points >= self._trials:
                return None
            due = number - self._lookahead + 1
            if any(n not in self._done for n in range(self._told, max(due, 0))):
                return WAIT
            self._tell_until(due)
            proposal = self._strategy.ask()
            if proposal is None:
                self._exhausted = True
                return None
            if proposal is WAIT:
                if self.in_flight or self._told < len(self._proposals):
                    # The strategy needs outcomes that are inside the look-ahead: give it what it waits for, in order.
                    if self._told not in self._done:
                        return WAIT
                    self._tell_until(self._told + 1)
                    continue
                raise RuntimeError(f"strategy {type(self._strategy).__name__} waits although nothing is in flight")
            assert isinstance(proposal, Proposal)
            job = self._job(number, proposal)
            journalled = self._numbered.get(number)
            if journalled is not None and journalled.key != job.key:
                raise SweepError(
                    f"the sweep cannot be replayed: the strategy now proposes another plan as number {number} than the "
                    "journal has; its libraries or its search space have changed. Nothing was run or written: "
                    "go on with the versions in the journal's first line, or start a new sweep"
                )
            self._proposals.append(proposal)
            self._number_of[proposal] = number
            self._jobs.append(job)
            self._points += not job.probe
            record = self._answers.get(_asked(job)) or self._borrow(job)
            if record is None:
                return job
            self._done[number] = record

    def _job(self, number: int, proposal: Proposal) -> Job:
        parent = None
        if proposal.parent is not None:
            if proposal.parent not in self._number_of:
                raise RuntimeError("a proposal starts from the weights of one that was never made")
            parent = self._jobs[self._number_of[proposal.parent]]
        fidelity = proposal.fidelity or self._fidelity
        job = Job(number, proposal.plan, fidelity, None, parent, proposal.pull, proposal.probe, proposal.want)
        gated = self._seen is not None and fidelity.steps and not (parent or proposal.pull or proposal.probe)
        return replace(job, gate=self._seen.gate()) if gated and self._seen is not None else job

    def _borrow(self, job: Job) -> TrialRecord | None:
        """Return another sweep's answer, journalled as this sweep's own; its weights can be made again."""
        found = self._borrowed.get(_asked(job))
        if found is None:
            return None
        record = replace(found, number=job.number, parent=job.parent.number if job.parent else None)
        if self._on_borrowed is not None:
            self._on_borrowed(record)
        self._learn(record)
        return record

    def _learn(self, record: TrialRecord) -> None:
        self._answers[_asked(record)] = record

    def done(self, record: TrialRecord) -> None:
        """Take the outcome of the job with the record's number."""
        self._done[record.number] = record
        self._learn(record)

    def _tell_until(self, number: int) -> None:
        while self._told < number:
            record = self._done[self._told]
            self._strategy.tell(self._proposals[self._told], record)
            if self._seen is not None:
                self._seen.add(record)
            self._told += 1
