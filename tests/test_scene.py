"""The scene of a Pareto figure on any two axes, against the border of what the points attain and a count by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from autorank.errors import ConfigError
from autorank.front import front_of
from autorank.scene import AXES, scene
from tests.sweep_samples import header, records

PAIRS = [(x, y) for x in AXES for y in AXES if x != y]


def attains(axis, needed, value):
    """Whether `value` is at least as good as `needed` on an axis."""
    return value <= needed if axis.direction == "min" else value >= needed


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("axes", PAIRS, ids="-".join)
def test_any_two_axes_show_the_values_and_the_border_of_what_is_attained(axes, direction):
    head = header(direction=direction, metric="m")
    done = records(head, 60)
    front = front_of(done, head.objectives)
    shown = scene(head, done, front, axes)
    by_number = {r.number: r for r in done}
    assert all((m.x, m.y) == tuple(by_number[m.number].value(name) for name in axes) for m in shown.marks)
    assert len(shown.marks) == sum(r.status != "failed" for r in done)
    assert {m.number for m in shown.marks if m.on_front} == {r.number for r in front}
    assert shown.dense == tuple(head.dense.score if name == "score" else 1.0 for name in axes)
    assert (shown.x.name, shown.y.name) == axes
    members = [m for m in shown.marks if m.on_front]
    corners = shown.line
    assert all(a[0] <= b[0] and (a[0] == b[0] or a[1] == b[1]) for a, b in itertools.pairwise(corners))
    best = min if shown.y.direction == "min" else max
    for (x, y), (x2, y2) in itertools.pairwise(corners):
        if y == y2 and x < x2:
            between = (x + x2) / 2
            assert y == best(m.y for m in members if attains(shown.x, between, m.x))
    unbeaten = {
        (m.x, m.y)
        for m in members
        if not any(
            attains(shown.x, m.x, o.x) and attains(shown.y, m.y, o.y) and (o.x, o.y) != (m.x, m.y) for o in members
        )
    }
    assert unbeaten == set(corners[::2])


def test_the_size_shows_the_first_objective_that_is_on_no_axis():
    head = header(objectives=("score", "macs_kept", "latency_kept"))
    done = records(head, 12)
    assert "latency" in scene(head, done, ()).third
    assert "MACs" in scene(head, done, (), ("latency_kept", "score")).third
    assert "accuracy" in scene(head, done, (), ("bytes_kept", "params_kept")).third
    assert scene(header(), done, (), ("macs_kept", "score")).third == ""


def test_trials_without_a_value_on_these_axes_are_counted():
    head = header()
    done = tuple(replace(r, kept={"macs_kept": 0.5}) if r.status == "complete" else r for r in records(head, 12))
    without = sum(r.status == "complete" for r in done)
    assert f"{without} without a value on these axes" in scene(head, done, (), ("latency_kept", "score")).note
    assert "without" not in scene(head, done, ()).note


@pytest.mark.parametrize(
    "axes", [("score", "score"), ("score", "watts"), ("macs_kept",)], ids=["twice", "unknown", "one"]
)
def test_axes_that_are_none(axes):
    with pytest.raises(ConfigError, match=r"two different ones of score, macs_kept"):
        scene(header(), (), (), axes)


@pytest.mark.parametrize("axes", PAIRS, ids="-".join)
def test_labels_stand_on_the_free_side(axes):
    """Beyond the front there is no trial; a label may go there unless that is the edge of the figure."""
    head = header()
    done = records(head, 60)
    shown = scene(head, done, front_of(done, head.objectives), axes)
    for mark, _ in shown.labels:
        right, up = shown.free_side(mark)
        beyond = 1 if shown.x.direction == "max" else -1
        if right == beyond:
            assert up == (1 if shown.y.direction == "max" else -1)
        else:
            place = shown.x.place(mark.x)
            assert (place if beyond < 0 else 1 - place) <= 0.25
    assert all(math.isfinite(v) for axis in (shown.x, shown.y) for v in (axis.low, axis.high))
