"""Predicted losses against closed forms, predicted fronts against every plan of small spaces."""

import math
from dataclasses import replace
from itertools import product
from statistics import median

import pytest

from autorank.errors import ConfigError
from autorank.pareto import non_dominated
from autorank.strategies.catalog import Catalog
from autorank.strategies.predictor import KINDS, Predictor
from autorank.testing.strategies import made_up_space
from autorank.types import Constraint, Errors

NAN, INF = float("nan"), float("inf")


def catalog_of(space, constraints=(), axis="macs_kept"):
    return Catalog(space, constraints, axis, 0)


def with_errors(space, errors):
    """Give every candidate the errors that a function of (layer, index from 1, its present errors) returns."""
    layers = tuple(
        replace(
            layer,
            candidates=tuple(
                replace(c, errors=errors(i, k, c.errors)) for k, c in enumerate(layer.candidates, start=1)
            ),
        )
        for i, layer in enumerate(space.layers)
    )
    return replace(space, layers=layers)


def small_space(**options):
    return made_up_space(layers=3, ranks=3, formats=2, **options)


def best_by_brute_force(predictor, names, constraints=()):
    """Return the (costs…, predicted loss) of the non-dominated plans."""
    catalog = predictor.catalog
    points = set()
    for vector in product(*(range(1 + len(layer.candidates)) for layer in catalog.space.layers)):
        kept = catalog.kept(vector)
        if all(c.violation(kept[c.name]) <= 0 for c in constraints):
            points.add((*(kept[name] for name in names), predictor.predict(vector)))
    ordered = sorted(points)
    return [ordered[i] for i in non_dominated(ordered, ["min"] * (len(names) + 1))]


def points_of(predictor, names):
    kept = [(predictor.catalog.kept(vector), predictor.predict(vector)) for vector in predictor.front()]
    return [(*(ratios[name] for name in names), loss) for ratios, loss in kept]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


# Losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_formulas(kind):
    space = small_space()
    predictor = Predictor(catalog_of(space), kind)
    ratios = [median(c.errors.loss / c.errors.output**2 for c in layer.candidates) for layer in space.layers]
    middle = median(ratios)
    for layer, row in zip(space.layers, predictor.losses, strict=True):
        assert row[0] == 0
        for candidate, loss in zip(layer.candidates, row[1:], strict=True):
            e, q = candidate.errors.loss, candidate.errors.output**2
            expected = {
                "sum": e,
                "snr": e / (1 - q),
                "shrunk": math.sqrt(e / q * middle) * q / (1 - q),
                "even": middle * q / (1 - q),
            }
            assert loss == pytest.approx(expected[kind], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_the_sum_over_the_layers(kind):
    predictor = Predictor(catalog_of(small_space()), kind)
    assert predictor.predict((0, 0, 0)) == 0
    assert predictor.predict((1, 0, 4)) == pytest.approx(predictor.predict((1, 0, 0)) + predictor.predict((0, 0, 4)))


def test_weights_multiply_the_losses_of_their_layers():
    plain = Predictor(catalog_of(small_space()))
    weighted = Predictor(plain.catalog, weights=[2.0, 1.0, 0.5]).reweighted([1.0, 3.0, 0.5])
    for factor, row, expected in zip((2.0, 3.0, 0.25), weighted.losses, plain.losses, strict=True):
        assert row == pytest.approx([factor * loss for loss in expected])


@pytest.mark.parametrize("loss", [None, NAN, INF, -INF, 0.0, -1.0], ids=str)
def test_loss_that_is_no_loss_follows_from_the_layers_other_candidates(loss):
    space = small_space()
    broken = with_errors(space, lambda i, k, e: replace(e, loss=loss) if (i, k) == (1, 2) else e)
    layer = space.layers[1]
    others = [c.errors for k, c in enumerate(layer.candidates, start=1) if k != 2]
    expected = median(e.loss / e.output**2 for e in others) * layer.candidates[1].errors.output ** 2
    assert Predictor(catalog_of(broken), "sum").losses[1][2] == pytest.approx(expected)


def test_layer_without_losses_takes_the_sensitivity_of_the_others():
    space = small_space()
    broken = with_errors(space, lambda i, k, e: replace(e, loss=None) if i == 1 else e)
    ratios = [median(c.errors.loss / c.errors.output**2 for c in space.layers[i].candidates) for i in (0, 2)]
    expected = [median(ratios) * c.errors.output**2 for c in space.layers[1].candidates]
    assert Predictor(catalog_of(broken), "sum").losses[1][1:] == pytest.approx(expected)


def test_without_any_losses_every_layer_counts_alike_by_output_and_else_by_weight():
    bare = with_errors(small_space(), lambda i, k, e: Errors(0.5, 0.1 * k if i else None))
    rows = Predictor(catalog_of(bare), "sum").losses
    assert rows[0][1:] == pytest.approx([0.25 / 3] * 6)
    assert rows[1][1:] == pytest.approx([(0.1 * k) ** 2 / 3 for k in range(1, 7)])


def test_loss_of_zero_is_believed_where_nothing_is_wrong():
    exact = with_errors(small_space(), lambda i, k, e: Errors(1e-8, 1e-8, 0.0) if k == 6 else e)
    assert Predictor(catalog_of(exact)).losses[0][6] == 0


@pytest.mark.parametrize("kind", ["snr", "shrunk", "even"])
def test_output_that_is_all_error_costs_much_but_not_infinitely(kind):
    noisy = with_errors(small_space(), lambda i, k, e: replace(e, output=(0.7, 1.0, 1.7)[k % 3]))
    losses = Predictor(catalog_of(noisy), kind).losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    plain = Predictor(catalog_of(noisy), "sum").losses[0]
    if kind == "snr":
        assert losses[1] == pytest.approx(100 * plain[1])
        assert losses[3] == pytest.approx(plain[3] / 0.51)


@pytest.mark.parametrize("kind", KINDS)
def test_candidate_of_which_nothing_is_known_is_left_out(kind):
    broken = with_errors(small_space(), lambda i, k, e: (None, Errors(NAN))[k % 2] if k < 3 else e)
    predictor = Predictor(catalog_of(broken), kind)
    assert predictor.predict((1, 0, 0)) == predictor.predict((0, 2, 0)) == INF
    assert predictor.front()
    assert not {1, 2} & {k for vector in predictor.front() for k in vector}


def test_space_without_errors_is_refused():
    with pytest.raises(ConfigError, match="no candidate of this search space has any"):
        Predictor(catalog_of(with_errors(small_space(), lambda i, k, e: None)))


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="'snrr' is not known; allowed are snr, sum"):
        Predictor(catalog_of(small_space()), "snrr")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0, 1.0], [1.0, NAN, 1.0], [1.0, INF, 1.0]], ids=str)
