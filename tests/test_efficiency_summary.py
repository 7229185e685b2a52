"""The comparison of searches: its volumes, budgets and ratios against small cases worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from efficiency_summary import Curve, summarise


def run(points: list[tuple[float, float]], strategy: str = "auto", **more: Any) -> dict[str, Any]:
    """Return the line of a search with points of (score, MACs kept), a second each."""
    records = [
        {"point": True, "probe": False, "status": "complete", "score": score, "macs_kept": kept, "seconds": 1.0}
        for score, kept in points
    ]
    return {
        "kind": "search",
        "task": "made up",
        "space": "made up",
        "level": "none",
        "steps": 0,
        "validation": 100,
        "strategy": strategy,
        "seed": 0,
        "needs": [],
        "dense": 100.0,
        "reference": [0.0, 1.0],
        "directions": ["max", "min"],
        "prepare_s": 2.0,
        "processor_s": 2.0 + len(records),
        "before": {"evaluations": 0, "seconds": 0.0},
        "ended": f"all {len(records)} trials done",
        "records": records,
    } | more


def test_the_volume_is_the_share_of_the_rectangle() -> None:
    # (80, 0.5) covers 0.8 · 0.5; (50, 0.2) adds 0.5 · 0.3; the third is beaten by the first.
    curve = Curve.of(run([(80, 0.5), (50, 0.2), (70, 0.6)]))
    assert [round(volume, 9) for _, _, volume in curve.steps] == [0, 40, 55, 55]
    assert [count for count, _, _ in curve.steps] == [0, 1, 2, 3]


def test_the_narrow_corner_is_ten_points_below_the_dense_score() -> None:
    # Of the rectangle of 10 points, (95, 0.5) covers half by half, and what lies below does not count.
    assert Curve.of(run([(95, 0.5), (80, 0.1)]), narrow=True).end[2] == pytest.approx(25)


def test_a_smaller_score_may_be_better() -> None:
    line = run([(1.5, 0.5)], dense=1.0, reference=[3.0, 1.0], directions=["min", "min"])
    assert Curve.of(line).end[2] == pytest.approx(100 * (3 - 1.5) * 0.5 / 2)


def test_probes_cost_seconds_and_are_no_evaluations() -> None:
    line = run([(80, 0.5), (50, 0.2)])
    line["records"][0] |= {"probe": True, "point": False}
    curve = Curve.of(line)
    assert [(n, s) for n, s, _ in curve.steps[1:]] == [(0, 3.0), (1, 4.0)]
    assert curve.steps[1][2] == 0


@pytest.mark.parametrize(
    ("more", "fits_s", "first"),
    [
        pytest.param({}, 0.0, 3.0, id="preparation first"),
        pytest.param({"processor_s": 2.0}, 0.0, 1.5, id="seconds of the processor"),
        pytest.param({"before": {"evaluations": 7, "seconds": 50.0}}, 0.0, 53.0, id="a peer's own seconds"),
        pytest.param({"needs": ["errors"]}, 10.0, 13.0, id="fits that a strategy needs"),
        pytest.param({}, 10.0, 3.0, id="fits that it does not need"),
    ],
)
def test_seconds_hold_all_that_a_search_costs(more: dict[str, Any], fits_s: float, first: float) -> None:
    curve = Curve.of(run([(80, 0.5), (50, 0.2)], **more), fits_s=fits_s)
    assert curve.steps[1][1] == pytest.approx(first)


def test_budgets_beyond_a_search_that_was_cut_have_no_value() -> None:
    points = [(80.0, 0.5), (50.0, 0.2)]
    cut, settled = Curve.of(run(points)), Curve.of(run(points, ended="the hypervolume has not grown"))
    assert [cut.at(0, n) for n in (1, 2, 3)] == [pytest.approx(40), pytest.approx(55), None]
    assert settled.at(0, 3) == pytest.approx(55)
    assert cut.at(1, 2.9) == 0
    assert cut.at(1, 3.0) == pytest.approx(40)
    assert cut.reaches(41) == (2, 4.0)
    assert cut.reaches(56) is None


def test_the_summary_compares_at_equal_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    ours = run([(80.0, 0.5)] * 5 + [(90.0, 0.5)])
    other = run([(60.0, 0.5)] * 4 + [(88.0, 0.5), (88.0, 0.5)], "nsga2")
    found = summarise([ours, other])["none"]
    # 40 against 44 % after five, 45 against 44 % after six.
    ratios = found["lead"]["nsga2"]["evaluations"]
    assert ratios["worst"] == (pytest.approx(40 / 44), 5)
    assert ratios["last"] == (pytest.approx(45 / 44), 6)
    assert found["reach"]["auto"] == {"evaluations": 6, "seconds": 8.0, "reached": 1, "of": 1}
    assert found["evaluations"]["nsga2"]["5"] == [44.0, 0.0]
    assert "6 (" not in capsys.readouterr().err


def test_seeds_are_averaged_only_where_all_have_a_value() -> None:
    rows = [run([(80.0, 0.5)] * 5), run([(60.0, 0.5)] * 10, seed=1)]
    assert summarise(rows)["none"]["evaluations"]["auto"] == {"5": [35.0, 5.0]}
