"""Exports: every file does what the model does, in the program that will load it; mistakes are refused in one line."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from autorank import artifacts
from autorank.errors import AutorankError, ExportError, ModelError, PlanError, WeightsError
from autorank.export import ExportResult, export, load
from autorank.types import Choice
from autorank.weightfile import read_weights, write_weights
from tests import exporting, models
from tests.exporting import TINY, Case

ROOT = Path(__file__).parent.parent
NAMES = ["model.onnx", "model.pt2", "model.safetensors", "plan.json", "report.json", "report.md"]
ZOO = ["shared_residual", "conv1d", "conv3d", "two_inputs", "tied", "generator", "reparametrised", "padding_modes"]
ZOO += ["attention"]


@pytest.fixture(scope="module")
def tiny() -> Case:
    return exporting.make("tiny_conv", TINY)


@pytest.fixture(scope="module")
def exported(tiny: Case, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return tiny.export(tmp_path_factory.mktemp("exports") / "new" / "seven")


@pytest.fixture
def copied(exported: ExportResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.directory, tmp_path / "copy"))


def run(model: Any, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return model(*inputs)


def in_another_process(directory: Path, folder: Path, case: Case, *more: str) -> tuple[dict[str, Any], np.ndarray]:
    """Score model.onnx by benchmarks/onnx_score.py on the first input's data."""
    with torch.no_grad():
        labels = case.task.model()(*case.inputs).argmax(1)
    np.save(folder / "images.npy", case.inputs[0].numpy(), allow_pickle=False)
    np.save(folder / "labels.npy", labels.numpy(), allow_pickle=False)
    command = [sys.executable, str(ROOT / "benchmarks" / "onnx_score.py"), str(directory)]
    command += ["--inputs", str(folder / "images.npy"), "--labels", str(folder / "labels.npy")]
    command += ["--save", str(folder / "outputs.npy"), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), np.load(folder / "outputs.npy", allow_pickle=False)


