"""Statistics of a sweep: what a search space needs is collected once, kept under a name that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import autorank
from autorank import prepare
from autorank.config import make_config
from autorank.journal import read
from autorank.profiling import profile
from autorank.solvers import whitening
from autorank.solvers.gradients import collect_gradients

SETTINGS: dict[str, Any] = {
    "trials": 2,
    "executor": "inline",
    "recovery": {"steps": 2, "batch_size": 16, "calibration": 32},
    "calibration": 40,
}


class Listener:
    """Counts the steps of each phase."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def say(self, text: str) -> None: ...
    def step(self, what: str, done: int, total: int) -> None:
        self.steps.setdefault(what, []).append((done, total))

    def trials(self, done: int, total: int, record: Any, front: Any, probes: int = 0) -> None: ...


def space(*rules: dict[str, Any], whiten: list[str]) -> dict[str, Any]:
    ranks = {"macs_kept": [0.4, 0.7]}
    defaults = {"formats": ["channel_svd", "tucker2"], "whiten": whiten, "ranks": ranks}
    return {"version": 1, "defaults": defaults, "rules": list(rules)}


def task(kind: str = "classification") -> autorank.Task:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(96) % 2
    images = torch.randn(96, 3, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1) * 0.6
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    if kind == "classification":
        return autorank.ClassificationTask(model, train=(images, targets), validation=0.25)
    wanted = torch.stack((targets, 1 - targets), 1).float()
    return autorank.CustomTask(model, train=(images, wanted), validation=0.25, loss=nn.functional.mse_loss)


def statistics_in(directory: Path) -> Path:
    (path,) = (directory / "cache").glob("stats-*.safetensors")
    return path


def prepared(directory: Path, wanted: dict[str, Any], listener: Listener | None = None, **more: Any) -> Path | None:
    config = make_config({**SETTINGS, "strategy": "random", "space": wanted, "device": "cpu", **more})
    return prepare.prepare(task(), config, directory, listener or Listener()).context.stats_file


@pytest.mark.parametrize("kind", ["classification", "custom"])
def test_a_sweep_that_whitens_outputs_runs_and_goes_on(kind: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "space": space(whiten=["both", "output"])}
    directory, listener = tmp_path / "s", Listener()
    first = autorank.search(task(kind), **settings, sweep_dir=str(directory), progress=listener)
    assert listener.steps["loss gradients"][-1] == (2, 2)
    used = {c.option("whiten", "none") for r in first.records for c in r.plan.choices.values()}
    assert used <= {"both", "output"}
    for record in first.records:
        assert record.status == "complete", record.reason
        assert all(layer.output_error is not None for layer in record.layers)
    path = statistics_in(directory)
    content = path.read_bytes()
    assert all(float(each.gradient.norm()) > 0 for each in whitening.load(path).values() if each.gradient is not None)

    again = Listener()
    more = autorank.resume(directory, task(kind), trials=3, progress=again)
    assert "loss gradients" not in again.steps
    assert [r.plan_id for r in more.records][:2] == [r.plan_id for r in first.records]
    path.write_bytes(content[: len(content) // 2])
    third = Listener()
    autorank.resume(directory, task(kind), trials=4, progress=third)
    assert third.steps["loss gradients"][-1] == (2, 2)
    # Byte for byte but for the order in which the file's metadata stand.
    made, kept = (safetensors.torch.load(data) for data in (path.read_bytes(), content))
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], kept[name]) for name in kept)
    assert len(read(directory).records) == 4


def test_what_is_collected_is_what_the_space_whitens(tmp_path: Path) -> None:
    only_output = {"match": {"name": "2"}, "whiten": ["both"]}
    paths = {}
    for name, wanted in {
        "none": space(whiten=["none"]),
        "input": space(whiten=["none", "input"]),
        "one layer": space(only_output, whiten=["none"]),
        "two kinds": space(only_output, whiten=["input"]),
        "output": space(whiten=["output"]),
    }.items():
        paths[name] = prepared(tmp_path, wanted)
    assert paths.pop("none") is None
    found = {
        name: {layer: each.gradient is not None for layer, each in whitening.load(path).items()}
        for name, path in paths.items()
        if path is not None
    }
    assert found == {
        "input": {"0": False, "2": False, "6": False},
        "one layer": {"2": True},
        "two kinds": {"0": False, "2": True, "6": False},
        "output": {"0": True, "2": True, "6": True},
    }
    assert len(set(paths.values())) == 4


def test_the_gradients_of_a_sweep_are_those_of_its_calibration_examples(tmp_path: Path) -> None:
    path = prepared(tmp_path, space(whiten=["output"]))
    assert path is not None
    found = whitening.load(path)
    one = task()
    (batch,) = one.calibration_batches(40, 40)
    model = one.model()
    generator = torch.Generator().manual_seed(0)
    # The exact curvature of the predictions, for the last layer; the search has a random estimate of it.
    p = model(*batch.inputs).softmax(1)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    gradient = found["6"].gradient
    assert gradient is not None
    torch.testing.assert_close(gradient[0], exact, rtol=0.5, atol=0)  # two signs for each of 40 examples
    specs = profile(model, one.example_inputs).layers
    batches = [
        (part.inputs, lambda y, part=part: one.sampled_loss(y, part, generator))
        for part in one.calibration_batches(40, 32)
    ]
    for name, expected in collect_gradients(model, specs, batches).items():
        torch.testing.assert_close(found[name].gradient, expected)


def test_statistics_of_an_older_layout_are_collected_again(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = prepared(tmp_path, space(whiten=["input"]))
    assert path is not None
    content = path.read_bytes()
    save_file({"0": torch.ones(1, 27, 27)}, str(path), metadata={"layers": '{"0": [9, false]}'})
    assert prepared(tmp_path, space(whiten=["input"])) == path
    assert path.read_bytes() == content
