"""The default search: keeps the contract, starts from the predicted front, learns, and ends by itself."""

from dataclasses import replace

import numpy as np
import pytest

from autorank import strategies
from autorank.front import hypervolume, reference_point
from autorank.space import SearchSpace
from autorank.strategies import mckp
from autorank.strategies.tables import hull_front
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import Constraint, Evaluation, Fidelity, Objective, Plan, Proposal


class TestAuto(StrategyContract):
    name = "auto"
    options = {"patience": 0}  # noqa: RUF012
    exhaustive = True


class TestAutoWithRungs(StrategyContract):
    name = "auto"
    options = {"patience": 0, "rungs": 3, "sampler": "nsga2"}  # noqa: RUF012
    trials = 20
    exhaustive = True


def make(space, constraints=(), seed=0, objectives=TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL, **options):
    return strategies.make("auto", space, objectives, constraints, seed, options, dense=dense, fidelity=fidelity)


def volume(records):
    points = [(r.score, r.kept["macs_kept"]) for r in records if not r.probe]
    return hypervolume(points, reference_point(TWO, 92.0), [o.direction for o in TWO]) / 92.0


def bare(space):
    """The space as it is before any error was computed."""
    layers = tuple(
        replace(layer, candidates=tuple(replace(c, errors=None) for c in layer.candidates)) for layer in space.layers
    )
    return SearchSpace(layers, space.kept_dense, space.dense)


def test_twenty_evaluations_reach_what_nsga2_reaches_in_two_hundred():
    space = made_up_space()
    theirs = [
        volume(run(strategies.make("nsga2", space, TWO, (), seed, dense=MADE_UP_DENSE), space, 200)) for seed in (0, 1)
    ]
    ours = [volume(run(make(space, seed=seed), space, 20)) for seed in (0, 1)]
    assert min(ours) > max(theirs)


def test_it_learns_beyond_the_predicted_front():
    space = made_up_space()
    knapsack = run(strategies.make("knapsack", space, TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL), space, 40)
    assert volume(run(make(space, patience=0), space, 40)) > volume(knapsack) + 0.003


def test_it_ends_when_the_hypervolume_stalls_and_says_so():
    space = made_up_space(4)
    strategy = make(space, patience=8, tolerance=0.01)
    assert strategy.ended == ""
    records = run(strategy, space, 400)
    assert len(records) < 200
    assert strategy.ask() is None
    assert "hypervolume has grown by less than 1.00% in the last" in strategy.ended


def test_points_lie_within_the_constraint_and_spread_up_to_it():
    space = made_up_space()
    kept = [r.kept["macs_kept"] for r in run(make(space, (Constraint("macs_kept", "<=", 0.3),)), space, 16)]
    assert max(kept) <= 0.3
    assert max(kept) > 0.25
    assert min(kept) < 0.2


def test_rungs_ask_cheap_questions_first_and_promote_the_best():
    space = made_up_space()
    records = run(make(space, rungs=3, eta=3, patience=0), space, 16)
    steps = [r.target.steps for r in records]
    assert set(steps) == {0, MADE_UP_FULL.steps // 3, MADE_UP_FULL.steps}
    assert [r.probe for r in records] == [s < MADE_UP_FULL.steps for s in steps]
    assert len({(r.plan_id, r.target) for r in records}) == len(records)
    for low, high in ((0, MADE_UP_FULL.steps // 3), (MADE_UP_FULL.steps // 3, MADE_UP_FULL.steps)):
        below = [r.plan_id for r in records if r.target.steps == low]
        above = [r.plan_id for r in records if r.target.steps == high]
        promoted = [plan for plan in above if plan in below]
        assert 0 < len(promoted) <= len(below) // 3


def test_without_a_fine_tune_there_is_one_rung():
    space = made_up_space()
    records = run(make(space, fidelity=Fidelity(0), rungs=3), space, 16)
    assert not any(r.probe for r in records)


def test_without_errors_it_starts_from_uniform_plans():
    space = bare(made_up_space(6, formats=1))
    records = run(make(space), space, 20)
    ratios = [
        [
            space.by_name[name].by_choice[choice].cost.macs / space.by_name[name].spec.macs
            for name, choice in r.plan.layers
        ]
        for r in records[:3]
    ]
    assert all(max(own) - min(own) < 0.35 for own in ratios)
    assert len({r.plan_id for r in records}) == 20


@pytest.mark.parametrize(
    "objectives",
    [
        (TWO[0],),
        (Objective("score", "max"), Objective("params_kept", "min"), Objective("bytes_kept", "min")),
        (*TWO, Objective("macs_kept", "min")),
    ],
    ids=["score-alone", "two-costs-that-are-one", "the-same-twice"],
)
def test_odd_objectives_get_new_plans(objectives):
    space = made_up_space(5)
    assert len({r.plan_id for r in run(make(space, objectives=objectives), space, 20)}) == 20


@pytest.mark.parametrize("dense", [None, Evaluation(-92.0, 0.3)], ids=["unknown-dense", "turned-dense"])
def test_a_score_of_which_less_is_better_gives_the_same_search(dense):
    space = made_up_space()
    falling = (Objective("score", "min"), TWO[1])
    turned = run(make(space, objectives=falling, dense=dense), space, 20, sign=-1.0)
    same = run(make(space, dense=None if dense is None else MADE_UP_DENSE), space, 20)
    assert [r.plan for r in turned] == [r.plan for r in same]


def test_a_noisy_score_does_not_lead_astray():
    space = made_up_space()
    strategy, rng, plans = make(space, patience=0), np.random.default_rng(0), []
    for number in range(30):
        proposal = strategy.ask()
        record = made_up_record(space, proposal, number)
        plans.append(record)
        strategy.tell(proposal, replace(record, score=record.score + rng.normal(0.0, 2.0)))
    assert volume(plans) > 0.755


def test_what_is_known_beforehand_is_learned_from():
    space = made_up_space()
    told = make(space, patience=0)
    known = run(make(space, patience=0, seed=3), space, 20)
    for record in known:
        told.tell(Proposal(Plan.of(record.plan.choices)), record)
    new = run(told, space, 10)
    assert not {r.plan.layers for r in known} & {r.plan.layers for r in new}
    assert volume(known + new) > volume(known) + 0.002


def test_corners_of_the_hull_are_on_the_exact_front():
    rng = np.random.default_rng(0)
    costs, values = rng.uniform(0, 1, (5, 7)), rng.uniform(0, 1, (5, 7))
    sizes = [7, 3, 7, 1, 6]
    rows = [[table[i, :size].tolist() for i, size in enumerate(sizes)] for table in (costs, values)]
    exact = {s.indices for s in mckp.front([rows[0]], rows[1])}
    corners = [tuple(row) for row in hull_front(costs, values, sizes).tolist()]
    assert set(corners) <= exact
    assert len(corners) == len(set(corners)) > 5
    at = np.arange(5)
    assert (np.diff([costs[at, row].sum() for row in corners]) > 0).all()
