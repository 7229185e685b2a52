"""The scene of a Pareto figure and the hypervolume, against brute force and a count by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from autorank.captions import score_label
from autorank.errors import ConfigError
from autorank.front import front_of, knee, recommend, values
from autorank.scene import AXES, OKABE_ITO, scene
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


def test_scene_marks_what_front_says():
    head = header()
    done = records(head, 60)
    front = front_of(done, head.objectives)
    shown = scene(head, done, front)
    assert {m.number for m in shown.marks if m.on_front} == {r.number for r in front}
    assert shown.recommended.number == recommend(front, head.dense.score, "max", 1.0, head.objectives).record.number
    assert shown.knee.number == front[knee([values(r, head.objectives) for r in front], ["max", "min"])].number
    assert shown.dense == (1.0, head.dense.score)
    assert {m.kind for m in shown.marks} == {"full", "pruned"}
    assert set(shown.groups.values()) <= {*OKABE_ITO, "#CC79A7"}
    assert f"{sum(r.status == 'failed' for r in done)} failed" in shown.note
    assert shown.y.low < min(r.score for r in front)
    assert shown.y.high > head.dense.score


@pytest.mark.parametrize("direction", ["max", "min"])
def test_staircase_is_the_border_of_what_is_attained(direction):
    head = header(direction=direction, metric="m")
    done = records(head, 60)
    shown = scene(head, done, front_of(done, head.objectives))
    sign = 1 if direction == "max" else -1
    best = lambda x: max((sign * m.y for m in shown.marks if m.on_front and m.x <= x), default=-math.inf)  # noqa: E731
    corners = shown.line
    assert len(corners) == 2 * sum(m.on_front for m in shown.marks) - 1
    assert all(a[0] <= b[0] and (a[0] == b[0] or a[1] == b[1]) for a, b in itertools.pairwise(corners))
    for (x, y), (x2, _) in zip(corners[::2], [*corners[1::2], (math.inf, 0)], strict=True):
        between = (x + x2) / 2 if math.isfinite(x2) else x + 1
        assert best(between) == sign * y


def test_third_objective_is_the_area_of_the_mark():
    head = header(objectives=("score", "macs_kept", "latency_kept"))
    done = records(head, 30)
    shown = scene(head, done, ())
    kept = {r.number: r.kept.get("latency_kept") for r in done}
    ordered = sorted(shown.marks, key=lambda m: kept[m.number])
    assert [m.size for m in ordered] == sorted(m.size for m in ordered)
    assert (ordered[0].size, ordered[-1].size) == (0.0, 1.0)
    assert "latency kept" in shown.third


@pytest.mark.parametrize(
    ("metric", "direction", "label"),
    [
        ("accuracy", "max", "validation accuracy (%)"),
        ("psnr", "max", "validation psnr (dB)"),
        ("mse", "min", "validation mse (lower is better)"),
        ("f1", "max", "validation f1"),
    ],
)
def test_score_axis_says_unit_and_direction(metric, direction, label):
    assert score_label(header(metric=metric, direction=direction)) == label


def test_cost_axis_says_what_is_divided_by_what():
    head = header()
    assert scene(head, (), ()).x.label == "MACs kept (compressed ÷ dense)"


def test_far_outliers_do_not_squeeze_the_front():
    head = header()
    done = records(head, 40)
    low = replace(done[0], number=99, status="complete", score=-5000.0, kept={"macs_kept": 0.9})
    shown = scene(head, (*done, low), front_of(done, head.objectives))
    assert shown.y.low > 0
    assert any(m.number == 99 for m in shown.marks)
