"""Files for ONNX Runtime as benchmarks/quantized.py compares them, their scores and their times."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from models import ResNet
from quantized_models import NAIVE
from torch import Tensor, nn

from autorank import artifacts, formats
from autorank.plan import apply
from autorank.profiling import profile
from autorank.quant import calibrate, leaves, with_bits
from autorank.quant.deploy import deployable
from autorank.quant.onnx_int8 import make_integer, session
from autorank.tasks import Task
from autorank.types import Choice, Plan


@dataclass
class File:
    """An ONNX file: what it is called, of which row's model, where."""

    called: str
    row: str
    path: Path
    found: dict[str, float] = field(default_factory=dict)

    @property
    def kernels(self) -> str:
        """What the session runs, counted."""
        target = self.path.with_suffix(".optimised")
        session(self.path, optimised=target)
        counts = Counter(node.op_type for node in onnx.load(target).graph.node)
        target.unlink()
        shown = ("QLinearConv", "QGemm", "QLinearAdd", "Conv", "FusedConv", "Gemm")
        return ", ".join(f"{counts[name]} {name}" for name in shown if counts[name])

    def score(self, task: Task) -> float:
        """Return the accuracy of the file on the test data, else on the validation data."""
        if not self.found:
            run = artifacts.open_onnx(self.path, None)
            split, total, seen = "test" if task.size("test") else "validation", 0.0, 0
            for batch in task.batches(split):
                total += float(task.metric(run(batch.inputs)[0], batch.targets)) * len(batch)
                seen += len(batch)
            self.found["score"] = total / seen
        return self.found["score"]


def written(task: Task, model: nn.Module, folder: Path, called: str) -> list[File]:
    """Write a model; one with bits with int8 and with uint8 weights."""
    inputs = [batch.inputs[0].numpy() for batch in task.calibration_batches(256, 64)]
    base = folder / called.replace(" ", "-")
    quantized = bool(leaves(model))
    program = deployable(model) if quantized else model
    traced = artifacts.trace(program, task.example_inputs)
    path = base.with_suffix(base.suffix + ".onnx")
    with torch.no_grad():
        artifacts.write_onnx(traced, program, program(*traced.inputs), path)
    if not quantized:
        return [File(called, called, path)]
    name = artifacts.onnx_inputs(path)[0]
    files = []
    for kind in ("int8", "uint8"):
        target = base.with_name(f"{base.name}-{kind}.onnx")
        shutil.copyfile(path, target)
        make_integer(target, [{name: x} for x in inputs], kind == "uint8")
        files.append(File(f"{called}, {kind}", called, target))
    return files


def quantized_by_runtime(task: Task, folder: Path, source: str, called: str) -> File:
    """Quantize the dense float file by ONNX Runtime's own tool: QDQ, per channel, minima and maxima."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.left = iter([{name: batch.inputs[0].numpy()} for batch in task.calibration_batches(256, 64)])

        def get_next(self) -> Any:
            return next(self.left, None)

    path, target = folder / f"{source.replace(' ', '-')}.onnx", folder / f"{called.replace(' ', '-')}.onnx"
    ready = folder / "ready.onnx"
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(target),
        Reader(artifacts.onnx_inputs(path)[0]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return File(called, called, target)


def timed(
    paths: Sequence[Path], task: Task | None, shape: tuple[int, ...] = (), rounds: int = 40
) -> dict[Path, dict[int, float]]:
    """Return the median milliseconds of files at batch 1 and 32, one thread, in turns so that all meet the same load.

    The median is of the faster half of the runs: on a shared machine the others say what else was running.
    """
    sessions = {path: session(path) for path in paths}
    found: dict[Path, dict[int, float]] = {path: {} for path in paths}
    for batch in (1, 32):
        if task is not None:
            example = next(iter(task.calibration_batches(32, 32))).inputs[0][:batch]
        else:
            example = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        times: dict[Path, list[float]] = {path: [] for path in paths}
        for number in range(rounds + 1):
            for path, run in sessions.items():
                feed = {run.get_inputs()[0].name: example.numpy()}
                begun = time.perf_counter()
                run.run(None, feed)
                if number:
                    times[path].append((time.perf_counter() - begun) * 1e3)
        for path, taken in times.items():
            found[path][batch] = float(np.median(np.sort(taken)[: max(len(taken) // 2, 1)]))
    return found


class Wider(ResNet):
    """The ResNet-20 with every channel count multiplied, without training."""

    def __init__(self, times: int) -> None:
        super().__init__(1)
        counts = [16 * times, 32 * times, 64 * times]
        self.conv1, self.bn1 = nn.Conv2d(3, counts[0], 3, 1, 1, bias=False), nn.BatchNorm2d(counts[0])
        self.layer1 = self._stage(counts[0], counts[0], 3, 1)
        self.layer2 = self._stage(counts[0], counts[1], 3, 2)
        self.layer3 = self._stage(counts[1], counts[2], 3, 2)
        self.linear = nn.Linear(counts[2], 10)


def widths(shape: tuple[int, ...] = (3, 32, 32), share: float = 0.35) -> list[dict[str, Any]]:
    """Print the times of untrained networks of several widths: spatial SVD, every layer at this share of its MACs."""
    found = []
    for times in (1, 2, 4):
        model = Wider(times).eval()
        inputs = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        specs = profile(model, (inputs,)).layers
        choices, fmt = {}, formats.get("spatial_svd")
        for spec in specs:
            if spec.kind == "conv2d" and spec.name != "conv1":
                ranks = range(fmt.max_rank(spec)[0], 0, -1)
                rank = next(rank for rank in ranks if fmt.cost(spec, (rank,)).macs <= share * spec.macs)
                choices[spec.name] = Choice("spatial_svd", (rank,))
        plan = Plan.of(choices)
        dense = Plan.of({spec.name: Choice("dense", (), ()) for spec in specs})
        with tempfile.TemporaryDirectory() as scratch:
            paths = {}
            for name, each in (("dense", dense), ("decomposed", plan)):
                plain = apply(model, plan, specs=specs)[0] if name == "decomposed" else model
                paths[name, "float"] = _file(plain, inputs, Path(scratch) / f"{name}.onnx")
                bits = Plan.of(
                    {
                        spec.name: replace(
                            each.choices.get(spec.name, Choice("dense", (), ())), weight_bits=8, activation_bits=8
                        )
                        for spec in specs
                    }
                )
                quantized = with_bits(plain, bits)
                calibrate(quantized, [(inputs,)], NAIVE)
                paths[name, "int8"] = _file(deployable(quantized), inputs, Path(scratch) / f"{name}-int8.onnx", True)
            taken = timed(list(paths.values()), None, shape, rounds=20)
        row = {f"{name} {kind}": taken[path] for (name, kind), path in paths.items()}
        gain = {batch: row["dense int8"][batch] / row["decomposed int8"][batch] for batch in (1, 32)}
        found.append({"times": times, **row, "gain": gain})
        shown = "   ".join(f"{key} {value[1]:.2f} / {value[32]:.1f}" for key, value in row.items())
        channels = f"{16 * times}-{32 * times}-{64 * times} channels"
        print(f"{channels}: {shown}   int8 gain {gain[1]:.2f} / {gain[32]:.2f}", flush=True)
    return found


def _file(model: nn.Module, inputs: Tensor, path: Path, whole: bool = False) -> Path:
    traced = artifacts.trace(model, (inputs,))
    with torch.no_grad():
        artifacts.write_onnx(traced, model, model(inputs), path)
    if whole:
        make_integer(path, [{artifacts.onnx_inputs(path)[0]: inputs.numpy()}])
    return path
