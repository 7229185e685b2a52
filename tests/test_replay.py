"""Replays: equal to running the whole changed network, without running what comes before the changed layer."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.errors import DataError
from autorank.lossrise import measured_increases
from autorank.modules import substitute
from autorank.plan import apply
from autorank.profiling import profile
from autorank.progress import Silent
from autorank.pytrees import tensors
from autorank.replay import Replay
from autorank.tasks.batch import Batch
from autorank.types import Choice, LayerSpec, Plan
from tests.models import SequenceMlp, SharedResidual, TinyConv, TwoInputs


class Bottleneck(nn.Module):
    """The block of a ResNet-50: in-place ReLU, one module for all three, a projection where the size changes."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """The shape of a ResNet-50 (3, 4, 6 and 3 blocks, 53 convolutions), of any width."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            wide = width * 2**stage
            parts = []
            for block in range(blocks):
                parts.append(Bottleneck(inputs, wide, 4 * wide, 2 if stage and not block else 1))
                inputs = 4 * wide
            self.add_module(f"layer{stage + 1}", nn.Sequential(*parts))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class Dense(nn.Module):
    """A dense block: a list of features that grows, concatenated before every layer, changed in place by its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(self.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Growing(nn.Module):
    """A module that returns a list and a dictionary, which its caller goes on filling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        y = self.conv(x)
        return [y, y.mean()], {"x": (x, None), "name": "nested"}


class Nested(nn.Module):
    """Modules that pass each other nested structures, and change them."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = Growing()
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        found, names = self.grow(x)
        found.append(self.second(found[0]))
        names["more"] = found[-1].sum()
        assert len(found) == 3, "what was recorded has grown"
        return {"out": self.last(found[2] + found[0]), "rest": (names["more"], names["x"][0])}


class Functional(nn.Module):
    """Functions between the modules, in place where it hurts; parameters of its own; a module called by its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 1.5))
        self.mix = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu_(self.a(x))
        z = self.b.forward(y)
        z.mul_(self.scale).add_(y)
        z = functional.gelu(z) + functional.conv2d(y, self.mix)
        z = z * self.c(z).sigmoid_()
        return functional.log_softmax(self.fc(z.amax((2, 3))), 1)


class Reordered(nn.Module):
    """One shared layer that runs first, in the middle and last, inside another module and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), self.shared, nn.Tanh())
        self.end = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.end(self.middle(self.middle(x)) + self.end(x)))


class Alias(nn.Module):
    """Goes on with a tensor that a module changed in place, not with what the module returned: it does not replay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.relu(y)
        return self.c(self.b(y) + y)


class Noisy(nn.Module):
    """Draws random numbers between its layers, inside a module and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.draw = Draw()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(functional.dropout(self.draw(self.a(x)), 0.3)) + torch.rand(()))


class Draw(nn.Module):
    """Multiplies by a random number, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(())


class Wayward(nn.Module):
    """Calls its layers in an order that depends on the size of the last one's outputs in the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        first, second = (self.a, self.b) if int(self.calls) % 2 else (self.b, self.a)
        return self.c(second(torch.tanh(first(x))))


def image(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(7))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "convolutions": (TinyConv, (image(),)),
    "resnet": (lambda: ResNet50(2), (image(size=32),)),
    "densenet": (Dense, (image(),)),
    "shared": (SharedResidual, (image(),)),
    "shared_in_any_order": (Reordered, (image(),)),
    "nested": (Nested, (image(),)),
    "functions": (Functional, (image(),)),
    "two_inputs": (TwoInputs, (image(1), torch.ones(3, 6))),
    "sequence": (SequenceMlp, (torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(7)),)),
    "one_layer": (lambda: nn.Linear(4, 3), (torch.ones(2, 4),)),
    "alias": (Alias, (image(),)),
    "noisy": (Noisy, (image(),)),
}
LAYERS = (nn.Conv2d, nn.Linear)


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, inputs


def changed(layer: nn.Module) -> nn.Module:
    """A copy of a layer with other weights."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return other


