"""Strategies that learn have to beat the one that does not, on a problem with a known score."""

import statistics

import pytest

from autorank import strategies
from autorank.front import hypervolume, reference_point
from autorank.testing.strategies import TWO, made_up_space, run
from autorank.types import Constraint

SEEDS = range(4)


def mean_volume(name, constraints=(), trials=120):
    space = made_up_space(10)
    volumes = []
    for seed in SEEDS:
        strategy = strategies.make(name, space, TWO, constraints, seed)
        points = [(r.score, r.kept["macs_kept"]) for r in run(strategy, space, trials, workers=4)]
        volumes.append(hypervolume(points, reference_point(TWO, 92.0), [o.direction for o in TWO]) / 92.0)
    return statistics.mean(volumes)


@pytest.mark.parametrize("constraints", [(), (Constraint("macs_kept", "<=", 0.5),)], ids=["unbounded", "half-the-macs"])
def test_learning_beats_random(constraints):
    volumes = {name: mean_volume(name, constraints) for name in ("random", "tpe", "nsga2")}
    assert volumes["tpe"] > volumes["random"] + 0.01, volumes
    assert volumes["nsga2"] > volumes["random"] + 0.002, volumes
