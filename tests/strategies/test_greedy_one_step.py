import math
from dataclasses import replace
from random import Random

import pytest

from autorank import strategies
from autorank.space import Candidate, LayerCandidates, SearchSpace
from autorank.strategies import WAIT
from autorank.strategies.greedy import next_rung, spread_order
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import Choice, Constraint, Fidelity, Objective, Plan, Proposal, TrialRecord


class TestGreedyOneStep(StrategyContract):
    name = "greedy-one-step"
    exhaustive = False
    seeded = False


def make(space, options=None, constraints=(), objectives=TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL):
    return strategies.make(
        "greedy-one-step", space, objectives, constraints, 0, options or {}, dense=dense, fidelity=fidelity
    )


def rough_drops(space, seed, monotone):
    """What each candidate loses alone: along each ladder falling with the cost, or with no order at all."""
    rng = Random(seed)
    drops = {}
    for layer in space.layers:
        for form in sorted({c.choice.format for c in layer.candidates}):
            own = [c for c in layer.candidates if c.choice.format == form]
            losses = [rng.expovariate(0.5) - 0.2 for _ in own]
            for candidate, loss in zip(own, sorted(losses, reverse=True) if monotone else losses, strict=True):
                drops[layer.spec.name, candidate.choice] = loss
    return drops


def answer(space, drops, proposal, number=0, sign=1.0):
    """A record whose score is the dense one less the drops of the layers."""
    score = sign * (92.0 - sum(drops[item] for item in proposal.plan.layers))
    cost = space.cost(proposal.plan)
    fidelity = proposal.fidelity or MADE_UP_FULL
    return TrialRecord(number, proposal.plan, fidelity, "complete", score, cost=cost, kept=cost.kept(space.dense))


def played(strategy, space, drops, workers=1, sign=1.0):
    """Everything that is asked until the end, told in order."""
    asked, pending = [], []
    while True:
        proposal = strategy.ask() if len(pending) < workers else WAIT
        if isinstance(proposal, Proposal):
            asked.append(proposal)
            pending.append(proposal)
        elif pending:
            strategy.tell(pending[0], answer(space, drops, pending.pop(0), sign=sign))
        else:
            assert proposal is None
            return asked


def cheapest(space, drops, epsilon):
    """The definition, word for word: per layer the cheapest candidate that loses at most epsilon, if any does."""
    plan = {}
    for layer in space.layers:
        fit = [c for c in layer.candidates if drops[layer.spec.name, c.choice] <= epsilon]
        if fit:
            best = min(fit, key=lambda c: (c.cost.macs, drops[layer.spec.name, c.choice]))
            plan[layer.spec.name] = best.choice
    return Plan.of(plan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("scan", "monotone"), [("all", False), ("all", True), ("bisection", True)])
def test_every_plan_is_the_exhaustive_definition(seed, scan, monotone):
    space = made_up_space(layers=5, ranks=9)
    drops = rough_drops(space, seed, monotone)
    options = {"epsilon": 3.0, "targets": 5, "ratio": 0.5, "scan": scan}
    points = [p.plan for p in played(make(space, options), space, drops) if not p.probe]
    wanted = [cheapest(space, drops, 3.0 * 0.5**n) for n in range(6)]
    assert points[0] == wanted[0]
    assert {p.plan_id for p in points} == {p.plan_id for p in wanted if p.layers}


def test_pairs_of_ranks_are_searched_like_any_grid():
    """Tucker-2's (R_out, R_in) pairs, with its true costs."""
    from autorank import formats

    base = made_up_space(layers=3).layers
    grid = [(a, b) for a in (2, 4, 8, 12) for b in (2, 4, 8, 12)]
    layers = []
    for layer in base:
        costs = {rank: formats.get("tucker2").cost(layer.spec, rank, ()) for rank in grid}
        found = sorted((Candidate(Choice("tucker2", r), cost) for r, cost in costs.items()), key=lambda c: c.cost.macs)
        layers.append(LayerCandidates(layer.spec, tuple(found)))
    space = SearchSpace(tuple(layers), (), made_up_space(layers=3).dense)
    drops = {
        (layer.spec.name, c.choice): 9.0 / c.choice.rank[0] + (5.0 + i) / c.choice.rank[1]
        for i, layer in enumerate(layers)
        for c in layer.candidates
    }
    (point,) = [
        p for p in played(make(space, {"epsilon": 2.0, "targets": 0, "scan": "all"}), space, drops) if not p.probe
    ]
    assert point.plan == cheapest(space, drops, 2.0)
    assert len({choice.rank for choice in point.plan.choices.values()}) > 1


