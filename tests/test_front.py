import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorank.errors import ConfigError, EmptyFrontError
from autorank.front import (
    dominates,
    front_of,
    hypervolume,
    knee,
    non_dominated,
    parse_constraint,
    parse_objectives,
    recommend,
    reference_point,
    select,
)
from autorank.types import Choice, Constraint, Evaluation, Fidelity, FrontPoint, Objective, Plan, TrialRecord

FULL = Fidelity(100)
SCORE, MACS = Objective("score", "max"), Objective("macs_kept", "min")


def record(number, score, macs, *, params=None, status="complete", fidelity=FULL):
    plan = Plan.of({"conv": Choice("tucker2", (number + 1, 2))})
    kept = {"macs_kept": macs, "params_kept": macs if params is None else params}
    return TrialRecord(number, plan, fidelity, status, score=score, kept=kept)


def random_points(dimensions, count, seed, levels=None):
    rng = Random(seed)
    draw = (lambda: rng.randrange(levels) / levels) if levels else rng.random
    return [tuple(draw() for _ in range(dimensions)) for _ in range(count)]


# Geometry


def by_definition(points, directions):
    """Non-dominated points straight from the definition, of equal ones the first."""
    signs = [1 if d == "min" else -1 for d in directions]
    turned = [tuple(s * x for s, x in zip(signs, p, strict=True)) for p in points]
    return [
        i
        for i, a in enumerate(turned)
        if not any(b != a and all(y <= x for x, y in zip(a, b, strict=True)) for b in turned) and turned.index(a) == i
    ]


@pytest.mark.parametrize("directions", [("max", "min"), ("min", "min"), ("max", "min", "min"), ("min",)], ids="/".join)
@pytest.mark.parametrize("levels", [None, 4], ids=["all-different", "many-equal"])
def test_non_dominated_is_the_definition(directions, levels):
    for seed in range(20):
        points = random_points(len(directions), 40, seed, levels)
        assert non_dominated(points, directions) == by_definition(points, directions)


def test_points_without_a_value_are_no_points():
    points = [(math.nan, 0.1), (None, 0.1), (math.inf, 0.1), (80.0, 0.5), (80.0, 0.5)]
    assert non_dominated(points, ("max", "min")) == [3]
    assert hypervolume(points, (0.0, 1.0), ("max", "min")) == pytest.approx(40.0)
    assert non_dominated([], ("max", "min")) == []
    assert hypervolume([], (0.0, 1.0), ("max", "min")) == 0.0


