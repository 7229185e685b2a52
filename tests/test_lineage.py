"""Trials that start from other trials' weights: what they inherit, and that it does not matter who still has them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autorank import formats
from autorank.config import make_config
from autorank.job import Job
from autorank.plan import apply, kernels, undecomposed
from autorank.prepare import prepare
from autorank.profiling import profile
from autorank.progress import Silent
from autorank.trial import TrialRunner
from autorank.trialfiles import MODELS
from autorank.types import Choice, Fidelity, Plan, TrialRecord
from tests.tiny import network, task

TUCKER, SVD = Choice("tucker2", (10, 9)), Choice("channel_svd", (12,))
STEPS = Fidelity(3)


@pytest.fixture
def runner(tmp_path: Path) -> TrialRunner:
    space = {
        "version": 1,
        "defaults": {"formats": ["channel_svd", "tucker2"], "whiten": ["none"], "ranks": {"macs_kept": [0.3, 0.6]}},
    }
    settings = {"space": space, "recovery": {"steps": 3, "batch_size": 16, "calibration": 32, "lr": 0.01}}
    config = make_config({**settings, "strategy": "random", "executor": "inline"})
    return TrialRunner(prepare(task(), config, tmp_path, Silent()).context)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def essence(record: TrialRecord) -> TrialRecord:
    return replace(record, seconds={}, started=0.0, worker="")


FORMATS = ["tucker2", "channel_svd", "spatial_svd", "cp", "tensor_ring", "kronecker", "grouped_svd"]


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_an_undecomposed_model_computes_what_the_decomposed_one_does(name: str) -> None:
    dense = network().eval()
    fmt = formats.get(name)
    layers = {}
    for spec in profile(dense, (torch.randn(1, 3, 8, 8),)).layers:
        for options in fmt.variants(spec) or ((),):
            if spec.name in ("3", "5") and fmt.supports(spec, options) is None:
                rank = tuple(max(1, top // 2) for top in fmt.max_rank(spec, options))
                layers[spec.name] = Choice(name, rank, options)
    assert layers
    plan = Plan.of(layers)
    model, _ = apply(dense, plan)
    for parameter in model.parameters():  # as if it had been trained
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    again = undecomposed(dense, plan, model)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(again.get_submodule(next(iter(layers)))) is nn.Conv2d
    for layer, kernel in kernels(dense, plan, model).items():
        torch.testing.assert_close(again.get_submodule(layer).weight.double(), kernel, rtol=0, atol=1e-6)


def test_a_layer_with_the_same_choice_keeps_its_trained_factors(runner: TrialRunner) -> None:
    parent = Job(0, Plan.of({"3": TUCKER, "5": Choice("channel_svd", (5,))}), STEPS)
    child = Job(1, Plan.of({"3": TUCKER, "5": Choice("channel_svd", (3,))}), Fidelity(0, False), parent=parent)
    runner.run(parent)
    record = runner.run(child)
    assert record.status == "complete", record.reason
    before, after = weights(runner.model(parent)), weights(runner.model(child))
    same = [name for name in before if not name.startswith("5.")]
    assert all(torch.equal(before[name], after[name]) for name in same), "batch norm and trained factors come along"
    assert {layer.name: layer.weight_error == 0 for layer in record.layers} == {"3": True, "5": False}
    fresh = runner.run(replace(child, parent=None))
    assert (record.parent, fresh.parent) == (0, None)
    assert record.key != fresh.key
    assert record.score_before != fresh.score_before or record.loss != fresh.loss


def test_a_changed_layer_is_fitted_to_the_trained_kernel(runner: TrialRunner) -> None:
    parent = Job(0, Plan.of({"3": TUCKER}), STEPS)
    child = Job(1, Plan.of({"3": SVD}), Fidelity(0, False), parent=parent)
    runner.run(parent)
    runner.run(child)
    dense = runner.context.task.model().eval()
    trained = kernels(dense, parent.plan, runner.model(parent))["3"]
    found = kernels(dense, child.plan, runner.model(child))["3"]
    u, s, v = torch.linalg.svd(trained.flatten(1), full_matrices=False)
    expected = ((u[:, :12] * s[:12]) @ v[:12]).reshape(trained.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_tucker_core_decomposed_again_is_merged_into_its_1x1_layers(runner: TrialRunner) -> None:
    parent, smaller = Job(0, Plan.of({"3": TUCKER}), STEPS), Choice("tucker2", (6, 5))
    child = Job(1, Plan.of({"3": smaller}), Fidelity(0, False), parent=parent)
    runner.run(parent)
    assert runner.run(child).status == "complete"
    layer = runner.model(child).get_submodule("3")
    shapes = [tuple(module.weight.shape) for module in layer.children()]
    assert shapes == [(5, 16, 1, 1), (6, 5, 3, 3), (16, 6, 1, 1)], "three convolutions, none more than before"
    assert torch.equal(
        list(layer.children())[-1].bias, list(runner.model(parent).get_submodule("3").children())[-1].bias
    )


@pytest.mark.parametrize("pulled", [False, True], ids=["tuned", "pulled"])
def test_the_outcome_is_the_same_when_the_parents_weights_are_gone(runner: TrialRunner, pulled: bool) -> None:
    grandparent = Job(0, Plan.of({"3": TUCKER}), STEPS)
    parent = Job(1, Plan.of({"3": SVD}), STEPS, parent=grandparent, pull=0.5 if pulled else 0.0, probe=True)
    child = Job(2, Plan.of({"3": SVD, "5": Choice("channel_svd", (4,))}), STEPS, parent=parent)
    records = [runner.run(job) for job in (grandparent, parent, child)]
    assert [record.status for record in records] == ["complete"] * 3, records
    shutil.rmtree(runner.context.directory / MODELS)
    alone = TrialRunner(runner.context).run(child)
    assert essence(alone) == essence(records[2])


def test_a_pull_brings_the_kernels_nearer_to_the_plan(runner: TrialRunner) -> None:
    plan = Plan.of({"3": Choice("channel_svd", (3,)), "5": Choice("channel_svd", (2,))})
    found = {}
    for pull in (1e-6, 1.0, 100.0):
        record = runner.run(Job(0, plan, STEPS, pull=pull, probe=True, want="distances"))
        assert record.status == "complete", record.reason
        candidates = runner.context.candidates["3"]
        assert [len(row) for row in record.measured.values()] == [len(c) for c in runner.context.candidates.values()]
        assert candidates
        found[pull] = sum(layer.weight_error for layer in record.layers)
    assert found[1e-6] > found[1.0] > found[100.0]


def test_spectra_are_those_of_the_trained_kernels(runner: TrialRunner) -> None:
    record = runner.run(Job(0, Plan.of({"3": Choice("tucker2", (3, 2))}), STEPS, want="spectra"))
    assert set(record.measured) == set(runner.context.candidates)
    out, into = record.measured["3"]
    assert out <= 3, "the trained kernel has no more than the rank of its factors"
    assert into <= 2


def test_probes_without_training_keep_no_weights(runner: TrialRunner) -> None:
    runner.run(Job(0, Plan.of({"3": TUCKER}), Fidelity(0), probe=True))
    assert not list((runner.context.directory / MODELS).glob("*"))
    runner.run(Job(1, Plan.of({"3": TUCKER}), Fidelity(0)))
    assert len(list((runner.context.directory / MODELS).glob("*"))) == 1


def test_layers_fitted_in_order_come_nearer_to_the_dense_outputs(runner: TrialRunner) -> None:
    plan = Plan.of({"3": Choice("channel_svd", (3,)), "5": Choice("channel_svd", (2,))})
    job, context = Job(0, plan, Fidelity(0, False)), runner.context
    ordered = TrialRunner(replace(context, recovery=replace(context.recovery, in_order=True)))
    dense, found = context.task.model().eval(), []
    for each in (runner, ordered):
        record = each.run(job)
        assert record.status == "complete", record.reason
        inputs = torch.cat([batch.inputs[0] for batch in context.task.calibration_batches(512)])
        with torch.no_grad():  # up to the last layer that is decomposed
            found.append(float((each.model(job)[:6](inputs) - dense[:6](inputs)).square().mean()))
        shutil.rmtree(context.directory / MODELS)
    assert found[1] < found[0]
    assert essence(ordered.run(job)) == essence(ordered.run(job))
    probe = replace(job, probe=True)
    assert ordered.run(probe).layers == runner.run(probe).layers, "probes are fitted layer by layer"
