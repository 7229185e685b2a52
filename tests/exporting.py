"""Makes what an export takes: a task, a compressed model, and the header and record that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autorank import formats
from autorank import plan as plans
from autorank.evaluate import evaluate
from autorank.export import ExportResult, export
from autorank.measure import count
from autorank.profiling import profile
from autorank.quant import calibrate
from autorank.tasks import CustomTask, Task
from autorank.types import (
    Choice,
    Constraint,
    Fidelity,
    FrontPoint,
    Objective,
    Plan,
    SweepHeader,
    TrialRecord,
    bit_operations,
)
from tests import models


@dataclass(frozen=True)
class Case:
    """Everything that `export` needs."""

    task: Task
    header: SweepHeader
    point: FrontPoint
    model: nn.Module
    inputs: tuple[Tensor, ...]

    def export(self, directory: Path, **options: Any) -> ExportResult:
        return export(self.task, self.header, self.point, self.model, directory, **options)


def accuracy(outputs: Any, targets: Tensor) -> Tensor:
    """Percent of examples at which the first output's largest entry is where the target says."""
    first = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return (first.flatten(1).argmax(1) == targets).float().mean() * 100


def squares(outputs: Any, targets: Tensor) -> Tensor:
    return sum(leaf.float().square().mean() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def make(
    model: str | Callable[[], nn.Module], choices: dict[str, Choice], *shapes: tuple[int, ...], size: int = 60
) -> Case:
    """Return a case for a model of the zoo, or for a factory and the shapes of its inputs without the batch."""
    if isinstance(model, str):
        dense, example = models.make(model)
        draws = [example] + [models.make(model)[1] for _ in range(size // len(example[0]) - 1)]
        inputs = tuple(torch.cat(parts) for parts in zip(*draws, strict=True))
    else:
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense = model().eval()
        dtype = next(dense.parameters()).dtype
        inputs = tuple(torch.randn(size, *shape, generator=generator).to(dtype) for shape in shapes)
    with torch.no_grad():
        first = next(leaf for leaf in tree_leaves(dense(*inputs)) if isinstance(leaf, Tensor))
    targets = first.flatten(1).argmax(1)
    data = (*inputs, targets)
    task = CustomTask(
        dense, train=data, validation=data, test=data, loss=squares, metric=accuracy, metric_name="accuracy"
    )
    return of_task(task, choices, inputs)


def of_task(task: Task, choices: dict[str, Choice], inputs: tuple[Tensor, ...]) -> Case:
    plan = Plan.of(choices)
    seen = profile(task.model(), task.example_inputs)
    model, layers = plans.apply(task.model(), plan, specs=seen.layers)
    # As after batch-norm re-estimation and a fine-tune: statistics and biases are those of no factory.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    calibrate(model, [inputs])
    score = evaluate(model, task, "validation").score
    cost, _ = count(model, task.example_inputs)
    dense_cost = seen.dense
    if any(choice.bits for choice in choices.values()):
        cost = replace(cost, bops=bit_operations(cost.macs, 8, 8))
        dense_cost = replace(dense_cost, bops=bit_operations(dense_cost.macs, None, None))
    record = TrialRecord(
        number=7,
        plan=plan,
        fidelity=Fidelity(20),
        status="complete",
        score=score,
        score_before=score / 2,
        cost=cost,
        kept=cost.kept(dense_cost),
        layers=layers,
        seconds={"fit": 0.5, "tune": 2.25},
        versions={"torch": torch.__version__},
    )
    header = SweepHeader(
        sweep_id="sweep-of-a-test",
        created=1.7e9,
        config={"model": "python:tests.models:TinyConv", "trials": 40, "recovery": {"steps": 20, "lr": 0.002}},
        metric=task.metric_name,
        direction=task.direction,
        objectives=(Objective("score", task.direction), Objective("macs_kept", "min")),
        constraints=(Constraint("macs_kept", "<=", 0.9),),
        dense=evaluate(task.model(), task, "validation"),
        dense_cost=dense_cost,
        layers=tuple(
            {
                "name": spec.name,
                "kind": spec.kind,
                "weight_shape": spec.weight_shape,
                "macs": spec.macs,
                "params": spec.params,
                "candidates": 4,
            }
            for spec in seen.layers
        ),
        left_alone=seen.left_alone,
        fingerprint=task.fingerprint,
        versions={"autorank": "0.1.0"},
    )
    return Case(task, header, FrontPoint(record, test_score=score), model, inputs)


TINY = {
    "conv1": Choice("channel_svd", (6,)),
    "conv2": Choice("tucker2", (8, 6)),
}


def half_ranks(name: str) -> dict[str, Choice]:
    """Return a plan for a network of the zoo: every layer at half its largest rank, the formats in turn."""
    model, inputs = models.make(name)
    choices = {}
    for index, spec in enumerate(profile(model, inputs).layers):
        fmt = formats.get(("channel_svd", "tucker2", "spatial_svd")[index % 3])
        if fmt.supports(spec) is None:
            options = (*fmt.variants(spec), ())[0]
            choices[spec.name] = Choice(fmt.name, tuple(max(1, r // 2) for r in fmt.max_rank(spec, options)), options)
    return choices
