from itertools import product

import pytest

from autorank.strategies.catalog import Catalog
from autorank.strategies.mending import Mender
from autorank.testing.strategies import made_up_space
from autorank.types import Constraint

BOUNDS = {
    "one": (Constraint("macs_kept", "<=", 0.3),),
    "from-below": (Constraint("params_kept", ">=", 0.8),),
    "a-band": (Constraint("params_kept", ">=", 0.5), Constraint("params_kept", "<=", 0.53)),
    "several": (
        Constraint("macs_kept", "<=", 0.4),
        Constraint("latency_kept", "<=", 0.5),
        Constraint("bytes_kept", "<=", 0.35),
    ),
}


def mender_of(space, constraints):
    catalog = Catalog(space, constraints, "macs_kept", 0)
    return catalog, Mender(catalog, [[0.0, *(c.errors.loss for c in layer.candidates)] for layer in space.layers])


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("start", [0, 1, 12, 24], ids=["dense", "cheapest", "middle", "dear"])
def test_mended_plans_meet_every_constraint(bounds, start):
    catalog, mender = mender_of(made_up_space(timed=True), BOUNDS[bounds])
    mended = mender.mend((start,) * 10)
    assert mended is not None
    assert catalog.feasible(mended)
    assert mender.misses(mended) == 0


def test_misses_add_up():
    catalog, mender = mender_of(made_up_space(timed=True), BOUNDS["several"])
    kept = catalog.kept((20,) * 10)
    expected = sum(max(kept[c.name] - c.bound, 0.0) for c in BOUNDS["several"])
    assert mender.misses((20,) * 10) == pytest.approx(expected)


def test_plan_within_its_constraints_is_left_as_it_is():
    _, mender = mender_of(made_up_space(timed=True), BOUNDS["one"])
    assert mender.mend((1,) * 10) == (1,) * 10


def test_the_one_change_that_is_enough_is_the_cheapest_such():
    space = made_up_space(layers=3, ranks=3, formats=2)
    catalog, mender = mender_of(space, (Constraint("macs_kept", "<=", 0.8),))
    losses = [[0.0, *(c.errors.loss for c in layer.candidates)] for layer in space.layers]
    single = [v for v in product(range(7), repeat=3) if sum(map(bool, v)) == 1 and catalog.feasible(v)]
    best = min(sum(losses[i][k] for i, k in enumerate(v)) for v in single)
    mended = mender.mend((0, 0, 0))
    assert sum(losses[i][k] for i, k in enumerate(mended)) == pytest.approx(best)


def test_constraints_that_contradict_each_other_end_with_nothing():
    both = (Constraint("macs_kept", "<=", 0.3), Constraint("params_kept", ">=", 0.9))
    assert mender_of(made_up_space(layers=3, ranks=3), both)[1].mend((0, 0, 0)) is None
