"""A chosen point as files that other programs load: each one loaded back and compared before it counts as written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autorank import plan as plans
from autorank.comparing import Check
from autorank.errors import AutorankError, ExportError, ModelError, PlanError
from autorank.exportdir import FILES, FORMATS, PLAN, REPORT, RERUN, check_target, disk_errors, move, scratch_beside
from autorank.exporter import Exporter
from autorank.planfile import read_plan
from autorank.tasks import Task
from autorank.types import DenseFigures, FrontPoint, Plan, SweepHeader, TrialRecord
from autorank.weightfile import read_weights

__all__ = ["FORMATS", "Check", "ExportResult", "export", "load"]


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes
    ----------
    directory : Path
    files : tuple of Path
    checks : tuple of Check
        A file that could not be made is in it as a check that has not passed, with the reason.
    """

    directory: Path
    files: tuple[Path, ...]
    checks: tuple[Check, ...]


def export(
    task: Task,
    header: SweepHeader,
    point: FrontPoint,
    model: nn.Module,
    directory: Path | str,
    *,
    formats: Sequence[str] = FORMATS,
    device: str = "cpu",
    dense: DenseFigures | None = None,
    overwrite: bool = False,
    examples: int = 2000,
    say: Callable[[str], None] | None = None,
    records: Sequence[TrialRecord] = (),
) -> ExportResult:
    """Write plan.json, model.safetensors, model.pt2, model.onnx, report.md and report.json, all of them or nothing.

    Everything is written into a directory beside the target that is renamed at the end.

    Parameters
    ----------
    task : Task
    header : SweepHeader
    point : FrontPoint
        The plan and its figures.
    model : nn.Module
        The recovered compressed model; not changed.
    directory : path
        Must not exist, or be empty, or with `overwrite` be an earlier export.
    formats : sequence of str
        Of ``safetensors``, ``pt2``, ``onnx``. With all three, one that this model cannot be brought into is reported as
        a failed check; when fewer are named, each of them is wanted and such a failure is an error.
    device : str
        Where the model and the one rebuilt from safetensors are run; the other files are run on the CPU.
    dense : DenseFigures, optional
        Test score and latency of the dense model, for the report.
    overwrite : bool
    examples : int
        Compare on at most this many validation examples.
    say : callable, optional
        Gets a line per step.
    records : sequence of TrialRecord
        Of the whole sweep, for what report.json says of the front and of the trials that this one started from.

    Returns
    -------
    ExportResult

    Raises
    ------
    ExportError
        The target is refused, a file cannot be written, or one does not behave as the model does (with its figure).
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        given = f"unknown export format {unknown[0]!r}" if unknown else "no export format given"
        raise ExportError(f"{given}; there are {', '.join(FORMATS)}")
    if examples < 1:
        raise ExportError(f"examples must be at least 1, not {examples}")
    target = check_target(Path(directory), overwrite)
    exporter = Exporter(
        task, header, point, model, tuple(f for f in FORMATS if f in formats), device, say or _silent, records
    )
    with disk_errors(target), scratch_beside(target) as folder:
        checks = exporter.write(folder, examples, dense)
        move(folder, target)
    names = [PLAN, *exporter.names(target), REPORT, RERUN]
    return ExportResult(target, tuple(target / name for name in names), checks)


def load(directory: Path | str, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuild an exported model from plan.json and model.safetensors, in eval mode on the CPU.

    Nothing is unpickled, and no file but these two is read.

    Parameters
    ----------
    directory : path
        What `export` wrote.
    model : nn.Module or callable
        The dense model (not changed; its weights do not matter) or a function that returns it.

    Returns
    -------
    nn.Module
        With the floating-point type that was exported.

    Raises
    ------
    ExportError
        No such directory.
    PlanError
        plan.json is missing, is not a plan, or is the plan of another model (names the layer).
    WeightsError
        model.safetensors is missing, damaged, or holds the weights of another model or plan.
    ModelError
        The function fails or does not return a module.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ExportError(f"{directory} is not a directory; give the one that `autorank export` wrote")
    plan = _read_plan(directory / PLAN)
    rebuilt = plans.build(_dense(model), plan).cpu()
    return read_weights(rebuilt, directory / FILES["safetensors"], plan.plan_id).eval()


def _silent(_: str) -> None:
    """Say nothing."""


def _read_plan(path: Path) -> Plan:
    """Return the plan in a file; PlanError, naming the file, when there is none."""
    if not path.is_file():
        raise PlanError(f"{path} does not exist: {path.parent} is not an exported directory")
    return read_plan(path)


def _dense(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ModelError(f"give the dense model or a function that returns it, not {type(model).__name__}")
        try:
            model = model()
        except AutorankError:
            raise
        except Exception as error:
            raise ModelError(f"the function that makes the model failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the function that makes the model must return a torch.nn.Module, not {type(model).__name__}")
    return model
