import math
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autorank import strategies
from autorank.strategies import WAIT
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_score,
    made_up_space,
    run,
)
from autorank.types import Constraint, Fidelity, Objective, Plan, Proposal, TrialRecord

PURE = {"stride": 1, "tries": 0, "interval": 0, "budget": 0.0, "epsilon": 1e9}
"""One move a step, all moves probed at every step, and never a start from fine-tuned weights."""


class TestGreedyMultiStep(StrategyContract):
    name = "greedy-multi-step"
    exhaustive = False
    seeded = False


def make(space, options=None, constraints=(), objectives=TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL):
    return strategies.make(
        "greedy-multi-step", space, objectives, constraints, 0, options or {}, dense=dense, fidelity=fidelity
    )


def played(strategy, score, limit=2000):
    """Everything that is asked until the end or the limit, answered one by one with the score of the plan."""
    asked = []
    while len(asked) < limit and (proposal := strategy.ask()) is not None:
        assert isinstance(proposal, Proposal)
        asked.append(proposal)
        strategy.tell(proposal, record_of(proposal, score(proposal.plan)))
    return asked


def record_of(proposal, score, status="complete"):
    return TrialRecord(0, proposal.plan, proposal.fidelity or MADE_UP_FULL, status, score=score)


def points_of(asked):
    return [p.plan for p in asked if not p.probe]


def macs(space, plan):
    return space.cost(plan).macs


def greedy_path(space, score, steps):
    """The rule, word for word, on plans alone: the next cheaper rank of each format of each layer, and the best one."""
    plan, path = Plan(), []
    for _ in range(steps):
        options = []
        for layer in space.layers:
            now = plan.choices.get(layer.spec.name)
            cost = layer.by_choice[now].cost.macs if now else layer.spec.macs
            for form in sorted({c.choice.format for c in layer.candidates}):
                below = [c for c in layer.candidates if c.choice.format == form and c.cost.macs < cost]
                if below:
                    best = max(below, key=lambda c: c.cost.macs)
                    moved = Plan.of({**plan.choices, layer.spec.name: best.choice})
                    options.append((max(score(plan) - score(moved), 0.0) / (cost - best.cost.macs), moved))
        if not options:
            break
        plan = min(options, key=lambda option: option[0])[1]
        path.append(plan)
    return path


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_one_move_at_a_time_is_the_exhaustive_definition(layers):
    space = made_up_space(layers, ranks=5)

    def score(plan):
        return made_up_score(space, plan)

    found = points_of(played(make(space, PURE), score))
    assert found == greedy_path(space, score, 1000)
    assert found[-1] == Plan.of({layer.spec.name: layer.candidates[0].choice for layer in space.layers})


def test_what_costs_no_score_goes_by_its_saving():
    """Noise that lets a plan look better than dense must not make small savings attractive."""
    space = made_up_space(6)
    first = points_of(played(make(space, {**PURE, "budget": 0.9}), lambda plan: 92.0 + Random(plan.plan_id).random()))[
        0
    ]
    largest = max(
        macs(space, Plan()) - macs(space, Plan.of({layer.spec.name: c.choice}))
        for layer in space.layers
        for form in ("plain", "wide", "tall")
        for c in [[c for c in layer.candidates if c.choice.format == form][-1]]
    )
    assert macs(space, Plan()) - macs(space, first) == largest


def test_points_descend_at_full_fidelity_and_probes_differ_by_one_layer():
    space = made_up_space()
    asked = played(make(space), lambda plan: made_up_score(space, plan))
    points = [p for p in asked if not p.probe]
    assert all(p.fidelity is None for p in points)
    assert all(p.fidelity == Fidelity(0) for p in asked if p.probe)
    costs = [macs(space, p.plan) for p in points]
    assert all(a > b for a, b in pairwise(costs))
    base = Plan()
    for proposal in asked:
        if not proposal.probe:
            base = proposal.plan
            continue
        changed = set(proposal.plan.layers) ^ set(base.layers)
        assert len({name for name, _ in changed}) <= 1


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_restored_points_are_the_parents_of_what_follows(interval):
    space = made_up_space()
    strategy = make(space, {"interval": interval})
    parent, points, parents = None, 0, 0
    for number in range(300):
        proposal = strategy.ask()
        if proposal is None:
            break
        assert isinstance(proposal, Proposal)
        assert proposal.parent is parent
        parents += proposal.parent is not None
        if not proposal.probe:
            points += 1
            if points % interval == 0:
                assert strategy.ask() is WAIT
                parent = proposal
        strategy.tell(proposal, made_up_record(space, proposal, number))
    assert parents > 100


