"""Whole sweeps on real data: the same with every executor, resumable after any stop, honest about the test split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autorank
from autorank import demo
from autorank.errors import ConfigError, EmptyFrontError, SweepError
from autorank.journal import FILE_NAME, read
from autorank.mlflow_ui import default_store
from autorank.types import TrialRecord

QUICK: dict[str, Any] = {
    "validation": 0.2,
    "trials": 6,
    "space": "small",
    "recovery": {"steps": 12, "batch_size": 32, "calibration": 64},
    "calibration": 64,
    "seed": 3,
}


@pytest.fixture(scope="session")
def settings(digits_weights: Path) -> dict[str, Any]:
    return {**QUICK, "model": demo.MODEL, "weights": str(digits_weights), "data": "digits"}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> autorank.SearchResult:
    directory = tmp_path_factory.mktemp("sweeps") / "inline"
    return autorank.search(**settings, executor="inline", sweep_dir=str(directory), progress=False)


def essence(records: Any) -> dict[int, tuple[Any, ...]]:
    """What must not depend on executor, worker or time."""
    return {
        r.number: (r.plan_id, r.status, r.fidelity, r.score, r.score_before, r.score_bn, r.loss, r.cost, r.curve)
        for r in records
    }


def test_an_inline_sweep_finds_smaller_models_that_still_work(undisturbed: autorank.SearchResult) -> None:
    assert len(undisturbed.records) == 6
    assert undisturbed.header.dense.score > 90
    front = undisturbed.front
    assert len(front) >= 2
    assert front["macs_kept"].min() < 0.8
    assert front["test_score"].max() > 90
    assert (front["latency_ms"] > 0).all()
    assert undisturbed.dense is not None
    assert undisturbed.dense.latency_ms is not None
    for record in undisturbed.records:
        assert record.score is not None, record.reason
        assert set(record.seconds) >= {"fit", "evaluate", "tune", "other"}
        assert all(layer.output_error is not None for layer in record.layers)


def test_the_inline_executor_needs_neither_ray_nor_mlflow(settings: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import autorank, json, sys\n"
        "settings = json.loads(sys.argv[1])\n"
        "autorank.search(**settings, executor='inline', progress=False)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'mlflow'}))"
    )
    small = {**settings, "trials": 1, "sweep_dir": str(tmp_path / "s")}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(small)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Bottleneck(nn.Module):
    """Digits made small, and large again by transposed convolutions, before they are told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 24, 4, stride=4)
        self.up1 = nn.ConvTranspose2d(24, 24, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(24, 16, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up2(torch.relu(self.up1(self.down(x))))).mean((2, 3)))


