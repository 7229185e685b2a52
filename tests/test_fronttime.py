"""Latencies of a front: all of it by one clock, and that of ONNX Runtime where a plan has bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import autorank
from autorank import deployment
from autorank.finish import measure_front
from autorank.fronttime import ORIGINAL, timer
from autorank.plan import apply
from autorank.progress import Silent
from autorank.quant import calibrate
from autorank.tasks import ClassificationTask
from autorank.trial import TrialContext
from autorank.types import Choice, DenseFigures, FrontPoint, Plan
from tests.quant.samples import images, network
from tests.test_bits import settings
from tests.tiny import task

PLAN = Plan.of({"0": Choice("dense", (), (), 8, 8), "3": Choice("tucker2", (8, 6), (), 8, 8)})


def own_task(model: nn.Module | None = None) -> ClassificationTask:
    data = images(96), torch.arange(96) % 5
    return ClassificationTask(model or network(), train=data, validation=0.5)


def with_bits() -> nn.Module:
    found, _ = apply(network(), PLAN)
    calibrate(found, [(images(),)])
    return found


def test_points_with_bits_are_timed_as_files_with_whole_numbers(tmp_path: Path) -> None:
    result = autorank.search(task(), **settings(tmp_path))
    assert any(choice.bits for point in result.points for _, choice in point.record.plan.layers)
    assert result.dense is not None
    assert result.dense.runtime == "onnxruntime"
    for figures in (result.dense, *result.points):
        assert figures.latency_ms is not None
        assert 0 < figures.latency_ms < 1000
    again = autorank.open_sweep(tmp_path)
    assert again.dense == result.dense
    assert [point.latency_ms for point in again.points] == [point.latency_ms for point in result.points]


def test_a_sweep_without_bits_is_timed_in_pytorch(tmp_path: Path) -> None:
    space = {"version": 1, "defaults": {"formats": ["channel_svd"], "ranks": {"macs_kept": [0.3, 0.6]}}}
    result = autorank.search(task(), **settings(tmp_path, space=space, objectives="accuracy,macs", trials=2))
    assert result.dense is not None
    assert result.dense.runtime == "pytorch"
    assert all(point.latency_ms for point in result.points)


def test_the_file_that_is_timed_has_whole_numbers_where_the_model_has_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert deployment.write(own_task(), with_bits(), path).batch is None
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("DequantizeLinear") > 4
    assert deployment.write(own_task(), network(), path).batch is None
    assert "DequantizeLinear" not in [node.op_type for node in onnx.load(path).graph.node]


def test_types_of_numbers_that_onnx_runtime_has_no_kernels_for_cost_only_the_times() -> None:
    said: list[str] = []
    data = images(96).double(), torch.arange(96) % 5
    task_of = ClassificationTask(network().double(), train=data, validation=0.5)
    with timer("onnxruntime", task_of, 4, 1, "cpu", said.append) as clock:
        clock.add(ORIGINAL, network().double())
        assert clock.times().of == {}
    assert said == [line for line in said if line.startswith("note: the dense model is not timed")]
    assert len(said) == 1


def test_models_are_timed_in_turns_and_what_has_no_file_is_told() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x.flatten(2) @ x.flatten(2).mT).real

    said: list[str] = []
    with timer("onnxruntime", own_task(), 4, 1, "cpu", said.append) as clock:
        clock.add(ORIGINAL, network())
        clock.add(3, with_bits())
        clock.add(5, Strange())
        times = clock.times()
    assert (times.runtime, times.batch, times.device) == ("onnxruntime", 4, "cpu")
    assert sorted(times.of) == [ORIGINAL, 3]
    assert len(said) == 1
    assert said[0].startswith("note: point 5 is not timed")


def test_a_point_more_has_all_timed_again_and_test_scores_stay(tmp_path: Path) -> None:
    result = autorank.search(task(), **settings(tmp_path, trials=3))
    records = {record.number: record for record in result.records}
    front = tuple(point.record for point in result.points)
    before = {record.number: FrontPoint(record, 12.5, 1e9, 0.0) for record in front[1:]}
    dense = DenseFigures(50.0, 1e9, 0.0)
    context = context_of(result, tmp_path)
    given: dict[str, Any] = {"records": records, "known_dense": dense}
    points, figures = measure_front(front, context, Silent(), known=before, **given)
    assert (figures.test_score, figures.runtime) == (50.0, "onnxruntime")
    assert [point.test_score for point in points] == [None] + [12.5] * len(before)  # there are no test data
    for each in (figures, *points):
        assert each.latency_ms is not None
        assert each.latency_ms < 1e6
    whole = {point.record.number: point for point in points}
    assert measure_front(front, context, Silent(), known=whole, **given) == (points, dense)


def context_of(result: autorank.SearchResult, directory: Path) -> TrialContext:
    """What the trials of a sweep had in common, as far as its front needs it."""
    from autorank.profiling import profile
    from autorank.recover import Recovery

    own = task()
    profiled = profile(own.model(), own.example_inputs)
    return TrialContext(own, profiled.layers, profiled.dense, Recovery(), 0, "cpu", 1, directory)
