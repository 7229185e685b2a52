"""Rungs, promotion by non-domination, what a front attains, and when a search has stalled."""

import copy
from random import Random

import numpy as np
import pytest

from autorank.pareto import hypervolume, non_dominated
from autorank.strategies.attained import Attained, nodes
from autorank.strategies.rungs import crowding, ladder, layers, promotable, ranking
from autorank.strategies.stall import Stall
from autorank.types import Fidelity


@pytest.mark.parametrize(
    ("steps", "rungs", "eta", "expected"),
    [
        (100, 1, 4, [100]),
        (100, 2, 4, [25, 100]),
        (100, 3, 4, [0, 25, 100]),
        (800, 4, 3, [0, 88, 266, 800]),
        (0, 3, 4, [0]),
        (2, 3, 4, [0, 2]),
    ],
)
def test_ladder(steps, rungs, eta, expected):
    found = ladder(Fidelity(steps, False), rungs, eta)
    assert [fidelity.steps for fidelity in found] == expected
    assert not any(fidelity.batch_norm for fidelity in found)


def test_layers_are_the_fronts_of_what_remains():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, (40, 3)).astype(float)
    left = list(range(40))
    for layer in layers(points):
        values = [tuple(points[i]) for i in left]
        # `non_dominated` lists equal points once; they are on the same layer.
        best = {values[i] for i in non_dominated(values, ("min", "min", "min"))}
        assert layer == [i for i in left if tuple(points[i]) in best]
        left = [i for i in left if i not in layer]
    assert not left


def test_crowding_by_hand():
    points = np.array([[0.0, 4.0], [1.0, 2.0], [2.0, 1.0], [4.0, 0.0]])
    assert crowding(points) == pytest.approx([np.inf, 2 / 4 + 3 / 4, 3 / 4 + 2 / 4, np.inf])


def test_promotion_takes_the_best_layer_spread_along_it_and_no_more_than_its_part():
    front = [[float(i), 10.0 - i] for i in range(6)]
    beaten = [[x + 5.0, y + 5.0] for x, y in front]
    points = front + beaten
    assert promotable(points, [], 4) == [0, 5, 1]
    assert promotable(points, [0, 5], 4) == [1]
    assert promotable(points, [0, 5, 1], 4) == []
    assert promotable(points[:3], [], 4) == []
    assert set(ranking(np.array(points))[:6]) == set(range(6))


def test_attained_volume_is_the_hypervolume():
    rng = Random(1)
    for costs, cells in ((1, 0.01), (2, 0.06)):
        points = [[rng.uniform(0.2, 0.9) for _ in range(costs)] + [rng.uniform(0.0, 90.0)] for _ in range(12)]
        attained = Attained([0.0] * costs, [1.0] * costs, 0.0)
        for point in points:
            attained.add(np.array(point[:-1]), point[-1])
        exact = hypervolume(points, [1.0] * costs + [0.0], ["min"] * costs + ["max"])
        assert attained.volume == pytest.approx(exact, rel=cells)


@pytest.mark.parametrize("costs", [1, 2])
def test_expected_improvement_is_the_mean_of_what_adding_brings(costs):
    rng = np.random.default_rng(0)
    attained = Attained([0.1] * costs, [1.0] * costs, 0.0)
    for _ in range(6):
        attained.add(rng.uniform(0.2, 0.9, costs), float(rng.uniform(20, 80)))
    plans, mean, spread = rng.uniform(0.1, 1.0, (5, costs)), rng.uniform(20, 90, 5), np.full(5, 8.0)
    expected = attained.expected(plans, nodes(mean, spread))
    for i, plan in enumerate(plans):
        added = []
        for gain in rng.normal(mean[i], spread[i], 2000):
            other = copy.deepcopy(attained)
            other.add(plan, float(gain))
            added.append(other.volume - attained.volume)
        assert expected[i] == pytest.approx(np.mean(added), rel=0.1, abs=0.05)


def test_points_below_the_score_asked_for_do_not_count():
    attained = Attained([0.0], [1.0], 0.0, least=60.0)
    attained.add(np.array([0.2]), 50.0)
    assert attained.volume == 0.0
    assert (attained.expected(np.array([[0.3]]), np.full((7, 1), 55.0)) == 0).all()


def test_stall_counts_points_since_the_last_growth():
    stall = Stall(3, 0.01)
    for volume in (0.5, 0.6, 0.6, 0.603):
        stall.point(volume)
        assert not stall.reason
    stall.point(0.605)
    assert "last 3 points" in stall.reason
    assert "1.00%" in stall.reason
    never = Stall(0, 0.01)
    for _ in range(100):
        never.point(0.5)
    assert not never.reason
