"""Training with a pull towards the decomposed copy: against closed forms, and on digits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autorank.errors import TrialError
from autorank.fitcache import FitCache
from autorank.layout import canonical_weight
from autorank.modules import read
from autorank.plan import apply
from autorank.pulling import Pull, decomposed_kernels, squared_distances, train_with_pull
from autorank.recover import Recovery, fine_tune
from autorank.tasks import ClassificationTask, CustomTask, Task, load_task
from autorank.types import Choice, Plan

PLAN = Plan.of({"3": Choice("tucker2", (3, 3)), "8": Choice("channel_svd", (3,))})
FEW = Recovery(steps=40, batch_size=64, optimizer="sgd", lr=0.05, distill=0.0)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.fixture(scope="module")
def digits() -> Task:
    """The digits with a network that has been trained on them."""
    torch.manual_seed(0)
    raw = load_task(model="python:tests.test_pulling:network", data="digits", data_args={"augment": "none"})
    model = raw.model()
    fine_tune(model, raw, Recovery(steps=120, batch_size=64, optimizer="sgd", lr=0.1, distill=0.0), seed=0)
    return raw.with_model(model)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def distance(model: nn.Module, copies: dict[str, torch.Tensor]) -> float:
    weights = {name: model.get_submodule(name).weight.detach() for name in copies}
    return sum(float((weights[name] - kernel).square().sum()) for name, kernel in copies.items())


def pulled(task: Task, pull: float, recovery: Recovery = FEW, seed: int = 3) -> tuple[nn.Module, float, float]:
    """Return the trained network, its squared distance to the copy, and the loss on what it was trained with."""
    model = task.model()
    copies = decomposed_kernels(model, PLAN)
    train_with_pull(model, copies, task, recovery, pull, seed)
    with torch.no_grad():
        losses = [task.loss(model(*b.inputs), b.targets) for b in task.train_batches(8, 128, 0)]
    return model, distance(model, copies), float(torch.stack(losses).mean())


def test_the_network_comes_nearer_to_its_copy_the_stronger_the_pull(digits):
    runs = [pulled(digits, pull) for pull in (0.0, 0.01, 0.1, 1.0, 1e6)]
    distances = [found for _, found, _ in runs]
    assert distances == sorted(distances, reverse=True)
    start = distance(digits.model(), decomposed_kernels(digits.model(), PLAN))
    assert distances[0] > 0.8 * start
    assert distances[3] < 0.05 * start
    # An explicit step of lr · μ = 50,000 would have blown up at once.
    assert distances[4] < 1e-6 * start
    # What a pulled network loses when it is decomposed is less than what the dense one loses.
    small = squared_distances(runs[2][0], {"3": [PLAN.choices["3"]]})["3"][0]
    dense = squared_distances(digits.model(), {"3": [PLAN.choices["3"]]})["3"][0]
    assert small < 0.5 * dense


def test_no_pull_is_the_plain_fine_tune_bit_for_bit(digits):
    model, _, _ = pulled(digits, 0.0)
    plain = digits.model()
    curve = fine_tune(plain, digits, FEW, 3)
    assert equal(model, plain)
    again = digits.model()
    assert train_with_pull(again, {}, digits, FEW, 5.0, 3) == curve
    assert equal(again, plain)


def test_the_same_seed_gives_the_same_bits(digits):
    first, second, other = (pulled(digits, 0.1, seed=seed)[0] for seed in (3, 3, 4))
    assert equal(first, second)
    assert not equal(first, other)


def test_no_steps_leave_the_weights(digits):
    model = digits.model().train()
    copies = decomposed_kernels(model, PLAN)
    assert train_with_pull(model, copies, digits, replace(FEW, steps=0), 1.0, 0) == ()
    assert equal(model, digits.model())
    assert not model.training


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("pull", [0.01, 0.3, 10.0, 1e5])
def test_training_settles_where_the_closed_form_says(pull, momentum):
    """Ridge regression towards the copy: ‖X Wᵀ − Y‖²/(2n) + (μ/2)·‖W − C‖², solved by its normal equations."""
    generator = torch.Generator().manual_seed(0)
    x, y, target = (torch.randn(*shape, generator=generator) for shape in ((64, 5), (64, 3), (3, 5)))
    task = CustomTask(
        nn.Linear(5, 3, bias=False),
        train=(x, y),
        validation=(x, y),
        loss=lambda outputs, targets: 0.5 * (outputs - targets).square().sum(1).mean(),
    )
    recovery = Recovery(
        steps=300,
        batch_size=64,
        optimizer="sgd",
        lr=0.2 * (1 - momentum),
        momentum=momentum,
        weight_decay=0.0,
        schedule="constant",
        distill=0.0,
        grad_clip=None,
    )
    model = task.model()
    curve = train_with_pull(model, {"": target}, task, recovery, pull, 0)
    gram = x.T @ x / 64 + pull * torch.eye(5)
    expected = torch.linalg.solve(gram, x.T @ y / 64 + pull * target.T).T
    torch.testing.assert_close(model.weight.detach(), expected, atol=2e-5, rtol=1e-4)
    loss = 0.5 * (x @ expected.T - y).square().sum() / 64 + 0.5 * pull * (expected - target).square().sum()
    assert curve[-1][1] == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e4])
def test_the_step_minimises_the_term_and_the_distance_moved(rate):
    weight, target = nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    start = weight.detach().clone()
    term = Pull([(weight, target)], 0.7)
    assert float(term.value()) == pytest.approx(float(0.35 * F.mse_loss(start, target, reduction="sum")), rel=1e-5)
    term.step(rate)
    slope = 0.7 * (weight.detach() - target) + (weight.detach() - start) / rate
    assert float(slope.abs().max()) < 1e-4 * max(1.0, 1 / rate)
    assert not term.value().requires_grad


class Mixed(nn.Module):
    """A grouped transposed convolution, whose stored layout is another, a linear layer of 16 bits, and a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.head, self.fixed = nn.Linear(36, 3), nn.Linear(3, 3)
        self.fixed.weight.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(self.head(self.up(x).flatten(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts_number_types_and_frozen_layers(dtype):
    torch.manual_seed(0)
    x, targets = torch.randn(32, 4, 4, dtype=dtype), torch.arange(32) % 3
    task = ClassificationTask(Mixed(dtype), train=(x, targets), validation=(x, targets))
    model, start = task.model(), task.model()
    specs = read(model).layers
    copies = {name: torch.randn(specs[name].weight_shape) for name in ("up", "head", "fixed")}
    train_with_pull(model, copies, task, replace(FEW, steps=20), 1e5, 0)
    assert torch.equal(model.fixed.weight, start.fixed.weight)
    for name in ("up", "head"):
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        found = canonical_weight(weight.detach(), specs[name])
        torch.testing.assert_close(found, copies[name].to(dtype), atol=1e-4, rtol=1e-3)


def test_kernels_and_distances_are_those_of_the_decomposed_model(digits):
    model = digits.model()
    specs = read(model).layers
    kernels = decomposed_kernels(model, PLAN)
    ranks = [Choice("tucker2", (r, r)) for r in (1, 3, 6)]
    found = squared_distances(model, {"3": ranks, "8": [PLAN.choices["8"]]})
    assert list(found) == ["3", "8"]
    assert squared_distances(model, {"3": ranks}, cache=FitCache())["3"] == pytest.approx(found["3"], rel=1e-6)
    weight = model.get_submodule("3").weight.detach()
    for choice, squared in zip(ranks, found["3"], strict=True):
        _, (result,) = apply(model, Plan.of({"3": choice}))
        assert squared == pytest.approx(result.weight_error**2 * float(weight.square().sum()), rel=1e-3)
    assert float((kernels["3"] - weight).square().sum()) == pytest.approx(found["3"][1], rel=1e-3)
    # Nothing but the layers that are replaced: the model with these kernels is the decomposed model.
    dense = copy.deepcopy(model)
    for name, kernel in kernels.items():
        assert kernel.shape == specs[name].weight_shape
        dense.get_submodule(name).weight.data = kernel
    decomposed, _ = apply(model, PLAN)
    images = torch.randn(4, *digits.example_inputs[0].shape[1:])
    torch.testing.assert_close(dense.eval()(images), decomposed.eval()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ({"7": torch.zeros(2)}, "no layer '7'"),
        ({"3": torch.zeros(8, 8, 3)}, r"layer '3': the copy has shape \(8, 8, 3\), the layer \(8, 8, 3, 3\)"),
    ],
    ids=["no such layer", "other shape"],
)
def test_wrong_copies_are_named(copies, message, digits):
    with pytest.raises(TrialError, match=message):
        train_with_pull(digits.model(), copies, digits, FEW, 1.0, 0)


def test_divergence_is_still_noticed(digits):
    model = digits.model()
    copies = {"3": torch.full((8, 8, 3, 3), float("nan"))}
    with pytest.raises(TrialError, match="the fine-tune diverged"):
        train_with_pull(model, copies, digits, FEW, 1.0, 0)
