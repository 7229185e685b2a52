"""Exports that a page asks for, run for real on a small sweep: what comes out, what is refused, what is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autorank
from autorank.dashboards.jobs import Export, Exports
from autorank.dashboards.library import Library, SweepView
from autorank.dashboards.picking import export_command
from autorank.errors import ConfigError
from tests.dashboards.samples import write_sweep
from tests.sweep_samples import HOSTILE

NET = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""
SETTINGS = {
    "model": "python:net_of_the_dashboard_tests:make",
    "data": "digits",
    "space": "small",
    "trials": 4,
    "executor": "inline",
    "calibration": 64,
    "recovery": {"steps": 2, "batch_size": 32, "calibration": 64},
}


def viewed(directory: Path) -> SweepView:
    library = Library([directory])
    library.poll()
    (view,) = library.sweeps()
    return view


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of somebody's own code in which a sweep was run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "net_of_the_dashboard_tests.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        autorank.search(**SETTINGS, sweep_dir="my sweep; $(touch here)", progress=False)
        patch.undo()
        yield folder


@pytest.fixture(scope="module")
def view(project: Path) -> SweepView:
    return viewed(project / "my sweep; $(touch here)")


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[Exports]:
    made = Exports(tmp_path)
    yield made
    made.close()
    assert list(tmp_path.glob("autorank-export-*")) == []


def ended(exports: Exports, token: str) -> Export:
    while (export := exports.status(token)) is not None and export.state == "running":
        time.sleep(0.02)
    assert export is not None
    return export


def unpacked(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a new folder, and return the one directory that is in it."""
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        assert all(not name.startswith(("/", "\\")) and ".." not in Path(name).parts for name in names)
        file.extractall(folder)
    (directory,) = folder.iterdir()
    return directory


def assert_same(directory: Path, view: SweepView, number: int) -> None:
    """Compare an exported directory with the model of the sweep itself."""
    found = autorank.open_sweep(view.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        expected = found.model(found.best(point=number)).eval()
        loaded = autorank.load(directory, found._need_task().model())
    batch = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), expected(batch))


