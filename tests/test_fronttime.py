"""Latencies of a front: all of it by one clock, and that of ONNX Runtime where a plan has bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
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
    assert deployment.write(own_task(), with_bits(), path) is None
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("DequantizeLinear") > 4
    assert deployment.write(own_task(), network(), path) is None
    assert "DequantizeLinear" not in [node.op_type for node in onnx.load(path).graph.node]


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


def test_the_first_point_with_bits_has_all_timed_again_and_no_test_score_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = autorank.search(task(), **settings(tmp_path, trials=3))
    records = {record.number: record for record in result.records}
    front = tuple(point.record for point in result.points)
    before = {
        number: FrontPoint(record, 12.5, 1e9, 0.0)
        for number, record in records.items()
        if number in [record.number for record in front]
    }
    dense = DenseFigures(50.0, 1e9, 0.0)
    context = context_of(result, tmp_path)
    monkeypatch.setattr("autorank.finish.evaluate", lambda *_: pytest.fail("the test data were read again"))
    given: dict[str, Any] = {"records": records, "known": before}
    points, figures = measure_front(front, context, Silent(), known_dense=dense, **given)
    assert figures.test_score == 50.0
    assert figures.runtime == "onnxruntime"
    assert [point.test_score for point in points] == [12.5] * len(points)
    assert all(point.latency_ms and point.latency_ms < 1e6 for point in points)
    same, kept = measure_front(front, context, Silent(), known_dense=replace(dense, runtime="onnxruntime"), **given)
    assert kept.latency_ms == 1e9
    assert [point.latency_ms for point in same] == [1e9] * len(same)


def context_of(result: autorank.SearchResult, directory: Path) -> TrialContext:
    """What the trials of a sweep had in common, as far as its front needs it."""
    from autorank.profiling import profile
    from autorank.recover import Recovery

    own = task()
    profiled = profile(own.model(), own.example_inputs)
    return TrialContext(own, profiled.layers, profiled.dense, Recovery(), 0, "cpu", 1, directory)
