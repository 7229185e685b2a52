"""Every strategy in whole sweeps with real trials: it finds a front, says why it ended, and goes on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autorank
from autorank import errortable, strategies
from autorank.errors import EmptyFrontError
from autorank.journal import FILE_NAME, read
from autorank.plan import apply
from autorank.solvers import whitening
from autorank.types import Plan
from tests.tiny import network, task

OPTIONS: dict[str, dict[str, Any]] = {
    "learned-rank": {"points": 2, "iterations": 2, "steps": 0.5},
    "greedy-one-step": {"epsilon": 20.0, "targets": 4},
    "greedy-multi-step": {"tries": 2},
}


def settings(name: str, **more: Any) -> dict[str, Any]:
    formats = ["channel_svd", "spatial_svd", "tucker2"]
    ranks = {"macs_kept": [0.3, 0.5, 0.7]}
    return {
        "executor": "inline",
        "strategy": {"name": name, "options": OPTIONS.get(name, {})},
        "space": {"version": 1, "defaults": {"formats": formats, "whiten": ["both"], "ranks": ranks}},
        "recovery": {"steps": 2, "batch_size": 16, "calibration": 32},
        "calibration": 32,
        "progress": False,
        "trials": 4,
        **more,
    }


def essence(records: Any) -> list[tuple[Any, ...]]:
    return [(r.number, r.key, r.probe, r.parent, r.status, r.score, r.loss, r.measured) for r in records]


@pytest.mark.parametrize("name", strategies.names())
def test_a_sweep_finds_a_front_and_goes_on_after_a_stop(name: str, tmp_path: Path) -> None:
    whole = autorank.search(task(), **settings(name), sweep_dir=tmp_path / "whole")
    assert whole.points
    assert all(record.status != "failed" for record in whole.records), [r.reason for r in whole.records]
    assert all(not point.record.probe for point in whole.points)
    model = whole.model(whole.points[-1])
    assert sum(p.numel() for p in model.parameters()) == whole.points[-1].record.cost.params  # type: ignore[union-attr]

    # The same sweep, killed after every other record: its journal ends there, its weights are gone.
    lines = (tmp_path / "whole" / FILE_NAME).read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / FILE_NAME).write_text("".join(lines[: 1 + len(whole.records) // 2]))
    for table in (tmp_path / "whole").glob("errors-*.json"):
        (cut / table.name).write_text(table.read_text())
    resumed = autorank.resume(cut, task(), progress=False)
    assert essence(resumed.records) == essence(whole.records)
    assert [point.record.number for point in resumed.points] == [point.record.number for point in whole.points]


@pytest.mark.parametrize("name", ["knapsack", "vbmf", "layer-wise"])
def test_a_rule_that_needs_tables_keeps_them_beside_the_journal(name: str, tmp_path: Path) -> None:
    autorank.search(task(), **settings(name), sweep_dir=tmp_path / "sweep")
    assert len(list((tmp_path / "sweep").glob("errors-*.json"))) == 1
    record = read(tmp_path / "sweep").records[0]
    assert all(layer.loss_increase is not None for layer in record.layers)


def test_a_rule_that_finds_nothing_to_do_says_so(tmp_path: Path) -> None:
    given = task()
    model = given.model()
    torch.manual_seed(1)
    for layer in (3, 5):
        torch.nn.init.normal_(model[layer].weight)  # type: ignore[index, arg-type]
    noise = autorank.ClassificationTask(model, train=(torch.randn(64, 3, 8, 8), torch.arange(64) % 2), validation=0.25)
    with pytest.raises(EmptyFrontError, match=r"strategy vbmf proposed no plan: .*EVBMF"):
        autorank.search(noise, **settings("vbmf"), sweep_dir=tmp_path / "sweep")


@pytest.mark.parametrize("name", ["auto", "knapsack", "layer-wise", "vbmf"])
def test_a_budget_holds_for_every_point(name: str, tmp_path: Path) -> None:
    result = autorank.search(task(), **settings(name, constraints="macs_kept<=0.6"), sweep_dir=tmp_path / "sweep")
    assert all(record.kept["macs_kept"] <= 0.6 for record in result.records if not record.probe)


def test_a_loss_without_gradients_leaves_predictions_to_the_errors_of_outputs(tmp_path: Path) -> None:
    class Lost(autorank.ClassificationTask):
        def sampled_loss(self, outputs: Any, batch: Any, generator: Any) -> Any:
            return super().sampled_loss(outputs, batch, generator).detach()

    images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    lost = Lost(network(), train=(images, torch.arange(96) % 2), validation=0.25)
    space = settings("knapsack")["space"]
    space["defaults"]["whiten"] = ["input"]
    result = autorank.search(lost, **settings("knapsack", space=space), sweep_dir=tmp_path / "sweep")
    assert result.points
    assert all(layer.loss_increase is None for layer in result.records[0].layers)


def test_the_rise_of_the_loss_can_be_measured_instead_of_predicted(tmp_path: Path) -> None:
    tables = {}
    for predictions in ("curvature", "measured"):
        directory = tmp_path / predictions
        result = autorank.search(task(), **settings("knapsack", predictions=predictions), sweep_dir=directory)
        assert result.points
        tables[predictions] = errortable.from_json(json.loads(next(directory.glob("errors-*.json")).read_text()))
    predicted, measured = tables["curvature"], tables["measured"]
    assert {key: replace(e, loss=None) for key, e in predicted.items()} == {
        key: replace(e, loss=None) for key, e in measured.items()
    }
    given = task()
    batches = list(given.calibration_batches(32))
    dense = given.model().eval()
    name, choice = max(measured, key=lambda key: measured[key].loss or 0.0)
    stats = whitening.load(next((tmp_path / "measured" / "cache").glob("stats-*.safetensors")))
    changed, _ = apply(dense, Plan.of({name: choice}), stats=stats)
    with torch.no_grad():
        rises = [float(given.distill(changed.eval()(*b.inputs), dense(*b.inputs), 1.0)) * len(b) for b in batches]
        start = [float(given.distill(dense(*b.inputs), dense(*b.inputs), 1.0)) * len(b) for b in batches]
    expected = (sum(rises) - sum(start)) / sum(map(len, batches))
    assert measured[name, choice].loss == pytest.approx(expected, rel=1e-3, abs=1e-7)
