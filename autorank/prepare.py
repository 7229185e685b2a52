"""What a sweep needs before its first trial: profile, candidates, layer statistics, teacher outputs, dense figures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from autorank import measure, strategies
from autorank.beforehand import informed
from autorank.config import SweepConfig
from autorank.errors import AutorankError, ConfigError, ModelError, SweepError, describe
from autorank.evaluate import evaluate
from autorank.front import default_drop
from autorank.objectives import parse_constraint, parse_objectives
from autorank.privacy import to_keep
from autorank.profiling import profile as profile_model
from autorank.progress import Reporter
from autorank.recover import Teacher
from autorank.solvers import whitening
from autorank.solvers.gradients import Loss, collect_gradients
from autorank.space import SearchSpace, build_space, read_space
from autorank.tasks import Task
from autorank.trial import TrialContext, versions
from autorank.trouble import tell
from autorank.types import Choice, Evaluation, LayerSpec, ModelProfile, SweepHeader

# A pass with gradients keeps all activations of its batch, and so does one that is replayed.
GRADIENT_BATCH = 32
MEASURED_BATCH = 64
Latencies = Mapping[tuple[str, Choice | None], float]


@dataclass(frozen=True)
class Prepared:
    """A sweep that is ready to run."""

    context: TrialContext
    header: SweepHeader
    space: SearchSpace
    profile: ModelProfile


def resolve_device(name: str) -> str:
    """Return the PyTorch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; ConfigError when it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {name!r} is not available on this machine")
    return name


def _can_have_bits(asked: Container[str], source: str, reporter: Reporter) -> None:
    """Refuse what cannot be searched with bits, and say so where bits would be chosen for nothing."""
    if "latency_kept" in asked:
        raise ConfigError(
            f"latency is an objective or a constraint, and {source} gives layers bits: their time is that of the "
            "exported int8 graph, which is measured at export only; use bops or bytes instead, or take the bits out"
        )
    if "bops_kept" not in asked and "bytes_kept" not in asked:
        reporter.say(
            f"note: {source} gives layers bits, and neither bops nor bytes is an objective: bits only cost accuracy"
        )


def prepare(
    task: Task, config: SweepConfig, directory: Path, reporter: Reporter, before: SweepHeader | None = None
) -> Prepared:
    """Profile the model, build the search space and compute, once, what all trials share.

    Parameters
    ----------
    task : Task
    config : SweepConfig
    directory : Path
        Sweep directory; statistics, teacher outputs and latencies are kept in its ``cache``.
    reporter : Reporter
    before : SweepHeader or None
        Header of the sweep that is resumed; the dense model is not measured again.

    Raises
    ------
    AutorankError
        Model, data, space or settings do not fit together; or the resumed sweep had another model or other data.
    """
    device = resolve_device(config.device)
    chosen = strategies.get(config.strategy.name)
    chosen.checked(config.strategy.options)
    cache = directory / "cache"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot write to sweep directory {directory}: {error.strerror or error}") from None
    objectives = parse_objectives(config.objectives, task.metric_name, task.direction)
    constraints = tuple(parse_constraint(text, task.metric_name) for text in config.constraints)
    file = read_space(config.space)
    if before is not None:
        _same_source(before, task)

    threads = torch.get_num_threads()
    model = task.model()
    reporter.step("profile", 0, 1)
    profile = profile_model(model, task.example_inputs, device)
    space = build_space(file, profile)
    reporter.step("profile", 1, 1)
    if not any(c.name == "latency_kept" for c in constraints) and not any(o.name == "latency_kept" for o in objectives):
        # A bound that no plan meets is refused before anything takes long.
        strategies.make("random", space, objectives, constraints)

    latencies: Latencies = {}
    asked = {o.name for o in objectives} | {c.name for c in constraints}
    dense_cost = profile.dense
    if space.quantizes:
        _can_have_bits(asked, file.source, reporter)
    if "latency_kept" in asked:
        latencies, dense_ms = _latencies(model, task, space, config, device, cache, reporter)
        dense_cost = replace(dense_cost, latency_ms=dense_ms)
        space = build_space(file, replace(profile, dense=dense_cost), latencies)

    if "bops_kept" in asked:
        space = space.with_bops()
    dense_cost = replace(dense_cost, bops=space.dense.bops)

    model = model.to(device)
    torch.set_num_threads(available_cores())  # one process works now; the trials fix their own number
    try:
        needs = chosen.needs
        stats_file = _statistics(model, task, space, config, device, cache, reporter, "errors" in needs)
        space = informed(
            space,
            needs,
            model,
            stats_file,
            directory,
            reporter,
            seed=config.seed,
            processes=default_workers(device, config.threads),
            threads=config.threads,
            measured_on=list(task.calibration_batches(config.calibration, MEASURED_BATCH, device))
            if config.predictions == "measured"
            else (),
            task=task,
        )
        dense = before.dense if before is not None else _dense(model, task, device, reporter)
        recovery = config.recovery
        teacher_file = cache / "teacher.npy"
        if recovery.steps and recovery.distill > 0 and not recovery.features:
            Teacher.build(
                task, recovery, config.seed, device, teacher_file, lambda d, t: reporter.step("teacher outputs", d, t)
            )
    finally:
        torch.set_num_threads(threads)
    context = TrialContext(
        task=task,
        specs=profile.layers,
        dense_cost=dense_cost,
        recovery=recovery,
        quantization=config.quantization,
        seed=config.seed,
        device=device,
        threads=config.threads,
        directory=directory.resolve(),
        stats_file=stats_file,
        teacher_file=teacher_file,
        latencies=latencies,
        candidates={layer.spec.name: tuple(c.choice for c in layer.candidates) for layer in space.layers},
    )
    header = before or SweepHeader(
        # Not the directory's name alone: two people's sweeps/net may share one MLflow.
        sweep_id=f"{directory.resolve().name}-{secrets.token_hex(3)}",
        created=time.time(),
        config={
            **to_keep(config.model_dump(mode="json")),
            "space": file.model_dump(mode="json", exclude_none=True),
            "max_drop": default_drop(task.metric_name, dense.score) if config.max_drop is None else config.max_drop,
        },
        metric=task.metric_name,
        direction=task.direction,
        objectives=objectives,
        constraints=constraints,
        dense=dense,
        dense_cost=dense_cost,
        layers=_layer_rows(space, profile),
        left_alone=(*profile.left_alone, *space.kept_dense),
        fingerprint=dict(task.fingerprint),
        versions=versions(),
        started_in=os.getcwd(),
    )
    return Prepared(context, header, space, profile)


