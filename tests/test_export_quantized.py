"""Exports of plans with bits: every file scores as the quantized model does, or is not handed over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from autorank import artifacts, deployment
from autorank.errors import ExportError
from autorank.export import ExportResult, load
from autorank.quant import leaves
from autorank.types import Choice
from tests import exporting, models
from tests.exporting import Case

CHOICES = {
    "conv1": Choice("dense", (), (), 8, 8),
    "conv2": Choice("tucker2", (8, 6), (), 4, 8),
}
OPEN = """
import sys
import torch, torch.ao.quantization.fx._decomposed
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture(scope="module")
def case() -> Case:
    return exporting.make("tiny_conv", CHOICES)


@pytest.fixture(scope="module")
def exported(case: Case, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return case.export(tmp_path_factory.mktemp("exports") / "bits")


def test_all_checks_passed(exported: ExportResult) -> None:
    assert all(check.passed for check in exported.checks)
    assert {check.file for check in exported.checks} >= {"model.safetensors", "model.pt2", "model.onnx"}


def test_safetensors_gives_the_same_quantized_model(case: Case, exported: ExportResult) -> None:
    loaded = load(exported.directory, models.TinyConv)
    assert [(leaf.weight_bits, leaf.calibrated) for leaf in leaves(loaded).values()] == [(8, True)] + [(4, True)] * 3
    with torch.no_grad():
        assert torch.equal(loaded(*case.inputs), case.model(*case.inputs))


def test_the_plan_carries_bits(exported: ExportResult) -> None:
    layers = json.loads((exported.directory / "plan.json").read_text())["layers"]
    assert [layers[name]["weight_bits"] for name in ("conv1", "conv2")] == [8, 4]


def test_the_program_in_another_process(case: Case, exported: ExportResult, tmp_path: Path) -> None:
    paths = [exported.directory / "model.pt2", tmp_path / "in.pt", tmp_path / "out.pt"]
    torch.save(case.inputs[0], paths[1])
    done = subprocess.run([sys.executable, "-c", OPEN, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = case.model(*case.inputs)
    torch.testing.assert_close(torch.load(paths[2]), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_the_program_has_the_operations_of_pt2e(exported: ExportResult) -> None:
    graph = torch.export.load(exported.directory / "model.pt2").graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("quantize_per_tensor" in name and "dequantize" not in name for name in called) == 4
    assert sum("dequantize_per_channel" in name for name in called) == 4


def test_the_file_for_onnx_runtime_in_another_process(case: Case, exported: ExportResult, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    with torch.no_grad():
        wanted, labels = case.model(*case.inputs), case.task.model()(*case.inputs).argmax(1)
    np.save(tmp_path / "in.npy", case.inputs[0].numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    command = [sys.executable, str(root / "benchmarks" / "onnx_score.py"), str(exported.directory)]
    command += ["--inputs", str(tmp_path / "in.npy"), "--labels", str(tmp_path / "labels.npy"), "--batch", "7"]
    command += ["--save", str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout)["accuracy"] - case.point.record.score) <= 100 / 60 + 1e-3
    got = np.load(tmp_path / "out.npy")
    assert np.abs(got - wanted.numpy()).max() <= 0.1 * np.abs(wanted.numpy()).max()


def test_the_report_says_bits_files_and_times(exported: ExportResult) -> None:
    text = (exported.directory / "report.md").read_text()
    assert "2 with bits (W4A8, W8A8)" in text
    assert "| dense W8A8 |" in text
    assert "| tucker2 W4A8 |" in text
    assert "Bit operations" in text
    assert "dense, floating point | 1 |" in text
    assert "products with whole numbers here" in text
    assert f"| `model.onnx` | {(exported.directory / 'model.onnx').stat().st_size:,} |" in text


def _worse(path: Path) -> None:
    model = onnx.load(path)
    for item in model.graph.initializer:
        if "scale" in item.name or item.name in _scales(model):
            values = onnx.numpy_helper.to_array(item)
            item.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values * 5 + 1, values.dtype), item.name))
    onnx.save(model, path)


def _scales(model: onnx.ModelProto) -> set[str]:
    return {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}


def test_a_file_with_wrong_scales_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = artifacts.write_onnx

    def tampered(*args: object, **more: object) -> int:
        opset = write(*args, **more)  # type: ignore[arg-type]
        _worse(args[3])  # type: ignore[arg-type]
        return opset

    monkeypatch.setattr(artifacts, "write_onnx", tampered)
    with pytest.raises(ExportError, match=r"model\.onnx does not behave as the model does"):
        case.export(tmp_path / "out", formats=("onnx",))
    assert not (tmp_path / "out").exists()


def test_where_whole_numbers_do_not_hold_sums_stay_in_floating_point(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = deployment.make_integer

    def tampered(path: Path, *args: object) -> None:
        make(path, *args)  # type: ignore[arg-type]
        _worse(path)

    monkeypatch.setattr(deployment, "make_integer", tampered)
    result = case.export(tmp_path / "out", formats=("onnx",))
    assert all(check.passed for check in result.checks)
    assert "as whole numbers do not hold there" in (tmp_path / "out" / "report.md").read_text()
