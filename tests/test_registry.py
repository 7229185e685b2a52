"""The recommended model in a real MLflow registry: loaded and served elsewhere it does what the model does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autorank.registry import model_name, pack, package_key
from autorank.run_inputs import Package
from autorank.tracking import Tracker
from autorank.types import Choice, FrontPoint, SweepHeader
from tests import exporting
from tests.exporting import Case
from tests.sweep_samples import HOSTILE, SECRET
from tests.test_export import Branches, Rows, Sorts

NAME = "torchhub.https.host.repo.net"


def client_of(directory: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{directory}/mlflow.db")


def register(directory: Path, header: SweepHeader, point: FrontPoint, package: Package) -> str:
    """Write a sweep of one trial and its model to the store in `directory`; return how it is called there."""
    tracker = Tracker(None, directory / "sweep")
    tracker.start(header)
    tracker.log(point.record)
    tracker.finish([point])
    called = tracker.register(package)
    tracker.close()
    assert not tracker.problem
    return called


@dataclass
class Registered:
    """A model that was registered, and all that it was made from."""

    directory: Path
    case: Case
    header: SweepHeader
    package: Package
    called: str

    @property
    def version(self) -> Any:
        return client_of(self.directory).get_model_version_by_alias(NAME, "champion")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    directory = tmp_path_factory.mktemp("store")
    case = exporting.make("tiny_conv", exporting.TINY)
    model = f"torchhub:https://me:{SECRET}@host/repo:net"
    header = replace(case.header, config={**case.header.config, "model": model})
    done: list[tuple[int, int]] = []
    (folder := directory / "packed").mkdir()
    package = pack(case.task, header, case.point, case.model, folder, lambda *at: done.append(at))
    assert done == [(1, 3), (2, 3)]
    return Registered(directory, case, header, package, register(directory, header, case.point, package))


def test_the_newest_version_holds_the_alias_and_says_what_it_is(registered: Registered) -> None:
    version, record = registered.version, registered.case.point.record
    assert registered.called == f"models:/{NAME}@champion (version 1)"
    assert (version.version, version.status) == (1, "READY")
    assert version.tags["plan_id"] == record.plan_id
    assert version.tags["trial"] == str(record.number)
    assert float(version.tags["score"]) == record.score
    assert float(version.tags["test_score"]) == registered.case.point.test_score
    assert float(version.tags["macs_kept"]) == record.kept["macs_kept"]


def test_the_model_is_an_output_of_its_trial_and_of_the_sweep(registered: Registered) -> None:
    client = client_of(registered.directory)
    version = registered.version
    experiment = client.get_experiment_by_name("autorank").experiment_id
    runs = {run.data.tags["autorank.role"]: run for run in client.search_runs([experiment])}
    assert version.run_id == runs["trial"].info.run_id
    for run in runs.values():
        outputs = client.get_run(run.info.run_id).outputs.model_outputs
        (made,) = [one.model_id for one in outputs]
    assert made in version.source
    logged = client.get_logged_model(made)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": version.version}]
    metrics = {m.key: m.value for m in logged.metrics}
    assert metrics["score"] == registered.case.point.record.score
    assert runs["trial"].data.metrics["score"] == registered.case.point.record.score


def test_signature_and_example(registered: Registered) -> None:
    from mlflow.models import Model

    model = Model.load(str(registered.package.folder))
    shape = registered.case.inputs[0].shape
    (given,), (made,) = model.signature.inputs.inputs, model.signature.outputs.inputs
    assert (given.shape, given.type) == ((-1, *shape[1:]), np.dtype("float32"))
    assert made.shape[0] == -1
    assert model.load_input_example(str(registered.package.folder)).shape == (1, *shape[1:])
    needed = (registered.package.folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in needed} == {"mlflow", "onnx", "onnxruntime", "numpy"}
    assert model.metadata["plan_id"] == registered.case.point.record.plan_id


def test_nothing_that_is_registered_could_be_unpickled(registered: Registered) -> None:
    files = [path for path in registered.package.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".onnx", ".json", ".yaml", ".txt", ""}
    assert [path.name for path in files if not path.suffix] == ["MLmodel"]


def test_no_secret_is_registered(registered: Registered) -> None:
    for path in registered.directory.rglob("*"):
        if path.is_file() and path.parent.name != "packed":
            assert SECRET.encode() not in path.read_bytes(), path


def test_global_state_of_mlflow_is_untouched(registered: Registered) -> None:
    import mlflow

    assert mlflow.active_run() is None
    assert str(registered.directory) not in mlflow.get_tracking_uri() + mlflow.get_registry_uri()


SCORE = """
import json, sys
import numpy as np
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
data = np.load(sys.argv[3])
(made,) = model.predict(data).values()
np.save(sys.argv[4], made)
print(sorted({"torch", "autorank"} & set(sys.modules)))
"""


def test_loaded_in_another_process_it_scores_the_same_without_torch(registered: Registered, tmp_path: Path) -> None:
    case = registered.case
    (batch,) = case.task.batches("validation")
    np.save(tmp_path / "x.npy", batch.inputs[0].numpy())
    uri, files = f"sqlite:///{registered.directory}/mlflow.db", [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    command = [sys.executable, "-c", SCORE, uri, f"models:/{NAME}@champion", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    made = np.load(tmp_path / "y.npy")
    with torch.no_grad():
        wanted = case.model(*batch.inputs).numpy()
    np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())
    score = float(case.task.metric(torch.from_numpy(made), batch.targets))
    assert score == pytest.approx(case.point.record.score)


@pytest.fixture
def served(registered: Registered, tmp_path: Path) -> Iterator[int]:
    """MLflow's own scoring server on the registered model; its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{registered.directory}/mlflow.db"}
    environment |= {"MLFLOW_MODELS_WORKERS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-m", f"models:/{NAME}@champion"],
            env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping")
                break
            except OSError:
                time.sleep(0.2)
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        yield port
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def test_served_over_http_it_gives_what_the_model_gives(registered: Registered, served: int) -> None:
    inputs = registered.case.inputs[0][:5]
    request = urllib.request.Request(
        f"http://127.0.0.1:{served}/invocations",
        json.dumps({"inputs": inputs.tolist()}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        predictions = json.loads(answer.read())["predictions"]
    (made,) = predictions.values()
    with torch.no_grad():
        wanted = registered.case.model(inputs).numpy()
    np.testing.assert_allclose(np.array(made), wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_same_point_is_registered_once_and_another_one_anew(registered: Registered, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    case, header, package = registered.case, replace(registered.header, sweep_id="twice"), registered.package
    first = Tracker(None, tmp_path / "sweep")
    first.start(header)
    first.log(case.point.record)
    first.finish([case.point])
    assert first.registered == ""
    first.register(package)
    assert first.registered == package.key == package_key(case.point)
    first.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")

    def versions() -> list[int]:
        return sorted(int(one.version) for one in client.search_model_versions(f"name = '{NAME}'"))

    again = Tracker(None, tmp_path / "sweep")
    again.start(header)
    again.catch_up(header, [case.point.record], [case.point])
    assert again.registered == package.key
    again.register(package)
    assert versions() == [1]
    again.register(replace(package, key="another point"))
    assert versions() == [1, 2]
    again.close()
    register(tmp_path, replace(header, sweep_id="newer"), case.point, package)
    assert versions() == [1, 2, 3]
    assert (
        client.get_model_version_by_alias(NAME, "champion").tags["autorank.sweep_id"]
        == package.tags["autorank.sweep_id"]
    )
    assert int(client.get_model_version_by_alias(NAME, "champion").version) == 3


def test_a_model_that_cannot_be_taken_leaves_the_rest_written_and_says_so(
    registered: Registered, tmp_path: Path
) -> None:
    case = registered.case
    tracker = Tracker(None, tmp_path / "sweep")
    tracker.start(registered.header)
    tracker.log(case.point.record)
    tracker.finish([case.point])
    assert tracker.register(replace(registered.package, folder=tmp_path / "gone")) == ""
    assert tracker.problem
    tracker.close()
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("autorank").experiment_id
    assert {run.info.status for run in client.search_runs([experiment])} == {"FINISHED"}
    assert not [m for m in client.search_logged_models([experiment]) if m.name == "recommended"]


LINEAR = {"linear": Choice("channel_svd", (3,))}


@pytest.mark.parametrize(
    ("model", "choices", "shapes", "flavor"),
    [
        (Rows, LINEAR, ((8,),), "onnx"),
        (Sorts, LINEAR, ((8,),), "pytorch"),
        ("two_inputs", {"image": Choice("channel_svd", (3,))}, (), "onnx"),
    ],
    ids=["fixed-batch", "no-onnx", "two-inputs"],
)
def test_other_models_are_loaded_too(model: Any, choices: Any, shapes: Any, flavor: str, tmp_path: Path) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    case = exporting.make(model, choices, *shapes)
    folder = pack(case.task, case.header, case.point, case.model, tmp_path).folder
    described = Model.load(str(folder))
    assert flavor in described.flavors
    inputs = tuple(x[:1] for x in case.inputs)
    names = [spec.name for spec in described.signature.inputs.inputs]
    arrays = [x.numpy() for x in inputs]
    loaded = mlflow.pyfunc.load_model(str(folder))
    made = loaded.predict(dict(zip(names, arrays, strict=True)) if len(names) > 1 else arrays[0])
    with torch.no_grad():
        outputs = case.model(*inputs)
    wanted = (outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))).numpy()
    np.testing.assert_allclose(made if flavor == "pytorch" else next(iter(made.values())), wanted, atol=1e-4)
    if model is Rows:
        assert described.signature.inputs.inputs[0].shape == (1, 8)


def test_a_model_with_bits_is_there_as_whole_numbers_for_any_batch_size(tmp_path: Path) -> None:
    import mlflow.pyfunc
    import onnx

    choices = {"conv1": Choice("dense", (), (), 8, 8), "conv2": Choice("tucker2", (8, 6), (), 4, 8)}
    case = exporting.make("tiny_conv", choices)
    folder = pack(case.task, case.header, case.point, case.model, tmp_path).folder
    kinds = [node.op_type for node in onnx.load(next(folder.glob("*.onnx"))).graph.node]
    assert "DequantizeLinear" in kinds
    loaded = mlflow.pyfunc.load_model(str(folder))
    for count in (1, 5):
        inputs = case.inputs[0][:count]
        made = next(iter(loaded.predict(inputs.numpy()).values()))
        with torch.no_grad():
            wanted = case.model(inputs).numpy()
        assert np.abs(made - wanted).max() <= 0.25 * np.abs(wanted).max()


def test_a_program_of_one_batch_size_says_so(tmp_path: Path) -> None:
    from mlflow.models import Model

    class SortedRows(Rows):
        """Has no ONNX form and one batch size."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = super().forward(x)
            return torch.linalg.eigvals(rows[:, :, None] * rows[:, None, :]).real

    case = exporting.make(SortedRows, LINEAR, (8,))
    described = Model.load(str(pack(case.task, case.header, case.point, case.model, tmp_path).folder))
    assert "pytorch" in described.flavors
    assert described.signature.inputs.inputs[0].shape == (1, 8)


def test_a_model_that_no_trace_holds_is_refused(tmp_path: Path) -> None:
    case = exporting.make(Branches, LINEAR, (8,))
    with pytest.raises(Exception, match="data-dependent"):
        pack(case.task, case.header, case.point, case.model, tmp_path)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("python:nets.zoo:small", "nets.zoo.small"),
        ("timm:resnet18.a1_in1k", "timm.resnet18.a1_in1k"),
        ("torchhub:owner/repo:net", "torchhub.owner.repo.net"),
        (f"torchhub:https://me:{SECRET}@host/repo:net", "torchhub.https.host.repo.net"),
        (HOSTILE, "script.alert.1.script"),
        (None, "Linear"),
        (":/", "network"),
    ],
)
def test_names_are_such_as_mlflow_takes(registered: Registered, spec: str | None, name: str) -> None:
    header = replace(registered.header, config={**registered.header.config, "model": spec})
    assert model_name(header, nn.Linear(1, 1)) == name
