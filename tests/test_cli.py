"""The command line as a user goes through it: profile, search from a file, front, export, load, resume."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import autorank
from autorank import cli, demo

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run autorank with arguments; return what it prints, fail on any error."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["autorank", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out

    return call


@pytest.fixture(scope="module")
def sweep(digits_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep, started from a sweep file whose number of trials a flag overrides."""
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "sweep.yaml"
    settings = {
        "model": demo.MODEL,
        "weights": "net.safetensors",
        "data": "digits",
        "validation": 0.2,
        "space": "small",
        "trials": 100,
        "executor": "inline",
        "recovery": {"steps": 10, "batch_size": 32, "calibration": 64},
        "calibration": 64,
    }
    file.write_text(yaml.safe_dump(settings))
    (folder / "net.safetensors").write_bytes(digits_weights.read_bytes())  # relative to the file, not to where we are
    patch = pytest.MonkeyPatch()
    arguments = ["search", file, "--trials", "3", "--sweep-dir", folder / "s", "--steps", "5", "--quiet"]
    patch.setattr(sys, "argv", ["autorank", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    patch.undo()
    assert end.value.code == 0
    return folder / "s"


def test_flags_win_over_the_sweep_file_section_by_section(sweep: Path) -> None:
    config = autorank.open_sweep(sweep).config
    assert config.trials == 3
    assert config.recovery.steps == 5
    assert config.recovery.batch_size == 32


def test_front_prints_the_same_points_as_table_json_and_csv(sweep: Path, run: Run) -> None:
    points = autorank.open_sweep(sweep).points
    numbers = [point.record.number for point in points]
    rows = json.loads(run("front", sweep, "--json"))
    assert [row["number"] for row in rows] == numbers
    assert [row["slower_layers"] for row in rows] == [list(point.slower_layers) for point in points]
    assert [float(row["score"]) for row in csv.DictReader(io.StringIO(run("front", sweep, "--csv")))] == pytest.approx(
        [point.record.score for point in points]
    )
    table = run("front", sweep)
    for point in points:
        assert f"{point.record.score:.2f}" in table
        assert f"{point.test_score:.2f}" in table
        assert f"{point.record.kept['macs_kept']:.3f}" in table
    assert "validation accuracy %" in table
    assert "→" in table


@pytest.mark.parametrize(
    ("rule", "picks"),
    [
        (["--max-macs", "1.0"], lambda points: points[0]),
        (["--point", "cheapest"], lambda points: points[-1]),
        (["--min-score", "0"], lambda points: points[-1]),
    ],
    ids=["best score", "named", "cheapest above a score"],
)
def test_export_writes_the_point_that_the_rule_picks(
    sweep: Path, run: Run, tmp_path: Path, rule: list[str], picks: Callable[..., object]
) -> None:
    target = tmp_path / "out"
    printed = run("export", sweep, *rule, "--out", target, "--formats", "safetensors")
    assert str(target) in printed
    expected = picks(autorank.open_sweep(sweep).points)
    assert autorank.Plan.from_json(json.loads((target / "plan.json").read_text())) == expected.record.plan  # type: ignore[attr-defined]
    model = autorank.load(target, demo.network)
    assert sum(p.numel() for p in model.parameters()) == expected.record.cost.params  # type: ignore[attr-defined]
    assert "Test" in (target / "report.md").read_text() or "test" in (target / "report.md").read_text()


def test_resume_extends_the_sweep_and_front_shows_it(sweep: Path, run: Run) -> None:
    before = len(autorank.open_sweep(sweep).records)
    printed = run("resume", sweep, "--trials", before + 1, "--quiet")
    assert f"{before + 1} trials" in printed
    assert len(autorank.open_sweep(sweep).records) == before + 1


def test_profile_prints_layers_costs_and_candidates(run: Run) -> None:
    text = run("profile", "--model", demo.MODEL, "--input", "1x8x8", "--space", "default")
    for name in ("conv2d", "linear", "MACs", "candidates", "the whole model"):
        assert name in text
    data = json.loads(run("profile", "--model", demo.MODEL, "--data", "digits", "--json"))
    assert [layer["kind"] for layer in data["layers"]] == ["conv2d"] * 5 + ["linear"] * 2
    macs = sum(
        weight * positions
        for weight, positions in [
            (1 * 32 * 9, 64),
            (32 * 64 * 9, 64),
            (64 * 64 * 9, 16),
            (64 * 128 * 9, 16),
            (128 * 128 * 9, 4),
            (128 * 64, 1),
            (64 * 10, 1),
        ]
    )
    assert data["dense"]["macs"] == macs


def test_profile_says_what_is_left_alone_and_why(run: Run) -> None:
    text = run("profile", "--model", "python:tests.test_cli:upsampling", "--input", "3x8x8")
    assert "left alone" in text
    assert "ConvTranspose2d" in text
    assert "cannot make it smaller" in text


def upsampling() -> object:
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 1, groups=16))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("1 h 30 m", 5400), ("1d", 86400)],
    ids=lambda value: str(value),
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    from autorank.config import parse_duration

    assert parse_duration(text) == seconds
