"""The contract that every strategy keeps, and a made-up search problem to hold it to.

Derive a test class from `StrategyContract` and name your strategy::

    class TestMine(StrategyContract):
        name = "mine"

Needs neither torch nor pytest; every method that starts with ``test_`` is one promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

from autorank import strategies
from autorank.errors import ConfigError
from autorank.space import Candidate, LayerCandidates, SearchSpace
from autorank.strategies import WAIT, Strategy
from autorank.types import (
    CallSize,
    Choice,
    Constraint,
    Cost,
    Errors,
    Evaluation,
    Fidelity,
    LayerCost,
    LayerSpec,
    Objective,
    Plan,
    Proposal,
    Spectrum,
    Status,
    TrialRecord,
)

TWO = (Objective("score", "max"), Objective("macs_kept", "min"))
"""Accuracy against MACs."""
THREE = (*TWO, Objective("params_kept", "min"))
"""Accuracy against MACs and parameters."""

_FORMATS = ("plain", "wide", "tall")
MADE_UP_FULL = Fidelity(100)
"""The full fidelity of made-up sweeps."""
MADE_UP_DENSE = Evaluation(92.0, 0.3, 1000)
"""The dense model of made-up sweeps; its score is turned where less is better."""


def made_up_space(layers: int = 10, ranks: int = 8, formats: int = 3, timed: bool = False) -> SearchSpace:
    """Return a search space of made-up layers and formats whose costs are proportional to their rank.

    Parameters
    ----------
    layers, ranks, formats : int
        Sizes of the space; at most three formats.
    timed : bool
        Whether dense layers and candidates have a latency.
    """
    found = []
    for i in range(layers):
        channels, size = 16 * 2 ** (3 * i // layers), 32 // 2 ** (3 * i // layers)
        spec = LayerSpec(
            f"block{i // 2}.conv{i % 2}",
            "conv2d",
            (channels, channels, 3, 3),
            (1, 1),
            (1, 1),
            dilation=(1, 1),
            calls=(CallSize(1, (size, size), (size, size)),),
        )
        candidates = []
        for f, name in enumerate(_FORMATS[:formats]):
            for r in range(1, ranks + 1):
                kept = r / (ranks + 1) * (1.0 - 0.07 * f)
                cost = LayerCost(round(spec.macs * kept), round(spec.params * kept * (1.0 + 0.1 * f)))
                time = spec.macs / 1e6 * (0.1 + kept) if timed else None
                errors = _made_up_errors(i, layers, name, cost.macs / spec.macs)
                candidates.append(Candidate(Choice(name, (r,)), cost, time, errors))
        candidates.sort(key=lambda c: (c.cost.macs, c.cost.params, c.choice.format))
        tail = tuple((1.0 - r / channels) ** 3 for r in range(channels + 1))
        spectrum = Spectrum(tail, tail, (channels // 4, channels // 4))
        found.append(LayerCandidates(spec, tuple(candidates), spec.macs / 1e6 if timed else None, spectrum))
    macs = sum(layer.spec.macs for layer in found) + 1000
    params = sum(layer.spec.params for layer in found) + 100
    return SearchSpace(tuple(found), (), Cost(macs, params, 4 * params, macs / 1e6 if timed else None))


def _damage(i: int, layers: int, name: str, kept: float) -> float:
    """Return what a layer loses: more in some layers than in others, and less in the format that it likes."""
    weight = 0.15 + 1.2 * ((7 * i) % 10 / 10) ** 2
    misfit = 1.0 if _FORMATS.index(name) == i % len(_FORMATS) else 1.8
    return weight * misfit * (1.0 - kept) ** 2.5 * 8 / layers


def _made_up_errors(i: int, layers: int, name: str, kept: float) -> Errors:
    """Return a blurred view of the damage, as predictions are: layers are misjudged by up to a factor of two."""
    blur = 2.0 ** math.sin(12.9898 * (i + 1) + 78.233 * _FORMATS.index(name))
    output = min(0.95, (1.0 - kept) ** 1.25)
    return Errors(output, output, blur * _damage(i, layers, name, kept), 1.0)


def made_up_score(space: SearchSpace, plan: Plan) -> float:
    """Return a made-up accuracy: layers differ in what they lose, each likes another format, and losses compound.

    It falls from 92 for the dense model towards 10.
    """
    damage = 0.0
    choices = plan.choices
    for i, layer in enumerate(space.layers):
        choice = choices.get(layer.spec.name)
        if choice is not None:
            kept = layer.by_choice[choice].cost.macs / layer.spec.macs
            damage += _damage(i, len(space.layers), choice.format, kept)
    return 10.0 + 82.0 * math.exp(-0.5 * damage - 0.02 * damage**2)


def made_up_record(
    space: SearchSpace, proposal: Proposal, number: int, status: Status = "complete", sign: float = 1.0
) -> TrialRecord:
    """Return the record of a made-up trial; `sign` -1 turns the score into one of which less is better.

    A fine-tune wins a part of the loss back, and more of it when it starts from weights that were tuned already.
    """
    cost = space.cost(proposal.plan)
    target = proposal.fidelity or MADE_UP_FULL
    score = None
    if status != "failed":
        lost = 92.0 - made_up_score(space, proposal.plan)
        steps = 0 if status == "pruned" else target.steps
        won = 1.0 - 0.5 * min(1.0, steps / MADE_UP_FULL.steps) - (0.1 if proposal.parent else 0.0)
        score = sign * (92.0 - lost * won)
    return TrialRecord(
        number,
        proposal.plan,
        Fidelity(target.steps if status == "complete" else 0, target.batch_norm),
        status,
        score=score,
        cost=cost,
        kept=cost.kept(space.dense),
        reason="" if status == "complete" else "made up",
        target=target,
        pull=proposal.pull,
        probe=proposal.probe,
        want=proposal.want,
        measured=_made_up_measured(space, proposal) if status == "complete" else {},
    )


def _made_up_measured(space: SearchSpace, proposal: Proposal) -> dict[str, tuple[float, ...]]:
    if proposal.want == "distances":  # the pull brings the kernels nearer to what is cheap
        nearer = 1.0 / (1.0 + proposal.pull)
        return {
            layer.spec.name: tuple(nearer * c.errors.weight**2 if c.errors else 0.0 for c in layer.candidates)
            for layer in space.layers
        }
    if proposal.want == "spectra":
        return {layer.spec.name: (layer.spec.out_channels // 8, layer.spec.out_channels // 8) for layer in space.layers}
    return {}


def run(
    strategy: Strategy,
    space: SearchSpace,
    trials: int,
    workers: int = 1,
    sign: float = 1.0,
    fates: Mapping[int, Status] | None = None,
) -> list[TrialRecord]:
    """Run a strategy on the made-up problem, with `workers` proposals pending at a time, told in order.

    Parameters
    ----------
    fates : mapping, optional
        Number of a trial → its status; complete where nothing is said.
    """
    pending: list[tuple[Proposal, TrialRecord]] = []
    records: list[TrialRecord] = []
    points = asked = 0
    while points < trials and asked < 50 * trials:
        proposal = strategy.ask() if len(pending) < workers else WAIT
        if proposal is None:
            if not pending:
                break
            proposal = WAIT
        if isinstance(proposal, Proposal):
            status = (fates or {}).get(asked, "complete")
            pending.append((proposal, made_up_record(space, proposal, asked, status, sign)))
            asked += 1
            points += not proposal.probe
            continue
        assert pending, "the strategy waits although nothing is pending"
        answered, record = pending.pop(0)
        strategy.tell(answered, record)
        records.append(record)
    for answered, record in pending:
        strategy.tell(answered, record)
        records.append(record)
    return records


class StrategyContract:
    """What every strategy promises; the attributes say which strategy, with which options, and of which kind.

    Attributes
    ----------
    name : str
    options : mapping
    trials : int
        How many points are asked for where many are.
    exhaustive : bool
        Whether it goes on until every plan was proposed; a rule that has an end of its own says False.
    seeded : bool
        Whether another seed gives other proposals.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    trials: ClassVar[int] = 40
    exhaustive: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    def make(
        self,
        space: SearchSpace,
        objectives: tuple[Objective, ...] = TWO,
        constraints: tuple[Constraint, ...] = (),
        seed: int = 0,
    ) -> Strategy:
        """Build the strategy under test."""
        falling = any(o.name == "score" and o.direction == "min" for o in objectives)
        dense = replace(MADE_UP_DENSE, score=-MADE_UP_DENSE.score) if falling else MADE_UP_DENSE
        return strategies.make(
            self.name, space, objectives, constraints, seed, self.options, dense=dense, fidelity=MADE_UP_FULL
        )

    def test_proposals_are_plans_of_the_space_and_never_repeat(self) -> None:
        """Every plan names layers and candidates of the space, is not dense, and comes once."""
        space = made_up_space()
        records = run(self.make(space), space, self.trials)
        points = [record for record in records if not record.probe]
        assert len(points) == self.trials if self.exhaustive else 0 < len(points) <= self.trials
        assert _distinct(records)
        for record in records:
            assert record.plan.layers or record.pull or record.want
            for name, choice in record.plan.layers:
                assert choice in space.by_name[name].by_choice

    def test_same_calls_same_proposals(self) -> None:
        """The same seed and the same answers give the same proposals; another seed gives others."""
        space = made_up_space()
        fates: dict[int, Status] = {3: "failed", 7: "pruned", 20: "failed"}
        runs = [
            [r.plan for r in run(self.make(space, seed=seed), space, self.trials, workers, fates=fates)]
            for seed, workers in ((5, 1), (5, 1), (6, 1), (5, 4), (5, 4))
        ]
        assert runs[0] == runs[1]
        assert ([plan.layers for plan in runs[0]] != [plan.layers for plan in runs[2]]) == self.seeded
        assert runs[3] == runs[4]

    def test_cost_constraints_hold_for_every_proposal(self) -> None:
        """No point breaks a bound on a cost, neither one nor several, nor from both sides; probes may."""
        space = made_up_space(timed=True)
        for constraints in (
            (Constraint("macs_kept", "<=", 0.35),),
            (Constraint("macs_kept", "<=", 0.13),),
            (Constraint("macs_kept", "<=", 0.5), Constraint("params_kept", "<=", 0.3)),
            (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.45)),
            (Constraint("latency_kept", "<=", 0.5), Constraint("bytes_kept", "<=", 0.6)),
        ):
            records = [r for r in run(self.make(space, constraints=constraints), space, 25) if not r.probe]
            assert len(records) == 25 if self.exhaustive else len(records) <= 25, constraints
            for record in records:
                kept = space.cost(record.plan).kept(space.dense)
                assert all(c.violation(kept[c.name]) <= 0 for c in constraints), (constraints, kept)

    def test_unreachable_constraint_is_refused_with_the_best_reachable_value(self) -> None:
        """The constructor says what the space can reach."""
        space = made_up_space()
        cheapest = {layer.spec.name: layer.candidates[0].choice for layer in space.layers}
        lowest = space.cost(Plan.of(cheapest)).kept(space.dense)["macs_kept"]
        message = _error(lambda: self.make(space, constraints=(Constraint("macs_kept", "<=", lowest / 2),)))
        assert f"{lowest:.4g}" in message, message
        self.make(space, constraints=(Constraint("macs_kept", "<=", lowest),))

    def test_small_space_is_exhausted(self) -> None:
        """With every plan proposed once, the dense one excepted, there is nothing left, and it stays so."""
        for constraints in ((), (Constraint("macs_kept", "<=", 0.6),)):
            space = made_up_space(layers=2, ranks=2, formats=2)
            strategy = self.make(space, constraints=constraints)
            records = run(strategy, space, 1000)
            assert strategy.ask() is None
            assert strategy.ask() is None
            plans = {record.plan.layers for record in records if not record.probe}
            every = {plan.layers for plan in _all_plans(space, constraints) if plan.layers}
            assert plans == every if self.exhaustive else plans <= every
            assert _distinct(records)

    def test_single_layer(self) -> None:
        """A space of one layer is searched to its end."""
        space = made_up_space(layers=1, ranks=4, formats=1)
        points = [record for record in run(self.make(space), space, 100) if not record.probe]
        assert len(points) == 4 if self.exhaustive else 0 < len(points) <= 4

    def test_pending_proposals_may_stay_unanswered(self) -> None:
        """Many proposals may be pending, answered out of order, or never."""
        space = made_up_space()
        strategy, rng = self.make(space), Random(0)
        pending: list[tuple[int, Proposal]] = []
        seen = set()
        for number in range(60):
            proposal = strategy.ask()
            if not isinstance(proposal, Proposal):
                continue
            assert proposal not in seen
            seen.add(proposal)
            pending.append((number, proposal))
            rng.shuffle(pending)
            if len(pending) > 8:
                at, answered = pending.pop()
                strategy.tell(answered, made_up_record(space, answered, at))
        assert len(seen) >= (8 if self.exhaustive else 1)

    def test_failed_and_pruned_trials_change_nothing_for_the_worse(self) -> None:
        """With every other trial failed or pruned, or without a finite value, it goes on proposing new plans."""
        space = made_up_space()
        fates: dict[int, Status] = {n: "failed" if n % 4 else "pruned" for n in range(0, 60, 2)}
        records = run(self.make(space), space, 60, workers=3, fates=fates)
        assert _distinct(records)
        assert sum(not record.probe for record in records) == 60 or not self.exhaustive
        strategy = self.make(space)
        for number in range(25):
            proposal = strategy.ask()
            if proposal is None and not self.exhaustive:
                break
            assert isinstance(proposal, Proposal)
            record = made_up_record(space, proposal, number)
            broken = TrialRecord(number, record.plan, record.fidelity, "complete", math.nan, kept=record.kept)
            strategy.tell(proposal, broken)

    def test_all_failed(self) -> None:
        """A sweep in which everything fails still gets new plans, or comes to its end."""
        space = made_up_space()
        fates: dict[int, Status] = dict.fromkeys(range(2000), "failed")
        strategy = self.make(space)
        records = run(strategy, space, 40, fates=fates)
        assert _distinct(records)
        points = sum(not record.probe for record in records)
        assert points == 40 or (not self.exhaustive and strategy.ask() is None)

    def test_three_objectives_and_a_score_to_minimise(self) -> None:
        """Three axes and a score of which less is better work as well, and so does a bound on the score."""
        space = made_up_space()
        falling = (Objective("score", "min"), Objective("params_kept", "min"))
        bound = (Constraint("score", "<=", -60.0),)
        for strategy, sign in ((self.make(space, THREE), 1.0), (self.make(space, falling, bound), -1.0)):
            points = [r for r in run(strategy, space, self.trials, sign=sign) if not r.probe]
            assert len(points) == self.trials if self.exhaustive else 0 < len(points) <= self.trials

    def test_known_outcomes_are_not_proposed_again(self) -> None:
        """A plan told without being asked for is known; telling twice, or an unknown choice, breaks nothing."""
        space = made_up_space(layers=1, ranks=4, formats=1)
        strategy = self.make(space)
        known = Proposal(Plan.of({"block0.conv0": Choice("plain", (2,))}))
        for _ in range(2):
            strategy.tell(known, made_up_record(space, known, 0))
        odd = Plan.of({"block0.conv0": Choice("plain", (77,))})
        strategy.tell(Proposal(odd), TrialRecord(1, odd, Fidelity(), "failed", reason="made up"))
        plans = [record.plan for record in run(strategy, space, 10) if not record.probe]
        assert len(plans) == 3 if self.exhaustive else len(plans) <= 3
        assert known.plan.layers not in [plan.layers for plan in plans]

    def test_wrong_options_are_named(self) -> None:
        """An unknown option is refused with the list of those that there are."""
        space = made_up_space()
        message = _error(lambda: strategies.make(self.name, space, TWO, (), 0, {"no_such_option": 1}))
        assert "no_such_option" in message
        assert self.name in message


def _distinct(records: Sequence[TrialRecord]) -> bool:
    """Say whether no plan was proposed twice as a point."""
    points = [record.plan_id for record in records if not record.probe]
    return len(set(points)) == len(points)


def _error(call: Any) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    raise AssertionError("no ConfigError was raised")


def _all_plans(space: SearchSpace, constraints: Sequence[Constraint]) -> list[Plan]:
    """Return every plan that meets the constraints, by brute force."""
    plans: list[dict[str, Choice]] = [{}]
    for layer in space.layers:
        plans = [
            {**plan, **extra}
            for plan in plans
            for extra in ({}, *({layer.spec.name: candidate.choice} for candidate in layer.candidates))
        ]
    found = [Plan.of(plan) for plan in plans]
    return [
        plan for plan in found if all(c.violation(space.cost(plan).kept(space.dense)[c.name]) <= 0 for c in constraints)
    ]
