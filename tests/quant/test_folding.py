"""Batch norms folded for deployment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autorank.plan import apply
from autorank.quant import QuantizedLeaf, calibrate, fold, leaves
from autorank.types import Choice, Plan
from tests.quant.samples import images, network

PLANS = {
    "float": Plan(),
    "decomposed": Plan.of({"3": Choice("tucker2", (8, 6))}),
    "uncalibrated": Plan.of({"0": Choice("dense", (), (), 8, 8), "3": Choice("cp", (20,), (), 8, 8)}),
    "calibrated": Plan.of({"0": Choice("dense", (), (), 8, 8), "3": Choice("tucker2", (8, 6), (), 4, 8)}),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_folded_model_computes_the_same(kind: str) -> None:
    model, _ = apply(network(), PLANS[kind])
    x = images()
    if kind == "calibrated":
        calibrate(model, [(x,)])
    folded = fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    expected = model(x)
    error = (folded(x) - expected).abs()
    # A value half way between two levels of the next layer may go the other way.
    assert float(error.max()) < (0.05 if kind == "calibrated" else 1e-4) * float(expected.abs().max())
    assert float(error.median()) < 1e-3 * float(expected.abs().max())


def test_levels_keep_their_size_and_scales_take_the_factor() -> None:
    model, _ = apply(network(), PLANS["calibrated"])
    calibrate(model, [(images(),)])
    for (name, before), after in zip(leaves(model).items(), leaves(fold(model)).values(), strict=True):
        assert torch.equal(before.integer_weight().abs(), after.integer_weight().abs()), name
    norm, first = model[1], fold(model)[0]  # type: ignore[index]
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    assert isinstance(first, QuantizedLeaf)
    assert torch.allclose(first.weight_scale, model[0].weight_scale * factor.abs())  # type: ignore[index, operator]
    assert bool((factor < 0).any())


@pytest.mark.parametrize("transposed", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_folded(transposed: type[nn.Module], groups: int) -> None:
    axes = int(transposed.__name__[-2])
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](6)
    model = nn.Sequential(transposed(4, 6, 2, groups=groups), norm)
    x = torch.randn(5, 4, *[4] * axes)
    model.train()(x * 3 + 1)
    model.eval()
    folded = fold(model)
    assert isinstance(folded[1], nn.Identity)  # type: ignore[index]
    assert torch.allclose(folded(x), model(x), atol=1e-5)


class Twice(nn.Module):
    """Calls one convolution twice, and adds what a second one makes before its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.used, self.plain = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.shared(self.norms[0](self.shared(x))))
        y = self.used(x)
        return self.norms[3](self.plain(self.norms[2](y) + y))  # type: ignore[no-any-return]


def test_only_what_one_layer_alone_makes_once_is_folded() -> None:
    model = Twice()
    x = torch.randn(4, 3, 5, 5)
    model.train()(x)
    model.eval()
    folded = fold(model)
    assert [isinstance(norm, nn.Identity) for norm in folded.norms] == [False, False, False, True]  # type: ignore[union-attr]
    assert torch.allclose(folded(x), model(x), atol=1e-5)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_traced_stays_and_that_is_said() -> None:
    model = Branching().eval()
    with pytest.warns(UserWarning, match="batch norms are not folded, as the model cannot be traced"):
        folded = fold(model)
    assert isinstance(folded.inner[1], nn.BatchNorm2d)  # type: ignore[index]
    assert torch.equal(folded(torch.ones(1, 3, 2, 2)), model(torch.ones(1, 3, 2, 2)))
