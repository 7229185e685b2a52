"""Gradient covariances against autograd one example at a time; the predicted rise of the loss against sums by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.errors import AutorankError, DataError, ModelError
from autorank.layout import canonical_weight, stored_weight
from autorank.profiling import profile
from autorank.solvers import gradients as module
from autorank.solvers.curvature import predicted_loss_increase
from autorank.solvers.gradients import collect_gradients, fisher_loss
from autorank.solvers.whitening import LayerStats, collect
from autorank.types import LayerSpec
from tests.models import make


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def energy(outputs: Any) -> Tensor:
    """A smooth loss without chance, summed over the examples, of outputs of any kind."""
    parts = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    return sum(((part.flatten(1).sin() + 0.1 * part.flatten(1) ** 3).sum() for part in parts), torch.zeros(()))


def by_hand(model: nn.Module, spec: LayerSpec, inputs: tuple[Tensor, ...], loss: Callable[[Any], Tensor]) -> Tensor:
    """One example at a time: gradients at zeros that are added to each output, then outer products in loops."""
    size = len(inputs[0])
    side = spec.out_channels // spec.groups
    total = torch.zeros(spec.groups, side, side, dtype=torch.float64)
    for i in range(size):
        other = copy.deepcopy(model).eval()
        zeros: list[Tensor] = []

        def add(_module: nn.Module, _args: Any, output: Tensor, zeros: list[Tensor] = zeros) -> Tensor:
            zeros.append(torch.zeros_like(output).requires_grad_())
            return output + zeros[-1]

        other.get_submodule(spec.name).register_forward_hook(add)
        value = loss(other(*(x[i : i + 1] for x in inputs)))
        for g in torch.autograd.grad(value, zeros):
            rows = (g.movedim(1, -1) if spec.kernel else g).reshape(-1, spec.out_channels).double()
            for row in rows:
                for group in range(spec.groups):
                    part = row[group * side : (group + 1) * side]
                    total[group] += torch.outer(part, part)
    return (total / size).float()


class Inplace(nn.Module):
    """What follows a layer changes its output in place; groups, stride, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.again = nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=3)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu_(self.first(x), 0.3)
        y = self.again(x)
        y[:, :2].mul_(2)
        y = self.again(functional.relu_(y)).add_(x)
        return self.head(self.drop(y).mean((2, 3)))


def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name == "inplace":
        torch.manual_seed(0)
        return Inplace().eval(), (random(5, 4, 9, 8),)
    return make(name)


ALL = [
    "inplace",
    "tiny_conv",
    "shared_residual",
    "conv1d",
    "conv3d",
    "two_inputs",
    "attention",
    "depthwise",
    "sequence",
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ALL)
def test_gradients_against_autograd_one_example_at_a_time(name: str, frozen: bool) -> None:
    model, inputs = network(name)
    specs = profile(model, inputs).layers
    expected = {spec.name: by_hand(model, spec, inputs, energy) for spec in specs}
    model.requires_grad_(not frozen)
    # Batches of different sizes: what is averaged are examples.
    batches = [(tuple(x[:1] for x in inputs), energy), (tuple(x[1:] for x in inputs), energy)]
    found = collect_gradients(model, specs, batches)
    assert found.keys() == expected.keys()
    for layer, covariance in found.items():
        assert covariance.dtype == torch.float32
        assert float(covariance.norm()) > 0
        torch.testing.assert_close(covariance, expected[layer], rtol=1e-4, atol=1e-6 * float(expected[layer].norm()))


@pytest.mark.parametrize("kind", ["conv_transpose1d", "conv_transpose2d"])
def test_gradients_of_transposed_convolutions(kind: str) -> None:
    d = int(kind[-2])
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[d - 1](4, 6, 3, stride=2, padding=1, groups=2)
    model = nn.Sequential(layer, nn.Tanh())
    spec = LayerSpec("0", kind, (6, 2, *[3] * d), (2,) * d, (1,) * d, "zeros", (1,) * d, 2, True)  # type: ignore[arg-type]
    inputs = (random(3, 4, *[5] * d),)
    found = collect_gradients(model, [spec], [(inputs, energy)])["0"]
    torch.testing.assert_close(found, by_hand(model, spec, inputs, energy))


