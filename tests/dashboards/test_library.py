"""The library of sweeps: what it lists while sweeps come, grow, end, break, mend and go."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import pytest

from autorank.dashboards.library import Library, SweepView
from autorank.journal import FILE_NAME, read
from autorank.sweep import open_sweep
from tests.dashboards.samples import BEGAN, Growing, write_many, write_sweep
from tests.nobody import as_nobody
from tests.sweep_samples import HOSTILE


def looked(*places: Path) -> Library:
    library = Library(places)
    library.poll()
    return library


def only(library: Library) -> SweepView:
    (view,) = library.sweeps()
    return view


def until(condition: object) -> None:
    """Wait until a condition holds; the test runner ends what never does."""
    while not condition():  # type: ignore[operator]
        time.sleep(0.01)


def test_a_view_says_what_the_sweep_found(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", 40, sweep_id="digits-7")
    view, found = only(looked(tmp_path)), open_sweep(tmp_path / "one")
    assert view.contents == read(tmp_path / "one")
    assert view.points == found.points
    assert view.points[0].test_score is not None
    assert view.recommended is not None
    assert (view.recommended.record, view.why) == (found.recommended.record, found.recommended.reason)
    assert view.header == found.header.measured(found.dense)
    assert (view.name, view.directory, view.created) == ("digits-7", tmp_path / "one", BEGAN)
    assert (view.state.stage, view.state.done, view.problem) == ("ended", 40, "")
    assert view.point(view.points[1].record.number) is view.points[1]
    off = next(r for r in view.contents.records if r not in [p.record for p in view.points])
    assert view.point(off.number) is None
    assert view.record(off.number) is off


def test_places_are_sweeps_or_hold_sweeps_and_each_sweep_is_listed_once(tmp_path: Path) -> None:
    write_sweep(tmp_path / "root" / "a", 3, created=BEGAN)
    write_sweep(tmp_path / "root" / "b", 3, created=BEGAN + 10)
    write_sweep(tmp_path / "alone", 3, created=BEGAN + 5)
    (tmp_path / "root" / "notes").mkdir()
    (tmp_path / "root" / "file.txt").write_text("no sweep")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "alone", target_is_directory=True)
    library = looked(tmp_path / "root", tmp_path / "alone", tmp_path / "root" / "a", tmp_path / "root" / ".." / "root")
    assert [view.name for view in library.sweeps()] == ["b", "alone", "a"]
    assert library.problems() == ()


def test_keys_are_opaque_and_stay_and_tell_equal_names_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("west", "east"):
        write_sweep(tmp_path / name, 3, sweep_id="same")
    views = looked(tmp_path).sweeps()
    assert [view.name for view in views] == ["same", "same"]
    assert len({view.key for view in views}) == 2
    assert all(view.key.isalnum() and view.directory.name not in view.key for view in views)
    monkeypatch.chdir(tmp_path)
    assert {view.key for view in looked(Path("west"), Path("./east")).sweeps()} == {view.key for view in views}
    library = looked(tmp_path)
    assert library.get(views[0].key) is not None
    assert library.get("nonsense") is None
    assert library.get(str(tmp_path / "west")) is None


def test_a_sweep_is_followed_from_nothing_to_its_end(tmp_path: Path) -> None:
    library = looked(tmp_path / "later")
    assert library.sweeps() == ()
    assert library.problems() == (f"{tmp_path / 'later'} does not exist yet",)
    with Growing(tmp_path / "later" / "one", 9, sweep_id="digits-9") as sweep:
        library.poll()
        assert library.problems() == ()
        assert (only(library).name, only(library).state.stage, only(library).why) == ("one", "preparing", "")
        sweep.begin()
        seen = []
        for _ in range(3):
            sweep.grow(3)
            library.poll()
            view = only(library)
            seen.append((view.name, view.state.stage, view.state.done, view.state.total))
            assert view.points == open_sweep(view.directory).points
        assert seen == [("digits-9", "running", done, 9) for done in (3, 6, 9)]
        sweep.end()
    library.poll()
    view = only(library)
    assert (view.state.stage, view.state.reason, view.contents.dense) == (
        "ended",
        "all trials done",
        read(view.directory).dense,
    )


def test_versions_grow_with_every_change_and_only_then(tmp_path: Path) -> None:
    write_sweep(tmp_path / "still", 3)
    with Growing(tmp_path / "one", 9) as sweep:
        sweep.begin()
        library = looked(tmp_path)
        before, of_all = {view.key: view for view in library.sweeps()}, library.version
        library.poll()
        assert all(library.get(key) is view for key, view in before.items())
        assert library.version == of_all
        sweep.grow()
        library.poll()
        grown = {view.name: view.version - before[view.key].version for view in library.sweeps()}
        assert grown["still"] == 0
        assert grown["one"] > 0
        assert library.version > of_all
    later = looked(tmp_path)  # after a restart of the server
    assert all(view.version > before[view.key].version for view in later.sweeps())


def test_a_killed_sweep_has_stopped_and_a_resumed_one_runs(tmp_path: Path) -> None:
    with Growing(tmp_path / "unborn", 5):
        pass
    with Growing(tmp_path / "one", 9) as sweep:
        sweep.begin()
        sweep.grow(4)
    library = looked(tmp_path)
    assert {view.name: view.state.stage for view in library.sweeps()} == {"one": "stopped", "unborn": "stopped"}
    with sweep:
        sweep.grow(2)
        library.poll()
        view = next(view for view in library.sweeps() if view.name == "one")
        assert (view.state.stage, view.state.done) == ("running", 6)


def test_a_half_written_line_waits_and_a_damaged_one_is_said_until_it_is_mended(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", 8, ended="", measured=False)
    write_sweep(tmp_path / "two", 3)
    path = tmp_path / "one" / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    library = looked(tmp_path)
    views = {view.name: view for view in library.sweeps()}
    assert (views["one"].state.done, views["one"].problem) == (7, "")
    path.write_bytes(whole + b"nonsense\n")
    library.poll()
    views = {view.name: view for view in library.sweeps()}
    assert "line 10: not a journal entry" in views["one"].problem
    assert views["one"].state.done == 8
    assert views["two"].problem == ""
    assert library.problems() == (views["one"].problem,)
    path.write_bytes(whole)
    library.poll()
    assert library.problems() == ()


@pytest.mark.parametrize(
    "line",
    [b'{"event":"sweep","header":[]}', b'{"event":"surprise"}', b"[1]", b"\xff", b'{"event":"end"}', b"[" * 9999],
    ids=["header", "event", "list", "bytes", "end", "deep"],
)
def test_a_journal_of_another_program_is_one_line_and_ends_nothing(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / FILE_NAME).write_bytes(line + b"\n")
    write_sweep(tmp_path / "one", 3)
    library = looked(tmp_path)
    views = {view.name: view for view in library.sweeps()}
    assert views["odd"].problem
    assert "\n" not in views["odd"].problem
    assert views["one"].state.stage == "ended"


@pytest.mark.parametrize("settings", [{"trials": "many"}, {"max_drop": "no"}], ids=lambda given: next(iter(given)))
def test_settings_that_make_no_sense_do_not_end_the_looking(tmp_path: Path, settings: dict[str, object]) -> None:
    head, _ = write_sweep(tmp_path / "odd", 3)
    path = tmp_path / "odd" / FILE_NAME
    (name, value), old = next(iter(settings.items())), head.config[next(iter(settings))]
    path.write_text(path.read_text().replace(f'"{name}":{old}', f'"{name}":"{value}"'))
    write_sweep(tmp_path / "one", 3)
    library = looked(tmp_path)
    assert {view.directory.name for view in library.sweeps()} == {"odd", "one"}
    assert all("\n" not in line for line in library.problems())


def test_a_journal_that_is_replaced_cut_or_taken_away_is_read_again(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweeps" / "one", 9)
    write_sweep(tmp_path / "other", 20, sweep_id="other", seed=5)
    path = tmp_path / "sweeps" / "one" / FILE_NAME
    library = looked(tmp_path / "sweeps")
    shutil.copy(tmp_path / "other" / FILE_NAME, path)
    library.poll()
    assert (only(library).name, only(library).state.done) == ("other", 20)
    assert only(library).points == open_sweep(path.parent).points
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]))
    library.poll()
    assert (only(library).state.stage, only(library).state.done) == ("stopped", 5)
    assert only(library).points == open_sweep(path.parent).points
    path.rename(tmp_path / "kept")
    library.poll()
    assert only(library).points == ()
    assert only(library).problem == f"there is no {FILE_NAME} in {path.parent} any more"
    version = only(library).version
    library.poll()
    assert only(library).version == version
    (tmp_path / "kept").rename(path)
    library.poll()
    assert (only(library).name, only(library).problem) == ("other", "")


def test_a_deleted_sweep_leaves_the_list_and_one_out_of_reach_stays_as_it_was_known(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sweep(tmp_path / "drive" / name, 5)
    library = looked(tmp_path / "drive")
    shutil.rmtree(tmp_path / "drive" / "a")
    library.poll()
    before = only(library)
    assert before.name == "b"
    (tmp_path / "drive").rename(tmp_path / "away")
    library.poll()
    assert only(library).points == before.points
    assert only(library).problem == f"{tmp_path / 'drive'} does not exist yet"
    assert library.problems() == (only(library).problem,)
    (tmp_path / "away").rename(tmp_path / "drive")
    library.poll()
    assert (only(library).problem, library.problems()) == ("", ())


@pytest.mark.parametrize("closed", ["drive", "drive/one", "drive/one/journal.jsonl"])
def test_what_may_not_be_read_is_said_until_it_may(closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others as a whole
        folder = Path(name)
        folder.chmod(0o755)
        write_sweep(folder / "drive" / "one", 5)
        mode = (folder / closed).stat().st_mode
        (folder / closed).chmod(0)
        library = Library([folder / "drive"])
        with as_nobody():
            library.poll()
        (problem,) = library.problems()
        assert "Permission denied" in problem
        assert str(folder / "drive") in problem
        (folder / closed).chmod(mode)
        library.poll()
        assert library.problems() == ()
        assert only(library).state.done == 5
        (folder / closed).chmod(0)  # and what was known stays
        with as_nobody():
            library.poll()
        assert len(library.problems()) == 1
        assert only(library).state.done == 5
        (folder / closed).chmod(mode)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["a file as a place", "a directory as a journal"])
def test_places_of_the_wrong_kind(tmp_path: Path, make: object) -> None:
    place = tmp_path / "place"
    if make is Path.touch:
        place.touch()
        assert looked(place).problems() == (f"cannot read {place}: Not a directory",)
    else:
        (place / "one" / FILE_NAME).mkdir(parents=True)
        assert looked(place).sweeps() == ()


def test_hostile_names_become_one_line(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", 3, sweep_id=f"{HOSTILE}\n\x1b[31m$x^2$" + "y" * 400)
    assert only(looked(tmp_path)).name.startswith(HOSTILE)
    assert only(looked(tmp_path)).name.isprintable()
    assert len(only(looked(tmp_path)).name) <= 120


def test_the_list_is_there_at_once_and_fills_in_the_background(tmp_path: Path) -> None:
    directories = write_many(tmp_path, 12, 60, 20, layers=20)
    library = Library([tmp_path], pause=0.01)
    library.start()
    try:
        first = library.sweeps()
        assert {view.directory for view in first} == set(directories)
        until(lambda: not any(view.state.stage == "reading" for view in library.sweeps()))
        views = library.sweeps()
        assert [view.directory for view in views] == list(reversed(directories))  # newest first
        assert [len(view.contents.records) for view in views] == [20] * 11 + [60]
        assert {view.key for view in views} == {view.key for view in first}
        assert views[-1].points == open_sweep(directories[0]).points
        with Growing(tmp_path / "live", 5) as sweep:
            sweep.begin()
            sweep.grow(5)
            until(lambda: len(library.sweeps()) == 13 and any(v.state.stage == "running" for v in library.sweeps()))
        until(lambda: not any(view.state.stage == "running" for view in library.sweeps()))
    finally:
        library.close()
    assert len(library.sweeps()) == 13


def test_a_long_journal_is_shown_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autorank.dashboards.library._PART", 1)
    write_sweep(tmp_path / "one", 6)
    library = Library([tmp_path])
    seen = []
    publish = library._publish
    monkeypatch.setattr(library, "_publish", lambda *a: (publish(*a), seen.append(only(library))))
    library.poll()
    stages = [(view.state.stage, view.state.done) for view in seen]
    assert stages[0] == ("reading", 0)
    assert [done for stage, done in stages if stage == "reading"] == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    assert stages[-1] == ("ended", 6)
    assert all(view.state.seconds_left is None for view in seen)
