"""Channels last: the same results, the same parameters afterwards, and only where the model bears it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autorank import formats
from autorank.evaluate import evaluate
from autorank.memoryformat import channels_last, lay_out, runs_in_channels_last
from autorank.plan import apply
from autorank.profiling import profile
from autorank.recover import Recovery, fine_tune, reestimate_batch_norm
from autorank.tasks import ClassificationTask
from autorank.types import Choice, Plan
from tests import tiny
from tests.models import ZOO, make, output


class Viewed(nn.Module):
    """Flattens activations by `view`, which channels last does not allow."""

    def __init__(self, training_only: bool = False) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 2)
        self.training_only = training_only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.head(y.reshape(len(y), -1) if self.training_only and not self.training else y.view(len(y), -1))


class Strided(nn.Module):
    """Looks at the memory of its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.as_strided((len(y), 4), (4 * 6 * 6, 1))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(tiny.network(), True, id="convolutions"),
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), False, id="none"),
        pytest.param(Viewed(), False, id="view"),
        pytest.param(Viewed(training_only=True), False, id="view in training"),
        pytest.param(Strided(), False, id="other outputs"),
    ],
)
def test_only_models_that_bear_it_run_so(model: nn.Module, expected: bool) -> None:
    state = copy.deepcopy(model.state_dict())
    chance = torch.get_rng_state()
    assert runs_in_channels_last(model, (IMAGES,)) is expected
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


@pytest.mark.parametrize("mine", [False, True], ids=["usual order", "channels last already"])
def test_the_parameters_and_their_order_are_the_same_afterwards(mine: bool) -> None:
    model = tiny.network().to(memory_format=torch.channels_last if mine else torch.contiguous_format)
    before = {name: (p, p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    with channels_last(model, True):
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[3].weight.is_contiguous()
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.stride() == before[name][2]


def test_nothing_changes_where_it_is_not_wanted() -> None:
    model = tiny.network()
    with channels_last(model, False):
        assert model[3].weight.is_contiguous()


@pytest.mark.parametrize("name", ZOO)
def test_outputs_of_all_kinds_of_models_are_the_same(name: str) -> None:
    model, inputs = make(name)
    if not runs_in_channels_last(model, inputs):
        assert not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
    expected = output(model, inputs)
    torch.testing.assert_close(output(lay_out(copy.deepcopy(model)), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", formats.names())
def test_every_format_runs_so(name: str) -> None:
    model = tiny.network()
    profiled = profile(model, (IMAGES,))
    fmt = formats.get(name)
    choices = [
        (spec.name, Choice(name, tuple(-(-r // 2) for r in fmt.max_rank(spec, options)), options))
        for spec in profiled.layers
        if fmt.supports(spec) is None
        for options in fmt.variants(spec)[:1]
    ]
    assert choices
    other, _ = apply(model, Plan(tuple(choices)), specs=profiled.layers)
    with torch.no_grad():
        expected = other(IMAGES)
        with channels_last(other, True):
            torch.testing.assert_close(other(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_batch_norm_and_fine_tune_use_it_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.task()
    seen: list[bool] = []

    def hook(module: nn.Module, _inputs: object, _output: object) -> None:
        assert isinstance(module, nn.Conv2d)
        seen.append(not module.weight.is_contiguous())

    def run() -> tuple[float, float, float]:
        model = task.model()
        model[3].register_forward_hook(hook)
        first = evaluate(model, task, "validation").loss
        again = reestimate_batch_norm(model, task.train_batches(2, 32, 0), laid=task.channels_last())
        assert again is not None
        second = evaluate(again, task, "validation").loss
        fine_tune(again, task, Recovery(steps=3, batch_size=32), 0)
        assert all(p.is_contiguous() for p in again.parameters())
        return first, second, evaluate(again, task, "validation").loss

    found = run()
    assert seen
    assert all(seen)
    monkeypatch.setattr(type(task), "channels_last", lambda _self, _device="cpu": False)
    seen.clear()
    assert found == pytest.approx(run(), rel=1e-3)
    assert not any(seen)


def test_another_model_is_tried_anew_and_other_devices_are_left_alone() -> None:
    task = tiny.task()
    assert task.channels_last()
    assert not task.channels_last("cuda")
    assert not task.with_model(Viewed()).channels_last()
    assert isinstance(task, ClassificationTask)
