"""Two sweeps and two points beside each other: what differs, which is better, and when nobody can say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autorank.dashboards.comparison import Comparison, Row, compare_points, compare_sweeps
from autorank.dashboards.library import Library, SweepView
from autorank.figures import front_table
from autorank.journal import Journal
from autorank.types import Choice, Plan
from tests.dashboards.samples import sweep_header, write_sweep
from tests.sweep_samples import HOSTILE, SECRET, header, records


def viewed(*directories: Path) -> list[SweepView]:
    library = Library(directories)
    library.poll()
    return [next(view for view in library.sweeps() if view.directory == directory) for directory in directories]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[SweepView]:
    root = tmp_path_factory.mktemp("pair")
    write_sweep(root / "one", 40, seed=1)
    settings = {"recovery": {"steps": 300}, "data_args": {"api_key": "0ther", "name": HOSTILE}, "calibration": 7}
    write_sweep(root / "two", 60, seed=2, ended="", measured=False, **settings)
    return viewed(root / "one", root / "two")


def row(found: Comparison | None, name: str) -> Row:
    assert found is not None
    return next(row for row in (*found.figures, *found.differences) if row.name == name)


def test_settings_that_differ_are_listed_without_secrets(pair: list[SweepView]) -> None:
    found = compare_sweeps(*pair)
    assert found.names == ("one", "two")
    assert {row.name: row.values for row in found.differences} == {
        "trials": ("40", "60"),
        "recovery.steps": ("100", "300"),
        "calibration": ("–", "7"),
    }
    assert found.equal > 3
    assert SECRET not in repr(found)
    assert "0ther" not in repr(found)


def test_key_figures_of_sweeps_are_those_of_the_views(pair: list[SweepView]) -> None:
    found, (one, two) = compare_sweeps(*pair), pair
    assert found.note == ""
    assert row(found, "dense score").values == ("92.50 %", "92.50 %")
    assert row(found, "trials").values == ("40 trials of 40", "60 trials of 60")
    assert row(found, "state").values == ("ended, all trials done", "stopped")
    best = [view.points[0].record.score for view in pair]
    assert row(found, "best score").values == tuple(f"{score:.2f} %" for score in best)
    assert row(found, "best score").better == best.index(max(best))
    volumes = [float(text.split()[0]) for text in row(found, "hypervolume").values]
    assert all(text.endswith("(accuracy × MACs kept)") for text in row(found, "hypervolume").values)
    assert row(found, "hypervolume").better == volumes.index(max(volumes))
    kept = [view.recommended.record.kept["macs_kept"] for view in (one, two) if view.recommended]
    assert row(found, "recommended: MACs kept").values == tuple(f"{value:.3f}" for value in kept)
    assert row(found, "recommended: MACs kept").better == kept.index(min(kept))
    assert row(found, "recommended: test score").values[1] == "–"
    assert row(found, "recommended: test score").better is None
    assert row(found, "time of the last run").values == ("prepare 2 s, search 30 s, front 2 s", "–")


def test_turned_around_it_says_the_same(pair: list[SweepView]) -> None:
    there, back = compare_sweeps(*pair), compare_sweeps(*reversed(pair))
    turned = {None: None, 0: 1, 1: 0}
    assert {r.name: (r.values, r.better) for r in there.figures} == {
        r.name: (r.values[::-1], turned[r.better]) for r in back.figures
    }
    assert {r.name: r.values for r in there.differences} == {r.name: r.values[::-1] for r in back.differences}
    same = compare_sweeps(pair[0], pair[0])
    assert same.differences == ()
    assert all(r.better is None for r in same.figures)


@pytest.mark.parametrize(
    "other",
    [
        header(direction="min", metric="loss"),
        replace(header(), fingerprint={"weights": "abc"}),
        replace(header(), dense=replace(header().dense, score=70.0)),
    ],
    ids=["metric", "weights", "dense"],
)
def test_what_does_not_compare_is_not_called_better(tmp_path: Path, other: object) -> None:
    write_sweep(tmp_path / "one", 12)
    with Journal(tmp_path / "two") as journal:
        journal.write_header(other)  # type: ignore[arg-type]
        for record in records(other, 12):  # type: ignore[arg-type]
            journal.write_trial(record)
    one, two = viewed(tmp_path / "one", tmp_path / "two")
    numbers = [view.points[0].record.number for view in (one, two)]
    for found in (compare_sweeps(one, two), compare_points(one, numbers[0], two, numbers[1])):
        assert found is not None
        assert "differ" in found.note
        assert all(row.better is None for row in found.figures)


def test_a_sweep_of_which_nothing_is_known_yet(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", 6)
    with Journal(tmp_path / "two"):
        pass
    one, two = viewed(tmp_path / "one", tmp_path / "two")
    assert compare_sweeps(one, two) == Comparison(("one", "two"), note="two: nothing is known yet")
    assert compare_points(one, 0, two, 0) is None


def test_points_list_the_layers_whose_choices_differ_in_the_order_of_the_network(tmp_path: Path) -> None:
    head = replace(sweep_header("one"), layers=tuple({"name": name} for name in ("stem", "b", "a", "head")))
    choices = {name: Choice("tucker2", (8, 4)) for name in ("stem", "b", "a")}
    many = tuple(range(11, 41))  # in words longer than any column
    choices["a"] = Choice("tensor_train", many)
    others = {**choices, "b": Choice("tucker2", (6, 4)), "head": Choice("channel_svd", (3,))}
    others["a"] = Choice("tensor_train", (*many[:-1], 99))
    done = [replace(r, number=n, status="complete", layers=()) for n, r in enumerate(records(head, 2))]
    done = [replace(r, plan=Plan.of(c)) for r, c in zip(done, (choices, others), strict=True)]
    with Journal(tmp_path / "one") as journal:
        journal.write_header(head)
        for record in done:
            journal.write_trial(record)
    (view,) = viewed(tmp_path / "one")
    found = compare_points(view, 0, view, 1)
    assert found is not None
    assert [(r.name, r.values) for r in found.differences] == [
        ("b", ("tucker2(8×4)", "tucker2(6×4)")),
        ("a", (str(choices["a"]), str(others["a"]))),
        ("head", ("dense", "channel_svd(3)")),
    ]
    assert found.equal == 1
    assert found.names == ("#0", "#1")


def test_figures_of_points_are_those_of_the_table_of_the_front(pair: list[SweepView]) -> None:
    one = pair[0]
    assert one.header is not None
    table = front_table(one.header, one.points).set_index("number")
    first, second = (one.points[i].record.number for i in (0, -1))
    found = compare_points(one, first, one, second)
    for name, column, digits, better in (
        ("score", "score", 2, 0),
        ("test score", "test_score", 2, 0),
        ("MACs kept", "macs_kept", 3, 1),
        ("parameters kept", "params_kept", 3, 1),
    ):
        texts = tuple(f"{table.loc[number, column]:.{digits}f}" for number in (first, second))
        assert tuple(text.removesuffix(" %") for text in row(found, name).values) == texts
        assert row(found, name).better == better
    assert row(found, "latency, measured").values == ("1.5 ms (0.75 of dense)",) * 2
    off = next(r.number for r in one.contents.records if r.status == "failed")
    failed = compare_points(one, first, one, off)
    assert row(failed, "place").values[1] == "failed"
    assert row(failed, "score").values[1] == "–"
    assert compare_points(one, first, one, 999) is None


def test_long_values_are_cut_where_they_differ(tmp_path: Path) -> None:
    for name, end in (("one", "left"), ("two", "right")):
        write_sweep(tmp_path / name, 1, space={"rules": ["x" * 3000, end]})
    found = compare_sweeps(*viewed(tmp_path / "one", tmp_path / "two"))
    left, right = row(found, "space.rules").values
    assert "left" in left
    assert "right" in right
    assert max(len(left), len(right)) <= 130