def test_the_fisher_of_a_softmax_in_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).requires_grad_(False)
    x = 1.5 * random(40, 6)
    source = generator()
    found = collect_gradients(model, profile_of(model, x), [((x,), lambda logits: fisher_loss(logits, source))] * 200)
    p = model(x).softmax(1).double()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(found[""][0].double(), exact, rtol=0, atol=0.02 * float(exact.norm()))


def profile_of(layer: nn.Linear, x: Tensor) -> list[LayerSpec]:
    return [LayerSpec("", "linear", tuple(layer.weight.shape), bias=True)]


def test_labels_drawn_from_the_model_have_the_same_covariance() -> None:
    # The stand-in for drawn labels, against drawn labels: many draws of each for one example.
    logits = torch.tensor([[2.0, 0.5, -1.0, -3.0]]).repeat(20_000, 1)
    sums = []
    for loss in (
        lambda x: fisher_loss(x, generator(1)),
        lambda x: functional.cross_entropy(
            x, x.detach().softmax(1).multinomial(1, generator=generator(2))[:, 0], reduction="sum"
        ),
    ):
        leaf = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf), leaf)
        assert float(g.mean(0).norm()) < 0.02
        sums.append(g.mT @ g / len(g))
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=0.012)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["plain", "certain"])
def test_the_curvature_of_dense_predictions_is_that_of_the_mean_over_positions(scale: float) -> None:
    logits = scale * random(3, 4, 6)  # three examples with six positions each
    hessian = torch.zeros(4, 4, dtype=torch.float64)
    for position in range(6):
        one = logits[0, :, position].double()
        hessian += torch.autograd.functional.hessian(lambda v: functional.cross_entropy(v, torch.tensor(1)) / 6, one)
    found = torch.zeros(4, 4, dtype=torch.float64)
    source = generator()
    draws = 3000
    for _ in range(draws):
        leaf = logits[:1].clone().requires_grad_()
        (g,) = torch.autograd.grad(fisher_loss(leaf, source), leaf)
        found += (g[0] @ g[0].mT).double() / draws
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, hessian, rtol=0, atol=0.01)


def test_thinned_out_positions_estimate_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make("tiny_conv")
    inputs = (random(64, 3, 12, 10),)
    specs = profile(model, inputs).layers
    batches = [((part,), energy) for part in inputs[0].split(16)]
    every = collect_gradients(model, specs, iter(batches))
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    counted: dict[str, int] = {}
    finish = module.GradientSum.mean

    def count(self: module.GradientSum, examples: int) -> Tensor:
        counted[self.spec.name] = self._taken
        return finish(self, examples)

    monkeypatch.setattr(module.GradientSum, "mean", count)
    for given, examples in ((batches, None), (iter(batches), 64)):
        known = collect_gradients(model, specs, given, examples=examples)
        assert counted["conv1"] < 64 * 120 / 2  # a part of the positions
        assert counted["fc"] == 64
        for name, expected in every.items():
            torch.testing.assert_close(known[name], expected, rtol=0, atol=0.15 * float(expected.norm()))
        assert torch.equal(known["fc"], every["fc"])


def test_small_blocks_give_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("inplace")
    specs = profile(model, inputs).layers
    whole = collect_gradients(model, specs, [(inputs, energy)])
    monkeypatch.setattr(module, "CHUNK", 50)
    for name, covariance in collect_gradients(model, specs, [(inputs, energy)]).items():
        torch.testing.assert_close(covariance, whole[name])


