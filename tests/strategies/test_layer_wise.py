"""The layer-wise optimum against brute force, the order of its points, and constraints."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from autorank import strategies
from autorank.errors import ConfigError
from autorank.space import SearchSpace
from autorank.strategies.layer_wise import LayerWise, error_levels
from autorank.strategies.spreading import spread_order
from autorank.testing.strategies import THREE, TWO, StrategyContract, made_up_record, made_up_space, run
from autorank.types import Constraint, Errors, Objective, Proposal


class TestLayerWise(StrategyContract):
    name = "layer-wise"
    exhaustive = False
    seeded = False


def random_space(seed: int, layers: int = 3, formats: int = 2, ranks: int = 3) -> SearchSpace:
    """Return a space of random errors and costs: cheap and good ones and equal ones if it is small, else smooth."""
    rng = np.random.default_rng(seed)
    space = made_up_space(layers, ranks, formats)
    found = []
    for layer in space.layers:
        candidates = []
        for candidate in layer.candidates:
            weight, output = rng.uniform(0.05, 1.0, 2) if layers > 3 else rng.integers(0, 12, 2) / 12
            kept = 1.0 - weight**2 if layers > 3 else rng.integers(1, 10) / 10
            cost = replace(
                candidate.cost, macs=int(kept * layer.spec.macs), params=int(rng.integers(layer.spec.params))
            )
            candidates.append(replace(candidate, cost=cost, errors=Errors(float(weight), float(output), output**2)))
        found.append(replace(layer, candidates=tuple(candidates)))
    return SearchSpace(tuple(found), (), space.dense)


def every_plan(strategy: LayerWise) -> list[tuple[tuple[int, ...], float]]:
    """Return every plan with the largest error of its layers."""
    rows = strategy._errors
    return [
        (vector, max(float(rows[i, k]) for i, k in enumerate(vector)))
        for vector in itertools.product(*(range(len(layer.candidates) + 1) for layer in strategy.space.layers))
    ]


def proposed(strategy: LayerWise) -> list[tuple[int, ...]]:
    vectors = []
    while (proposal := strategy.ask()) is not None:
        vectors.append(strategy.catalog.vector(proposal.plan))
    return vectors


@pytest.mark.parametrize("error", ["output", "weight", "loss"])
@pytest.mark.parametrize("axis", ["macs_kept", "params_kept"])
@pytest.mark.parametrize("seed", range(4))
def test_under_every_budget_the_largest_error_is_the_smallest_possible(seed, axis, error):
    space = random_space(seed)
    strategy = strategies.make("layer-wise", space, (TWO[0], Objective(axis, "min")), (), 0, {"error": error})
    worst = dict(every_plan(strategy))
    cost = {vector: strategy.catalog.kept(vector)[axis] for vector in worst}
    mine = [strategy.catalog.dense_vector, *proposed(strategy)]
    for budget in sorted(set(cost.values())):
        best = min(worst[v] for v in worst if cost[v] <= budget)
        assert min((worst[v] for v in mine if cost[v] <= budget), default=math.inf) == best
    # None of them is dominated by another plan.
    for vector in mine[1:]:
        assert not any(worst[v] <= worst[vector] and cost[v] < cost[vector] for v in worst)
        assert not any(worst[v] < worst[vector] and cost[v] <= cost[vector] for v in worst)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_along_the_axis_cuts_the_front_off_exactly(seed):
    space = random_space(seed)
    everything = proposed(strategies.make("layer-wise", space, TWO))
    bounds = (Constraint("macs_kept", "<=", 0.6), Constraint("macs_kept", ">=", 0.3))
    strategy = strategies.make("layer-wise", space, TWO, bounds)
    assert sorted(proposed(strategy)) == sorted(v for v in everything if strategy.catalog.feasible(v))


@pytest.mark.parametrize("bound", [0.4, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_a_bound_on_another_cost_is_met_at_every_error_that_allows_it(seed, bound):
    space = random_space(seed)
    strategy = strategies.make("layer-wise", space, TWO, (Constraint("params_kept", "<=", bound),))
    worst = dict(every_plan(strategy))
    feasible = [v for v in worst if strategy.catalog.feasible(v)]
    mine = proposed(strategy)
    assert mine
    assert set(mine) <= set(feasible)
    assert min(worst[v] for v in mine) <= min(
        level.error for level in strategy._levels if any(worst[v] <= level.error for v in feasible)
    )


def test_a_window_that_the_front_jumps_over_is_still_entered():
    space = random_space(1, layers=1, ranks=4)
    free = strategies.make("layer-wise", space, TWO)
    shares = sorted(free.catalog.kept(v)["macs_kept"] for v in [(0,), *proposed(free)])
    others = {free.catalog.kept((k,))["macs_kept"] for k in range(len(space.layers[0].candidates) + 1)}
    between = next(s for s in sorted(others) if s not in shares)
    window = (Constraint("macs_kept", ">=", between - 1e-6), Constraint("macs_kept", "<=", between + 1e-6))
    (vector,) = proposed(strategies.make("layer-wise", space, TWO, window))
    assert free.catalog.kept(vector)["macs_kept"] == pytest.approx(between)


def test_every_beginning_is_spread_along_the_cost_axis():
    space = random_space(5, layers=20, formats=3, ranks=6)
    strategy = strategies.make("layer-wise", space, TWO, (), 0, {"error": "weight"})
    kept = [record.kept["macs_kept"] for record in run(strategy, space, 15)]
    for count, gap in ((3, 0.3), (7, 0.16), (15, 0.08)):
        ends = sorted([strategy.catalog.low, 1.0, *kept[:count]])
        assert max(b - a for a, b in itertools.pairwise(ends)) < gap


def test_with_a_budget_its_end_comes_first():
    space = random_space(5, layers=20, formats=3, ranks=6)
    strategy = strategies.make("layer-wise", space, TWO, (Constraint("macs_kept", "<=", 0.5),))
    first, *others = run(strategy, space, 100)
    assert first.kept["macs_kept"] == max(record.kept["macs_kept"] for record in (first, *others)) > 0.45


def test_halves_then_quarters():
    values = [i / 8 for i in range(9)]
    order = [values[i] for i in spread_order(values, (0.0, 1.0))]
    assert order[0] == 0.5
    assert set(order[1:3]) == {0.25, 0.75}
    assert sorted(order) == values
    assert list(spread_order([], (0.0,))) == []


def test_formats_are_chosen_layer_by_layer():
    """With the same errors per rank everywhere, each layer takes the format that is cheapest for it."""
    space = made_up_space(4, ranks=3, formats=3)
    layers = []
    for i, layer in enumerate(space.layers):
        liked = ("plain", "wide", "tall")[i % 3]
        candidates = tuple(
            replace(c, errors=Errors(0.2 * (4 - c.choice.rank[0]) * (1.0 if c.choice.format == liked else 3.0)))
            for c in layer.candidates
        )
        layers.append(replace(layer, candidates=candidates))
    space = SearchSpace(tuple(layers), (), space.dense)
    strategy = strategies.make("layer-wise", space, TWO)
    # With a larger error than that every layer is as cheap as it can be.
    small = [strategy.catalog.plan(level.vector) for level in strategy._levels if level.error <= 0.61]
    assert len(small) == 4
    for record in run(strategy, space, 50):
        for i, layer in enumerate(space.layers):
            choice = record.plan.choices.get(layer.spec.name)
            if record.plan in small:
                assert choice is None or choice.format == ("plain", "wide", "tall")[i % 3]


def test_auto_takes_the_outputs_error_where_all_have_it_and_else_the_weights():
    space = random_space(2)
    rows = {
        kind: strategies.make("layer-wise", space, TWO, (), 0, {"error": kind})._errors for kind in ("weight", "output")
    }
    assert np.array_equal(strategies.make("layer-wise", space, TWO)._errors, rows["output"])
    assert not np.array_equal(rows["weight"], rows["output"])
    first = space.layers[0]
    plain = replace(first.candidates[0], errors=Errors(0.5))
    first = replace(first, candidates=(plain, *first.candidates[1:]))
    space = SearchSpace((first, *space.layers[1:]), (), space.dense)
    assert strategies.make("layer-wise", space, TWO)._errors[1:] == pytest.approx(rows["weight"][1:])


def test_errors_that_are_not_there_are_said():
    space = made_up_space(2)
    bare = SearchSpace(
        tuple(
            replace(layer, candidates=tuple(replace(c, errors=Errors(0.5)) for c in layer.candidates))
            for layer in space.layers
        ),
        (),
        space.dense,
    )
    with pytest.raises(ConfigError, match=r"option error=output: no candidate has such an error; 'weight' needs no"):
        strategies.make("layer-wise", bare, TWO, (), 0, {"error": "output"})
    with pytest.raises(ConfigError, match="option error: 'spectral' is not known; allowed are auto, output, weight"):
        strategies.make("layer-wise", bare, TWO, (), 0, {"error": "spectral"})


def test_a_candidate_without_errors_is_left_out():
    space = random_space(3)
    lost = space.layers[1].candidates[0]
    layer = replace(space.layers[1], candidates=(replace(lost, errors=None), *space.layers[1].candidates[1:]))
    space = SearchSpace((space.layers[0], layer, *space.layers[2:]), (), space.dense)
    strategy = strategies.make("layer-wise", space, TWO)
    for record in run(strategy, space, 100):
        assert record.plan.choices.get(layer.spec.name) != lost.choice


def test_the_end_is_explained_and_stays():
    space = made_up_space(3)
    strategy = strategies.make("layer-wise", space, TWO)
    assert strategy.ended == ""
    records = run(strategy, space, 1000)
    assert strategy.ask() is None
    assert f"were proposed ({len(records)})" in strategy.ended
    again = strategies.make("layer-wise", space, TWO)
    for record in records:
        again.tell(Proposal(record.plan), record)
    assert again.ask() is None
    assert "is new" in again.ended


def test_the_direction_of_the_score_does_not_matter():
    space = made_up_space()
    falling = (Objective("score", "min"), TWO[1])
    plans = [
        [r.plan for r in run(strategies.make("layer-wise", space, objectives), space, 20, sign=sign)]
        for objectives, sign in ((TWO, 1.0), (falling, -1.0), (THREE, 1.0))
    ]
    assert plans[0] == plans[1] == plans[2]


def test_a_resumed_sweep_goes_on_where_it_was():
    space = made_up_space()
    through = [r.plan for r in run(strategies.make("layer-wise", space, TWO), space, 20)]
    strategy = strategies.make("layer-wise", space, TWO)
    for number in range(10):
        proposal = strategy.ask()
        strategy.tell(proposal, made_up_record(space, proposal, number))
    assert [r.plan for r in run(strategy, space, 10)] == through[10:]


def test_the_front_of_a_table_by_hand():
    errors = np.array([[0.0, 0.5, 0.1], [0.0, 0.3, math.inf]])
    costs = np.array([[1.0, 0.2, 0.6], [1.0, 0.4, math.inf]])
    levels = error_levels(errors, costs)
    assert [(level.error, pytest.approx(level.share), level.vector) for level in levels] == [
        (0.0, 2.0, (0, 0)),
        (0.1, 1.6, (2, 0)),
        (0.3, 1.0, (2, 1)),
        (0.5, 0.6, (1, 1)),
    ]
