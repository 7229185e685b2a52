"""Where a batch norm must stay: the folded model computes what the model does, however its layers are made and used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from autorank.plan import apply
from autorank.quant import calibrate, fold
from autorank.types import DENSE, Choice, Plan

QUANTIZED = Plan.of({"last": Choice(DENSE, (), (), 8, 8)})


class Net(nn.Module):
    """A convolution with a batch norm, then one that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.norm(self.first(x)))))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(self.first)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.abs()], 1))


class Read(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.conv2d(x, self.first.weight)[:, :4]


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, output: output + 1)


class Rows(nn.Module):
    """A batch norm over the second axis, behind a linear layer over the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x[:, :, 0].repeat(1, 2, 1)))))


@pytest.mark.parametrize("make", [Net, Normed, Tied, Read, Hooked, Rows], ids=lambda make: make.__name__)
def test_folding_changes_nothing(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    x = torch.randn(4, 3, 8, 8)
    quantized, _ = apply(model.eval(), QUANTIZED)
    calibrate(quantized, [(x,)])
    folded = fold(quantized)
    with torch.no_grad():
        expected = quantized(x)
        assert torch.allclose(folded(x), expected, atol=0.05 * float(expected.abs().max()))
    stays = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in folded.modules())
    assert stays == (make is not Net)