def test_probes_are_single_layers_at_the_cheap_fidelity():
    space = made_up_space()
    never = Fidelity(0, False)
    for full, probe, cheap in (
        (Fidelity(100), "bn", Fidelity(0)),
        (Fidelity(100, False), "bn", never),
        (Fidelity(100), "decompose", never),
    ):
        asked = played(make(space, {"targets": 2, "probe": probe}, fidelity=full), space, rough_drops(space, 0, True))
        assert all(p.fidelity == cheap and len(p.plan.layers) == 1 for p in asked if p.probe)
        assert all(p.fidelity is None and p.parent is None for p in asked if not p.probe)


def test_bisection_probes_fewer():
    space = made_up_space(layers=6, ranks=16)
    drops = rough_drops(space, 1, True)
    count = {
        scan: sum(p.probe for p in played(make(space, {"targets": 0, "scan": scan}), space, drops))
        for scan in ("all", "bisection")
    }
    assert count["all"] == 6 * 3 * 16
    assert count["bisection"] <= 6 * 3 * 5


@pytest.mark.parametrize("scan", ["all", "bisection"])
def test_independent_probes_do_not_wait_for_each_other(scan):
    strategy = make(made_up_space(layers=7), {"scan": scan})
    first = [strategy.ask() for _ in range(7 * 3)]
    assert all(isinstance(p, Proposal) and p.probe for p in first)
    assert len({p.plan for p in first}) == 21
    # Layers before ladders: what one format of a layer tells may spare probes of the others.
    if scan == "bisection":
        assert len({p.plan.layers[0][0] for p in first[:7]}) == 7


@pytest.mark.parametrize("scan", ["all", "bisection"])
def test_a_further_target_costs_only_its_plan(scan):
    space = made_up_space()
    drops = rough_drops(space, 2, True)
    asked = played(make(space, {"targets": 4, "scan": scan}), space, drops)
    probes = [p for p in asked if p.probe]
    assert len({p.plan for p in probes}) == len(probes)
    second = make(space, {"targets": 4, "scan": scan})
    for proposal in probes:
        second.tell(proposal, answer(space, drops, proposal))
    assert [p for p in played(second, space, drops) if p.probe] == []
    if scan == "all":
        other = make(space, {"epsilon": 2.5, "targets": 0, "scan": scan})
        for proposal in probes:
            other.tell(proposal, answer(space, drops, proposal))
        (point,) = played(other, space, drops)
        assert point.plan == cheapest(space, drops, 2.5)


def test_the_score_on_the_way_to_a_fine_tune_counts_as_a_probe():
    space = made_up_space(layers=1, ranks=2, formats=1)
    strategy = make(space, {"epsilon": 1.0, "targets": 0})
    harsh, mild = (Plan.of({"block0.conv0": c.choice}) for c in space.layers[0].candidates)
    for plan, early in ((harsh, 80.0), (mild, 91.5)):
        done = TrialRecord(0, plan, MADE_UP_FULL, "complete", 91.9, 3.0, early)
        strategy.tell(Proposal(plan), done)
    # The mild plan would be the answer, and is known already.
    assert strategy.ask() is None
    assert "0 different ones" in strategy.ended


@pytest.mark.parametrize("broken", ["failed", "pruned", "nan"])
def test_broken_probes_are_not_acceptable(broken):
    space = made_up_space(layers=3, ranks=4, formats=1)
    strategy = make(space, {"epsilon": 100.0, "targets": 0, "scan": "all"})
    points = []
    while (proposal := strategy.ask()) is not None:
        record = made_up_record(space, proposal, 0)
        if proposal.probe and proposal.plan.layers[0][1].rank == (1,):
            score = math.nan if broken == "nan" else record.score
            record = replace(record, status="complete" if broken == "nan" else broken, score=score)
        points += [] if proposal.probe else [proposal.plan]
        strategy.tell(proposal, record)
    assert [{c.rank for c in plan.choices.values()} for plan in points] == [{(2,)}]


def test_less_may_be_better():
    space = made_up_space(layers=5)
    drops = rough_drops(space, 3, True)
    falling = (Objective("score", "min"), TWO[1])
    turned = replace(MADE_UP_DENSE, score=-92.0)
    there = played(make(space, objectives=falling, dense=turned), space, drops, sign=-1.0)
    assert there == played(make(space), space, drops)


