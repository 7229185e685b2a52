"""The growth of the hypervolume, against the hypervolume of every prefix."""

from __future__ import annotations

import pytest

from autorank.front import front_of, hypervolume, reference_point, values
from autorank.growth import hypervolumes
from autorank.types import Constraint
from tests.sweep_samples import header, records


@pytest.mark.parametrize("mixed", [False, True], ids=["one-fidelity", "two-fidelities"])
@pytest.mark.parametrize(
    ("objectives", "constraints"),
    [
        (("score", "macs_kept"), ()),
        (("score", "macs_kept"), (Constraint("macs_kept", "<=", 0.6),)),
        (("score", "macs_kept", "latency_kept"), ()),
    ],
    ids=["two", "constrained", "three"],
)
def test_hypervolumes_equal_those_of_every_prefix(objectives, constraints, mixed):
    head = header(objectives=objectives, constraints=constraints)
    done = records(head, 40, seed=3, mixed_fidelity=mixed)
    directions = [o.direction for o in head.objectives]
    corner = reference_point(head.objectives, head.dense)
    expected = [
        hypervolume(
            [values(r, head.objectives) for r in front_of(done[: i + 1], head.objectives, constraints)],
            corner,
            directions,
        )
        for i in range(len(done))
    ]
    assert hypervolumes(head, done) == pytest.approx(expected)
    assert max(expected) > 0
