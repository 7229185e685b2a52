"""Evaluation: averages over examples, modes restored, failures with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autorank.errors import DataError, TrialError
from autorank.evaluate import evaluate
from autorank.tasks import ClassificationTask, CustomTask
from tests.tasks import nets


def vectors_task(model: nn.Module | None = None) -> ClassificationTask:
    return ClassificationTask(
        model or nets.linear(), train=nets.vectors(), validation=nets.vectors(37, seed=1), test=nets.vectors(20, seed=2)
    )


@pytest.mark.parametrize("batch_size", [1, 5, 36, 100])
def test_score_and_loss_do_not_depend_on_the_batch_size(batch_size):
    task = vectors_task()
    x, t = nets.vectors(37, seed=1)
    outputs = task.model()(x)
    found = evaluate(task.model(), task, "validation", batch_size=batch_size)
    assert found.score == pytest.approx(100 * (outputs.argmax(1) == t).double().mean().item(), abs=1e-12)
    assert found.loss == pytest.approx(F.cross_entropy(outputs, t).item(), rel=1e-5)
    assert found.examples == 37


@pytest.mark.parametrize("limit", [1, 10, 36, 37, 500])
def test_limit_takes_the_first_examples(limit):
    task = vectors_task()
    x, t = (part[:limit] for part in nets.vectors(37, seed=1))
    found = evaluate(task.model(), task, "validation", batch_size=8, limit=limit)
    assert found.examples == min(limit, 37)
    assert found.loss == pytest.approx(F.cross_entropy(task.model()(x), t).item(), rel=1e-5)


def test_a_smaller_metric_of_a_custom_task():
    x, _ = nets.vectors(23)
    task = CustomTask(
        nn.Linear(4, 1),
        train=nets.vectors(),
        validation=(x, x[:, :1]),
        loss=F.mse_loss,
        metric=lambda outputs, targets: float((outputs - targets).abs().mean()),
        metric_name="mae",
        direction="min",
        example_inputs=x[:1],
    )
    found = evaluate(task.model(), task, "validation", batch_size=10)
    assert found.score == pytest.approx((task.model()(x) - x[:, :1]).abs().mean().item(), rel=1e-5)


def test_modes_are_restored_and_nothing_is_changed():
    model = nets.convnet()
    model.train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    task = ClassificationTask(nets.convnet(), train=(torch.rand(30, 1, 8, 8), torch.arange(30) % 10))
    first = evaluate(model, task, "validation")
    assert first == evaluate(model, task, "validation")  # dropout is off
    assert model.training
    assert model[5].training
    assert not model[1].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Positions(nn.Module):
    """Computes a table in its first forward pass and keeps it, as many transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 3), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(4.0).sin() + 1
        return self.linear(x * self.table)


def test_a_model_that_caches_a_tensor_can_be_trained_afterwards():
    task = vectors_task(Positions())
    model = Positions()
    evaluate(model, task, "validation")
    batch = next(task.train_batches(1, 8, 0))
    task.loss(model(batch.inputs[0].requires_grad_()), batch.targets).backward()
    assert model.linear.weight.grad is not None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "outputs on the validation split are NaN"),
        (float("inf"), "outputs on the validation split are NaN|loss"),
    ],
    ids=["nan", "inf"],
)
def test_a_model_that_is_not_finite_fails_with_the_reason(value, words):
    task = vectors_task()
    model = task.model()
    with torch.no_grad():
        model.weight[0, 0] = value
    model.train()
    with pytest.raises(TrialError, match=words):
        evaluate(model, task, "validation")
    assert model.training


def test_a_metric_that_is_not_finite_fails():
    task = CustomTask(
        nn.Linear(4, 1),
        train=nets.vectors(),
        loss=lambda o, t: o.mean(),
        metric=lambda o, t: float("inf"),
        metric_name="psnr",
    )
    with pytest.raises(TrialError, match="psnr on the validation split is inf"):
        evaluate(task.model(), task, "validation")


def test_minus_infinity_for_a_wrong_class_is_no_failure():
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :3], torch.full((len(x), 1), float("-inf"))], 1)

    task = ClassificationTask(Masked(), train=nets.vectors())
    assert evaluate(task.model(), task, "validation").examples == 6


@pytest.mark.parametrize("split", ["exam", "test"])
def test_no_such_split(split):
    task = ClassificationTask(nets.linear(), train=nets.vectors())
    with pytest.raises(DataError, match=f"no {split} split"):
        evaluate(task.model(), task, split)


def test_limit_of_nothing():
    task = vectors_task()
    with pytest.raises(DataError, match="at least one example"):
        evaluate(task.model(), task, "validation", limit=0)
