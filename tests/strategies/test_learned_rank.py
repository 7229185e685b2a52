"""Learned ranks: the compression step against brute force, the alternation step by step, failures and resume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from autorank import strategies
from autorank.space import SearchSpace
from autorank.strategies import WAIT
from autorank.strategies.hulls import compression_path
from autorank.strategies.learned_rank import LearnedRank
from autorank.testing.strategies import (
    MADE_UP_FULL,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import Constraint, Fidelity, Objective, Plan, Proposal, TrialRecord


class TestLearnedRank(StrategyContract):
    name = "learned-rank"
    exhaustive = False
    seeded = False


class TestHeldAlpha(StrategyContract):
    name = "learned-rank"
    options = {"hold": "alpha", "iterations": 2}  # noqa: RUF012
    exhaustive = False
    seeded = False


def make(space: SearchSpace, fidelity: Fidelity = MADE_UP_FULL, constraints=(), objectives=TWO, **options):
    return strategies.make("learned-rank", space, objectives, constraints, 0, options, fidelity=fidelity)


def random_tables(seed: int, layers: int = 3, indices: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    costs, distances = rng.integers(1, 12, (layers, indices)) / 12, rng.integers(1, 12, (layers, indices)) / 5
    costs[:, 0], distances[:, 0] = 1.0, 0.0
    distances[1, 2] = math.inf
    return costs, distances


def distances_of(strategy: LearnedRank, space: SearchSpace, scale: Mapping[str, float] | None = None) -> dict:
    """Return what a probe measures: the squared errors of the candidates, each layer's on a scale of its own."""
    return {
        layer.spec.name: tuple((scale or {}).get(layer.spec.name, 1.0) * c.errors.weight**2 for c in layer.candidates)
        for layer in space.layers
    }


def answered(space: SearchSpace, proposal: Proposal, number: int, measured: Mapping) -> TrialRecord:
    return replace(made_up_record(space, proposal, number), measured=measured if proposal.want else {})


@pytest.mark.parametrize("seed", range(6))
def test_the_path_holds_the_compression_step_of_every_exchange_rate(seed):
    costs, distances = random_tables(seed)
    path = compression_path(costs, distances)
    vectors = {step.vector for step in path}
    plans = list(itertools.product(*(range(costs.shape[1]) for _ in costs)))
    total = {
        p: (sum(costs[i, k] for i, k in enumerate(p)), sum(distances[i, k] for i, k in enumerate(p))) for p in plans
    }
    for rate in np.geomspace(0.01, 100, 60):
        best = min(rate * cost + distance for cost, distance in total.values())
        assert min(rate * total[v][0] + total[v][1] for v in vectors) == pytest.approx(best)
    assert [step.share for step in path] == pytest.approx([total[step.vector][0] for step in path])
    assert all(a.share < b.share and a.rate >= b.rate for a, b in itertools.pairwise(path))
    assert path[-1].share <= len(costs) + 1e-9
    assert total[path[-1].vector][1] == 0.0


def test_one_budget_step_by_step():
    space = made_up_space(4)
    strategy = make(space, points=1, iterations=3, steps=0.5, mu=0.1, growth=4.0)
    first = strategy.ask()
    assert (first.plan.layers, first.fidelity, first.pull) == ((), Fidelity(0, False), 0.0)
    assert (first.probe, first.want) == (True, "distances")
    assert strategy.ask() is WAIT
    strategy.tell(first, answered(space, first, 0, distances_of(strategy, space)))
    parent = None
    for number, pull in enumerate((0.1, 0.4, 1.6), start=1):
        proposal = strategy.ask()
        assert proposal.pull == pytest.approx(pull)
        assert proposal.fidelity == Fidelity(50, MADE_UP_FULL.batch_norm)
        assert (proposal.parent, proposal.probe, proposal.want) == (parent, True, "distances")
        assert strategy.ask() is WAIT
        parent = proposal
        strategy.tell(proposal, answered(space, proposal, number, distances_of(strategy, space)))
    last = strategy.ask()
    assert (last.parent, last.pull, last.probe, last.want, last.fidelity) == (parent, 0.0, False, "", None)
    assert last.plan == parent.plan  # nothing moved, so the choice is the same
    assert strategy.ask() is None
    assert "1 points" in strategy.ended
    strategy.tell(last, made_up_record(space, last, 9))
    assert strategy.ask() is None


