"""A second sweep on the same model and data takes the answers that an earlier one found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autorank
from autorank.errors import SweepError
from autorank.journal import read
from tests.tiny import task

SETTINGS: dict[str, Any] = {
    "executor": "inline",
    "strategy": "random",
    "space": {
        "version": 1,
        "defaults": {"formats": ["channel_svd"], "whiten": ["none"], "ranks": {"macs_kept": [0.3, 0.6]}},
    },
    "recovery": {"steps": 2, "batch_size": 16, "calibration": 32},
    "pruning": {"patience": 0},
    "progress": False,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reuse") / "first"
    autorank.search(task(), **SETTINGS, trials=30, sweep_dir=directory)
    return directory


def test_what_was_run_before_is_not_run_again(first: Path, tmp_path: Path) -> None:
    before = {record.plan_id: record for record in read(first).records}
    second = autorank.search(task(), **SETTINGS, trials=30, sweep_dir=tmp_path / "second", reuse=first)
    assert {r.plan_id for r in second.records} == set(before), "thirty trials try the whole space"
    for record in second.records:
        assert record.started == before[record.plan_id].started, "the very same trial, not a new one"
        assert record.score == before[record.plan_id].score
    assert [r.number for r in read(tmp_path / "second").records] == [r.number for r in second.records]
    model = second.model()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2), "weights that were not borrowed are made again"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"recovery": {"steps": 3, "batch_size": 16, "calibration": 32}}, "had recovery = "),
        ({"seed": 1}, "another model|seed"),
        ({"calibration": 9}, "had calibration = 512, this one has 9"),
        ({"objectives": "score,latency"}, "latencies are measured anew"),
    ],
    ids=["recovery", "seed", "calibration", "latency"],
)
def test_other_settings_are_refused_with_what_would_be_right(
    first: Path, tmp_path: Path, changed: dict[str, Any], line: str
) -> None:
    with pytest.raises(SweepError, match=line):
        autorank.search(task(), **{**SETTINGS, **changed}, trials=2, sweep_dir=tmp_path / "x", reuse=first)


def test_other_data_and_no_sweep_are_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="another model, other weights or other data"):
        autorank.search(task(seed=5), **SETTINGS, trials=2, sweep_dir=tmp_path / "x", reuse=first)
    with pytest.raises(SweepError, match=r"^reuse: .*nothing"):
        autorank.search(task(), **SETTINGS, trials=2, sweep_dir=tmp_path / "y", reuse=tmp_path / "nothing")