def test_an_export_is_the_model_of_the_sweep_wherever_the_server_was_started(
    exports: Exports, view: SweepView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "net_of_the_dashboard_tests.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    number = view.points[-1].record.number
    token = exports.start(view, number, ("safetensors", "onnx"))
    again = exports.start(view, number, ("onnx", "safetensors"))
    assert again == token
    assert exports.archive(token) is None
    export = ended(exports, token)
    assert (export.state, export.problem) == ("done", "")
    assert any("writing model.onnx" in line for line in export.lines)
    assert str(tmp_path) not in " ".join(export.lines)
    archive = exports.archive(token)
    assert archive is not None
    assert (archive.name, archive.stat().st_size) == (export.name, export.bytes)
    assert export.name.startswith("my-sweep-touch-here-")
    assert export.name.endswith(f"-{number}.zip")
    directory = unpacked(archive, tmp_path / "unpacked")
    assert sorted(path.name for path in directory.iterdir()) == [
        "model.onnx",
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.md",
    ]
    assert_same(directory, view, number)
    assert exports.start(view, number, ("onnx", "safetensors")) == token


def test_the_command_that_is_shown_does_the_same_from_any_directory(view: SweepView, tmp_path: Path) -> None:
    number = view.points[0].record.number
    command = f"{export_command(view, number)} --formats safetensors --out {tmp_path / 'out'}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(tmp_path / "out", view, number)


@pytest.fixture
def made_up(tmp_path: Path) -> SweepView:
    """A sweep without a model: each export of it fails, but only once the process runs."""
    write_sweep(tmp_path / "sweeps" / "one", 40)
    return viewed(tmp_path / "sweeps" / "one")


def test_an_export_that_fails_says_why_in_one_line_and_can_be_asked_for_again(
    exports: Exports, made_up: SweepView
) -> None:
    number = made_up.points[0].record.number
    token = exports.start(made_up, number)
    export = ended(exports, token)
    assert export.state == "failed"
    assert export.problem.startswith("no model given: name it")
    assert exports.archive(token) is None
    assert exports.start(made_up, number) != token


@pytest.mark.parametrize(
    ("number", "formats", "said"),
    [
        (10**9, ("onnx",), "is not on the front"),
        (-1, ("onnx",), "is not on the front"),
        (None, ("safetensors",), "is not on the front"),
        (0, (), "choose at least one"),
        (0, ("onnx", "--overwrite"), "choose at least one"),
        (0, ("pickle",), "choose at least one"),
    ],
    ids=["no trial", "negative", "beaten", "no format", "a flag", "unknown format"],
)
def test_what_does_not_belong_to_the_sweep_is_refused(
    exports: Exports, made_up: SweepView, number: int | None, formats: tuple[str, ...], said: str
) -> None:
    on_front = {point.record.number for point in made_up.points}
    beaten = next(r.number for r in made_up.contents.records if r.number not in on_front)
    number = beaten if number is None else made_up.points[0].record.number if number == 0 else number
    with pytest.raises(ConfigError, match=said):
        exports.start(made_up, number, formats)


@pytest.mark.parametrize("token", ["", "..", "../../etc/passwd", "0" * 32, "x\0y"])
def test_a_token_of_nobody_is_nothing(exports: Exports, token: str) -> None:
    assert exports.status(token) is None
    assert exports.archive(token) is None


@pytest.mark.parametrize(
    "name", [HOSTILE, "../../etc/passwd", "a/b\\c\0d", "-rf", "...", "x" * 500, "名前", "con\nnew\r\nSet-Cookie: a"]
)
def test_names_of_archives_are_safe(exports: Exports, made_up: SweepView, name: str) -> None:
    export = exports.status(exports.start(replace(made_up, name=name), made_up.points[0].record.number))
    assert export is not None
    stem, _, number = export.name.removesuffix(".zip").rpartition("-")
    assert set(export.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    assert stem
    assert not stem.startswith((".", "-"))
    assert number == str(made_up.points[0].record.number)
    assert len(export.name) < 80


def test_two_run_at_once_the_others_wait_and_closing_ends_all(made_up: SweepView, tmp_path: Path) -> None:
    exports = Exports(tmp_path)
    try:
        tokens = [exports.start(made_up, point.record.number) for point in made_up.points[:4]]
        while len(folders := list(tmp_path.glob("autorank-export-*"))) < 2:
            time.sleep(0.01)
        states = [exports.status(token) for token in tokens]
        assert [state and state.state for state in states] == ["running"] * 4
        assert [state and state.lines for state in states[2:]] == [("waiting for other exports",)] * 2
        assert len(folders) == 2
        processes = [job.process for job in exports._jobs.values() if job.process is not None]
        assert all(os.getpgid(process.pid) == process.pid for process in processes)
    finally:
        exports.close()
    assert all(process.poll() is not None for process in processes)
    assert list(tmp_path.glob("autorank-export-*")) == []
    with pytest.raises(ConfigError, match="stopping"):
        exports.start(made_up, made_up.points[0].record.number)


def test_only_the_last_exports_are_kept(view: SweepView, made_up: SweepView, tmp_path: Path) -> None:
    exports = Exports(tmp_path, kept=1)
    try:
        first = exports.start(view, view.points[0].record.number, ("safetensors",))
        assert ended(exports, first).state == "done"
        archive = exports.archive(first)
        assert archive is not None
        second = exports.start(made_up, made_up.points[0].record.number)
        assert ended(exports, second).state == "failed"
        assert exports.status(first) is None
        assert exports.archive(first) is None
        assert not archive.parent.exists()
    finally:
        exports.close()


@pytest.mark.parametrize("spoil", [shutil.rmtree, Path.touch], ids=["gone", "a file"])
def test_where_nothing_can_be_kept_it_says_so(
    made_up: SweepView, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    place = tmp_path / "place"
    if spoil is shutil.rmtree:
        place.mkdir()
    spoil(place)
    exports = Exports(place)
    export = ended(exports, exports.start(made_up, made_up.points[0].record.number))
    exports.close()
    assert export.state == "failed"
    assert export.problem.startswith("the export cannot be kept: No")
