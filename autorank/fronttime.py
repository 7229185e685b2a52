"""How fast the members of a front are: as PyTorch runs them, or as ONNX Runtime runs their files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from autorank import deployment, measure
from autorank.artifacts import reason
from autorank.copying import model_copy
from autorank.errors import ExportError
from autorank.tasks import Task
from autorank.types import Runtime

ORIGINAL = -1
"""Stands for the dense model where models go by the numbers of their trials."""


@dataclass(frozen=True)
class Times:
    """Latencies that were taken on one machine in one go.

    Attributes
    ----------
    runtime : {"pytorch", "onnxruntime"}
    batch : int
    device : str
    of : mapping of int to tuple of float
        Number of the trial, or `ORIGINAL` → median and interquartile range in milliseconds; nothing where it failed.
    """

    runtime: Runtime
    batch: int
    device: str
    of: dict[int, tuple[float, float]]


class Timer(Protocol):
    """Is given one model after the other, then asked for all times."""

    def add(self, number: int, model: nn.Module) -> None:
        """Take a model in."""

    def times(self) -> Times:
        """Return what was measured."""


@contextmanager
def timer(
    runtime: Runtime, task: Task, batch: int, threads: int, device: str, say: Callable[[str], None]
) -> Iterator[Timer]:
    """Give what times models in a runtime.

    Parameters
    ----------
    runtime : {"pytorch", "onnxruntime"}
        In ONNX Runtime, on the CPU, layers with bits run with whole numbers; in PyTorch they only act as if, in
        floating point, so that their time there says nothing.
    task : Task
    batch, threads : int
    device : str
        For PyTorch.
    say : callable
        Told in one line of a model that cannot be timed.
    """
    if runtime == "pytorch":
        inputs = tuple(x.to(device) for x in measure.batch_one(task.example_inputs, batch))
        yield _InPyTorch(inputs, batch, threads, device)
        return
    with tempfile.TemporaryDirectory(prefix="autorank-") as folder:
        yield _InOnnxRuntime(task, batch, threads, Path(folder), say)


class _InPyTorch:
    def __init__(self, inputs: tuple[Tensor, ...], batch: int, threads: int, device: str) -> None:
        self._inputs, self._threads = inputs, threads
        self._found = Times("pytorch", batch, device, {})

    def add(self, number: int, model: nn.Module) -> None:
        timing = measure.time_module(model, self._inputs, self._threads, device=self._found.device)
        self._found.of[number] = timing.median_ms, timing.spread_ms

    def times(self) -> Times:
        return self._found


class _InOnnxRuntime:
    def __init__(self, task: Task, batch: int, threads: int, folder: Path, say: Callable[[str], None]) -> None:
        self._task, self._threads, self._folder, self._say = task, threads, folder, say
        self._size: int | None = batch
        self._files: dict[int, Path] = {}

    def add(self, number: int, model: nn.Module) -> None:
        path = self._folder / f"{number + 1}.onnx"
        try:
            fixed = deployment.write(self._task, model_copy(model).cpu().eval(), path).batch
            self._open(path, fixed)
        except Exception as error:  # not every model is one for ONNX; the front is whole without its time
            what = "the dense model" if number == ORIGINAL else f"point {number}"
            self._say(f"note: {what} is not timed, as it has no ONNX file: {reason(error)}")
            return
        self._files[number] = path

    def _open(self, path: Path, fixed: int | None) -> None:
        """Run a file once; ONNX Runtime has no kernels for some types of numbers."""
        if fixed is not None and self._files and fixed != self._size:
            raise ExportError(f"it runs at a batch size of {fixed} alone, and other points do not")
        self._size = self._size if fixed is None else fixed
        deployment.latencies({"": path}, {0: self._inputs()}, seconds=0.0)

    def _inputs(self) -> tuple[Tensor, ...]:
        examples = self._task.example_inputs
        return measure.batch_one(examples, self._size) if self._size else examples

    def times(self) -> Times:
        """Time all files in turns; at the size that the one with a fixed size takes."""
        size = self._size or next((len(x) for x in self._task.example_inputs if x.ndim), 1)
        if not self._files:
            return Times("onnxruntime", size, "cpu", {})
        files = {str(number): path for number, path in self._files.items()}
        found = deployment.latencies(files, {size: self._inputs()}, threads=self._threads)
        of = {int(each.file): (each.median_ms, each.spread_ms) for each in found}
        return Times("onnxruntime", size, "cpu", of)
