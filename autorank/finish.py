"""The end of a sweep: the members of the front are measured once, alone, on test data and in time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autorank import measure
from autorank.evaluate import evaluate
from autorank.fronttime import ORIGINAL, timer
from autorank.job import job_of
from autorank.progress import Reporter
from autorank.trial import TrialContext, TrialRunner
from autorank.types import Choice, DenseFigures, FrontPoint, Runtime, TrialRecord

# A layer counts as slower only beyond what two timings of the same layer differ by.
SLOWER_BY = 1.05


def measure_front(
    front: tuple[TrialRecord, ...],
    context: TrialContext,
    reporter: Reporter,
    *,
    records: Mapping[int, TrialRecord],
    batch: int = 1,
    threads: int = 1,
    known: Mapping[int, FrontPoint] | None = None,
    known_dense: DenseFigures | None = None,
) -> tuple[tuple[FrontPoint, ...], DenseFigures]:
    """Measure the members of the front, with nothing else running.

    Parameters
    ----------
    front : tuple of TrialRecord
    context : TrialContext
    reporter : Reporter
    batch : int
        Batch size of the latency.
    threads : int
        PyTorch threads of the latency.
    known : mapping, optional
        Points that were measured when the sweep ended before: their test scores stay. All latencies are taken again
        when there is a point more, so that they compare.
    known_dense : DenseFigures, optional
        The dense model as it was measured then.

    Returns
    -------
    points : tuple of FrontPoint
        Test score (None without test data), latency and its spread, layers slower than their dense originals. Where a
        plan has bits, all latencies are those of ONNX files in ONNX Runtime.
    dense : DenseFigures
        Test score and latency of the dense model, measured beside them.
    """
    known = known or {}
    runtime: Runtime = "onnxruntime" if any(record.plan.has_bits for record in front) else "pytorch"
    if known_dense is not None and all(record.number in known for record in front):
        return tuple(known[record.number] for record in front), known_dense
    runner = TrialRunner(context)
    task, device = context.task, context.device

    def test_score(model: nn.Module) -> float | None:
        return evaluate(model, task, "test", device).score if task.size("test") else None

    what = "front: test score and latency"
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, context.threads))
    scores: dict[int, float | None] = {number: point.test_score for number, point in known.items()}
    try:
        with timer(runtime, task, batch, threads, device, reporter.say) as clock:
            dense_model = task.model().to(device).eval()
            dense_test = known_dense.test_score if known_dense is not None else test_score(dense_model)
            clock.add(ORIGINAL, dense_model)
            layer_times = _layer_times(front, context, threads, batch) if runtime == "pytorch" else {}
            for done, record in enumerate(front):
                reporter.step(what, done, len(front))
                model = runner.model(job_of(record, records))
                if record.number not in scores:
                    scores[record.number] = test_score(model)
                clock.add(record.number, model)
            times = clock.times()
        reporter.step(what, len(front), len(front))
    finally:
        torch.set_num_threads(before)
    missing = None, None
    median, spread = times.of.get(ORIGINAL, missing)
    dense = DenseFigures(dense_test, median, spread, times.batch, threads, times.device, runtime)
    points = []
    for record in front:
        slower = _slower(record, layer_times) if runtime == "pytorch" else ()
        median, spread = times.of.get(record.number, missing)
        points.append(FrontPoint(record, scores[record.number], median, spread, slower))
    return tuple(points), dense


def _layer_times(
    front: tuple[TrialRecord, ...], context: TrialContext, threads: int, batch: int
) -> dict[tuple[str, Choice | None], float]:
    """Time every layer of the front's plans alone, and its dense original."""
    specs = {spec.name: spec for spec in context.specs}
    layers = [layer for record in front for layer in record.layers]
    pairs = dict.fromkeys((specs[layer.name], choice) for layer in layers for choice in (None, layer.choice))
    return measure.time_layers(pairs, threads, context.device, batch)


def _slower(record: TrialRecord, times: Mapping[tuple[str, Choice | None], float]) -> tuple[str, ...]:
    """Name the layers whose decomposed form takes longer than the dense layer on this machine."""
    return tuple(
        layer.name for layer in record.layers if times[layer.name, layer.choice] > SLOWER_BY * times[layer.name, None]
    )