def test_weights_must_be_positive_numbers(weights):
    with pytest.raises(ValueError, match="3 positive weights"):
        Predictor(catalog_of(small_space()), weights=weights)


# Fronts

BOUNDS = {
    "none": (),
    "axis": (Constraint("macs_kept", "<=", 0.5),),
    "another-cost": (Constraint("params_kept", "<=", 0.4),),
    "another-cost-from-below": (Constraint("params_kept", ">=", 0.7),),
    "axis-and-another": (Constraint("macs_kept", "<=", 0.6), Constraint("params_kept", "<=", 0.4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_front_is_that_of_all_plans(kind, bounds):
    predictor = Predictor(catalog_of(small_space(), BOUNDS[bounds]), kind)
    same(points_of(predictor, ["macs_kept"]), best_by_brute_force(predictor, ["macs_kept"], BOUNDS[bounds]))


@pytest.mark.parametrize("bounds", ["none", "axis", "another-cost", "axis-and-another"])
def test_front_of_two_costs_is_that_of_all_plans(bounds):
    names = ["macs_kept", "params_kept"]
    predictor = Predictor(catalog_of(small_space(), BOUNDS[bounds]), costs=names)
    same(points_of(predictor, names), best_by_brute_force(predictor, names, BOUNDS[bounds]))


def test_front_between_two_bounds_is_that_part_of_the_whole():
    bounds = (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.6))
    whole = Predictor(catalog_of(small_space())).front()
    catalog = catalog_of(small_space(), bounds)
    assert Predictor(catalog).front() == [vector for vector in whole if catalog.feasible(vector)]


def test_front_between_bounds_that_it_leaps_over_is_repaired():
    space = made_up_space(layers=3, ranks=3, formats=2)
    whole = [catalog_of(space).kept(vector)["macs_kept"] for vector in Predictor(catalog_of(space)).front()]
    gap = max(range(len(whole) - 1), key=lambda n: whole[n + 1] - whole[n])
    other = catalog_of(space)
    inside = [
        kept for vector in other.every() if whole[gap] < (kept := other.kept(vector)["macs_kept"]) < whole[gap + 1]
    ]
    bounds = (Constraint("macs_kept", ">=", min(inside)), Constraint("macs_kept", "<=", max(inside)))
    catalog = catalog_of(space, bounds)
    found = Predictor(catalog).front()
    assert found
    assert all(catalog.feasible(vector) for vector in found)


def test_front_along_latency():
    space = small_space(timed=True)
    predictor = Predictor(catalog_of(space, axis="latency_kept"), costs=("latency_kept",))
    same(points_of(predictor, ["latency_kept"]), best_by_brute_force(predictor, ["latency_kept"]))


def test_bytes_beside_parameters_are_no_second_axis():
    space = small_space()
    both = Predictor(catalog_of(space, axis="params_kept"), costs=("params_kept", "bytes_kept"))
    assert both.front() == Predictor(catalog_of(space, axis="params_kept")).front()


def test_candidate_that_is_dearer_and_worse_is_never_on_the_front():
    # The loss rises with the cost in layer 1, so that its cheapest candidate beats all the others.
    odd = with_errors(small_space(), lambda i, k, e: replace(e, loss=float(k)) if i == 1 else e)
    assert {vector[1] for vector in Predictor(catalog_of(odd), "sum").front()} == {0, 1}


@pytest.mark.parametrize("error", [Errors(0.5, 0.5, 0.1), Errors(0.5), Errors(0.5, 0.5, 0.0), Errors(0.0, 0.0, 0.0)])
def test_equal_errors_leave_the_cheapest_candidates(error):
    equal = with_errors(small_space(), lambda i, k, e: error)
    predictor = Predictor(catalog_of(equal))
    same(points_of(predictor, ["macs_kept"]), best_by_brute_force(predictor, ["macs_kept"]))
    assert {k for vector in predictor.front() for k in vector} <= {0, 1}


def test_bound_that_only_the_cheapest_plan_meets():
    space = made_up_space()
    lowest = catalog_of(space).low
    (only,) = Predictor(catalog_of(space, (Constraint("macs_kept", "<=", lowest),))).front()
    assert only == (1,) * 10


def test_bound_that_only_unknown_candidates_meet_is_met_all_the_same():
    space = with_errors(made_up_space(), lambda i, k, e: None if k == 1 else e)
    bound = Constraint("macs_kept", "<=", catalog_of(space).low)
    predictor = Predictor(catalog_of(space, (bound,)))
    assert predictor.front() == [(1,) * 10]
    assert predictor.spread(4) == [(1,) * 10]


def test_front_of_many_layers_runs_from_end_to_end_and_falls():
    catalog = catalog_of(made_up_space(layers=20))
    predictor = Predictor(catalog)
    front = predictor.front()
    shares = [catalog.share(vector) for vector in front]
    losses = [predictor.predict(vector) for vector in front]
    assert shares[0] == pytest.approx(catalog.low)
    assert front[-1] == (0,) * 20
    assert shares == sorted(shares)
    assert losses == sorted(losses, reverse=True)
    # No uniform plan is better.
    for target in (0.2, 0.4, 0.6, 0.8):
        uniform = catalog.at_share(target, [0] * 20, [0.0] * 20)
        best = min(loss for share, loss in zip(shares, losses, strict=True) if share <= catalog.share(uniform))
        assert best <= predictor.predict(uniform)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_spread_lies_evenly_between_the_ends(count):
    catalog = catalog_of(made_up_space())
    predictor = Predictor(catalog)
    shares = [catalog.share(vector) for vector in predictor.spread(count)]
    inner = [catalog.share(vector) for vector in predictor.front() if any(vector)]
    wanted = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    assert shares == pytest.approx([inner[0] + w * (inner[-1] - inner[0]) for w in wanted], abs=0.02)


def test_spread_of_a_small_space_names_no_plan_twice():
    predictor = Predictor(catalog_of(made_up_space(layers=1, ranks=3, formats=1)))
    assert sorted(predictor.spread(50)) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("names", [["macs_kept"], ["macs_kept", "params_kept"]], ids=len)
def test_prices_and_losses_are_least_near_the_plan_of_the_front(names):
    catalog = catalog_of(made_up_space(layers=20))
    predictor = Predictor(catalog, costs=names)
    for place in (0.2, 0.5, 0.8):
        vector = predictor.at(place)
        prices = predictor.prices(vector)
        best = here = worst = 0.0
        for k, price, loss in zip(vector, prices, predictor.losses, strict=True):
            total = [p + q for p, q in zip(price, loss, strict=True)]
            best, here, worst = best + min(total), here + total[k], worst + max(total)
        assert here - best < 0.05 * (worst - best)


def test_prices_where_there_is_only_the_dense_plan():
    dense = with_errors(small_space(), lambda i, k, e: e if (i, k) == (0, 1) else None)
    predictor = Predictor(catalog_of(dense, (Constraint("macs_kept", ">=", 1.0),)))
    assert predictor.front() == [(0, 0, 0)]
    assert predictor.at(0.5) is None
    assert predictor.spread(3) == []
    assert predictor.prices((0, 0, 0)) == [[0.0] * 7] * 3
