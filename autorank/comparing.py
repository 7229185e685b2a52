"""Holds exported files against the model that they came from: same inputs in, differences and scores out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autorank import pytrees
from autorank.tasks import Task

Runner = Callable[[tuple[Tensor, ...]], Any]
"""Inputs on the CPU in, outputs in the model's own structure or a list of its tensors out."""

OUTPUT = "largest output difference ÷ largest output"
LABELS = "share of whole-number outputs that differ"
SCORE = 1e-3
"""By how much the score of a file may differ, as a share of the score, if nothing else is said."""
BATCH = 256  # as evaluate: metrics that are no plain mean over examples depend on it


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in one exported file.

    Attributes
    ----------
    file : str
        Name of the file in the exported directory.
    what : str
        What was measured; for a file that could not be made, why.
    value : float
        The figure; NaN where there is none.
    passed : bool
    limit : float
        The largest `value` that passes; NaN where there is none.
    """

    file: str
    what: str
    value: float
    passed: bool
    limit: float = math.nan


@dataclass
class Candidate:
    """A file that has been loaded back, and what is allowed to differ.

    Attributes
    ----------
    file : str
    run : callable
    tolerance : float
        Largest output difference as a share of the largest output.
    share : float
        By how much its score may differ, as a share of the score.
    failure : Exception or None
        What it raised when it was run.
    """

    file: str
    run: Runner
    tolerance: float
    share: float = SCORE
    failure: Exception | None = None
    _worst: dict[int, float] = field(default_factory=dict)
    _labels: list[int] = field(default_factory=lambda: [0, 0])
    _score: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: the reference's score (None without data), the number of examples, the checks per file."""

    score: float | None
    examples: int
    checks: dict[str, tuple[Check, ...]]


def runner(model: nn.Module, device: str = "cpu") -> Runner:
    """Return what runs a model, which is moved to the device, on inputs on the CPU."""
    model = model.to(device).eval()

    def run(inputs: tuple[Tensor, ...]) -> Any:
        return tree_map_only(Tensor, lambda x: x.detach().cpu(), model(*(x.to(device) for x in inputs)))

    return run


def compare(
    reference: Runner, candidates: Sequence[Candidate], task: Task, examples: int, dense_score: float
) -> Comparison:
    """Run the validation data through the model and every candidate, batch by batch.

    The first example is run alone as well, so a file that only works at one batch size does not pass for one that
    works at any. A candidate that raises is not run again; its `failure` says why.

    Parameters
    ----------
    reference : Runner
    candidates : sequence of Candidate
    task : Task
    examples : int
        At most this many validation examples.
    dense_score : float
        Gives the score its scale where the reference's own is near zero.

    Returns
    -------
    Comparison
        Score difference and output differences of every candidate that ran to the end. Scores may differ by a
        thousandth, or by what four examples weigh.
    """
    scales: dict[int, float] = {}
    score, seen = 0.0, 0
    for inputs, targets, batch in _data(task, examples):
        if not seen and batch > 1 and all(x.ndim and x.shape[0] == batch for x in inputs):
            _alone(reference, candidates, tuple(x[:1] for x in inputs), task)
        wanted = reference(inputs)
        for index, leaf in enumerate(tensors(wanted)):
            if leaf.numel() and leaf.is_floating_point():
                scales[index] = max(scales.get(index, 0.0), _largest(leaf))
        if targets is not None:
            score += float(task.metric(wanted, targets)) * batch
        for candidate in candidates:
            _take(candidate, inputs, wanted, targets, batch, task)
        seen += batch if targets is not None else 0
    checks = {}
    for candidate in candidates:
        if candidate.failure is None:
            checks[candidate.file] = tuple(_checks(candidate, scales, score, seen, dense_score, task.metric_name))
    return Comparison(score / seen if seen else None, seen, checks)


def tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a model's outputs, in order."""
    return list(pytrees.tensors(outputs))


def score_tolerance(score: float, dense_score: float, examples: int, share: float = SCORE) -> float:
    """Return by how much two scores of one model may differ: a share, or what four examples weigh."""
    return max(abs(score), abs(dense_score)) * max(share, 4 / max(examples, 1))


def _data(task: Task, examples: int) -> Iterable[tuple[tuple[Tensor, ...], Any, int]]:
    """Yield inputs, targets and number of examples; the example inputs, without targets, where there is no data."""
    if task.size("validation") == 0:
        yield task.example_inputs, None, task.example_inputs[0].shape[0]
        return
    for batch in task.batches("validation", batch_size=BATCH, limit=examples):
        yield batch.inputs, batch.targets, len(batch)


def _alone(reference: Runner, candidates: Sequence[Candidate], inputs: tuple[Tensor, ...], task: Task) -> None:
    """Run one example by itself through the candidates, if the model itself takes it."""
    try:
        wanted = reference(inputs)
    except Exception:
        return
    for candidate in candidates:
        _take(candidate, inputs, wanted, None, 1, task)


def _take(candidate: Candidate, inputs: tuple[Tensor, ...], wanted: Any, targets: Any, batch: int, task: Task) -> None:
    """Run one batch through the candidate and note how far it is from `wanted`."""
    if candidate.failure is not None:
        return
    try:
        expected, got = tensors(wanted), tensors(candidate.run(inputs))
        if [leaf.shape for leaf in expected] != [leaf.shape for leaf in got]:
            candidate._worst[0] = math.inf
            return
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a.is_floating_point() and a.numel():
                candidate._worst[index] = max(candidate._worst.get(index, 0.0), _difference(a, b))
            elif not a.is_floating_point():
                candidate._labels[0] += int((a != b).sum())
                candidate._labels[1] += a.numel()
        if targets is not None:
            replaced = iter(got)
            again = pytrees.map_tensors(wanted, lambda _: next(replaced))
            candidate._score += float(task.metric(again, targets)) * batch
    except Exception as error:
        # Whatever the runtime raises (ONNX Runtime has its own classes) is this file's failure, not the export's.
        candidate.failure = error


def _largest(leaf: Tensor) -> float:
    finite = leaf[torch.isfinite(leaf)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(a: Tensor, b: Tensor) -> float:
    """Return max |a − b|; infinite where one of the two is not finite and the other is not the same."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


def _checks(
    candidate: Candidate, scales: dict[int, float], score: float, seen: int, dense_score: float, metric: str
) -> Iterable[Check]:
    if candidate._worst:
        value = max(worst / (scales.get(index) or 1.0) for index, worst in candidate._worst.items())
        yield Check(candidate.file, OUTPUT, value, value <= candidate.tolerance, candidate.tolerance)
    wrong, total = candidate._labels
    if total:
        # A label can flip where two logits are equal but for rounding, so a few may.
        limit = max(1e-2, 2 / total)
        yield Check(candidate.file, LABELS, wrong / total, wrong / total <= limit, limit)
    if seen:
        value = abs(candidate._score - score) / seen
        limit = score_tolerance(score / seen, dense_score, seen, candidate.share)
        yield Check(candidate.file, f"difference in {metric}", value, value <= limit, limit)