def test_each_choice_minimises_the_distance_of_what_was_measured_last():
    """A layer whose weights moved towards low rank gets cheaper, the others share what it sets free."""
    space = made_up_space(3, ranks=4, formats=1)
    strategy = make(space, points=1, iterations=1)
    first = strategy.ask()
    strategy.tell(first, answered(space, first, 0, distances_of(strategy, space)))
    pulled = strategy.ask()
    near = space.layers[1].spec.name
    strategy.tell(pulled, answered(space, pulled, 1, distances_of(strategy, space, {near: 1e-3})))
    last = strategy.ask()
    macs = [_macs(space, plan) for plan in (pulled.plan, last.plan)]
    assert macs[1][1] < macs[0][1]
    assert macs[1][0] + macs[1][2] > macs[0][0] + macs[0][2]
    assert sum(macs[1]) <= sum(macs[0]) * 1.2
    # By brute force: no plan on the lower convex hull within the budget is nearer.
    costs, near_errors = strategy._costs, strategy._chains[0].distances
    vector = strategy.catalog.vector(last.plan)
    value = sum(near_errors[i, k] for i, k in enumerate(vector))
    inside = [
        s
        for s in compression_path(costs, near_errors)
        if s.share + strategy._outside <= 0.5 * (1 + strategy.catalog.low)
    ]
    assert value == pytest.approx(min(sum(near_errors[i, k] for i, k in enumerate(s.vector)) for s in inside))


def test_a_held_alpha_gives_the_choice_of_the_paper():
    space = made_up_space(3)
    strategy = make(space, points=1, iterations=2, mu=0.3, growth=5.0, hold="alpha")
    first = strategy.ask()
    strategy.tell(first, answered(space, first, 0, distances_of(strategy, space)))
    plans = []
    for number, (mu, scale) in enumerate([(0.3, 0.7), (1.5, 0.1)], start=1):
        proposal = strategy.ask()
        assert proposal.pull == pytest.approx(mu)
        name = space.layers[0].spec.name
        measured = distances_of(strategy, space, {name: scale})
        strategy.tell(proposal, answered(space, proposal, number, measured))
        alpha = strategy._chains[0].alpha
        expected = {}
        for layer in space.layers:
            share = layer.spec.macs / space.dense.macs
            best, choice = alpha * share, None
            for candidate, distance in zip(layer.candidates, measured[layer.spec.name], strict=True):
                value = alpha * candidate.cost.macs / space.dense.macs + mu / 2 * distance
                if value < best:
                    best, choice = value, candidate.choice
            if choice is not None:
                expected[layer.spec.name] = choice
        plans.append(Plan.of(expected))
        assert strategy.catalog.plan(strategy._chains[0].vector) == plans[-1]
    assert strategy.ask().plan == plans[-1]
    # A stronger pull with the same α costs more.
    assert space.cost(plans[1]).macs > space.cost(plans[0]).macs


def test_budgets_are_spread_and_met():
    space = made_up_space(20)
    records = [r for r in run(make(space, points=7), space, 100) if not r.probe]
    kept = [r.kept["macs_kept"] for r in records]
    assert len(kept) == 7
    ends = sorted([_lowest(space), 1.0, *kept])
    assert max(b - a for a, b in itertools.pairwise(ends)) < 0.2
    assert abs(kept[0] - 0.55) < 0.1
    bounded = run(make(space, points=4, constraints=(Constraint("macs_kept", "<=", 0.5),)), space, 50)
    assert bounded[-1].kept["macs_kept"] <= 0.5
    first = next(r for r in bounded if not r.probe)
    assert first.kept["macs_kept"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("hold", ["share", "alpha"])
@pytest.mark.parametrize(
    "constraints",
    [
        (Constraint("params_kept", "<=", 0.3),),
        (Constraint("macs_kept", "<=", 0.5), Constraint("latency_kept", "<=", 0.45)),
        (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.45)),
    ],
    ids=lambda bounds: ", ".join(map(str, bounds)),
)
def test_every_choice_meets_the_constraints_trainings_included(constraints, hold):
    space = made_up_space(timed=True)
    records = run(make(space, constraints=constraints, points=6, hold=hold), space, 20)
    assert sum(not r.probe for r in records) >= 2
    for record in records[1:]:
        assert all(c.violation(record.kept[c.name]) <= 0 for c in constraints)


def test_alternations_run_in_parallel_and_what_was_begun_is_ended_first():
    space = made_up_space()
    strategy = make(space, points=3, iterations=2)
    first = strategy.ask()
    strategy.tell(first, made_up_record(space, first, 0))
    begun = [strategy.ask() for _ in range(3)]
    assert len({p.plan for p in begun}) == 3
    assert all(p.parent is None and p.pull for p in begun)
    assert strategy.ask() is WAIT
    strategy.tell(begun[1], made_up_record(space, begun[1], 1))
    assert strategy.ask().parent == begun[1]
    alone = [r.probe for r in run(make(space, points=3, iterations=2), space, 100)]
    assert alone == [True, *[True, True, False] * 3]