def test_between_restored_points_nothing_waits_for_a_fine_tune():
    space = made_up_space(4)
    strategy = make(space, {"interval": 3})
    held = []
    while len(held) < 3:
        proposal = strategy.ask()
        assert isinstance(proposal, Proposal)
        if proposal.probe:
            strategy.tell(proposal, made_up_record(space, proposal, 0))
        else:
            held.append(proposal)
    assert strategy.ask() is WAIT
    for proposal in held:
        strategy.tell(proposal, made_up_record(space, proposal, 0))
    assert strategy.ask().parent is held[-1]


@pytest.mark.parametrize("fate", ["failed", "pruned"])
def test_a_restored_point_that_fails_is_no_parent(fate):
    space = made_up_space(4)
    strategy = make(space, {"interval": 1})
    points = 0
    while points < 4:
        proposal = strategy.ask()
        assert proposal.parent is None
        points += not proposal.probe
        status = "complete" if proposal.probe else fate
        strategy.tell(proposal, made_up_record(space, proposal, 0, status))


def test_without_a_fine_tune_nothing_is_restored():
    space = made_up_space(4)
    strategy = make(space, {"interval": 1}, fidelity=Fidelity(0))
    asked = played(strategy, lambda plan: made_up_score(space, plan))
    assert all(p.parent is None for p in asked)
    # The point tells what the new state scores, so no probe asks for it again.
    points = set()
    for proposal in asked:
        assert proposal.plan not in points
        if not proposal.probe:
            points.add(proposal.plan)


def test_default_reaches_a_fifth_of_the_macs_in_about_forty_points():
    space = made_up_space(19, ranks=9)
    records = run(make(space), space, 60, workers=4)
    points = [r for r in records if not r.probe]
    assert 30 <= len(points) <= 42
    assert points[-1].kept["macs_kept"] <= 0.2 < points[-2].kept["macs_kept"]
    assert len(records) < 60 * 19


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_ends_at_the_budget(budget):
    space = made_up_space()
    strategy = make(space, {"budget": budget, "stride": 1})
    kept = [r.kept["macs_kept"] for r in run(strategy, space, 1000) if not r.probe]
    assert kept[-1] <= budget < kept[-2]
    assert strategy.ask() is None
    assert f"budget={budget}: reached" in strategy.ended


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ends_when_a_point_has_lost_too_much(sign):
    space = made_up_space()
    objectives = (Objective("score", "max" if sign > 0 else "min"), TWO[1])
    strategy = make(space, {"epsilon": 2.0}, objectives=objectives, dense=replace(MADE_UP_DENSE, score=92.0 * sign))
    points = [r for r in run(strategy, space, 1000, sign=sign) if not r.probe]
    lost = [92.0 - sign * r.score for r in points]
    assert lost[-1] > 2.0
    assert all(drop <= 2.0 for drop in lost[:-1])
    assert "more than epsilon=2" in strategy.ended


def test_less_may_be_better():
    space = made_up_space(5)
    falling = (Objective("score", "min"), TWO[1])
    turned = make(space, objectives=falling, dense=replace(MADE_UP_DENSE, score=-92.0))
    there = run(turned, space, 30, sign=-1.0)
    assert [(r.plan, r.probe) for r in there] == [(r.plan, r.probe) for r in run(make(space), space, 30)]


def test_without_a_dense_score_it_goes_on():
    space = made_up_space(5)
    known = [r.plan for r in run(make(space), space, 20) if not r.probe]
    unknown = [r.plan for r in run(make(space, dense=None), space, 20) if not r.probe]
    assert len(unknown) == len(known) == 20


def test_tries_bound_the_probes_of_a_step():
    space = made_up_space(12)

    def score(plan):
        return made_up_score(space, plan)

    steps, last = [], 0
    asked = played(make(space, {"tries": 4, "stride": 2, "interval": 0}), score)
    for number, proposal in enumerate(asked):
        if not proposal.probe:
            steps.append(number - last)
            last = number + 1
    assert steps[0] == 12 * 3  # every ladder once
    assert max(steps[1:]) <= 4 + 2 + 1  # those of the last moves, and the state itself


def test_few_tries_come_near_to_all():
    space = made_up_space(12)

    def score(plan):
        return made_up_score(space, plan)

    ends = {}
    for tries in (0, 6):
        asked = played(make(space, {**PURE, "tries": tries, "budget": 0.4}), score, limit=10_000)
        ends[tries] = (score(points_of(asked)[-1]), sum(p.probe for p in asked))
    assert ends[6][0] >= ends[0][0] - 1.0
    assert ends[6][1] < 0.5 * ends[0][1]


