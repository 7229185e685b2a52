"""The knapsack's front against every plan of small problems, and against linear programmes of large ones."""

from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from autorank.pareto import non_dominated
from autorank.strategies.mckp import front


def by_brute_force(costs, values):
    """Return the (costs…, value) of all non-dominated choices, ascending."""
    points = [
        (
            *(sum(table[i][k] for i, k in enumerate(chosen)) for table in costs),
            sum(row[k] for row, k in zip(values, chosen, strict=True)),
        )
        for chosen in product(*(range(len(row)) for row in values))
    ]
    points = [point for point in points if point[-1] < float("inf")]
    return sorted(points[i] for i in non_dominated(points, ["min"] * (len(costs) + 1)))


def made_up(layers, candidates, costs, seed=0):
    """Return tables like those of a network: along a rank, cost rises and the loss falls."""
    rng = Random(seed)
    tables, values = [[] for _ in range(costs)], []
    for _ in range(layers):
        size, weight = rng.uniform(1, 20), rng.lognormvariate(0, 1)
        ranks = [rng.uniform(0.02, 1.2) for _ in range(candidates)]
        for table in tables:
            table.append([0.0 if r == 0 else round(size * r * rng.uniform(0.7, 1.3) * 1000) for r in ranks])
        values.append([weight * max(1 - r, 0.0) ** 2 * rng.uniform(0.8, 1.2) for r in ranks])
    return tables, values


@st.composite
def problems(draw, costs):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = st.integers(0, 12)
    table = st.tuples(*(st.lists(number, min_size=n, max_size=n) for n in sizes))
    return [draw(table) for _ in range(costs)], draw(table)


@pytest.mark.parametrize("costs", [1, 2])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_front_is_that_of_all_choices(costs, data):
    tables, values = data.draw(problems(costs))
    found = front(tables, values)
    assert [(*s.costs, s.value) for s in found] == by_brute_force(tables, values)
    for solution in found:
        for c, table in enumerate(tables):
            assert solution.costs[c] == sum(table[i][k] for i, k in enumerate(solution.indices))
        assert solution.value == sum(row[k] for row, k in zip(values, solution.indices, strict=True))


@given(problem=problems(1), limit=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_rounded_front_keeps_the_documented_bound(problem, limit):
    (costs,), values = problem
    found = front([costs], values, limit=limit)
    spans = sorted(max(row) - min(row) for row in costs)
    slack = sum(np.cumsum(spans)) / limit + 1e-9
    exact = by_brute_force([costs], values)
    for cost, value in exact:
        assert any(s.costs[0] <= cost + slack and s.value <= value for s in found)
    for solution in found:
        assert any(cost <= solution.costs[0] and value <= solution.value for cost, value in exact)


def relaxed(tables, values, budgets):
    """Return the least value of the linear relaxation within `budgets`, by a linear programme."""
    sizes = [len(row) for row in values]
    starts = np.cumsum([0, *sizes])
    one_each = np.zeros((len(values), starts[-1]))
    for i in range(len(values)):
        one_each[i, starts[i] : starts[i + 1]] = 1
    spent = [np.concatenate([np.asarray(row, float) for row in table]) for table in tables]
    flat = np.concatenate([np.asarray(row, float) for row in values])
    done = linprog(flat, A_ub=np.asarray(spent), b_ub=budgets, A_eq=one_each, b_eq=np.ones(len(values)))
    return float(done.fun) if done.success else np.inf


@pytest.mark.parametrize("seed", [0, 1])
def test_large_front_lies_at_the_linear_bound(seed):
    tables, values = made_up(40, 60, 1, seed)
    found = front(tables, values)
    low, high = found[0].costs[0], found[-1].costs[0]
    assert low == sum(min(row) for row in tables[0])
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = low + share * (high - low)
        best = max((s for s in found if s.costs[0] <= budget), key=lambda s: s.costs[0])
        assert relaxed(tables, values, [budget]) - 1e-9 <= best.value
        # Where hardly any value is left, whole candidates are coarse beside it; along the costs they never are.
        assert best.value <= relaxed(tables, values, [budget - 0.002 * (high - low)]) + 1e-9


def test_large_front_of_two_costs_lies_near_the_linear_bound():
    tables, values = made_up(40, 30, 2)
    found = front(tables, values)
    points = np.asarray([(*s.costs, s.value) for s in found])
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    for shares in ((0.3, 0.3), (0.5, 0.5), (0.35, 0.6), (0.6, 0.4), (0.8, 0.5)):
        budgets = low + np.asarray(shares) * (high - low)
        within = points[(points[:, :2] <= budgets).all(1)]
        bound = relaxed(tables, values, budgets)
        # Between two of the weightings a budget is met with a little to spare.
        assert bound - 1e-9 <= within[:, 2].min() <= bound * 1.1 + 1e-9


def test_front_of_two_costs_holds_both_fronts_of_one():
    tables, values = made_up(30, 20, 2)
    both = front(tables, values)
    for c in range(2):
        alone = front([tables[c]], values)
        for solution in alone[:: len(alone) // 20]:
            near = [s.value for s in both if s.costs[c] <= solution.costs[0] * 1.005]
            assert min(near) <= solution.value * 1.005 + 1e-9


def test_solutions_ascend_and_none_dominates_another():
    for costs in (1, 2):
        tables, values = made_up(25, 20, costs)
        found = front(tables, values, limit=300)
        points = [(*s.costs, s.value) for s in found]
        assert points == sorted(points)
        sample = points[:: max(len(points) // 300, 1)]
        assert non_dominated(sample, ["min"] * (costs + 1)) == list(range(len(sample)))


def test_same_numbers_same_front():
    for costs in (1, 2):
        tables, values = made_up(20, 20, costs)
        assert front(tables, values, limit=200) == front(tables, values, limit=200)


def test_equal_costs_twice_are_as_one():
    (table,), values = made_up(8, 10, 1)
    twice = front([table, table], values)
    assert [(s.costs[0], s.value) for s in twice] == [(s.costs[0], s.value) for s in front([table], values)]


def test_cost_that_never_changes_leaves_one_point():
    for costs in ([[[5.0] * 3] * 30], [[[5.0] * 3] * 30, [[1.0] * 3] * 30]):
        (only,) = front(costs, [[3.0, 1.0, 2.0]] * 30, limit=4)
        assert only.indices == (1,) * 30


def test_infinite_values_are_never_chosen():
    found = front([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]], [[float("inf"), 1.0, 0.0]] * 2)
    assert [s.indices for s in found] == [(1, 1), (1, 2), (2, 2)]


def test_no_layers_leave_the_empty_choice():
    (only,) = front([[]], [])
    assert (only.indices, only.costs, only.value) == ((), (0.0,), 0.0)


@pytest.mark.parametrize(
    ("costs", "values", "limit"),
    [
        ([], [[1.0]], 10),
        ([[[1.0]]] * 3, [[1.0]], 10),
        ([[[1.0]]], [[1.0]], 0),
        ([[[1.0]]], [[1.0], [1.0]], 10),
        ([[[1.0, 2.0]]], [[1.0]], 10),
        ([[[float("inf")]]], [[1.0]], 10),
        ([[[1.0]]], [[float("nan")]], 10),
        ([[[1.0]]], [[float("inf")]], 10),
        ([[[]]], [[]], 10),
    ],
    ids=["no-cost", "three", "limit", "layers", "candidates", "infinite-cost", "nan", "all-forbidden", "empty"],
)
def test_impossible_problems_are_refused(costs, values, limit):
    with pytest.raises(ValueError, match=r"needed|layers of costs|costs for|must be finite"):
        front(costs, values, limit=limit)