def _dense(model: nn.Module, task: Task, device: str, reporter: Reporter) -> Evaluation:
    reporter.step("dense model on validation data", 0, 1)
    try:
        dense = evaluate(model, task, "validation", device)
    except AutorankError as error:
        raise type(error)(f"the dense model: {error}") from None
    except Exception as error:  # the user's own forward pass, loss, metric or data
        raise ModelError(f"the dense model cannot be scored on the validation data: {describe(error)}") from error
    reporter.step("dense model on validation data", 1, 1)
    return dense


def _layer_rows(space: SearchSpace, profile: ModelProfile) -> tuple[dict[str, object], ...]:
    candidates = {layer.spec.name: len(layer.candidates) for layer in space.layers}
    return tuple(
        {
            "name": spec.name,
            "kind": spec.kind,
            "weight_shape": list(spec.weight_shape),
            "macs": spec.macs,
            "params": spec.params,
            "candidates": candidates.get(spec.name, 0),
        }
        for spec in profile.layers
    )


def _same_source(before: SweepHeader, task: Task) -> None:
    now = json.loads(json.dumps(dict(task.fingerprint)))
    for key, value in before.fingerprint.items():
        if now.get(key) != value:
            raise SweepError(
                f"the sweep was started with another {key} (fingerprint {value} then, {now.get(key)} now); "
                "resume with the same model, weights and data, or start a new sweep"
            )