class TestWhole:
    def test_files_are_there_and_only_they(self, exported: ExportResult) -> None:
        assert sorted(path.name for path in exported.directory.iterdir()) == NAMES
        assert sorted(path.name for path in exported.files) == NAMES
        assert [path.name for path in exported.directory.parent.iterdir()] == ["seven"]

    def test_every_file_was_checked_on_outputs_and_score(self, exported: ExportResult) -> None:
        assert all(check.passed and check.value <= check.limit for check in exported.checks)
        looked_at = {(check.file, check.what.split()[0]) for check in exported.checks}
        for file in ("model.safetensors", "model.pt2", "model.onnx"):
            assert {(file, "largest"), (file, "difference")} <= looked_at

    def test_files_can_be_read_by_others(self, exported: ExportResult) -> None:
        umask = os.umask(0)
        os.umask(umask)
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in exported.files)
        assert exported.directory.stat().st_mode & 0o777 == 0o777 & ~umask

    def test_plan_file_is_the_plan(self, tiny: Case, exported: ExportResult) -> None:
        assert json.loads((exported.directory / "plan.json").read_text()) == tiny.point.record.plan.to_json()

    def test_no_path_of_the_source_code_goes_along(self, exported: ExportResult) -> None:
        for path in exported.files:
            assert str(ROOT).encode() not in path.read_bytes(), path.name

    def test_the_model_is_not_changed_and_nothing_is_printed(
        self, tiny: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        model = copy.deepcopy(tiny.model).train()
        before = copy.deepcopy(model.state_dict())
        said: list[str] = []
        export(tiny.task, tiny.header, tiny.point, model, tmp_path / "out", say=said.append)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert capfd.readouterr() == ("", "")
        assert {"writing model.safetensors", "writing model.pt2", "writing model.onnx"} <= set(said)

    @pytest.mark.parametrize("formats", [("safetensors",), ("pt2",), ("onnx",)], ids=lambda names: names[0])
    def test_one_format_alone(self, tiny: Case, tmp_path: Path, formats: tuple[str, ...]) -> None:
        result = tiny.export(tmp_path / "out", formats=formats)
        assert [path.name for path in result.files] == ["plan.json", f"model.{formats[0]}", "report.md", "report.json"]


class TestLoadedElsewhere:
    @pytest.mark.parametrize("given", [models.TinyConv, lambda: models.make("tiny_conv")[0]], ids=["class", "function"])
    def test_safetensors_gives_the_same_model(
        self, tiny: Case, exported: ExportResult, given: Callable[[], nn.Module]
    ) -> None:
        loaded = load(exported.directory, given)
        assert not loaded.training
        assert torch.equal(run(loaded, tiny.inputs), run(tiny.model, tiny.inputs))

    def test_safetensors_leaves_a_given_module_alone(self, tiny: Case, exported: ExportResult) -> None:
        dense = models.TinyConv().train()
        before = copy.deepcopy(dense.state_dict())
        loaded = load(str(exported.directory), dense)
        assert dense.training
        assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
        assert torch.equal(run(loaded, tiny.inputs), run(tiny.model, tiny.inputs))

    @pytest.mark.parametrize("batch", [1, 2, 7, 60])
    def test_pt2_at_any_batch_size(self, tiny: Case, exported: ExportResult, batch: int) -> None:
        program = torch.export.load(exported.directory / "model.pt2").module()
        inputs = tuple(x[:batch] for x in tiny.inputs)
        torch.testing.assert_close(run(program, inputs), run(tiny.model, inputs))

    def test_pt2_holds_nothing_to_unpickle(self, exported: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
        with zipfile.ZipFile(exported.directory / "model.pt2") as archive:
            assert [e.filename for e in archive.infolist() if e.filename.endswith(".pt") and e.file_size] == []

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("something is unpickled")

        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, refuse)
        torch.export.load(exported.directory / "model.pt2")

    def test_onnx_in_a_process_without_torch(self, tiny: Case, exported: ExportResult, tmp_path: Path) -> None:
        figures, outputs = in_another_process(exported.directory, tmp_path, tiny, "--batch", "7")
        wanted = run(tiny.model, tiny.inputs)
        np.testing.assert_allclose(outputs, wanted.numpy(), rtol=1e-4, atol=1e-5)
        assert figures["accuracy"] == pytest.approx(tiny.point.record.score, abs=1e-3)
        assert figures["examples"] == 60
        assert not figures["torch_imported"]
        assert not figures["autorank_imported"]

    def test_onnx_is_one_valid_file_with_a_free_batch_and_names(self, tiny: Case, exported: ExportResult) -> None:
        model = onnx.load(exported.directory / "model.onnx", load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        assert [value.name for value in model.graph.input] == ["x"]
        assert [value.name for value in model.graph.output] == ["output"]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["autorank.plan_id"] == tiny.point.record.plan_id
        opset = next(entry.version for entry in model.opset_import if not entry.domain)
        assert f"opset {opset}" in (exported.directory / "report.md").read_text()


class Labels(nn.Module):
    """Logits, the label, None and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3)

    def forward(self, *images: Tensor) -> tuple[Any, ...]:
        logits = self.conv(images[0] + images[1]).mean((2, 3))
        return logits, {"label": logits.argmax(1), "none": None}, 3


class TestKindsOfModels:
    @pytest.mark.parametrize("name", ZOO)
    def test_zoo(self, name: str, tmp_path: Path) -> None:
        case = exporting.make(name, exporting.half_ranks(name))
        result = case.export(tmp_path / "out")
        assert sorted(path.name for path in result.files) == NAMES
        assert all(check.passed for check in result.checks)
        loaded = load(tmp_path / "out", lambda: models.make(name, seed=9)[0])
        assert torch.equal(models.output(loaded, case.inputs), models.output(case.model, case.inputs))

    def test_names_of_inputs_and_of_keyed_outputs(self, tmp_path: Path) -> None:
        case = exporting.make("two_inputs", {"image": Choice("channel_svd", (3,))})
        case.export(tmp_path / "out")
        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert [value.name for value in graph.input] == ["image", "vector"]
        assert [value.name for value in graph.output] == ["logits", "features"]
        assert 'session.run(None, {"image": image, "vector": vector})' in (tmp_path / "out" / "report.md").read_text()

    def test_outputs_that_are_not_all_tensors(self, tmp_path: Path) -> None:
        case = exporting.make(Labels, {"conv": Choice("channel_svd", (4,))}, (2, 6, 6), (2, 6, 6))
        result = case.export(tmp_path / "out")
        assert sorted(path.name for path in result.files) == NAMES
        assert sum("whole-number" in check.what for check in result.checks) == 3
        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert [value.name for value in graph.input] == ["images_0", "images_1"]
        assert len(graph.output) == 2
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} == {"batch"}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_float_type_is_kept(self, dtype: torch.dtype, tmp_path: Path) -> None:
        case = exporting.make(lambda: models.TinyConv().to(dtype), TINY, (3, 8, 8))
        case.export(tmp_path / "out", formats=("safetensors", "pt2"))
        loaded = load(tmp_path / "out", models.TinyConv)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(run(loaded, case.inputs), run(case.model, case.inputs))

    def test_tied_weights_are_stored_once_and_stay_tied(self, tmp_path: Path) -> None:
        case = exporting.make("tied", {"inner": Choice("channel_svd", (4,))})
        case.export(tmp_path / "out", formats=("safetensors",))
        loaded = load(tmp_path / "out", models.TiedAutoencoder)
        assert loaded.decoder.weight is loaded.embed.weight
        assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * (20 * 16 + 16 * 4 * 2 + 16) + 1000


class TestScoreScript:
    """benchmarks/onnx_score.py on what it is given."""

    def call(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benchmarks" / "onnx_score.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_several_inputs_from_one_archive(self, tmp_path: Path) -> None:
        case = exporting.make("two_inputs", {"image": Choice("channel_svd", (3,))})
        case.export(tmp_path / "out", formats=("onnx",))
        image, vector = (x.numpy() for x in case.inputs)
        labels = run(case.model, case.inputs)["logits"].argmax(1).numpy()
        labels[::4] = -1
        np.savez(tmp_path / "data.npz", vector=vector, labels=labels, image=image)
        done = self.call(tmp_path / "out", "--inputs", tmp_path / "data.npz", "--limit", 40)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["accuracy"] == 75.0
        assert json.loads(done.stdout)["examples"] == 40

    def test_a_pickled_array_is_refused(self, exported: ExportResult, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.array([Evil(tmp_path / "ran")], dtype=object), allow_pickle=True)
        done = self.call(exported.directory, "--inputs", tmp_path / "x.npy", "--labels", tmp_path / "x.npy")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "ran").exists()


class Rows(nn.Module):
    """Runs at any batch size, and no trace of it does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(row) for row in x])


