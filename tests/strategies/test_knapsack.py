from dataclasses import replace
from fractions import Fraction
from itertools import islice

import pytest

from autorank import strategies
from autorank.errors import ConfigError
from autorank.pareto import hypervolume
from autorank.strategies.knapsack import spread_evenly
from autorank.testing.strategies import MADE_UP_DENSE, THREE, TWO, StrategyContract, made_up_space, run
from autorank.types import CallSize, Constraint, Errors, LayerCost, Objective, Proposal


class TestKnapsack(StrategyContract):
    name = "knapsack"
    seeded = False


class TestKnapsackOfFewPoints(StrategyContract):
    name = "knapsack"
    options = {"points": 4, "predictor": "shrunk"}  # noqa: RUF012
    seeded = False


def make(space, objectives=TWO, constraints=(), **options):
    return strategies.make("knapsack", space, objectives, constraints, 0, options, dense=MADE_UP_DENSE)


def ask(strategy, count):
    """Return the index vectors and the ratios of the next proposals, none of them answered."""
    found = []
    for _ in range(count):
        proposal = strategy.ask()
        assert isinstance(proposal, Proposal)
        vector = strategy.catalog.vector(proposal.plan)
        found.append((vector, strategy.catalog.kept(vector)))
    return found


def equal_errors(space, errors):
    layers = tuple(
        replace(layer, candidates=tuple(replace(c, errors=errors) for c in layer.candidates)) for layer in space.layers
    )
    return replace(space, layers=layers)


@pytest.mark.parametrize(
    ("base", "first"),
    [(2, ["1/2", "1/4", "3/4", "1/8", "5/8", "3/8", "7/8"]), (3, ["1/3", "2/3", "1/9", "4/9", "7/9"])],
)
def test_even_spread_is_the_mirrored_digits(base, first):
    assert list(islice(spread_evenly(base), len(first))) == pytest.approx([float(Fraction(text)) for text in first])


def test_first_points_are_the_predicted_front_from_the_middle_outwards():
    strategy = make(made_up_space())
    front = set(strategy.predictor.front())
    found = ask(strategy, 32)
    assert all(vector in front for vector, _ in found)
    low, high = strategy.catalog.low, 1.0
    places = [(kept["macs_kept"] - low) / (high - low) for _, kept in found]
    assert places[:7] == pytest.approx([1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8], abs=0.04)
    gaps = sorted(places)
    assert max(b - a for a, b in zip([0.0, *gaps], [*gaps, 1.0], strict=True)) < 0.1


def test_points_of_two_costs_are_spread_over_both():
    strategy = make(made_up_space(), THREE)
    front = set(strategy.predictor.front())
    found = ask(strategy, 24)
    assert all(vector in front for vector, _ in found)
    middle = [kept["params_kept"] for _, kept in found if 0.4 < kept["macs_kept"] < 0.7]
    assert max(middle) - min(middle) > 0.1


def test_after_the_points_come_plans_that_differ_in_one_or_two_layers():
    strategy = make(made_up_space(), points=6)
    points = [vector for vector, _ in ask(strategy, 6)]
    beside = ask(strategy, 60)
    losses = {vector: strategy.predictor.predict(vector) for vector in points}
    for vector, _ in beside:
        changed = [sum(a != b for a, b in zip(vector, point, strict=True)) for point in points]
        assert min(changed) in (1, 2)
        assert strategy.predictor.predict(vector) < 1.5 * max(losses.values())
    near = [min(points, key=lambda p, v=vector: sum(a != b for a, b in zip(v, p, strict=True))) for vector, _ in beside]
    assert set(near) == set(points)


def test_upper_bound_is_tried_first_at_the_bound():
    strategy = make(made_up_space(), constraints=(Constraint("macs_kept", "<=", 0.4),))
    (_, kept), *others = ask(strategy, 8)
    assert 0.39 < kept["macs_kept"] <= 0.4
    assert all(other["macs_kept"] < kept["macs_kept"] for _, other in others)


@pytest.mark.parametrize(
    "constraints",
    [
        (Constraint("params_kept", "<=", 0.3),),
        (Constraint("params_kept", "<=", 0.5), Constraint("latency_kept", "<=", 0.6)),
        (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.45)),
    ],
    ids=["another-cost", "two-others", "both-sides"],
)
def test_constraints_leave_points_that_fill_what_is_allowed(constraints):
    found = ask(make(made_up_space(timed=True), constraints=constraints), 20)
    for _, kept in found:
        assert all(c.violation(kept[c.name]) <= 0 for c in constraints)
    shares = [kept["macs_kept"] for _, kept in found]
    assert max(shares) - min(shares) > 0.04


def test_latency_as_objective():
    strategy = make(made_up_space(timed=True), (TWO[0], Objective("latency_kept", "min")))
    times = [kept["latency_kept"] for _, kept in ask(strategy, 16)]
    assert max(times) - min(times) > 0.5


def test_costs_that_order_candidates_alike_are_as_one():
    space = made_up_space()
    layers = tuple(
        replace(
            layer,
            # At one place in the image a layer has as many MACs as parameters.
            spec=replace(layer.spec, calls=(CallSize(1, (1, 1), (1, 1)),)),
            candidates=tuple(replace(c, cost=LayerCost(c.cost.params, c.cost.params)) for c in layer.candidates),
        )
        for layer in space.layers
    )
    space = replace(space, layers=layers)
    two, three = (ask(make(space, objectives), 30) for objectives in (TWO, THREE))
    assert [vector for vector, _ in two] == [vector for vector, _ in three]


@pytest.mark.parametrize(
    "errors", [Errors(0.5, 0.5, 0.1), Errors(0.5), Errors(0.5, 0.5, 0.0), Errors(0.0, 0.0, 0.0)], ids=str
)
def test_equal_errors_still_give_plans_and_come_to_an_end(errors):
    strategy = make(equal_errors(made_up_space(), errors))
    assert len({vector for vector, _ in ask(strategy, 60)}) == 60
    small = equal_errors(made_up_space(layers=2, ranks=2, formats=2), errors)
    assert len(run(make(small), small, 1000)) == 24


def test_space_without_errors_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"needs the errors of the candidates[^\n]*$"):
        make(equal_errors(made_up_space(), None))


def test_unknown_predictor_is_refused():
    with pytest.raises(ConfigError, match="option predictor: 'best' is not known; allowed are snr, sum"):
        make(made_up_space(), predictor="best")


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["max", "min"])
def test_twenty_points_reach_what_random_search_does_not_in_two_hundred(sign):
    space = made_up_space(layers=20)
    objectives = (Objective("score", "max" if sign > 0 else "min"), TWO[1])

    def volume(records):
        points = [(sign * record.score, record.kept["macs_kept"]) for record in records]
        return hypervolume([*points, (92.0, 1.0)], (10.0, 1.0), ("max", "min"))

    found = run(make(space, objectives), space, 20, sign=sign)
    others = run(strategies.make("random", space, objectives), space, 200, sign=sign)
    assert volume(found) > volume(others)
