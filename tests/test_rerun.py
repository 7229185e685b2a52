"""report.json alone is enough to run a sweep again, and to run the exported trial again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autorank
from autorank.compression import as_plan
from autorank.journal import read
from autorank.rerun import ancestors, described
from autorank.types import FrontPoint
from tests import sweep_samples


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an export says of a sweep of which nothing else is left."""
    home = tmp_path_factory.mktemp("rerun")
    found = autorank.search(
        model="python:tests.tiny:network",
        data="python:tests.secure_samples:images",
        data_args={"password": "${HOME}"},
        space={
            "version": 1,
            "defaults": {
                "formats": ["channel_svd", "tucker2"],
                "whiten": ["none", "input"],
                "ranks": {"macs_kept": [0.3, 0.6]},
            },
        },
        recovery={"steps": 3, "batch_size": 16, "calibration": 32},
        strategy={"name": "tpe", "options": {}},
        calibration=32,
        trials=6,
        seed=11,
        workers=1,
        executor="inline",
        sweep_dir=str(home / "sweep"),
        progress=False,
    )
    done = found.export(home / "export", formats=("safetensors",))
    assert done.files[-1].name == "report.json"
    (home / "sweep").rename(home / "gone")
    said: dict[str, Any] = json.loads((home / "export" / "report.json").read_text())
    return said


def test_the_sweep_runs_again_to_the_same_front(report: dict[str, Any], tmp_path: Path) -> None:
    again = autorank.search(**{**report["settings"], "sweep_dir": str(tmp_path / "again")}, progress=False)
    front = {p["number"]: (p["plan_id"], p["score"], p["kept"]) for p in report["front"]}
    assert {p.record.number: (p.record.plan_id, p.record.score, dict(p.record.kept)) for p in again.points} == front
    assert len(again.records) == report["trials"]
    header = read(tmp_path / "again").header
    assert header is not None
    assert json.loads(json.dumps(dict(header.fingerprint))) == report["fingerprint"]


def test_what_a_comparison_needs_is_there(report: dict[str, Any]) -> None:
    assert report["seeds"] == {"sweep": 11, "plan": 11}
    assert {"autorank", "torch", "python", "numpy", "safetensors"} <= report["versions"].keys()
    assert report["settings"]["lookahead"] >= 1
    assert report["settings"]["data_args"] == {"password": "${HOME}"}
    assert set(report["files"]) == {"plan.json", "model.safetensors", "report.md"}
    assert all(len(file["sha256"]) == 64 for file in report["files"].values())
    assert as_plan(report["trial"]["plan"]).plan_id == report["trial"]["plan_id"]
    assert report["lineage"] == []


def test_lineage_names_the_trials_that_came_before() -> None:
    head = sweep_samples.header()
    first, second, third, _ = sweep_samples.records(head, 4)
    second = replace(second, parent=first.number, lineage="0123456789ab")
    third = replace(third, parent=second.number, lineage="ba9876543210")
    assert ancestors(third, {r.number: r for r in (first, second)}) == [first, second]
    said = described(head, FrontPoint(third), records=(first, second, third))
    assert [step["number"] for step in said["lineage"]] == [first.number, second.number]
    assert [as_plan(step["plan"]).plan_id for step in said["lineage"]] == [first.plan_id, second.plan_id]
    assert said["lineage"][1]["parent"] == first.number


def test_no_secret_goes_along() -> None:
    head = sweep_samples.header()
    failed = next(r for r in sweep_samples.records(head, 6) if r.reason.startswith("the loss"))
    said = json.dumps(described(head, FrontPoint(failed), records=(failed,)))
    assert sweep_samples.SECRET not in said