@pytest.mark.parametrize("stride", [1, 3])
def test_stride_moves_as_many_layers(stride):
    space = made_up_space(9)
    base = Plan()
    for plan in points_of(played(make(space, {"stride": stride, "budget": 0.5}), lambda p: made_up_score(space, p)))[
        :-1
    ]:
        changed = {name for name, _ in set(plan.layers) ^ set(base.layers)}
        assert len(changed) == stride
        base = plan


@pytest.mark.parametrize("broken", ["failed", "pruned", "nan"])
def test_broken_probes_are_not_taken(broken):
    space = made_up_space(5)
    strategy = make(space, {"budget": 0.3})
    points = []
    while (proposal := strategy.ask()) is not None:
        record = made_up_record(space, proposal, 0)
        if proposal.probe and any(choice.format == "wide" for choice in proposal.plan.choices.values()):
            score = math.nan if broken == "nan" else record.score
            record = replace(record, status="complete" if broken == "nan" else broken, score=score)
        if not proposal.probe:
            points.append(proposal.plan)
        strategy.tell(proposal, record)
    assert points
    assert all(choice.format != "wide" for plan in points for choice in plan.choices.values())


def test_all_failed_is_said():
    space = made_up_space(3, ranks=2)
    strategy = make(space)
    records = run(strategy, space, 10, fates=dict.fromkeys(range(1000), "failed"))
    assert all(r.probe for r in records)
    assert len(records) == sum(len(layer.candidates) for layer in space.layers)
    assert strategy.ask() is None
    assert strategy.ended == "no probe of a move has a score"


def test_what_another_sweep_has_probed_is_not_asked_again():
    space = made_up_space(6)
    first = played(make(space), lambda plan: made_up_score(space, plan))
    from_dense = [p for p in first if p.probe and p.parent is None]
    other = make(space, {"budget": 0.5, "stride": 2})
    for proposal in from_dense:
        other.tell(proposal, record_of(proposal, made_up_score(space, proposal.plan)))
    asked = played(other, lambda plan: made_up_score(space, plan))
    assert not asked[0].probe
    again = {p.plan for p in asked if p.probe and p.parent is None} & {p.plan for p in from_dense}
    assert not again


def test_a_state_that_is_known_beforehand_is_passed_without_a_point():
    space = made_up_space(4)

    def score(plan):
        return made_up_score(space, plan)

    first = points_of(played(make(space, PURE), score))
    strategy = make(space, PURE)
    strategy.tell(Proposal(first[1]), record_of(Proposal(first[1]), 90.0))
    assert points_of(played(strategy, score)) == [first[0], *first[2:]]


@pytest.mark.parametrize(
    "constraints",
    [
        (Constraint("macs_kept", "<=", 0.5),),
        (Constraint("macs_kept", "<=", 0.12),),
        (Constraint("macs_kept", ">=", 0.6),),
        (Constraint("params_kept", "<=", 0.15),),
        (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.45)),
    ],
    ids=lambda constraints: " ".join(map(str, constraints)),
)
def test_points_are_within_the_constraints_and_there_are_some(constraints):
    space = made_up_space()
    strategy = make(space, constraints=constraints)
    points = [r for r in run(strategy, space, 1000) if not r.probe]
    assert points
    for record in points:
        assert all(c.violation(record.kept[c.name]) <= 0 for c in constraints)
    assert strategy.ask() is None
    assert strategy.ended


@pytest.mark.parametrize("workers", [1, 4])
def test_replaying_the_outcomes_gives_the_same_proposals(workers):
    space = made_up_space(7)

    def proposals():
        strategy, asked, pending = make(space), [], []
        while True:
            proposal = strategy.ask() if len(pending) < workers else WAIT
            if isinstance(proposal, Proposal):
                pending.append(proposal)
                asked.append(proposal)
            elif pending:
                strategy.tell(pending[0], made_up_record(space, pending.pop(0), 0))
            else:
                return asked

    first = proposals()
    assert first == proposals()
    assert len(set(first)) == len(first)


def test_noise_breaks_nothing():
    space = made_up_space(8)
    rng = Random(5)
    strategy = make(space, {"epsilon": 1000.0})
    points = points_of(played(strategy, lambda plan: made_up_score(space, plan) + rng.gauss(0.0, 3.0)))
    assert len(points) > 20
    assert macs(space, points[-1]) <= 0.2 * macs(space, Plan())
