"""The recommended model as an MLflow model directory: run by ONNX Runtime, with signature, example and requirements.

Nothing is written to MLflow here: `mlflow_store` uploads the directory and registers it. The newest finished sweep of a
network holds the alias ``champion`` of the registered model that bears the network's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autorank import artifacts, deployment
from autorank.comparing import SCORE, Candidate, compare
from autorank.copying import model_copy
from autorank.errors import ExportError
from autorank.privacy import public
from autorank.run_inputs import Package
from autorank.run_values import short, trial_name
from autorank.tasks import Task
from autorank.types import FrontPoint, SweepHeader

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

EXAMPLES = 256
"""Validation examples on which the file must do what the model does; an export looks at more."""

_TOLERANCE = 1e-3
_NAME_LIMIT = 120


def model_name(header: SweepHeader, network: nn.Module) -> str:
    """Return the name under which models of this network are registered.

    That of the settings, ``python:nets.zoo:small`` as ``nets.zoo.small``; the class of a network from Python.
    """
    named = header.config.get("model")
    text = public(named).removeprefix("python:") if isinstance(named, str) else type(network).__name__
    return re.sub(r"[^\w.-]+", ".", text, flags=re.ASCII).strip(".")[:_NAME_LIMIT] or "network"


def package_key(point: FrontPoint) -> str:
    """Return what tells one recommended point of a sweep from another."""
    return f"{point.record.number} {point.record.plan_id}"


def pack(
    task: Task,
    header: SweepHeader,
    point: FrontPoint,
    model: nn.Module,
    folder: Path,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Package:
    """Write the model of a point as an MLflow model directory.

    Parameters
    ----------
    task : Task
        Its example inputs are traced, its validation data compared on.
    header : SweepHeader
    point : FrontPoint
    model : nn.Module
        The recovered compressed model; not changed.
    folder : Path
        An empty directory.
    step : callable, optional
        Told how many of how many steps are done.

    Returns
    -------
    Package
        As ONNX; where ONNX cannot hold the model, as PyTorch's traced program (which MLflow opens with
        `torch.export.load`).

    Raises
    ------
    Exception
        The model cannot be brought into either form, or what was written does not do what the model does.
    """
    tags = _tags(header, point)
    model = model_copy(model).cpu().eval()
    step(1, 3)
    try:
        place = _onnx(task, header, model, folder, tags)
    except Exception as error:
        if len(task.example_inputs) != 1:
            raise
        program = deployment.traceable(model)
        traced = artifacts.trace(program, task.example_inputs)
        place = _pt2(program, traced, folder, tags, artifacts.reason(error))
    step(2, 3)
    record = point.record
    metrics = {"score": record.score, "test_score": point.test_score, "macs_kept": record.kept.get("macs_kept")}
    return Package(
        model_name(header, task.model()),
        package_key(point),
        record.number,
        place,
        tags,
        {name: value for name, value in metrics.items() if value is not None},
    )


def _tags(header: SweepHeader, point: FrontPoint) -> dict[str, str]:
    record = point.record
    said: dict[str, Any] = {
        "autorank.sweep_id": header.sweep_id,
        "trial": record.number,
        "plan_id": record.plan_id,
        "plan": trial_name(record),
        "metric": header.metric,
        "score": record.score,
        "test_score": point.test_score,
        "macs_kept": record.kept.get("macs_kept"),
    }
    return {name: short(public(str(value))) for name, value in said.items() if value is not None}


def _onnx(task: Task, header: SweepHeader, model: nn.Module, folder: Path, tags: Mapping[str, str]) -> Path:
    """Write the ONNX flavor and hold the file against the model."""
    import mlflow.onnx
    import onnx

    file = folder / "model.onnx"
    traced = deployment.write(task, model, file, tags)
    allowed = (deployment.TOLERANCE, deployment.SCORE) if deployment.is_quantized(model) else (_TOLERANCE, SCORE)
    candidate = Candidate(file.name, artifacts.open_onnx(file, traced.batch), *allowed)
    with torch.no_grad():
        found = compare(lambda inputs: model(*inputs), [candidate], task, EXAMPLES, header.dense.score)
    if candidate.failure is not None:
        raise candidate.failure
    for check in found.checks[file.name]:
        if not check.passed:
            raise ExportError(f"the ONNX file does not do what the model does: {check.what} is {check.value:.3g}")
    proto = onnx.load(file)
    example = _example(proto, traced)
    place = folder / "model"
    with artifacts.quiet():
        mlflow.onnx.save_model(
            proto,
            str(place),
            signature=_signature(proto, single=len(traced.inputs) == 1),
            input_example=example,
            pip_requirements=_requirements("onnx", "onnxruntime", "numpy"),
            metadata=dict(tags),
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=(folder / "model.onnx.data").exists(),
        )
    return place


def _example(proto: Any, traced: artifacts.Trace) -> Any:
    """Return inputs of one example (all where the batch is fixed): an array, or several by name."""
    arrays = [_array(x if traced.batch is not None else x[:1]) for x in traced.inputs]
    names = [value.name for value in proto.graph.input]
    return arrays[0] if len(arrays) == 1 else dict(zip(names, arrays, strict=True))


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _signature(proto: Any, single: bool) -> ModelSignature:
    """Return the types and shapes of the graph's inputs and outputs; -1 where a size is free."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(value: Any, name: str | None) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        return TensorSpec(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape, name)

    given = Schema([spec(value, None if single else value.name) for value in proto.graph.input])
    return ModelSignature(given, Schema([spec(value, value.name) for value in proto.graph.output]))


def _pt2(model: nn.Module, traced: artifacts.Trace, folder: Path, tags: Mapping[str, str], why: str) -> Path:
    """Write the PyTorch flavor, as a traced program."""
    import mlflow.pytorch
    from mlflow.models import infer_signature

    place = folder / "program"
    with torch.no_grad():
        outputs = model(*traced.inputs)
    array = _array(traced.inputs[0])
    if not isinstance(outputs, Tensor):
        raise ExportError(f"not as ONNX ({why}); as a PyTorch program only with a single output")
    with artifacts.quiet():
        mlflow.pytorch.save_model(
            model,
            str(place),
            # MLflow takes a first size for free if it is not told otherwise.
            signature=infer_signature(array, _array(outputs))
            if traced.batch is None
            else _fixed(array, _array(outputs)),
            input_example=array,
            pip_requirements=_requirements("torch", "numpy"),
            metadata={**tags, "not_as_onnx": short(public(why))},
            serialization_format="pt2",
        )
    return place


def _fixed(given: Any, made: Any) -> ModelSignature:
    """Return the types and shapes of arrays, of which no size is free."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    before, after = (Schema([TensorSpec(array.dtype, array.shape)]) for array in (given, made))
    return ModelSignature(before, after)


def _requirements(*names: str) -> list[str]:
    # Said outright: MLflow would load the model in another process to find them out. A local build has no package.
    return [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", *names)]
