"""Distillation between blocks: which blocks, the closed form of the loss, where its gradient goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autorank.errors import ConfigError
from autorank.features import FeatureMatch, blocks, changed_layers
from autorank.plan import apply
from autorank.types import Choice, Plan


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.conv(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Network().eval()
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    model, _ = apply(dense, Plan.of({name: Choice("tucker2", (2, 2)) for name in names if name != "stages.0.1.conv"}))
    return model, dense


def test_blocks_are_entries_of_the_innermost_sequence_and_lone_layers_themselves(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, dense = pair
    assert changed_layers(model, dense) == ("stem", "stages.0.0.conv", "stages.1.0.conv")
    assert blocks(dense, changed_layers(model, dense)) == ("stem", "stages.0.0", "stages.1.0")


def test_the_loss_is_the_share_of_the_variance_that_is_missed(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    match = FeatureMatch(model, dense, ["stem", "stages.0"])
    taught = match.teach((x,))
    model(x)
    found = match.loss()
    match.close()
    torch.testing.assert_close(taught, dense(x))
    parts = []
    for mine, theirs in (
        (model.stem(x), dense.stem(x)),
        (model.stages[0](model.stem(x)), dense.stages[0](dense.stem(x))),
    ):
        parts.append(((mine - theirs) ** 2).sum() / ((theirs - theirs.mean(0)) ** 2).sum())
    torch.testing.assert_close(found, sum(parts) / 2)


def test_the_loss_of_the_dense_network_itself_is_zero_and_hooks_go_away(pair: tuple[nn.Module, nn.Module]) -> None:
    _, dense = pair
    model = copy.deepcopy(dense)
    match = FeatureMatch(model, dense, ["stages.0.0", "head"])
    x = torch.randn(4, 3, 5, 5)
    match.teach((x,))
    model(x)
    assert float(match.loss()) == 0
    match.close()
    assert not any(module._forward_hooks for each in (model, dense) for module in each.modules())


def test_gradients_reach_the_model_and_not_the_dense_one(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    x = torch.randn(4, 3, 5, 5)
    match = FeatureMatch(model, dense)
    match.teach((x,))
    model(x)
    match.loss().backward()
    assert all(p.grad is not None for p in model.get_submodule("stem").parameters())
    assert all(p.grad is None for p in dense.parameters())
    match.close()


def test_outputs_of_other_shapes_are_left_out(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    model.head = nn.Linear(8, 5)
    match = FeatureMatch(model, dense, ["head"])
    x = torch.randn(4, 3, 5, 5)
    match.teach((x,))
    model(x)
    assert float(match.loss()) == 0
    match.close()


def test_places_that_are_not_there_are_named(pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"'stages\.9'"):
        FeatureMatch(*pair, ["stages.9"])