def volume_by_inclusion_exclusion(points, reference):
    """Union of boxes [p, reference], all objectives minimised."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            corner = [max(column) for column in zip(*subset, strict=True)]
            total += (-1) ** (size + 1) * math.prod(max(0.0, r - c) for c, r in zip(corner, reference, strict=True))
    return total


def volume_by_grid(points, reference, cells):
    """Count cells of a grid on which all coordinates lie."""
    axes = np.meshgrid(*[(np.arange(cells) + 0.5) / cells] * len(reference), indexing="ij")
    covered = np.zeros_like(axes[0], dtype=bool)
    for point in points:
        covered |= np.logical_and.reduce([axis >= x for axis, x in zip(axes, point, strict=True)])
    return covered.mean()


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_by_inclusion_exclusion(dimensions):
    for seed in range(10):
        points = random_points(dimensions, 9, seed)
        expected = volume_by_inclusion_exclusion(points, (0.9,) * dimensions)
        assert hypervolume(points, (0.9,) * dimensions, ("min",) * dimensions) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_by_counting_cells(dimensions):
    for seed in range(5):
        points = random_points(dimensions, 12, seed, levels=8)
        expected = volume_by_grid(points, (1.0,) * dimensions, 8)
        assert hypervolume(points, (1.0,) * dimensions, ("min",) * dimensions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "directions", [("max", "min"), ("max", "min", "min"), ("min", "max", "min", "max")], ids="/".join
)
def test_hypervolume_as_optuna_computes_it(directions):
    from optuna._hypervolume import compute_hypervolume

    signs = np.array([1.0 if d == "min" else -1.0 for d in directions])
    for seed in range(5):
        points = np.array(random_points(len(directions), 60, seed))
        reference = np.where(signs > 0, 1.0, 0.0)
        expected = compute_hypervolume(points * signs, reference * signs)
        assert hypervolume(points.tolist(), reference.tolist(), directions) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=15), st.randoms())
def test_hypervolume_ignores_order_and_dominated_points_and_grows(points, rng):
    directions, reference = ("min", "max", "min"), (1.0, 0.0, 1.0)
    whole = hypervolume(points, reference, directions)
    shuffled = list(points)
    rng.shuffle(shuffled)
    assert hypervolume(shuffled, reference, directions) == pytest.approx(whole, abs=1e-12)
    front = [points[i] for i in non_dominated(points, directions)]
    assert hypervolume(front, reference, directions) == pytest.approx(whole, abs=1e-12)
    assert hypervolume(points[:-1], reference, directions) <= whole + 1e-12


@pytest.mark.parametrize("reference", [(math.nan, 1.0), (math.inf, 1.0)])
def test_hypervolume_needs_a_finite_reference(reference):
    with pytest.raises(ValueError, match="not finite"):
        hypervolume([(0.5, 0.5)], reference, ("min", "min"))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 values for 3 objectives"):
        non_dominated([(1.0, 2.0)], ("max", "min", "min"))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(90, 1.0), (89, 0.5), (60, 0.4), (10, 0.1)], 1),
        ([(10, 0.1), (60, 0.4), (89, 0.5), (90, 1.0)], 2),
        ([(90, 1.0), (50, 0.55), (10, 0.1)], 0),  # all on the chord: the first
        ([(90, 0.5)], 0),
        ([(math.nan, 0.1), (90, 0.5), (80, 0.9)], 1),
    ],
    ids=["bulge", "other-order", "straight", "single", "not-finite"],
)
def test_knee(points, expected):
    assert knee(points, ("max", "min")) == expected


def test_knee_is_the_point_furthest_from_the_chord():
    rng = Random(3)
    for _ in range(20):
        xs = sorted(rng.random() for _ in range(12))
        points = [(x, (1 - x) ** rng.uniform(2, 4)) for x in xs]
        front = [points[i] for i in non_dominated(points, ("min", "min"))]
        low, high = np.min(front, axis=0), np.max(front, axis=0)
        scaled = (np.array(front) - low) / (high - low)
        start, end = scaled[0], scaled[-1]
        # Normal of the chord, towards the better side.
        across = np.array([end[1] - start[1], start[0] - end[0]])
        distances = (scaled - start) @ across / np.linalg.norm(across)
        assert points[knee(points, ("min", "min"))] == front[int(np.argmax(distances))]


def test_knee_of_nothing():
    with pytest.raises(EmptyFrontError, match="finite"):
        knee([(None, 1.0)], ("max", "min"))


@pytest.mark.parametrize(
    ("direction", "dense", "expected"),
    [("max", 91.5, 0.0), ("max", -2.0, -4.0), ("min", 0.4, 0.8), ("min", -3.0, 0.0), ("max", 0.0, -1.0)],
)
def test_reference_point(direction, dense, expected):
    objectives = (Objective("score", direction), MACS)
    assert reference_point(objectives, dense) == (expected, 1.0)
    assert reference_point(objectives, Evaluation(dense, 0.1)) == (expected, 1.0)


# Records


def test_dominates_compares_records():
    a, b, same = record(0, 90, 0.5), record(1, 89, 0.6), record(2, 90, 0.5)
    assert dominates(a, b, (SCORE, MACS))
    assert not dominates(b, a, (SCORE, MACS))
    assert not dominates(a, same, (SCORE, MACS))
    assert not dominates(record(3, None, 0.1), a, (SCORE, MACS))
    assert dominates(b, a, (Objective("score", "min"), Objective("macs_kept", "max")))


def test_front_holds_only_complete_full_records_within_the_constraints():
    records = [
        record(5, 88.0, 0.5),
        record(0, 90.0, 0.9),
        record(1, 99.0, 0.1, status="pruned"),
        record(2, 99.0, 0.1, status="failed"),
        record(3, 99.0, 0.1, fidelity=Fidelity(0)),
        record(4, math.nan, 0.1),
        record(6, 88.0, 0.5),
        record(7, 50.0, 0.05),
        record(8, 70.0, 0.3),
    ]
    assert [r.number for r in front_of(records, (SCORE, MACS))] == [0, 5, 8, 7]
    bounds = (Constraint("score", ">=", 60.0), Constraint("macs_kept", "<=", 0.5))
    assert [r.number for r in front_of(records, (SCORE, MACS), bounds)] == [5, 8]
    assert front_of(records, (SCORE, MACS), (Constraint("latency_kept", "<=", 0.5),)) == ()
    assert [r.number for r in front_of(records, (SCORE, MACS), fidelity=Fidelity(0))] == [3]
    assert front_of([], (SCORE, MACS)) == ()


def test_front_of_a_score_to_minimise_has_the_smallest_first():
    records = [record(0, 0.5, 0.3), record(1, 0.2, 0.8), record(2, 0.6, 0.9)]
    assert [r.number for r in front_of(records, (Objective("score", "min"), MACS))] == [1, 0]


# Parsing


@pytest.mark.parametrize(
    ("given", "metric", "expected"),
    [
        ("accuracy,macs", "accuracy", ["score", "macs_kept"]),
        (" Score , latency_kept ", "accuracy", ["score", "latency_kept"]),
        (["psnr", "params", "bytes"], "psnr", ["score", "params_kept", "bytes_kept"]),
        (("macs", "score"), "accuracy", ["macs_kept", "score"]),
    ],
    ids=str,
)
def test_objectives(given, metric, expected):
    parsed = parse_objectives(given, metric, "min")
    assert [o.name for o in parsed] == expected
    assert all(o.direction == "min" for o in parsed)
    assert parse_objectives(given, metric, "max")[expected.index("score")].direction == "max"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("accuracy", "1 given, two or three are needed"),
        ("", "0 given"),
        ("accuracy,macs,params,bytes", "4 given"),
        ("macs,params", "no score; add accuracy"),
        ("accuracy,macs,macs_kept", "'macs_kept' is the same axis as 'macs'"),
        ("accuracy,score", "same axis"),
        ("accuracy,mcas", r"unknown name 'mcas' \(did you mean 'macs'\?\); allowed are score, accuracy, macs, params"),
        (["accuracy", 3], "not a list of names"),
    ],
    ids=str,
)
def test_wrong_objectives(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_objectives(given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs_kept<=0.5", Constraint("macs_kept", "<=", 0.5)),
        ("macs <= 50%", Constraint("macs_kept", "<=", 0.5)),
        ("params<=50 %", Constraint("params_kept", "<=", 0.5)),
        ("latency ≤ 1", Constraint("latency_kept", "<=", 1.0)),
        ("score>=90", Constraint("score", ">=", 90.0)),
        ("accuracy>=88.5%", Constraint("score", ">=", 88.5)),
        ("score<=-0.25", Constraint("score", "<=", -0.25)),
        ("bytes>=1e-1", Constraint("bytes_kept", ">=", 0.1)),
    ],
    ids=str,
)
def test_constraint(text, expected):
    assert parse_constraint(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs<0.5", "operator '<' is not known; allowed are <= and >="),
        ("macs=0.5", "operator '='"),
        ("macs<=50", "above 0 and at most 1; write for example 0.5 or 50%"),
        ("macs<=0", "above 0"),
        ("macs<=nan", "finite"),
        ("macs<=half", "'half' is not a number"),
        (
            "flops<=0.5",
            "unknown name 'flops'; did you mean macs. one of them is two FLOPs; allowed are score, accuracy, macs",
        ),
        ("macs", "write it as name<=number"),
        ("<=0.5", "write it as name<=number"),
        ("", "write it as"),
        (0.5, "not a text"),
    ],
    ids=str,
)
def test_wrong_constraint(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_constraint(text)


def test_percent_of_a_metric_that_is_no_percentage():
    with pytest.raises(ConfigError, match="plain number"):
        parse_constraint("psnr>=30%", "psnr")


# Taking a point

FRONT = [
    record(3, 90.0, 0.9),
    record(1, 88.0, 0.48, params=0.7),
    record(2, 87.5, 0.5, params=0.4),
    record(0, 60.0, 0.2),
]
POINTS = [FrontPoint(r) for r in FRONT]


def test_recommend_says_why():
    chosen = recommend(FRONT, 88.4, "max", 1.0)
    assert chosen.record.number == 1
    assert chosen.reason == (
        "cheapest of the points that lose at most 1 point against the dense model (88.40 → 88.00, 0.48 of the MACs)"
    )
    by_params = recommend(FRONT, 88.4, "max", 1.0, (SCORE, Objective("params_kept", "min")))
    assert by_params.record.number == 2
    assert "0.40 of the parameters" in by_params.reason


def test_recommend_takes_the_knee_when_everything_loses_too_much():
    chosen = recommend(FRONT, 99.0, "max", 1.0)
    assert chosen.record.number == FRONT[knee([(r.score, r.value("macs_kept")) for r in FRONT], ("max", "min"))].number
    assert chosen.reason.startswith("the knee of the front, as no point loses at most 1 point")


def test_recommend_for_a_score_to_minimise():
    records = [record(0, 0.30, 0.9), record(1, 0.35, 0.5), record(2, 0.9, 0.1)]
    assert recommend(records, 0.28, "min", 0.1).record.number == 1
    assert recommend(records, 0.1, "min", 0.01).reason.startswith("the knee")


def test_recommend_survives_records_without_values():
    records = [record(0, None, 0.1, status="failed"), record(1, math.nan, 0.2), record(2, 50.0, 0.3)]
    assert recommend(records, 90.0).record.number == 2
    with pytest.raises(EmptyFrontError):
        recommend(records[:2], 90.0)
    with pytest.raises(EmptyFrontError):
        recommend([], 90.0)


@pytest.mark.parametrize("drop", [-1.0, math.nan, math.inf])
def test_wrong_max_drop(drop):
    with pytest.raises(ConfigError, match="max-drop"):
        recommend(FRONT, 88.4, max_drop=drop)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 1),
        ({"max_drop": 1.0}, 1),
        ({"max_drop": 0.0}, 3),
        ({"min_score": 87.5}, 1),
        ({"min_score": 89}, 3),
        ({"max_macs": 0.5}, 1),
        ({"max_macs": 0.2}, 0),
        ({"min_score": 50, "max_macs": 0.49}, 0),
        ({"point": 2}, 2),
        ({"point": "2"}, 2),
        ({"point": "best"}, 3),
        ({"point": "cheapest"}, 0),
        ({"point": "knee"}, 1),
        ({"point": FRONT[0].plan_id}, 3),
        ({"point": FRONT[0].plan_id[:6].upper()}, 3),
    ],
    ids=str,
)
def test_select(asked, expected):
    assert select(POINTS, dense=Evaluation(88.4, 0.4), **asked).record.number == expected


def test_select_for_a_score_to_minimise():
    points = [FrontPoint(record(0, 0.30, 0.9)), FrontPoint(record(1, 0.35, 0.5)), FrontPoint(record(2, 0.9, 0.1))]
    assert select(points, dense=0.28, direction="min", min_score=0.35).record.number == 1
    assert select(points, dense=0.28, direction="min", max_macs=0.6).record.number == 1
    assert select(points, dense=0.28, direction="min", point="best").record.number == 0


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"min_score": 95}, EmptyFrontError, "meets --min-score 95; the nearest is point 3 .*90.00, 0.90 of the MACs"),
        ({"max_macs": 0.1}, EmptyFrontError, "meets --max-macs 0.1; the nearest is point 0"),
        ({"max_drop": 1, "max_macs": 0.45}, EmptyFrontError, "--max-drop 1 --max-macs 0.45; the nearest is point 1"),
        ({"point": 17}, ConfigError, "point '17' is not on the front; its points are 0, 1, 2, 3"),
        ({"point": "abc"}, ConfigError, "not on the front"),
        ({"point": 1, "max_drop": 1}, ConfigError, "cannot be combined"),
        ({"max_drop": -1}, ConfigError, "max-drop"),
        ({"max_macs": 50}, ConfigError, "ratio"),
        ({"min_score": math.nan}, ConfigError, "finite"),
    ],
    ids=str,
)
def test_select_refuses(asked, error, message):
    with pytest.raises(error, match=message):
        select(POINTS, dense=88.4, **asked)


def test_select_from_an_empty_front():
    with pytest.raises(EmptyFrontError, match="empty"):
        select([], dense=88.4)