def test_many_output_channels_keep_the_diagonal() -> None:
    model, inputs = network("inplace")
    specs = profile(model, inputs).layers
    whole = collect_gradients(model, specs, [(inputs, energy)])
    thin = collect_gradients(model, specs, [(inputs, energy)], max_side=2)
    assert [thin[name].ndim for name in ("first", "again", "head")] == [2, 3, 2]
    torch.testing.assert_close(thin["first"], whole["first"].diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("scale", [1e-25, 1e-30], ids=["tiny", "tiniest"])
def test_tiny_gradients_keep_their_directions(scale: float) -> None:
    model, x = nn.Linear(3, 4), random(5, 3)
    plain = collect_gradients(model, profile_of(model, x), [((x,), energy)])[""]
    # Their squares would be zero in float32 from 1e-23 on; the sum in float64 is not.
    adder = module.GradientSum(profile_of(model, x)[0], 8, None)
    y = model(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(y), y)
    adder.add(g * scale)
    torch.testing.assert_close((adder._total / scale**2 / 5).float(), plain, rtol=1e-3, atol=1e-6)


def test_nobodys_state_is_touched_and_runs_repeat() -> None:
    model, inputs = network("inplace")
    head = model.get_submodule("head")
    model.train()
    head.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    specs = profile(model, inputs).layers
    state = torch.random.get_rng_state()

    def chancy(outputs: Tensor) -> Tensor:
        return (outputs * torch.randn(outputs.shape)).sum()

    with torch.no_grad():
        first = collect_gradients(model, specs, [(inputs, chancy)] * 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    with torch.inference_mode():
        second = collect_gradients(model, specs, [((inputs[0].clone(),), chancy)] * 2)
    other = collect_gradients(model, specs, [(inputs, chancy)] * 2, seed=5)
    for name, covariance in first.items():
        assert torch.equal(covariance, second[name])
        assert not torch.equal(covariance, other[name])
    assert model.training
    assert [p.requires_grad for p in head.parameters()] == [False, False]
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)
    assert not any(m._forward_hooks for m in model.modules())


class Partly(nn.Module):
    """One layer that matters, one behind a detach, one in inference mode, one without any use, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.cut, self.inferred, self.aside, self.never = (nn.Linear(3, 3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        with torch.inference_mode():
            y = self.inferred(x)
        return self.used(x) + self.cut(x).detach() + y.clone()


def test_layers_without_an_effect_have_zeros_and_those_that_never_run_are_missing() -> None:
    specs = [LayerSpec(name, "linear", (3, 3)) for name in ("used", "cut", "inferred", "aside", "never")]
    found = collect_gradients(Partly(), specs, [((random(4, 3),), energy)])
    assert list(found) == ["used", "cut", "inferred", "aside"]
    assert float(found["used"].norm()) > 0
    assert all(torch.equal(found[name], torch.zeros(1, 3, 3)) for name in ("cut", "inferred", "aside"))


def test_a_recurrent_layer_in_between_runs_backward_without_its_dropout() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(3, 4)
            self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.into(x))[0]

    torch.manual_seed(0)
    model, inputs = Net().eval(), (random(3, 5, 3),)
    spec = LayerSpec("into", "linear", (4, 3))
    found = collect_gradients(model, [spec], [(inputs, energy)])["into"]
    torch.testing.assert_close(found, by_hand(model, spec, inputs, energy))


def poisoned(outputs: Tensor) -> Tensor:
    return (outputs.flatten(1).sum(1) * torch.tensor([1.0, float("nan"), 1.0, 1.0])).sum()


LINEAR = LayerSpec("0", "linear", (3, 3))


@pytest.mark.parametrize(
    ("spec", "batches", "kind", "words"),
    [
        (LINEAR, [], DataError, "no calibration batch to collect gradients"),
        (LayerSpec("9", "linear", (3, 3)), [energy], ModelError, "layer '9' is not in the model"),
        (LINEAR, [poisoned], ModelError, "layer '0': the gradients of the loss at its outputs are not finite"),
        (LINEAR, [lambda y: energy(y).detach()], ModelError, "the loss has no gradient at any layer"),
        (LINEAR, [lambda y: y], ModelError, r"must be one number, a sum over examples, not a tensor of shape \(4, 3\)"),
        (LINEAR, [lambda y: 1.0], ModelError, "must be one number, a sum over examples, not float"),
        (LINEAR, [lambda y: y.logits], ModelError, "gradients of the loss cannot be computed: .*AttributeError"),
    ],
    ids=["no batch", "no layer", "nan", "detached", "not a sum", "no tensor", "raises"],
)
def test_what_goes_wrong_is_said_in_one_line(
    spec: LayerSpec, batches: list[Any], kind: type[AutorankError], words: str
) -> None:
    with pytest.raises(kind, match=words) as error:
        collect_gradients(nn.Sequential(nn.Linear(3, 3)), [spec], [((random(4, 3),), loss) for loss in batches])
    assert "\n" not in str(error.value)


# The predicted rise of the loss


@pytest.mark.parametrize("outputs", ["full", "diagonal"])
@pytest.mark.parametrize("inputs", ["full", "diagonal", "factorised", "factorised diagonal"])
@pytest.mark.parametrize(("groups", "kernel"), [(1, (2, 3)), (2, (2,)), (1, ())], ids=["2d", "groups", "linear"])
def test_the_predicted_rise_against_loops(inputs: str, outputs: str, groups: int, kernel: tuple[int, ...]) -> None:
    s, t, size = 3, 4, math.prod(kernel)
    factorised = "factorised" in inputs
    n = s if factorised else s * size
    weight = random(groups * t, s, *kernel, seed=1).double()
    approx = weight + 0.1 * random(groups * t, s, *kernel, seed=2).double()
    a, g = random(groups, n, 7, seed=3).double(), random(groups, t, 5, seed=4).double()
    covariance, gradient = a @ a.mT / 7, g @ g.mT
    if "diagonal" in inputs:
        covariance = covariance.diagonal(dim1=1, dim2=2)
    if outputs == "diagonal":
        gradient = gradient.diagonal(dim1=1, dim2=2)
    stats = LayerStats(covariance.float(), 7, factorised, gradient.float())
    expected = 0.0
    delta = (weight - approx).reshape(groups, t, -1)
    for i in range(groups):
        sigma = covariance[i].diag() if "diagonal" in inputs else covariance[i]
        if factorised:
            sigma = torch.kron(sigma, torch.eye(size, dtype=torch.float64))
        curve = gradient[i].diag() if outputs == "diagonal" else gradient[i]
        expected += 0.5 * float(torch.trace(curve @ delta[i] @ sigma @ delta[i].T))
    assert predicted_loss_increase(weight, approx, stats) == pytest.approx(expected, rel=1e-5)
    assert predicted_loss_increase(weight, weight, stats) == 0
    assert predicted_loss_increase(weight, approx, LayerStats(stats.covariance, 7, factorised)) is None


def test_the_predicted_rise_of_a_real_loss() -> None:
    # Inputs of one direction and of any sign make input and gradient independent, so the Kronecker form is exact: the
    # rise of the cross-entropy with the model's own labels is the divergence of the two predictions.
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    x = random(1, 6).repeat(64, 1)
    specs = profile_of(layer, x)
    source = generator()
    losses = [((x,), lambda logits: fisher_loss(logits, source))] * 100
    stats = LayerStats(
        collect(layer, specs, [(x,)])[""].covariance, 64, False, collect_gradients(layer, specs, losses)[""]
    )
    weight = layer.weight.detach()
    other = weight + 0.05 * random(5, 6, seed=3)
    before, after = (functional.linear(x.double(), w.double()).log_softmax(1) for w in (weight, other))
    rise = float((before.exp() * (before - after)).sum(1).mean())
    assert predicted_loss_increase(weight, other, stats) == pytest.approx(rise, rel=0.1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False),
        lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False),
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False),
    ],
    ids=["twice", "groups", "transposed"],
)
def test_the_predicted_rise_of_a_convolution_adds_up_over_positions_and_calls(layer: Callable[[], nn.Module]) -> None:
    # A loss of independent signs at every position and channel: its curvature is the identity at each of them, so the
    # rise is half the mean squared change of the output, summed over everything.
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.conv(x), self.conv(x.flip(0)[..., :5])), 3)

    torch.manual_seed(0)
    model = Twice()
    x = random(8, int(model.conv.in_channels), 9, 7)  # type: ignore[arg-type]
    (spec,) = profile(model, (x,)).layers
    source = generator()

    def signs(y: Tensor) -> Tensor:
        return (y * (2.0 * torch.randint(0, 2, y.shape, generator=source) - 1)).sum()

    gradient = collect_gradients(model, [spec], [((x,), signs)] * 30)["conv"]
    found = collect(model, [spec], [(x,)])["conv"]
    stats = LayerStats(found.covariance, found.count, False, gradient)
    kept = model.get_submodule("conv").get_parameter("weight").detach()
    weight = canonical_weight(kept, spec).clone()
    other = weight + 0.1 * random(*weight.shape, seed=2)
    with torch.no_grad():
        before = model(x)
        kept.copy_(stored_weight(other, spec))
        change = float((model(x) - before).square().sum()) / len(x)
    assert predicted_loss_increase(weight, other, stats) == pytest.approx(change / 2, rel=0.02)
