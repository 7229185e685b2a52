"""The growth of the hypervolume, against the hypervolume of every prefix."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autorank.front import front_of, hypervolume, reference_point, values
from autorank.growth import GrowingFront, GrowingVolume, hypervolumes
from autorank.types import Constraint, Fidelity
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


@pytest.mark.parametrize("mixed", [False, True], ids=["one-fidelity", "two-fidelities"])
@pytest.mark.parametrize("constraints", [(), (Constraint("macs_kept", "<=", 0.6),)], ids=["free", "constrained"])
@pytest.mark.parametrize("order", ["by number", "as they finished"])
def test_a_growing_front_is_the_front_of_all_so_far(mixed, constraints, order):
    head = header()
    done = list(records(head, 60, seed=5, mixed_fidelity=mixed))
    done += [replace(r, number=r.number + 100) for r in done[:20]]  # the same values again
    done += [replace(done[0], number=90, probe=True, fidelity=Fidelity(10**6, True))]
    if order != "by number":
        random.Random(1).shuffle(done)
    growing = GrowingFront(head.objectives, constraints)
    for i, record in enumerate(done, 1):
        before = growing.members
        assert growing.add(record) == (growing.members != before)
        assert growing.members == front_of(done[:i], head.objectives, constraints)
    assert GrowingFront(head.objectives, constraints, done).members == growing.members


def test_a_growing_volume_goes_on_and_begins_again_where_records_are_others():
    head = header()
    done = records(head, 40, seed=3)
    growing = GrowingVolume(head)
    for count in (1, 2, 17, 17, 40, 12, 40):
        assert growing.of(done[:count]) == hypervolumes(head, done[:count])
    others = (*done[:5], replace(done[5], score=0.0), *done[6:])
    assert growing.of(others) == hypervolumes(head, others) != hypervolumes(head, done)