def whole(model: nn.Module, layer: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The outputs of the whole network with another layer, from the random numbers that a replay starts from."""
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(model, memo)
    copied = substitute(copied, {memo[id(layer)]: other})
    torch.manual_seed(11)
    with torch.no_grad():
        return copied(*inputs)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_replay_equals_the_whole_changed_network(name: str) -> None:
    model, inputs = built(name)
    replay = Replay(model, 11)
    dense = replay.record(inputs)
    kept = [x.clone() for x in tensors(dense)]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert layers
    for _ in range(2):  # the second time nothing is left of the first
        for layer, module in layers.items():
            other = changed(module)
            assert same(replay.run(layer, other), whole(model, module, other, inputs)), layer
            assert not same(replay.run(layer, other), dense) or name == "one_layer"
    assert same(dense, kept)


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, set()) for name in CASES if name not in ("alias", "noisy")]
    + [("alias", {"b", "c"}), ("noisy", {"b", "c"})],
    ids=[*(name for name in CASES if name not in ("alias", "noisy")), "alias", "noisy"],
)
def test_only_what_cannot_be_replayed_is_run_as_a_whole(name: str, expected: set[str]) -> None:
    model, inputs = built(name)
    replay = Replay(model, 11)
    replay.record(inputs)
    for layer, module in model.named_modules():
        if isinstance(module, LAYERS):
            replay.run(layer, changed(module))
    assert replay.whole == expected


def test_other_inputs_can_be_recorded_afterwards() -> None:
    model, inputs = built("functions")
    replay = Replay(model)
    for step in range(3):
        replay.record((inputs[0] + step,))
        other = changed(model.get_submodule("b"))
        expected = whole(model, model.get_submodule("b"), other, (inputs[0] + step,))
        assert same(replay.run("b", other), expected)


def test_a_network_that_goes_another_way_each_time_is_run_as_a_whole() -> None:
    torch.manual_seed(0)
    model = Wayward().eval()
    x = torch.randn(4, 6)
    replay = Replay(model)
    replay.record((x,))
    other = changed(model.c)
    found = replay.run("c", other)
    assert replay.whole == {"c"}
    ways = []
    for start in (0.0, 1.0):
        copied = copy.deepcopy(model)
        copied.calls.fill_(start)  # type: ignore[operator]
        ways.append(whole(copied, copied.c, other, (x,)))
    assert any(torch.allclose(found, way) for way in ways)


def test_the_model_is_left_alone() -> None:
    model, inputs = built("convolutions")
    model.train()
    before = copy.deepcopy(model.state_dict())
    names = [set(vars(module)) for module in model.modules()]
    replay = Replay(model)
    replay.record(inputs)
    replay.run("conv2", changed(model.get_submodule("conv2")))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == names
    assert all(module.training for module in model.modules())


class Counted(nn.Conv2d):
    """A convolution that counts its runs by name."""

    runs: ClassVar[Counter[str]] = Counter()
    label = ""

    def forward(self, x: Tensor) -> Tensor:
        self.runs[self.label] += 1
        return super().forward(x)


def counting(model: nn.Module) -> nn.Module:
    """Make every convolution of a model count."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = Counted
            module.label = name  # type: ignore[assignment]
    return model


def test_nothing_before_the_changed_layer_runs_and_everything_behind_it_once() -> None:
    model, inputs = built("resnet")
    counting(model)
    order = [name for name, module in model.named_modules() if isinstance(module, Counted)]
    assert len(order) == 53
    replay = Replay(model)
    replay.record(inputs)
    for layer in ("conv1", "layer1.0.conv1", "layer2.0.conv2", "layer3.4.conv3", "layer4.0.downsample.0", "fc"):
        original = model.get_submodule(layer)
        replay.run(layer, original)  # checks first whether it replays
        Counted.runs.clear()
        other = changed(original)
        replay.run(layer, other)
        behind = order[order.index(layer) :] if layer in order else []
        assert Counted.runs == Counter(dict.fromkeys(behind, 1)), layer


def test_shares_fall_from_the_first_layer_to_the_last() -> None:
    model, inputs = built("resnet")
    replay = Replay(model)
    replay.record(inputs)
    names = ["conv1", "layer1.1.conv2", "layer2.0.conv1", "layer3.3.conv1", "layer4.2.conv3", "fc"]
    shares = [replay.share(name) for name in names]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] <= 1
    assert replay.seconds > 0


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, what: str, done: int, total: int) -> None:
        self.steps.append((done, total))


def divergence(outputs: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    return functional.kl_div(outputs.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)


def task_loss(outputs: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def candidates(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[LayerSpec, Choice]]:
    specs = profile(model, (inputs[0][:1],)).layers
    return [(spec, Choice("channel_svd", (rank,))) for spec in specs for rank in (1, 2)]


@pytest.mark.parametrize("loss", [divergence, task_loss], ids=["divergence", "loss"])
@pytest.mark.parametrize("name", ["convolutions", "shared", "densenet", "functions"])
def test_measured_increases_are_those_of_the_decomposed_network(
    name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    model, (x,) = built(name)
    parts = [x, x[:2] + 1]
    with torch.no_grad():
        batches = [Batch((part,), model(part).argmax(1)) for part in parts]
    pairs = candidates(model, (x,))
    found = measured_increases(model, pairs, batches, loss, seed=4)
    assert list(found.values) == [(spec.name, choice) for spec, choice in pairs]

    def mean(network: nn.Module) -> float:
        with torch.no_grad():
            sums = [len(b) * float(loss(network(*b.inputs), model(*b.inputs), b.targets)) for b in batches]
        return sum(sums) / sum(map(len, batches))

    assert found.dense == pytest.approx(mean(model), abs=1e-7)
    for (layer, choice), rise in found.values.items():
        other, _ = apply(model, Plan.of({layer: choice}, 4))
        assert rise == pytest.approx(mean(other.eval()) - mean(model), rel=1e-5, abs=1e-6)


def test_it_says_beforehand_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autorank.lossrise.TELL_FROM_S", 0.0)
    model, (x,) = built("convolutions")
    pairs, told = candidates(model, (x,)), Told()
    batches = [Batch((x,), torch.zeros(3, dtype=torch.long))] * 2
    measured_increases(model, pairs, batches, divergence, reporter=told)
    assert len(told.lines) == 1
    assert f"{len(pairs)} candidates on 2 batches" in told.lines[0]
    assert [done for done, _ in told.steps] == list(range(2 * len(pairs) + 1))


def test_no_examples_are_refused() -> None:
    model, (x,) = built("convolutions")
    with pytest.raises(DataError, match="no example"):
        measured_increases(model, candidates(model, (x,)), [], divergence)
