"""The end of a sweep: the members of the front are measured once, alone, on test data and in time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autorank import measure
from autorank.copying import model_copy
from autorank.evaluate import evaluate
from autorank.prepare import LAYER_SECONDS, batched
from autorank.progress import Reporter
from autorank.trial import TrialContext, TrialRunner, job_of
from autorank.types import Choice, DenseFigures, FrontPoint, TrialRecord

# A layer counts as slower only beyond what two timings of the same layer differ by.
SLOWER_BY = 1.05


def measure_front(
    front: tuple[TrialRecord, ...],
    context: TrialContext,
    reporter: Reporter,
    *,
    batch: int = 1,
    threads: int = 1,
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

    Returns
    -------
    points : tuple of FrontPoint
        Test score (None without test data), latency and its spread, layers slower than their dense originals.
    dense : DenseFigures
        Test score and latency of the dense model, measured beside them.
    """
    runner = TrialRunner(context)
    task, device = context.task, context.device
    inputs = tuple(x.to(device) for x in batched(task.example_inputs, batch))
    has_test = task.size("test") > 0
    dense_model = task.model().to(device).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, context.threads))
    try:
        dense_test = evaluate(dense_model, task, "test", device).score if has_test else None
        points = []
        dense_timing = measure.time_module(_deployed(dense_model), inputs, threads, device=device)
        times = _layer_times(front, context, threads, batch)
        for done, record in enumerate(front):
            reporter.step("front: test score and latency", done, len(front))
            model = runner.model(job_of(record), record)
            test = evaluate(model, task, "test", device).score if has_test else None
            timing = measure.time_module(_deployed(model), inputs, threads, device=device)
            points.append(FrontPoint(record, test, timing.median_ms, timing.spread_ms, _slower(record, times)))
        reporter.step("front: test score and latency", len(front), max(len(front), 1))
    finally:
        torch.set_num_threads(before)
    dense = DenseFigures(dense_test, dense_timing.median_ms, dense_timing.spread_ms, batch, threads, device)
    return tuple(points), dense


def _deployed(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, so that timing leaves nothing on the model."""
    return model_copy(model).eval()


def _layer_times(
    front: tuple[TrialRecord, ...], context: TrialContext, threads: int, batch: int
) -> dict[tuple[str, Choice | None], float]:
    """Time every layer of the front's plans alone, and its dense original."""
    specs = {spec.name: spec for spec in context.specs}
    layers = [layer for record in front for layer in record.layers]
    pairs = dict.fromkeys((specs[layer.name], choice) for layer in layers for choice in (None, layer.choice))
    return measure.time_layers(pairs, threads, context.device, batch, min_run_time=LAYER_SECONDS)


def _slower(record: TrialRecord, times: Mapping[tuple[str, Choice | None], float]) -> tuple[str, ...]:
    """Name the layers whose decomposed form takes longer than the dense layer on this machine."""
    return tuple(
        layer.name for layer in record.layers if times[layer.name, layer.choice] > SLOWER_BY * times[layer.name, None]
    )