class Branches(Rows):
    """Does another thing where the data are negative: no trace holds both."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class Sorts(Rows):
    """Has an operator that PyTorch exports and ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.special.i1(x))


class Forked(Rows):
    """Gives other values when it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 1.01 if torch.compiler.is_exporting() else y


class Hidden(Rows):
    """Holds a number that is in no state dict, another one in each copy that the factory makes."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Hidden.made += 1
        self.gain = 1 + 0.1 * Hidden.made

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


LINEAR = {"linear": Choice("channel_svd", (3,))}


class TestCannotBeExported:
    def test_a_fixed_batch_size_is_said(self, tmp_path: Path) -> None:
        case = exporting.make(Rows, LINEAR, (8,))
        result = case.export(tmp_path / "out")
        assert all(check.passed for check in result.checks)
        fixed = {check.file for check in result.checks if check.what.startswith("fixed batch size of 1: ")}
        assert fixed == {"model.pt2", "model.onnx"}
        assert "fixed batch size of 1" in (tmp_path / "out" / "report.md").read_text()
        figures, _ = in_another_process(tmp_path / "out", tmp_path, case)
        assert figures["batch"] == 1
        assert figures["accuracy"] == pytest.approx(case.point.record.score, abs=1e-3)

    @pytest.mark.parametrize(
        ("model", "without"),
        [(Branches, {"model.pt2", "model.onnx"}), (Sorts, {"model.onnx"})],
        ids=["data-dependent", "no ONNX operator"],
    )
    def test_the_other_files_are_written_and_the_reason_reported(
        self, model: type[nn.Module], without: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        case = exporting.make(model, LINEAR, (8,))
        said: list[str] = []
        result = case.export(tmp_path / "out", say=said.append)
        assert {path.name for path in result.files} == set(NAMES) - without
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(NAMES) - without
        failed = [check for check in result.checks if not check.passed]
        assert {check.file for check in failed} == without
        for check in failed:
            assert check.what.startswith("not written: ")
            assert len(check.what) > 20
            assert "\n" not in check.what
            assert "\x1b" not in check.what
            assert any(check.file in line for line in said)
        report = (tmp_path / "out" / "report.md").read_text()
        assert "**failed**" in report
        assert "onnxruntime.InferenceSession" not in report
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(("model", "name"), [(Branches, "pt2"), (Sorts, "onnx")])
    def test_a_format_that_was_named_is_wanted(self, model: type[nn.Module], name: str, tmp_path: Path) -> None:
        case = exporting.make(model, LINEAR, (8,))
        with pytest.raises(ExportError, match=f"model.{name} could not be made: "):
            case.export(tmp_path / "out", formats=("safetensors", name))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("model", "file"), [(Forked, "pt2"), (Hidden, "safetensors")])
    def test_a_file_that_behaves_otherwise_is_no_export(
        self, model: type[nn.Module], file: str, tmp_path: Path
    ) -> None:
        case = exporting.make(model, LINEAR, (8,))
        # The task copies one module for ever; Hidden's copies differ as a factory's would.
        case.task._source = _Factory(model)  # type: ignore[assignment]
        with pytest.raises(
            ExportError, match=rf"model.{file} does not behave .* is [\d.]+(e-\d+)?, and at most"
        ) as caught:
            case.export(tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_is_not_the_trials_is_refused(self, tiny: Case, tmp_path: Path) -> None:
        other = copy.deepcopy(tiny.model)
        nn.init.zeros_(other.fc.weight)
        with pytest.raises(ExportError, match="accuracy against the trial's record is"):
            export(tiny.task, tiny.header, tiny.point, other, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_is_not_the_trials_is_refused_by_a_part_of_the_data(self, tiny: Case, tmp_path: Path) -> None:
        other = copy.deepcopy(tiny.model)
        nn.init.zeros_(other.fc.weight)
        with pytest.raises(ExportError, match="accuracy against the trial's record is"):
            export(tiny.task, tiny.header, tiny.point, other, tmp_path / "out", formats=("safetensors",), examples=5)
        assert list(tmp_path.iterdir()) == []

    def test_the_record_is_checked_on_all_data_and_the_files_on_a_part(self, tiny: Case, tmp_path: Path) -> None:
        result = tiny.export(tmp_path / "out", formats=("safetensors",), examples=5)
        (check,) = [check for check in result.checks if check.file == "the model"]
        assert check.passed
        assert check.what == "accuracy against the trial's record"
        assert check.value == pytest.approx(0, abs=1e-6)
        report = (tmp_path / "out" / "report.md").read_text()
        assert "run on 5 validation examples" in report
        assert "accuracy against the trial's record" in report

    def test_a_trial_without_a_score_is_said_not_to_be_compared(self, tiny: Case, tmp_path: Path) -> None:
        point = replace(tiny.point, record=replace(tiny.point.record, score=None))
        result = export(tiny.task, tiny.header, point, tiny.model, tmp_path / "out", formats=("safetensors",))
        (check,) = [check for check in result.checks if check.file == "the model"]
        assert check.what == "accuracy against the trial's record: not compared, the trial has no score"

    def test_an_unknown_format(self, tiny: Case, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="unknown export format 'tflite'; there are safetensors, pt2, onnx"):
            tiny.export(tmp_path / "out", formats=("tflite",))


class _Factory:
    """A model source that makes a new module at each call."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def template(self) -> nn.Module:
        return self.kind().eval()


class TestTarget:
    def test_a_directory_with_files_is_refused(self, tiny: Case, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for overwrite, said in ((False, "is not empty; give another"), (True, "is not an earlier export")):
            with pytest.raises(ExportError, match=said):
                tiny.export(tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_earlier_export_is_replaced_only_on_demand(self, tiny: Case, copied: Path) -> None:
        with pytest.raises(ExportError, match="overwrite=True"):
            tiny.export(copied, formats=("safetensors",))
        assert sorted(path.name for path in copied.iterdir()) == NAMES
        tiny.export(copied, formats=("safetensors",), overwrite=True)
        assert sorted(path.name for path in copied.iterdir()) == [
            "model.safetensors",
            "plan.json",
            "report.json",
            "report.md",
        ]
        assert [path.name for path in copied.parent.iterdir()] == ["copy"]

    def test_a_users_own_file_in_an_earlier_export_is_kept(self, tiny: Case, copied: Path) -> None:
        (copied / "notes.txt").write_text("mine")
        with pytest.raises(ExportError, match=r"'notes\.txt', which no export wrote"):
            tiny.export(copied, overwrite=True)
        assert (copied / "notes.txt").read_text() == "mine"

    def test_an_empty_directory_is_taken(self, tiny: Case, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        tiny.export(tmp_path / "out", formats=("safetensors",))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_file_in_the_way(self, tiny: Case, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(ExportError, match="out is a file"):
            tiny.export(tmp_path / "out")
        with pytest.raises(ExportError, match=r"cannot export to .*below: .*out is a file"):
            tiny.export(tmp_path / "out" / "below", formats=("safetensors",))

    def test_an_interrupted_export_leaves_the_earlier_one(self, tiny: Case, copied: Path) -> None:
        before = {path.name: path.read_bytes() for path in copied.iterdir()}

        def interrupt(line: str) -> None:
            if line.startswith("comparing"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny.export(copied, formats=("safetensors",), overwrite=True, say=interrupt)
        assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
        assert [path.name for path in copied.parent.iterdir()] == ["copy"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _rewrite(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _edit_plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        (folder / "plan.json").write_text(json.dumps(plan))

    return edit


def _edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _fails() -> nn.Module:
    raise RuntimeError("no such checkpoint")


class Wider(models.TinyConv):
    """Layers of the same names, the last one wider."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 11)


class TestLoadRefuses:
    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            pytest.param(lambda d: shutil.rmtree(d), ExportError, "is not a directory", id="no directory"),
            pytest.param(lambda d: (d / "plan.json").unlink(), PlanError, "plan.json does not exist", id="no plan"),
            pytest.param(lambda d: _rewrite(d / "plan.json", "{"), PlanError, "not JSON: line 1", id="plan cut off"),
            pytest.param(lambda d: _rewrite(d / "plan.json", b"\xff\xfe\0"), PlanError, "not a text", id="plan binary"),
            pytest.param(lambda d: _rewrite(d / "plan.json", "[1]"), PlanError, "not a plan", id="plan a list"),
            pytest.param(lambda d: _rewrite(d / "plan.json", "[" * 99999), PlanError, "not a plan", id="plan nested"),
            pytest.param(lambda d: _rewrite(d / "plan.json", "{}"), PlanError, "'layers' is missing", id="plan empty"),
            pytest.param(_edit_plan(lambda p: p.update(x=1)), PlanError, "unknown key 'x'", id="plan key"),
            pytest.param(
                _edit_plan(lambda p: p["layers"].update(other=p["layers"]["conv1"])), PlanError, "'other'", id="layer"
            ),
            pytest.param(
                _edit_plan(lambda p: p["layers"]["conv1"].update(rank=[99])), PlanError, "conv1.*99", id="rank"
            ),
            pytest.param(
                _edit_plan(lambda p: p["layers"]["conv1"].update(rank=[5])), WeightsError, "of plan", id="edited plan"
            ),
            pytest.param(
                lambda d: (d / "model.safetensors").unlink(),
                WeightsError,
                "safetensors does not exist",
                id="no weights",
            ),
            pytest.param(
                lambda d: _rewrite(d / "model.safetensors", (d / "model.safetensors").read_bytes()[:500]),
                WeightsError,
                "damaged",
                id="weights cut off",
            ),
            pytest.param(lambda d: _rewrite(d / "model.safetensors", b""), WeightsError, "damaged", id="weights empty"),
            pytest.param(
                _edit_weights(lambda t: t.pop("fc.bias")), WeightsError, "has no 'fc.bias'", id="weights missing"
            ),
            pytest.param(
                _edit_weights(lambda t: t.update(more=torch.ones(1))),
                WeightsError,
                "holds 'more'",
                id="weights left over",
            ),
            pytest.param(
                _edit_weights(lambda t: t.update({"fc.bias": torch.ones(3)})),
                WeightsError,
                "'fc.bias' has shape 3, and the rebuilt model wants 10",
                id="weights of another shape",
            ),
            pytest.param(
                _edit_weights(lambda t: t.update({"fc.bias": torch.ones(10, dtype=torch.int32)})),
                WeightsError,
                "'fc.bias' is int32",
                id="weights of another kind",
            ),
        ],
    )
    def test_files(self, copied: Path, change: Callable[[Path], None], error: type[AutorankError], said: str) -> None:
        change(copied)
        with pytest.raises(error, match=said) as caught:
            load(copied, models.TinyConv)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("model", "error", "said"),
        [
            pytest.param(models.Conv1dNet, PlanError, "no layer 'conv1'", id="another model"),
            pytest.param(Wider, WeightsError, "'fc.weight' has shape 10×24", id="another width"),
            pytest.param(_fails, ModelError, "no such checkpoint", id="factory fails"),
            pytest.param(lambda: 3, ModelError, "must return a torch.nn.Module, not int", id="factory of numbers"),
            pytest.param("resnet", ModelError, "not str", id="a name"),
        ],
    )
    def test_models(self, exported: ExportResult, model: Any, error: type[AutorankError], said: str) -> None:
        with pytest.raises(error, match=said):
            load(exported.directory, model)

    @pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "pickle"])
    def test_a_pickle_by_the_name_of_safetensors_does_not_run(self, copied: Path, tmp_path: Path, zipped: bool) -> None:
        trace = tmp_path / "ran"
        if zipped:
            torch.save({"fc.bias": Evil(trace)}, copied / "model.safetensors")
        else:
            (copied / "model.safetensors").write_bytes(pickle.dumps(Evil(trace)))
        with pytest.raises(WeightsError, match="damaged or not a safetensors file"):
            load(copied, models.TinyConv)
        assert not trace.exists()

    def test_a_pickle_inside_a_pt2_does_not_run(self, copied: Path, tmp_path: Path) -> None:
        # torch.export.load would run it: it falls back to weights_only=False for the sample inputs.
        trace, pickled = tmp_path / "ran", io.BytesIO()
        torch.save((Evil(trace),), pickled)
        with zipfile.ZipFile(copied / "model.pt2") as archive, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
            for entry in archive.infolist():
                sample = entry.filename.endswith("sample_inputs/model.pt")
                evil.writestr(entry, pickled.getvalue() if sample else archive.read(entry))
        with pytest.raises(ExportError, match="only unpickling could read"):
            artifacts.open_pt2(tmp_path / "evil.pt2", None)
        assert not trace.exists()