@pytest.mark.parametrize("scan", ["all", "bisection"])
def test_threshold_that_nothing_meets_names_the_nearest(scan):
    space = made_up_space(layers=4, ranks=3)
    strategy = make(space, {"epsilon": 1e-4, "scan": scan})
    assert all(
        p.probe for p in played(strategy, space, {k: 1.0 + abs(d) for k, d in rough_drops(space, 0, True).items()})
    )
    assert "no candidate of any layer loses at most epsilon=0.0001; the nearest is block" in strategy.ended
    assert "\n" not in strategy.ended


@pytest.mark.parametrize("bound", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("by", ["constraint", "option"])
def test_budget_takes_the_smallest_drop_of_the_table_that_keeps_it(by, bound):
    space = made_up_space(layers=6)
    drops = {key: drop + 0.5 for key, drop in rough_drops(space, 4, False).items()}
    options = {"epsilon": 0.4, "targets": 0, "scan": "all"}
    if by == "option":
        strategy = make(space, {**options, "budget": bound})
    else:
        strategy = make(space, options, (Constraint("macs_kept", "<=", bound),))
    points = [p.plan for p in played(strategy, space, drops) if not p.probe]

    def kept(plan):
        return space.cost(plan).kept(space.dense)["macs_kept"]

    threshold = next(d for d in sorted(drops.values()) if kept(cheapest(space, drops, d)) <= bound)
    wanted = cheapest(space, drops, threshold)
    assert wanted in points
    if by == "constraint":
        assert all(kept(plan) <= bound for plan in points)
    assert (f"takes a threshold of {threshold:.4g}, beyond epsilon" in strategy.ended) == (threshold > 0.4)


def test_budget_out_of_reach_is_said():
    space = made_up_space(layers=3)
    strategy = make(space, {"budget": 0.01})
    assert any(not p.probe for p in played(strategy, space, rough_drops(space, 0, True)))
    assert "no threshold gives a plan with budget=0.01; the nearest keeps 0.09" in strategy.ended


def test_without_a_dense_score_the_mildest_probes_stand_for_it():
    space = made_up_space(layers=4)
    records = run(make(space, dense=None), space, 30, workers=3)
    first = records[:4]
    assert [r.plan.layers[0][1] for r in first] == [layer.candidates[-1].choice for layer in space.layers]
    assert any(not r.probe for r in records)


def test_all_failed_without_a_dense_score():
    space = made_up_space(layers=4)
    strategy = make(space, dense=None)
    run(strategy, space, 10, fates=dict.fromkeys(range(100), "failed"))
    assert strategy.ask() is None
    assert "no probe of a single layer has a score" in strategy.ended


@pytest.mark.parametrize("workers", [1, 4])
def test_replaying_the_outcomes_gives_the_same_proposals(workers):
    space = made_up_space(layers=5)
    drops = rough_drops(space, 5, False)
    constraints = (Constraint("macs_kept", "<=", 0.6),)
    asked = [played(make(space, {}, constraints), space, drops, workers) for _ in range(2)]
    assert asked[0] == asked[1]
    assert len({(p.plan, p.probe) for p in asked[0]}) == len(asked[0])


def test_noise_breaks_nothing():
    space, rng = made_up_space(layers=6), Random(3)
    drops = {key: drop + rng.gauss(0.0, 2.0) for key, drop in rough_drops(space, 6, True).items()}
    points = [p.plan for p in played(make(space), space, drops, workers=3) if not p.probe]
    assert points
    for plan in points:
        assert all(drops[item] <= 5.0 for item in plan.layers)


@pytest.mark.parametrize("seed", range(20))
def test_next_rung_finds_the_cheapest_acceptable_rung(seed):
    rng = Random(seed)
    gains = sorted(rng.uniform(0, 9) for _ in range(rng.randrange(1, 20)))
    least, known = rng.uniform(-1, 10), {}
    while (k := next_rung(tuple(range(len(gains))), known, least)) is not None:
        assert k not in known
        known[k] = gains[k]
    assert len(known) <= math.ceil(math.log2(len(gains) + 1)) + 1
    found = [k for k, gain in known.items() if gain >= least]
    assert min(found, default=None) == next((k for k, gain in enumerate(gains) if gain >= least), None)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_spread_order_is_an_order_with_evenly_spread_beginnings(count):
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    assert order[0] == 0
    if count == 8:
        assert order == [0, 4, 2, 6, 1, 5, 3, 7]
