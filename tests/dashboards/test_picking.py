"""The sliders pick what the command line picks, and say why; the command that is shown does what it says."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from autorank.dashboards.library import Library, SweepView
from autorank.dashboards.picking import Picked, export_command, pick_by_drop, pick_by_factor
from autorank.errors import EmptyFrontError
from autorank.journal import Journal
from autorank.sweep import SearchResult, open_sweep
from tests.dashboards.samples import write_sweep
from tests.sweep_samples import header, records

SWEEPS = {
    "accuracy": header(),
    "loss": header(direction="min", metric="loss"),
    "three": header(objectives=("score", "latency_kept", "macs_kept")),
    "costs": header(objectives=("macs_kept", "params_kept")),
}


def viewed(directory: Path) -> SweepView:
    library = Library([directory])
    library.poll()
    (view,) = library.sweeps()
    return view


@pytest.fixture(scope="module", params=list(SWEEPS))
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepView, SearchResult]:
    directory, head = tmp_path_factory.mktemp("picking") / request.param, SWEEPS[request.param]
    with Journal(directory) as journal:
        journal.write_header(head)
        for record in records(head, 60, seed=3):
            journal.write_trial(record)
    return viewed(directory), open_sweep(directory)


def told(picked: Picked, found: SearchResult, **rule: float) -> None:
    """Compare with the rule of the command line."""
    assert "\n" not in picked.reason
    if picked.point is not None:
        assert picked.point == found.best(**rule)  # type: ignore[arg-type]
        assert f"#{picked.point.record.number} " in picked.reason
        return
    assert picked.nearest is not None
    number = picked.nearest.record.number
    with pytest.raises(EmptyFrontError, match=f"the nearest is point {number} "):
        found.best(**rule)  # type: ignore[arg-type]
    assert f"the nearest is #{number} " in picked.reason


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.3, 1.0, 2.5, 7.0, 40.0])
def test_a_loss_picks_what_max_drop_picks(sweep: tuple[SweepView, SearchResult], lost: float) -> None:
    view, found = sweep
    told(pick_by_drop(view, lost), found, max_drop=lost)


@pytest.mark.parametrize("times", [1.0, 1.1, 1.5, 2.0, 3.0, 5.0, 6.6, 50.0])
def test_a_factor_picks_what_max_macs_picks(sweep: tuple[SweepView, SearchResult], times: float) -> None:
    view, found = sweep
    told(pick_by_factor(view, times), found, max_macs=1 / times)


def test_reasons_are_said_in_the_words_of_the_sliders(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", 60)
    view = viewed(tmp_path)
    picked = pick_by_factor(view, 2)
    assert picked.point is not None
    record = picked.point.record
    assert picked.reason == (
        f"the best point with 2× fewer MACs: #{record.number} "
        f"(92.50 → {record.score:.2f}, {1 / record.kept['macs_kept']:.2f}× fewer MACs)"
    )
    assert pick_by_factor(view, 100).reason.startswith("no point has 100× fewer MACs; the nearest is #")
    assert pick_by_drop(view, 0).reason.startswith("no point loses at most 0 points; the nearest is #")
    assert pick_by_drop(view, 30).reason.startswith("the cheapest point that loses at most 30 points: #")


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, float("nan"), float("inf")])
def test_bounds_that_make_no_sense_pick_nothing_and_say_so(tmp_path: Path, value: float) -> None:
    write_sweep(tmp_path / "one", 12)
    view = viewed(tmp_path)
    assert pick_by_factor(view, value).point is None
    assert "at least 1" in pick_by_factor(view, value).reason
    if value != value or value < 0:
        assert pick_by_drop(view, value).point is None
        assert "at least 0" in pick_by_drop(view, value).reason


@pytest.mark.parametrize("count", [None, 0], ids=["preparing", "no trial"])
def test_without_a_front_nothing_is_picked(tmp_path: Path, count: int | None) -> None:
    if count is None:
        with Journal(tmp_path / "one"):
            pass
    else:
        write_sweep(tmp_path / "one", count, ended="")
    view = viewed(tmp_path)
    for picked in (pick_by_drop(view, 1.0), pick_by_factor(view, 2.0)):
        assert picked.point is None
        assert picked.reason


@pytest.mark.parametrize(
    "name",
    ["it's $(touch here); a `sweep` & more", "it's\u202e\x1b[31m a\n\\trap", os.fsdecode(b"no text \xff'")],
    ids=["special", "unseen", "bytes"],
)
def test_the_command_is_quoted_for_a_shell(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    write_sweep(directory, 6)
    command = export_command(viewed(directory), 3)
    assert command.isprintable()
    code = (
        f"autorank() {{ {shlex.quote(sys.executable)} -c 'import sys; print(ascii(sys.argv[1:]))' \"$@\"; }}; {command}"
    )
    said = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.strip() == ascii(["export", str(directory), "--point", "3"])
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