class Views(nn.Module):
    """Tensors that share memory in every way: tied, a transposed view, a part, not contiguous, empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.randn(4, 6))
        self.tied = self.a
        self.register_buffer("flipped", self.a.data.t())
        self.register_buffer("part", self.a.data[1])
        self.register_buffer("last", torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("count", torch.tensor(seed))


class TestWeightFile:
    def test_shared_memory_of_all_kinds_comes_back(self, tmp_path: Path) -> None:
        model, other = Views(1), Views(2)
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
        write_weights(model, tmp_path / "w.safetensors")
        other.flipped, other.part = other.flipped.clone(), other.part.clone()
        got = read_weights(other, tmp_path / "w.safetensors").state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert other.tied is other.a

    def test_safetensors_own_loader_reads_it(self, tmp_path: Path) -> None:
        from safetensors.torch import load_model

        model, other = models.TiedAutoencoder(), models.TiedAutoencoder()
        write_weights(model, tmp_path / "w.safetensors", {"note": "mine"})
        load_model(other, tmp_path / "w.safetensors")
        assert torch.equal(other.decoder.weight, model.decoder.weight)

    def test_extra_state_is_refused(self, tmp_path: Path) -> None:
        class Extra(nn.Linear):
            def get_extra_state(self) -> dict[str, int]:
                return {"seen": 3}

        with pytest.raises(ExportError, match="_extra_state is extra state of type dict"):
            write_weights(Extra(2, 2), tmp_path / "w.safetensors")
