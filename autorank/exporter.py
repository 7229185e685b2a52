"""Writes the files of one export into a folder, loads each of them back and holds it against the model."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from autorank import artifacts, deployment
from autorank import plan as plans
from autorank.comparing import Candidate, Check, Comparison, Runner, compare, runner, score_tolerance
from autorank.copying import model_copy
from autorank.errors import AutorankError, ExportError
from autorank.exportdir import FILES, FORMATS, ONNX_DATA, PLAN, REPORT, RERUN
from autorank.measure import batch_one
from autorank.quant.deploy import REGISTERING
from autorank.report import render_report
from autorank.rerun import described
from autorank.tasks import Task
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord
from autorank.weightfile import PLAN_ID, read_weights, write_weights

# Rebuilt weights give the same numbers, a traced program the same kernels, another runtime the same mathematics.
_TOLERANCES = {"safetensors": 1e-5, "pt2": 1e-4, "onnx": 1e-3}
_HALF = 3e-2  # for models in 16-bit floating point
_LEVELS = 5e-2  # for programs with bits: a value between two levels may fall on either


class Exporter:
    """Writes the files of one export into one folder and checks them."""

    def __init__(
        self,
        task: Task,
        header: SweepHeader,
        point: FrontPoint,
        model: nn.Module,
        formats: tuple[str, ...],
        device: str,
        say: Callable[[str], None],
        records: Sequence[TrialRecord] = (),
    ) -> None:
        self.task, self.header, self.point, self.device, self.say = task, header, point, device, say
        self.records = records
        self.model = model_copy(model).cpu().eval()
        self.formats = formats
        self.required = set(FORMATS if set(formats) != set(FORMATS) else ("safetensors",))
        self.metadata = {PLAN_ID: point.record.plan_id, "autorank.sweep": header.sweep_id}
        self.notes: dict[str, str] = {}
        self.checks: list[Check] = []
        self.latencies: tuple[deployment.Latency, ...] = ()
        self.quantized = deployment.is_quantized(self.model)
        self._traced: artifacts.Trace | Exception | None = None

    def write(self, folder: Path, examples: int, dense: DenseFigures | None) -> tuple[Check, ...]:
        """Write all files into `folder`; return the checks."""
        (folder / PLAN).write_text(json.dumps(self.point.record.plan.to_json(), indent=2) + "\n", encoding="utf-8")
        candidates: list[Candidate] = []
        self.examples = examples
        for name in self.formats:
            self.say(f"writing {FILES[name]}")
            try:
                run = getattr(self, f"_{name}")(folder / FILES[name])
                candidates.append(self._candidate(name, run))
            except OSError:
                raise
            except Exception as error:
                self._gave_up(folder, name, error)
        self.say(f"comparing {', '.join(c.file for c in candidates)} with the model")
        reference = self._reference()
        found = self._compare(reference, candidates, examples)
        for candidate in candidates:
            if candidate.failure is not None:
                self._gave_up(folder, candidate.file.removeprefix("model."), candidate.failure)
            self.checks += found.checks.get(candidate.file, ())
        self._against_record(reference, found.score, found.examples)
        for check in self.checks:
            if not check.passed and not math.isnan(check.value):
                raise ExportError(
                    f"{check.file} does not behave as the model does: {check.what} is {check.value:.3g}, "
                    f"and at most {check.limit:.3g} is allowed; nothing was exported"
                )
        if self.quantized and (folder / FILES["onnx"]).exists():
            self._time(folder)
        (folder / REPORT).write_text(self._report(folder, found.examples, dense), encoding="utf-8")
        written = [folder / name for name in (PLAN, *self.names(folder), REPORT)]
        again = described(
            self.header,
            self.point,
            records=self.records,
            dense=dense,
            files=written,
            checks=self.checks,
            versions=_writers(),
        )
        (folder / RERUN).write_text(json.dumps(again, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return tuple(self.checks)

    def names(self, folder: Path) -> list[str]:
        """Return the names of the model files that are in `folder`."""
        names = [FILES[name] for name in self.formats] + [ONNX_DATA]
        return [name for name in names if (folder / name).exists()]

    def _safetensors(self, path: Path) -> Runner:
        write_weights(self.model, path, self.metadata)
        rebuilt = plans.build(self.task.model(), self.point.record.plan).cpu()
        return runner(read_weights(rebuilt, path, self.point.record.plan_id), self.device)

    def _pt2(self, path: Path) -> Runner:
        traced = self._trace(path.name)
        artifacts.write_pt2(traced, path)
        if self.quantized:
            self.notes[path.name] = f"quantize and dequantize operations as PT2E writes them, from `{REGISTERING}`"
        return artifacts.open_pt2(path, traced.batch)

    def _onnx(self, path: Path) -> Runner:
        traced = self._trace(path.name)
        with torch.no_grad():
            outputs = self.program(*traced.inputs)
        opset = artifacts.write_onnx(traced, self.program, outputs, path, self.metadata)
        beside = f"; weights in `{ONNX_DATA}`" if (path.parent / ONNX_DATA).exists() else ""
        self.notes[path.name] = f"opset {opset}{beside}"
        if not self.quantized or beside:
            return artifacts.open_onnx(path, traced.batch)
        self.say("completing model.onnx for whole-number kernels")
        reference = self._reference()

        def checked(candidate: Candidate) -> Sequence[Check]:
            return self._compare(reference, [candidate], self.examples).checks.get(candidate.file, ())

        note, run = deployment.make_whole(path, self.task, traced, checked)
        self.notes[path.name] += f"; {note}"
        return run

    @cached_property
    def program(self) -> nn.Module:
        """The model as it is traced: with whole-number weights where it has bits."""
        return deployment.traceable(self.model)

    def _time(self, folder: Path) -> None:
        """Time the whole-number file beside the dense model's in floating point."""
        self.say("timing model.onnx beside the dense model")
        shown = self.header.config.get("latency")
        batch = shown.get("batch", 1) if isinstance(shown, Mapping) else 1
        fixed = self._traced.batch if isinstance(self._traced, artifacts.Trace) else None
        sizes = (1, batch) if fixed is None else (fixed,)
        with tempfile.TemporaryDirectory() as scratch:
            files = {"dense, floating point": Path(scratch) / "dense.onnx", FILES["onnx"]: folder / FILES["onnx"]}
            try:
                deployment.write(self.task, self.task.model().cpu().eval(), files["dense, floating point"])
                inputs = {
                    size: batch_one(self.task.example_inputs, size) if size else self.task.example_inputs
                    for size in sizes
                }
                self.latencies = deployment.latencies(files, inputs)
            except Exception as error:  # the dense model may not be one for ONNX; what is exported is whole without it
                self.notes[FILES["onnx"]] += f"; not timed: {artifacts.reason(error)}"

    def _trace(self, file: str) -> artifacts.Trace:
        """Trace once for both formats, and say so when the batch size had to be fixed."""
        if self._traced is None:
            self.say("tracing the model")
            try:
                self._traced = artifacts.trace(self.program, self.task.example_inputs)
            except Exception as error:
                self._traced = error
        if isinstance(self._traced, Exception):
            raise self._traced
        if self._traced.batch is not None:
            what = f"fixed batch size of {self._traced.batch}" if self._traced.batch else "fixed input sizes"
            self.checks.append(Check(file, f"{what}: {self._traced.note}", float(self._traced.batch), True))
        return self._traced

    def _candidate(self, name: str, run: Runner) -> Candidate:
        if self.quantized and name != "safetensors":
            tolerance = deployment.TOLERANCE if name == "onnx" else _LEVELS
            return Candidate(FILES[name], run, tolerance, share=deployment.SCORE)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        return Candidate(FILES[name], run, _HALF if half else _TOLERANCES[name])

    def _reference(self) -> Runner:
        return runner(self.model if self.device == "cpu" else model_copy(self.model), self.device)

    def _compare(self, reference: Runner, candidates: Sequence[Candidate], examples: int) -> Comparison:
        with _on_validation_data():
            return compare(reference, candidates, self.task, examples, self.header.dense.score)

    def _gave_up(self, folder: Path, name: str, error: Exception) -> None:
        """Take away what is there of a file that cannot be made, and report it or raise."""
        why = str(error) if isinstance(error, AutorankError) else artifacts.reason(error)
        if name in self.required:
            raise ExportError(f"{FILES[name]} could not be made: {why}") from error
        for file in (FILES[name], f"{FILES[name]}.data"):
            (folder / file).unlink(missing_ok=True)
        self.notes.pop(FILES[name], None)
        self.checks = [check for check in self.checks if check.file != FILES[name]]
        self.checks.append(Check(FILES[name], f"not written: {why}", math.nan, False))
        self.say(f"{FILES[name]} is left out: {why}")

    def _against_record(self, reference: Runner, score: float | None, examples: int) -> None:
        """Hold the model itself against its trial: the weights must be those that were measured, on the same data."""
        recorded, what = self.point.record.score, f"{self.header.metric} against the trial's record"
        if score is None or recorded is None:
            why = "the trial has no score" if recorded is None else "there is no validation data"
            self.checks.append(Check("the model", f"{what}: not compared, {why}", math.nan, True))
            return
        if examples < self.task.size("validation"):
            self.say("scoring the model on the whole validation data")
            score, examples = self._score(reference)
        # Trials may run on an accelerator, in other sums than here.
        limit = max(score_tolerance(recorded, self.header.dense.score, examples), 0.01 * abs(recorded))
        self.checks.append(Check("the model", what, abs(score - recorded), abs(score - recorded) <= limit, limit))

    def _score(self, reference: Runner) -> tuple[float, int]:
        """Return the model's score on the whole validation split, and the number of examples."""
        total, seen = 0.0, 0
        with _on_validation_data():
            for batch in self.task.batches("validation"):
                total += float(self.task.metric(reference(batch.inputs), batch.targets)) * len(batch)
                seen += len(batch)
        return total / seen, seen

    def _report(self, folder: Path, examples: int, dense: DenseFigures | None) -> str:
        names = [PLAN, *self.names(folder)]
        return render_report(
            self.header,
            self.point,
            sizes={name: (folder / name).stat().st_size for name in names},
            checks=self.checks,
            dense=dense,
            examples=examples,
            input_names=artifacts.input_names(self.model, self.task.example_inputs),
            notes=self.notes,
            versions=_writers(),
            latencies=self.latencies,
        )


def _writers() -> dict[str, str]:
    """Return the versions of the libraries that write the files."""
    from importlib.metadata import version

    return {name: version(name) for name in ("safetensors", "onnx", "onnxscript", "onnxruntime")}


@contextmanager
def _on_validation_data() -> Iterator[None]:
    """Run the model that is exported, in full precision; an error of the user's own code is told in a line."""
    try:
        with _full_precision(), torch.no_grad():
            yield
    except AutorankError:
        raise
    except Exception as error:
        raise ExportError(f"the model to export does not run on validation data: {artifacts.reason(error)}") from error


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: its rounding would look like a difference between the files."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
