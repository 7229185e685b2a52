"""model.pt2 and model.onnx: traced once, written, and opened again as something that runs.

About .pt2 (torch 2.13): `torch.export.load` can unpickle. The archive's ``data/sample_inputs/*.pt`` goes through
``torch.load(weights_only=True)`` and, when that refuses, through ``weights_only=False``; weights and constants marked
``use_pickle`` and opaque constants are unpickled without any guard. So a .pt2 file of unknown origin can run code when
it is opened. What is written here holds none of it (no sample inputs, raw tensors only), and `open_pt2`, which is for
files that this process has just written, refuses an archive in which there would be something to unpickle.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autorank.comparing import Runner, tensors
from autorank.errors import ExportError
from autorank.quant.deploy import quantization_operations

# Protocol buffers end at 2 GiB; beyond this the ONNX weights go into a second file beside it.
ONNX_LIMIT = 1_900_000_000


@dataclass(frozen=True)
class Trace:
    """A model as `torch.export` sees it.

    Attributes
    ----------
    program : torch.export.ExportedProgram
    inputs : tuple of Tensor
        What it was traced with.
    shapes : mapping or None
        The dynamic dimensions, in the form that `torch.export.export` takes; None for a fixed batch size.
    batch : int or None
        The only batch size it runs at; 0 where the inputs have no batch dimension; None for any.
    note : str
        Why the batch size is fixed; empty otherwise.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[Tensor, ...]
    shapes: Mapping[str, Any] | None
    batch: int | None
    note: str = ""


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Trace `model` with a batch dimension of any size, else with a fixed one.

    Parameters
    ----------
    model : nn.Module
        On the CPU, in eval mode.
    inputs : tuple of Tensor
        Example inputs; a view of a large tensor is cloned, as the whole of it would be saved.

    Returns
    -------
    Trace
        Fixed at batch 1 (else at the example's batch size) when no trace with a free batch size exists.

    Raises
    ------
    Exception
        Whatever torch.export raises when the model cannot be traced at all; the first reason is given.
    """
    size = inputs[0].shape[0] if inputs[0].ndim else 0
    if not size or not all(x.ndim and x.shape[0] == size for x in inputs):
        note = "the inputs have no first dimension in common that could be the batch"
        return Trace(_export(model, _own(inputs), None), _own(inputs), None, 0, note)
    # torch.export takes a size of 1 for a constant, so the batch is traced with at least two examples.
    several = _own(inputs if size > 1 else tuple(torch.cat([x, x]) for x in inputs))
    shapes = _dynamic(model, several)
    try:
        return Trace(_export(model, several, shapes), several, shapes, None)
    except Exception as error:
        first = error
    for fixed in dict.fromkeys((1, size)):
        cut = _own(tuple(x[:fixed] for x in inputs))
        try:
            return Trace(_export(model, cut, None), cut, None, fixed, reason(first))
        except Exception:
            continue
    raise first


def write_pt2(traced: Trace, path: Path) -> None:
    """Write the trace as one .pt2 file without sample inputs (they would be the file's only pickle)."""
    traced.program.example_inputs = None
    with quiet():
        torch.export.save(traced.program, path)


def open_pt2(path: Path, batch: int | None) -> Runner:
    """Return the program of a .pt2 file that this process has just written, as something that runs.

    Raises
    ------
    ExportError
        The archive holds something that would have to be unpickled.
    """
    if record := _pickled(path):
        raise ExportError(f"{path.name} holds {record}, which only unpickling could read")
    quantization_operations()
    with quiet():
        module = torch.export.load(path).module()
    return _in_batches(lambda inputs: tensors(module(*inputs)), batch)


def write_onnx(
    traced: Trace, model: nn.Module, outputs: Any, path: Path, metadata: Mapping[str, str] | None = None
) -> int:
    """Write the trace as ONNX, the weights inside the file as long as it stays under 2 GB.

    Parameters
    ----------
    traced : Trace
    model : nn.Module
        The traced model; traced again, giving its tensors alone, when it also returns something that is not a tensor.
    outputs : any
        What the model returns for the traced inputs; names the outputs (``output``, or key and position).
    path : Path
    metadata : mapping of str to str, optional
        Goes into the file's metadata.

    Returns
    -------
    int
        The opset.
    """
    program = traced.program
    if len(tensors(outputs)) != len(pytree.tree_flatten(outputs)[0]):
        shapes = (
            None if traced.shapes is None else {"inputs": tuple(pytree.tree_leaves(traced.shapes, is_leaf=_is_axis))}
        )
        program = _export(_TensorsOnly(model), traced.inputs, shapes)
    names = input_names(model, traced.inputs)
    with quiet():
        onnx = torch.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=_output_names(outputs, names),
            dynamic_shapes=None if traced.shapes is None else tuple({0: "batch"} for _ in traced.inputs),
        )
        if onnx is None:
            raise ExportError("torch.onnx.export gave nothing")
        onnx.model.metadata_props.update(metadata or {})
        for node in onnx.model.graph:
            node.metadata_props.clear()  # where in the model's code it comes from, often longer than the weights
        size = sum(t.numel() * t.element_size() for t in (*program.state_dict.values(), *program.constants.values()))
        onnx.save(path, external_data=size > ONNX_LIMIT)
    return int(onnx.model.opset_imports[""])


def onnx_inputs(path: Path) -> list[str]:
    """Return the names of an ONNX file's inputs."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def open_onnx(path: Path, batch: int | None) -> Runner:
    """Return the ONNX file as something that runs, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return _in_batches(run, batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch.export and torch.onnx print, log and warn about while they work; errors still raise."""
    before = logging.root.manager.disable
    aside = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def reason(error: BaseException) -> str:
    """Return the innermost cause of an exporter's error in one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    specialised = next((line for line in lines if "your code specialized" in line), lines[0])
    return f"{type(error).__name__}: {specialised.split('. If you')[0][:200]}"


class _TensorsOnly(nn.Module):
    """Gives the tensors among a model's outputs as one flat tuple, the only outputs that ONNX has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model."""
        return tuple(tensors(self.model(*inputs)))


def _export(model: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    with quiet(), torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    # Both formats would carry paths and lines of the user's source code along, several times as large as the graph.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _own(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in inputs)


def _arguments(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return the inputs by the names of the parameters of `forward`; ``*args`` gets a tuple."""
    return dict(inspect.signature(model.forward).bind(*inputs).arguments)


def _dynamic(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1)
    return pytree.tree_map(lambda _: {0: batch}, _arguments(model, inputs))


def _is_axis(value: Any) -> bool:
    return isinstance(value, dict) and 0 in value


def input_names(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Return the names of the inputs: those of the parameters of `forward`; numbered for ``*args``."""
    names: list[str] = []
    for name, value in _arguments(model, inputs).items():
        names += [name] if isinstance(value, Tensor) else [f"{name}_{index}" for index in range(len(value))]
    return names


def _output_names(outputs: Any, taken: list[str]) -> list[str]:
    """Name the output tensors by their keys and positions: ``output``, ``output_0``, ``logits``."""
    names = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor):
            name = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
            names.append(name if name and not name[0].isdigit() and name not in taken else f"output_{name}".rstrip("_"))
    return names if len(set(names)) == len(names) else [f"output_{index}" for index in range(len(names))]


def _in_batches(run: Runner, batch: int | None) -> Runner:
    """Make a program of fixed batch size take any: in pieces, the last one filled up by repeating its last example."""
    if not batch:
        return run

    def pieces(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        size = inputs[0].shape[0]
        parts = []
        for start in range(0, size, batch):
            index = torch.arange(start, start + batch).clamp(max=size - 1)
            count = min(batch, size - start)
            parts.append([x[:count] for x in run(tuple(x[index] for x in inputs))])
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)]

    return pieces


def _pickled(path: Path) -> str | None:
    """Name what in a .pt2 archive would have to be unpickled; None when there is nothing."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            folder, _, name = entry.filename.rpartition("/")
            if name.endswith(".pt") and entry.file_size:
                return entry.filename
            if name.startswith(("custom_obj", "opaque_obj")):
                return entry.filename
            if name.endswith("_config.json") and folder.endswith(("weights", "constants")):
                config = json.loads(archive.read(entry))["config"]
                for tensor, payload in config.items():
                    if payload.get("use_pickle"):
                        return f"{tensor!r} as a pickle"
    return None
