"""What an export does more for a model with bits: a file that whole-number kernels run, and its time beside others."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autorank import artifacts
from autorank.comparing import Candidate, Check, compare, runner
from autorank.quant import leaves
from autorank.quant.deploy import deployable
from autorank.quant.onnx_int8 import kernels, make_integer, session
from autorank.tasks import Task

CALIBRATION = 256
"""Training examples for the ranges of sums and outputs."""

TOLERANCE = 0.25
"""Of the outputs: single ones may move by many levels, where those of layers before them were close to two levels."""

SCORE = 2e-3
"""Of the score, as a share of it: two tenths of a point of 100."""

_SECONDS, _ROUNDS = 2.0, 200


@dataclass(frozen=True)
class Latency:
    """The time of a file in ONNX Runtime: median and interquartile range, in milliseconds."""

    file: str
    batch: int
    median_ms: float
    spread_ms: float


def make_whole(
    path: Path, task: Task, traced: artifacts.Trace, checked: Callable[[Candidate], Sequence[Check]]
) -> tuple[str, artifacts.Runner]:
    """Complete an ONNX file with quantize and dequantize nodes, in place, as far as it scores as the model does here.

    Weights are tried as int8, then as uint8, which is exact on every processor; where neither holds, the file stays as
    it was traced, with sums in floating point.

    Parameters
    ----------
    path : Path
    task : Task
    traced : Trace
    checked : callable
        Compares a file that was opened with the model.

    Returns
    -------
    note : str
    run : Runner
        The file, opened.
    """
    names, trial, why = [], path.with_name(f".{path.name}.trial"), ""
    names = artifacts.onnx_inputs(path)
    feeds = [{name: x.numpy() for name, x in zip(names, inputs, strict=True)} for inputs in _inputs(task, traced)]
    try:
        for unsigned in (False, True):
            shutil.copyfile(path, trial)
            try:
                make_integer(trial, feeds, unsigned)
                candidate = Candidate(path.name, artifacts.open_onnx(trial, traced.batch), TOLERANCE, share=SCORE)
                failed = [check for check in checked(candidate) if not check.passed]
                if candidate.failure is not None:
                    raise candidate.failure
            except Exception as error:  # what ONNX Runtime refuses is left as it was traced
                why = artifacts.reason(error)
                continue
            if failed:
                why = f"{failed[0].what} is {failed[0].value:.3g}, and {failed[0].limit:.3g} is allowed"
                continue
            trial.replace(path)
            return _note(path, unsigned), artifacts.open_onnx(path, traced.batch)
    finally:
        trial.unlink(missing_ok=True)
    note = f"sums and outputs between layers in floating point, as whole numbers do not hold there: {why}"
    return note, artifacts.open_onnx(path, traced.batch)


def _note(path: Path, unsigned: bool) -> str:
    whole, products = kernels(path)
    kind = "uint8 (as int8 they do not hold on this processor)" if unsigned else "int8"
    return f"ONNX Runtime runs {whole} of {products} products with whole numbers here; weights as {kind}"


def _inputs(task: Task, traced: artifacts.Trace) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs of the sizes that the trace takes."""
    if traced.batch == 0:
        yield traced.inputs
        return
    size = traced.batch or 64
    batches = task.calibration_batches(CALIBRATION, size)
    taken = [batch.inputs for batch in batches if traced.batch is None or len(batch) == size]
    yield from taken or [traced.inputs]


def traceable(model: nn.Module) -> nn.Module:
    """Return the model as it is traced: with whole-number weights where it has bits."""
    return deployable(model) if is_quantized(model) else model


def is_quantized(model: nn.Module) -> bool:
    """Say whether weights of the model are rounded to levels."""
    return any(leaf.weight_on for leaf in leaves(model).values())


def write(task: Task, model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> artifacts.Trace:
    """Write a model as ONNX, with whole numbers where it has bits and they hold; an export looks at more.

    Parameters
    ----------
    task : Task
        Its example inputs are traced; with bits, validation data are compared on.
    model : nn.Module
        On the CPU, in eval mode; not changed.
    path : Path
    metadata : mapping, optional

    Returns
    -------
    Trace
        What was written; its batch size may be fixed.
    """
    program = traceable(model)
    traced = artifacts.trace(program, task.example_inputs)
    with torch.no_grad():
        artifacts.write_onnx(traced, program, program(*traced.inputs), path, metadata)
    if is_quantized(model):

        def checked(candidate: Candidate) -> Sequence[Check]:
            with torch.no_grad():
                return compare(model_runner, [candidate], task, CALIBRATION, 0.0).checks.get(candidate.file, ())

        model_runner = runner(model)
        make_whole(path, task, traced, checked)
    return traced


def latencies(
    files: Mapping[str, Path],
    inputs: Mapping[int, tuple[Tensor, ...]],
    seconds: float = _SECONDS,
    threads: int = 1,
) -> tuple[Latency, ...]:
    """Time files in ONNX Runtime, one after the other again and again, so that all meet the same machine.

    Parameters
    ----------
    files : mapping of str to Path
        By what they are called.
    inputs : mapping
        Batch size → inputs.
    seconds : float
        For each batch size.
    threads : int
    """
    sessions = {name: session(path, threads) for name, path in files.items()}
    found = []
    for batch, tensors in inputs.items():
        values = [x.detach().cpu().contiguous().numpy() for x in tensors]
        feeds = {
            name: dict(zip([item.name for item in run.get_inputs()], values, strict=True))
            for name, run in sessions.items()
        }
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for name, run in sessions.items():
            run.run(None, feeds[name])
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < 5 or (rounds < _ROUNDS and time.perf_counter() < end):
            for name, run in sessions.items():
                begun = time.perf_counter()
                run.run(None, feeds[name])
                times[name].append((time.perf_counter() - begun) * 1e3)
            rounds += 1
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            found.append(Latency(name, batch, middle, high - low))
    return tuple(found)
