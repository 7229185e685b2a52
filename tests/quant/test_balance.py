"""Matrices between factors: exact in floating point, and ranges that are even afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autorank import formats
from autorank.quant import QuantizedLeaf, calibrate, quantized_layer
from autorank.quant.balance import equalise, junctions
from autorank.quant.build import without_bits
from autorank.quant.rounding import rows_of, stored_rows
from autorank.quant.settings import QuantSettings
from autorank.testing.cases import random
from autorank.types import Choice
from tests.quant.samples import decomposed_layers

LAYERS = [
    row
    for row in decomposed_layers()
    if row[1].spec.kind in ("linear", "conv_transpose2d") or (row[1].spec.groups == 2 and row[1].spec.kind == "conv2d")
]
NAIVE = QuantSettings("minmax", "max", False, "nearest")


def uneven(layer: nn.Module) -> None:
    """Give the channels between the factors very different sizes; the layer stays what it is."""
    for place in junctions(layer):
        channels = rows_of(place.first.module, place.first.weight.detach()).flatten(0, 1).shape[0]
        sizes = torch.logspace(-1.5, 1.5, channels)
        with torch.no_grad():
            rows = rows_of(place.first.module, place.first.weight)
            scaled = rows * sizes.reshape(*rows.shape[:2], 1)
            place.first.weight.copy_(stored_rows(place.first.module, scaled, place.first.weight))
            rows = rows_of(place.second.module, place.second.weight)
            parts = rows.reshape(rows.shape[0], rows.shape[1], channels // rows.shape[0], -1)
            scaled = parts / sizes.reshape(rows.shape[0], 1, -1, 1)
            place.second.weight.copy_(stored_rows(place.second.module, scaled.reshape(rows.shape), place.second.weight))


@pytest.mark.parametrize(("case", "dense", "choice"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_a_layer_stays_what_it_is(case: Any, dense: nn.Module, choice: Choice) -> None:
    layer = quantized_layer(formats.get(choice.format).from_layer(dense, choice.rank, choice.options), choice).eval()
    uneven(layer)
    x = case.input(4, dtype=torch.float32)
    expected = layer(x).detach()
    for place in junctions(layer):
        handle = place.first.register_forward_pre_hook(lambda _module, args, see=place.see: see(args[0]))
        layer(x)
        handle.remove()
        with torch.no_grad():
            equalise(place)
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def chain(name: str = "tucker2") -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Conv2d(16, 16, 3, padding=1)
    fmt = formats.get(name)
    rank = (8, 8) if name == "tucker2" else (16,)
    layer = quantized_layer(fmt.from_layer(dense, rank), Choice(name, rank, (), 8, 8)).eval()
    uneven(layer)
    return layer, random((16, 16, 8, 8), 0).float().relu()


@pytest.mark.parametrize("name", ["tucker2", "cp"])
def test_uneven_channels_cost_much_less_once_they_are_even(name: str) -> None:
    layer, x = chain(name)
    expected, other = layer(x), copy.deepcopy(layer)
    calibrate(other, [(x,)], NAIVE)
    calibrate(layer, [(x,)], QuantSettings("minmax", "max", True, "nearest"))
    wrong = [float((found(x) - expected).detach().norm()) for found in (layer, other)]
    assert wrong[0] < 0.4 * wrong[1]
    assert torch.allclose(without_bits(layer)(x), expected, atol=1e-5 * float(expected.detach().abs().max()))


def test_ranges_are_even_afterwards() -> None:
    layer, x = chain()

    def spread() -> float:
        seen: list[torch.Tensor] = []
        handle = layer.core.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # type: ignore[union-attr]
        without = layer(x)
        handle.remove()
        assert len(without)
        largest = seen[0].abs().amax((0, 2, 3))
        return float(largest.max() / largest.min())

    before = spread()
    calibrate(layer, [(x,)], QuantSettings(rounding="nearest"))
    assert spread() < before / 5


def test_a_junction_needs_neighbours() -> None:
    leaf = QuantizedLeaf(nn.Conv2d(3, 3, 1), 8)
    assert junctions(nn.Sequential(leaf, nn.ReLU(), QuantizedLeaf(nn.Conv2d(3, 3, 1), 8))) == []
    layer, _ = chain()
    assert [place.name for place in junctions(nn.Sequential(layer))] == ["0.core", "0.output"]


def test_a_channel_that_is_always_zero_does_no_harm() -> None:
    layer, x = chain()
    with torch.no_grad():
        layer.input.weight[2] = 0  # type: ignore[union-attr]
    expected = layer(x)
    calibrate(layer, [(x,)])
    assert bool(layer(x).isfinite().all())
    assert float((layer(x) - expected).norm() / expected.norm()) < 0.05