def test_a_sweep_decomposes_transposed_convolutions(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    formats = "channel_svd, tucker2, spatial_svd"
    space.write_text(f"version: 1\ndefaults: {{formats: [{formats}], ranks: {{macs_kept: [0.3, 0.6]}}}}\n")
    found = autorank.search(
        model="python:tests.test_sweep:Bottleneck",
        data="digits",
        space=str(space),
        trials=3,
        recovery={"steps": 4, "batch_size": 16, "calibration": 32},
        calibration=32,
        executor="inline",
        sweep_dir=str(tmp_path / "sweep"),
        progress=False,
    )
    assert {layer["kind"] for layer in found.header.layers} == {"conv2d", "conv_transpose2d", "linear"}
    assert [record.status for record in found.records] == ["complete"] * 3, [record.reason for record in found.records]
    changed = {layer.name for record in found.records for layer in record.layers}
    assert {"up1", "up2"} <= changed
    for record in found.records:
        saved = sum(layer.macs_dense - layer.macs for layer in record.layers)
        assert record.cost is not None
        assert record.cost.macs == found.header.dense_cost.macs - saved


@pytest.fixture(scope="module")
def on_ray(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> autorank.SearchResult:
    directory = tmp_path_factory.mktemp("sweeps") / "ray"
    return autorank.search(**settings, workers=2, sweep_dir=str(directory), progress=False)


def test_ray_gives_the_same_sweep_as_one_process(
    undisturbed: autorank.SearchResult, on_ray: autorank.SearchResult
) -> None:
    assert essence(on_ray.records) == essence(undisturbed.records)
    assert [p.record.number for p in on_ray.points] == [p.record.number for p in undisturbed.points]
    assert [p.test_score for p in on_ray.points] == [p.test_score for p in undisturbed.points]


def test_ray_uses_several_workers_and_leaves_no_scratch(on_ray: autorank.SearchResult) -> None:
    assert len({record.worker for record in on_ray.records}) == 2
    assert not (on_ray.directory / "ray").exists()


def test_mlflow_holds_the_sweep(on_ray: autorank.SearchResult) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(default_store(on_ray.directory))
    experiments = client.search_experiments(filter_string="name = 'autorank'")
    runs = client.search_runs([experiments[0].experiment_id], max_results=100)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == len(on_ray.records)
    assert len(runs) == len(children) + 1
    scores = sorted(run.data.metrics["score"] for run in children)
    assert scores == pytest.approx(sorted(r.score for r in on_ray.records if r.score is not None))
    (data,) = {one.dataset.name for run in runs for one in run.inputs.dataset_inputs}
    assert data == on_ray.header.fingerprint["task"]


def test_the_recommended_model_is_in_the_registry(on_ray: autorank.SearchResult) -> None:
    import mlflow.onnx
    from mlflow import MlflowClient

    client = MlflowClient(default_store(on_ray.directory))
    (registered,) = client.search_registered_models()
    champion = client.get_model_version_by_alias(registered.name, "champion")
    best = on_ray.best()
    assert (champion.tags["trial"], champion.tags["plan_id"]) == (str(best.record.number), best.record.plan_id)
    inputs = torch.cat([batch.inputs[0] for batch in autorank.sweep.task_of(on_ray.config).batches("validation")])
    loaded = mlflow.pyfunc.load_model(champion.source)
    (made,) = loaded.predict(inputs.numpy()).values()
    with torch.no_grad():
        wanted = on_ray.model()(inputs)
    assert torch.from_numpy(made).sub(wanted).abs().max() < 1e-3 * wanted.abs().max()


def command(settings: dict[str, Any], directory: Path, executor: str) -> list[str]:
    code = (
        "import autorank, json, sys\n"
        "from autorank.errors import AutorankError\n"
        "try:\n"
        "    autorank.search(**json.loads(sys.argv[1]), progress=False)\n"
        "except AutorankError as error:\n"
        "    print(error)"
    )
    return [
        sys.executable,
        "-c",
        code,
        json.dumps({**settings, "sweep_dir": str(directory), "executor": executor}),
    ]


def wait_for_trials(process: subprocess.Popen[str], directory: Path, count: int) -> None:
    """Wait until the journal holds `count` trials; fail with the output when the process ended before."""
    path = directory / FILE_NAME
    while not path.exists() or path.read_bytes().count(b'"event":"trial"') < count:
        if process.poll() is not None:
            pytest.fail(f"the sweep ended early: {process.communicate()}")
        time.sleep(0.05)


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_killed_sweep_goes_on_and_ends_like_an_undisturbed_one(
    settings: dict[str, Any], undisturbed: autorank.SearchResult, tmp_path: Path, executor: str
) -> None:
    directory = tmp_path / "killed"
    process = subprocess.Popen(
        command(settings, directory, executor), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_trials(process, directory, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read(directory).records
    assert 2 <= len(before) < 6
    result = autorank.resume(directory, executor="inline", progress=False)
    assert essence(result.records) == essence(undisturbed.records)
    finished = {record.number: record for record in before}
    assert all(r.started == finished[r.number].started for r in result.records if r.number in finished)
    assert [p.record.plan_id for p in result.points] == [p.record.plan_id for p in undisturbed.points]


@pytest.mark.parametrize(
    ("executor", "number"),
    [("inline", signal.SIGINT), ("ray", signal.SIGINT), ("ray", signal.SIGTERM)],
    ids=["inline, Ctrl-C", "ray, Ctrl-C", "ray, terminated"],
)
def test_a_stop_finishes_what_runs_and_saves_it(
    settings: dict[str, Any], tmp_path: Path, executor: str, number: signal.Signals
) -> None:
    directory = tmp_path / "stopped"
    process = subprocess.Popen(
        command({**settings, "trials": 40}, directory, executor),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_trials(process, directory, 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the whole group
    else:
        os.kill(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    contents = read(directory)
    assert contents.ended == "interrupted"
    assert 1 <= len(contents.records) < 40
    assert all(record.status != "failed" for record in contents.records)
    assert not contents.measured  # the test split waits for the end of the sweep


def test_a_second_ctrl_c_stops_now_and_loses_no_finished_trial(settings: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    process = subprocess.Popen(
        command({**settings, "trials": 400}, directory, "ray"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_trials(process, directory, 1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    contents = read(directory)
    assert contents.records
    assert [r.number for r in autorank.open_sweep(directory).records] == [r.number for r in contents.records]
    assert not _processes_of(process.pid)


def _processes_of(group: int) -> list[int]:
    """Processes that are still alive in a session; Ray's need a moment to end."""
    for _ in range(100):
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[3]) == group and fields[0] != "Z":
                    alive.append(int(entry.name))
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def test_what_fails_while_a_record_is_taken_ends_a_ray_sweep_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    class Broken:
        """A terminal that goes away in the middle."""

        def say(self, text: str) -> None: ...
        def step(self, what: str, done: int, total: int) -> None: ...
        def trials(self, done: int, total: int, record: TrialRecord | None, front: Any, probes: int = 0) -> None:
            if done == 2:
                raise OSError(5, "the terminal is gone")

    directory = tmp_path / "s"
    with pytest.raises(SweepError, match=r"the terminal is gone.*autorank resume"):
        autorank.search(**settings, workers=2, sweep_dir=str(directory), progress=Broken())
    assert len(read(directory).records) >= 2


def test_more_trials_extend_a_finished_sweep(settings: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "s"
    first = autorank.search(**{**settings, "trials": 2}, executor="inline", sweep_dir=str(directory), progress=False)
    more = autorank.resume(directory, trials=4, progress=False)
    assert len(more.records) == 4
    again = autorank.resume(directory, progress=False)  # what a resume changed holds for the next one
    assert again.config.trials == 4
    assert again.records == more.records
    assert [p.test_score for p in again.points] == [p.test_score for p in more.points]
    assert essence(first.records).items() <= essence(more.records).items()


def test_a_time_limit_ends_the_search_and_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    def within(seconds: int) -> autorank.SearchResult:
        place = str(tmp_path / f"{seconds}")
        limited = {**settings, "trials": 1000, "max_time": seconds}
        return autorank.search(**limited, executor="inline", sweep_dir=place, progress=False)

    try:
        result = within(6)
    except EmptyFrontError:  # on a busy machine no trial finishes in that time
        result = within(60)
    assert result.ended == "time limit reached"
    assert len(result.records) < 1000


def test_resume_refuses_other_weights_and_other_settings(
    settings: dict[str, Any], undisturbed: autorank.SearchResult, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="seed cannot change"):
        autorank.resume(undisturbed.directory, seed=9, progress=False)
    other = autorank.load_task(model=demo.MODEL, data="digits", validation=0.2, seed=3)
    with pytest.raises(SweepError, match="another model"):
        autorank.resume(undisturbed.directory, other, progress=False)
    with pytest.raises(SweepError, match="already holds a sweep"):
        autorank.search(**settings, sweep_dir=str(undisturbed.directory), progress=False)


def test_the_chosen_model_is_the_one_that_was_scored(undisturbed: autorank.SearchResult) -> None:
    from autorank.config import make_config
    from autorank.evaluate import evaluate
    from autorank.sweep import task_of

    point = undisturbed.best(max_drop=100.0)
    task = task_of(make_config(undisturbed.header.config))
    model = undisturbed.model(point)
    assert evaluate(model, task, "validation").score == pytest.approx(point.record.score)
    assert evaluate(model, task, "test").score == pytest.approx(point.test_score)
    for path in (undisturbed.directory / "models").iterdir():
        path.unlink()  # lost weights are made again from the plan
    assert evaluate(undisturbed.model(point), task, "validation").score == pytest.approx(point.record.score)


class Watched(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Blobs of two classes; counts how often it is read."""

    def __init__(self, seed: int, size: int = 96) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(size) % 2
        self.inputs = torch.randn(size, 3, 8, 8, generator=generator) + self.targets.view(-1, 1, 1, 1) * 0.6
        self.reads = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.reads += 1
        return self.inputs[index], self.targets[index]


class TwoInputs(nn.Module):
    """A model with two inputs and a scalar output."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.side = nn.Linear(5, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, image: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        return self.head(self.image(image).mean((2, 3)) + self.side(side)).squeeze(-1)


def blob_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


SMALL: dict[str, Any] = {
    "trials": 4,
    "space": "small",
    "executor": "inline",
    "progress": False,
    "recovery": {"steps": 3, "batch_size": 16, "calibration": 32},
    "calibration": 32,
}


def test_the_test_split_is_read_only_for_the_final_front(tmp_path: Path) -> None:
    train, test = Watched(0), Watched(1)
    reads: list[int] = []

    class Spy:
        def say(self, text: str) -> None: ...
        def step(self, what: str, done: int, total: int) -> None: ...
        def trials(self, done: int, total: int, record: TrialRecord | None, front: Any, probes: int = 0) -> None:
            reads.append(test.reads)

    task = autorank.ClassificationTask(blob_net(), train=train, test=test, validation=0.25)
    result = autorank.search(task, **{**SMALL, "progress": Spy()}, sweep_dir=str(tmp_path / "s"))
    assert len(set(reads)) == 1  # a few examples are hashed for the fingerprint before; none during the search
    assert reads[0] <= 8
    assert test.reads >= reads[0] + len(test) * (1 + len(result.points))
    assert all(point.test_score is not None for point in result.points)


def test_a_dense_model_at_chance_and_a_tiny_validation_split_are_doubted_aloud(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener:
        def say(self, text: str) -> None:
            said.append(text)

        def step(self, what: str, done: int, total: int) -> None: ...
        def trials(self, done: int, total: int, record: TrialRecord | None, front: Any, probes: int = 0) -> None: ...

    task = autorank.ClassificationTask(blob_net(), train=Watched(0), validation=0.25)
    result = autorank.search(task, **{**SMALL, "progress": Listener()}, sweep_dir=str(tmp_path / "s"))
    assert any("about chance for 2 classes" in line for line in said), said
    assert any("24 examples" in line and "4.2 points" in line for line in said), said
    text = str(result)
    assert "recommended: point" in text
    assert str(tmp_path / "s") in text
    assert f"autorank dashboard {tmp_path}\n" in f"{text}\n"


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: autorank.search(blob_net(), trials=1), "wrap a model and its data"),
        (lambda: autorank.search(trials=1), "no task given: pass one"),
        (lambda: autorank.search(regression(), validation=0.3), "validation has no effect beside a task"),
        (lambda: autorank.search(regression(), workers=9, lookahead=2), "more than lookahead"),
        (lambda: autorank.search(regression(), executor="inline", tracking_uri="http://127.0.0.1:1"), "no effect with"),
    ],
    ids=["a model for a task", "nothing", "settings of a task", "workers", "inline and MLflow"],
)
def test_wrong_calls_from_python_give_one_line(call: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        call()


def test_the_users_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = blob_net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = autorank.ClassificationTask(model, train=Watched(0), test=Watched(1), validation=0.25)
    autorank.search(task, **SMALL, sweep_dir=str(tmp_path / "s"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def regression(metric: Any = None) -> autorank.CustomTask:
    generator = torch.Generator().manual_seed(0)
    image, side = torch.randn(80, 3, 8, 8, generator=generator), torch.randn(80, 5, generator=generator)
    target = image.mean((1, 2, 3)) + side[:, 0]
    torch.manual_seed(0)
    return autorank.CustomTask(
        TwoInputs(),
        train=(image[:48], side[:48], target[:48]),
        validation=(image[48:64], side[48:64], target[48:64]),
        test=(image[64:], side[64:], target[64:]),
        loss=nn.functional.mse_loss,
        metric=metric or nn.functional.l1_loss,
        metric_name="mae",
        direction="min",
    )


def test_a_custom_task_with_two_inputs_where_less_is_better(tmp_path: Path) -> None:
    result = autorank.search(regression(), **SMALL, objectives="mae,params", sweep_dir=str(tmp_path / "s"))
    assert result.header.direction == "min"
    assert [o.direction for o in result.header.objectives] == ["min", "min"]
    scores = [point.record.score for point in result.points]
    assert scores == sorted(scores)  # best first, which is smallest
    kept = [point.record.kept["params_kept"] for point in result.points]
    assert kept == sorted(kept, reverse=True)
    # A whole point would be more than all of this metric: what may be lost is a part of the dense score instead.
    assert result.config.max_drop == pytest.approx(0.02 * result.header.dense.score)
    assert "points" not in result.recommended.reason.split("against")[0].removeprefix("cheapest of the points")


def test_a_trial_that_raises_in_the_users_code_fails_and_the_sweep_goes_on(tmp_path: Path) -> None:
    calls = iter(range(10_000))

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyError("a bug of mine")
        return nn.functional.l1_loss(outputs, targets)

    result = autorank.search(regression(metric), **SMALL, sweep_dir=str(tmp_path / "s"))
    failed = [record for record in result.records if record.status == "failed"]
    assert len(failed) == 1
    assert "a bug of mine" in failed[0].reason
    assert failed[0].number not in {point.record.number for point in result.points}
    assert len(result.records) == 4


def test_when_every_trial_fails_the_reason_is_in_the_error(tmp_path: Path) -> None:
    calls = iter(range(10_000))

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) > 0:
            raise ZeroDivisionError("no good")
        return nn.functional.l1_loss(outputs, targets)

    with pytest.raises(EmptyFrontError, match=r"all 4 trials failed.*no good"):
        autorank.search(regression(metric), **SMALL, sweep_dir=str(tmp_path / "s"))


@pytest.fixture(scope="module")
def three_objectives(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> autorank.SearchResult:
    return autorank.search(
        **{**settings, "objectives": "accuracy,macs,latency", "constraints": "macs_kept<=0.7", "trials": 3},
        executor="inline",
        sweep_dir=str(tmp_path_factory.mktemp("s") / "s"),
        progress=False,
    )


def test_latency_is_predicted_from_a_table_measured_before_the_first_trial(
    three_objectives: autorank.SearchResult,
) -> None:
    table = json.loads(next(three_objectives.directory.glob("latencies-*.json")).read_text())
    layers = {(name, json.dumps(choice, sort_keys=True)): ms for name, choice, ms in table["layers"]}
    assert three_objectives.header.dense_cost.latency_ms == table["dense_ms"]
    for record in three_objectives.records:
        expected, replaced = table["dense_ms"], 0.0
        for layer in record.layers:
            choice = json.dumps(layer.choice.to_json(), sort_keys=True)
            expected += layers[layer.name, choice] - layers[layer.name, "null"]
            replaced += layers[layer.name, choice]
        assert record.cost is not None
        # Layers timed alone may add up to more than the whole model; what replaces them takes its time at least.
        assert record.cost.latency_ms == pytest.approx(max(expected, replaced))
        assert record.kept["macs_kept"] <= 0.7


def test_early_stopping_keeps_hopeless_trials_off_the_front(settings: dict[str, Any], tmp_path: Path) -> None:
    result = autorank.search(
        **{**settings, "trials": 14, "strategy": "random", "pruning": {"patience": 1, "margin": 0.1}},
        executor="inline",
        sweep_dir=str(tmp_path / "s"),
        progress=False,
    )
    pruned = [record for record in result.records if record.status == "pruned"]
    assert pruned
    for record in pruned:
        assert record.fidelity.steps == 0
        assert "tune" not in record.seconds
        assert "stopped before the fine-tune" in record.reason
        assert record.number not in {point.record.number for point in result.points}


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