def test_a_failed_training_ends_its_own_alternation_only():
    space = made_up_space()
    whole = run(make(space, points=4, iterations=2), space, 100)
    records = run(make(space, points=4, iterations=2), space, 100, fates={5: "failed"})
    points = [r.plan for r in records if not r.probe]
    assert points == [r.plan for r in whole if not r.probe][:1] + [r.plan for r in whole if not r.probe][2:]
    strategy = make(space, points=2, iterations=2)
    run(strategy, space, 100, fates=dict.fromkeys(range(1, 10), "failed"))
    assert strategy.ask() is None
    assert "2 alternations ended early, as a training failed" in strategy.ended


def test_a_training_that_measured_too_little_ends_its_alternation():
    space = made_up_space(2)
    strategy = make(space, points=1, iterations=2)
    first = strategy.ask()
    strategy.tell(first, made_up_record(space, first, 0))
    pulled = strategy.ask()
    short = {layer.spec.name: (0.1,) for layer in space.layers}
    strategy.tell(pulled, answered(space, pulled, 1, short))
    assert strategy.ask() is None


def test_without_the_first_distances_relative_errors_stand_in():
    space = made_up_space()
    with_them = run(make(space, points=3), space, 100)
    without = run(make(space, points=3), space, 100, fates={0: "failed"})
    # The made-up distances are the squared relative errors.
    assert [r.plan for r in with_them] == [r.plan for r in without]


@pytest.mark.parametrize(("fidelity", "options"), [(Fidelity(0), {}), (MADE_UP_FULL, {"steps": 0.0})])
def test_without_training_the_choice_is_proposed_at_once(fidelity, options):
    space = made_up_space()
    records = run(make(space, fidelity, points=5, **options), space, 100)
    assert [r.probe for r in records] == [True, *[False] * 5]
    assert all(r.pull == 0 for r in records)


def test_a_single_layer_and_points_without_end():
    space = made_up_space(layers=1, ranks=4, formats=1)
    records = run(make(space, points=1000), space, 100)
    points = [r.plan for r in records if not r.probe]
    assert 2 <= len(points) == len(set(points)) <= 4


def test_chains_that_meet_end_in_different_points():
    """When training makes all budgets choose the same plan, the next on the way is proposed in its place."""
    space = made_up_space(layers=2, ranks=6, formats=1)
    strategy = make(space, points=5, iterations=1, hold="alpha")
    number, points = 0, []
    while (proposal := strategy.ask()) is not None:
        flat = {layer.spec.name: tuple(1e-6 * c.errors.weight**2 for c in layer.candidates) for layer in space.layers}
        measured = flat if proposal.pull else distances_of(strategy, space)
        strategy.tell(proposal, answered(space, proposal, number, measured))
        points += [proposal.plan] if not proposal.probe else []
        number += 1
    assert len(points) == len(set(points)) == len(strategy._chains) >= 3


@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_direction_of_the_score_does_not_matter(direction):
    space = made_up_space()
    plans = [r.plan for r in run(make(space, points=4), space, 100)]
    sign = 1.0 if direction == "max" else -1.0
    other = run(make(space, objectives=(Objective("score", direction), TWO[1]), points=4), space, 100, sign=sign)
    assert [r.plan for r in other] == plans


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_replayed_beginning_goes_on_as_if_nothing_had_happened(stop):
    space = made_up_space()
    whole = make(space, points=4, iterations=2)
    history, number = [], 0
    while (proposal := whole.ask()) is not None:
        record = made_up_record(space, proposal, number)
        history.append((proposal, record))
        whole.tell(proposal, record)
        number += 1
    again = make(space, points=4, iterations=2)
    for proposal, record in history[:stop]:
        assert again.ask() == proposal
        again.tell(proposal, record)
    for proposal, record in history[stop:]:
        assert again.ask() == proposal
        again.tell(proposal, record)
    assert again.ask() is None


def test_known_plans_are_not_proposed_and_candidates_without_errors_not_chosen():
    space = made_up_space(2, ranks=3, formats=1)
    lost = space.layers[0].candidates[0]
    bare = replace(space.layers[0], candidates=(replace(lost, errors=None), *space.layers[0].candidates[1:]))
    space = SearchSpace((bare, space.layers[1]), (), space.dense)
    strategy = make(space, points=3)
    first = strategy.ask()
    strategy.tell(first, made_up_record(space, first, 0, "failed"))
    assert not any(
        vector[0] == 1 for vector in (step.vector for step in compression_path(strategy._costs, strategy._distances))
    )
    known = Proposal(strategy.catalog.plan((2, 2)))
    strategy.tell(known, made_up_record(space, known, 1))
    assert not strategy._is_new((2, 2))


def _macs(space: SearchSpace, plan: Plan) -> list[int]:
    return [
        layer.by_choice[plan.choices[layer.spec.name]].cost.macs if layer.spec.name in plan.choices else layer.spec.macs
        for layer in space.layers
    ]


def _lowest(space: SearchSpace) -> float:
    cheapest = {layer.spec.name: layer.candidates[0].choice for layer in space.layers}
    return space.cost(Plan.of(cheapest)).kept(space.dense)["macs_kept"]