def _statistics(
    model: nn.Module,
    task: Task,
    space: SearchSpace,
    config: SweepConfig,
    device: str,
    cache: Path,
    reporter: Reporter,
    of_all: bool = False,
) -> Path | None:
    """Collect the statistics of the layers that a candidate whitens, once per sweep.

    Inputs of all of them, by which the errors of outputs are told as well, and gradients of those whose outputs are
    whitened. With `of_all`, both of every layer, as far as the loss has gradients: for predictions.
    """

    def whitened(*sides: Literal["input", "output"]) -> list[LayerSpec]:
        return [
            layer.spec for layer in space.layers if any(c.choice.whitens(s) for c in layer.candidates for s in sides)
        ]

    specs, needed = whitened("input", "output"), whitened("output")
    if of_all:
        specs = [layer.spec for layer in space.layers]
    outputs = specs if of_all else needed
    if not specs:
        return None
    contents = [sorted(spec.name for spec in some) for some in (specs, outputs)]
    path = cache / f"stats-{_key(task, config.calibration, *contents)}.safetensors"
    if path.is_file():
        try:
            whitening.load(path)
            return path
        except AutorankError:
            tell(f"{path} is damaged; the statistics are collected again")
            path.unlink()
    what = "layer statistics"
    total = -(-config.calibration // 64)
    reporter.step(what, 0, total)

    def inputs() -> Iterator[tuple[torch.Tensor, ...]]:
        for done, batch in enumerate(task.calibration_batches(config.calibration, 64)):
            yield batch.inputs
            reporter.step(what, min(done + 1, total), total)

    stats = whitening.collect(model, specs, inputs(), device, examples=config.calibration)
    if outputs:
        try:
            gradients = _gradients(model, task, outputs, config, device, reporter)
        except ModelError as error:
            if needed:
                raise
            reporter.say(f"note: {error}; the rise of the loss is predicted from the errors of outputs instead")
            gradients = {}
        stats = {name: replace(each, gradient=gradients.get(name)) for name, each in stats.items()}
    whitening.save(stats, path)
    return path


def _gradients(
    model: nn.Module, task: Task, specs: Sequence[LayerSpec], config: SweepConfig, device: str, reporter: Reporter
) -> dict[str, torch.Tensor]:
    """Collect the covariances of the gradients of the task's loss at the outputs of layers."""
    what = "loss gradients"
    total = -(-config.calibration // GRADIENT_BATCH)
    reporter.step(what, 0, total)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[tuple[torch.Tensor, ...], Loss]]:
        for done, batch in enumerate(task.calibration_batches(config.calibration, GRADIENT_BATCH, device)):
            yield batch.inputs, partial(task.sampled_loss, batch=batch, generator=generator)
            reporter.step(what, min(done + 1, total), total)

    return collect_gradients(model, specs, batches(), device, examples=config.calibration)


def _latencies(
    model: nn.Module,
    task: Task,
    space: SearchSpace,
    config: SweepConfig,
    device: str,
    cache: Path,
    reporter: Reporter,
) -> tuple[Latencies, float]:
    """Measure every candidate layer alone, before any trial runs; the table is kept for a resumed sweep."""
    settings = config.latency
    # Beside the journal, not in the cache: the search has seen these figures and is replayed with them.
    path = cache.parent / f"latencies-{_key(task, device, settings.batch, settings.threads)}.json"
    pairs: list[tuple[LayerSpec, Choice | None]] = []
    for layer in space.layers:
        pairs.append((layer.spec, None))
        pairs.extend((layer.spec, candidate.choice) for candidate in layer.candidates)
    if path.is_file():
        saved = _saved_latencies(path)
        if saved is None:
            reporter.say(f"note: {path} is damaged: the layers are timed anew")
        elif all((spec.name, choice) in saved[0] for spec, choice in pairs):
            return saved

    def shown() -> Iterator[tuple[LayerSpec, Choice | None]]:
        for done, pair in enumerate(pairs):
            reporter.step("layer latencies", done, len(pairs))
            yield pair
        reporter.step("layer latencies", len(pairs), len(pairs))

    table = measure.time_layers(shown(), settings.threads, device, settings.batch)
    inputs = tuple(x.to(device) for x in measure.batch_one(task.example_inputs, config.latency.batch))
    dense = measure.time_module(model.to(device), inputs, settings.threads, device=device).median_ms
    rows = [[name, choice.to_json() if choice else None, ms] for (name, choice), ms in table.items()]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"dense_ms": dense, "layers": rows}))
    part.replace(path)
    return table, dense


def _saved_latencies(path: Path) -> tuple[Latencies, float] | None:
    """Return what `_latencies` has kept, or None when that is damaged."""
    try:
        data = json.loads(path.read_text())
        known = {(str(n), None if c is None else Choice.from_json(c)): float(ms) for n, c, ms in data["layers"]}
        dense = float(data["dense_ms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return (known, dense) if all(0 < ms < math.inf for ms in (dense, *known.values())) else None


def _key(task: Task, *more: object) -> str:
    """Return a name for what belongs to this model, these data and these settings only."""
    text = json.dumps([dict(task.fingerprint), torch.__version__, *map(str, more)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def available_cores() -> int:
    """Return how many cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str, threads: int, gpus: float = 0.0) -> int:
    """Return how many trials to run at a time on this machine.

    The cores divided by a trial's threads; as many as its GPUs hold where each takes some; else one on a GPU.
    """
    by_cores = max(1, available_cores() // threads)
    if gpus:
        return max(1, min(by_cores, int(torch.cuda.device_count() / gpus + 1e-6)))
    return 1 if device.startswith("cuda") else by_cores
