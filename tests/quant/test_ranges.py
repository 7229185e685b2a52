"""Ranges of activations and weights: outliers, one-sided and constant ones, many batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autorank.quant.ranges import Watch, activation_grid, least_squares_range, weight_grid
from autorank.quant.settings import QuantSettings, Ranges
from autorank.testing.cases import random

HOWS: tuple[Ranges, ...] = ("minmax", "percentile", "mse")


def watched(*batches: Tensor, spatial: int = 0) -> Watch:
    watch = Watch(len(batches), spatial)
    for x in batches:
        watch.add(x)
    return watch


def error(x: Tensor, how: Ranges, **more: float) -> float:
    grid = activation_grid(watched(x), QuantSettings(ranges=how, **more))  # type: ignore[arg-type]
    return float((grid.fake(x) - x).square().mean())


def test_minmax_holds_every_value() -> None:
    x = random((50, 20), 0).float()
    grid = activation_grid(watched(x, x * 3), QuantSettings(ranges="minmax"))
    assert float((grid.fake(x * 3) - x * 3).abs().max()) <= float(grid.scale)


@pytest.mark.parametrize(("how", "bits", "outlier"), [("percentile", 8, 300), ("mse", 4, 20)])
def test_an_outlier_does_not_spoil_the_range(how: Ranges, bits: int, outlier: float) -> None:
    x = random((500, 16), 0).float()
    x[0, 0] = outlier
    inliers = x[1:]

    def wrong(name: Ranges) -> float:
        grid = activation_grid(watched(x), QuantSettings(ranges=name, percentile=99.9), bits)
        return float((grid.fake(inliers) - inliers).square().mean())

    assert wrong(how) < wrong("minmax") / 4


def test_the_least_squares_range_is_no_worse_than_any_other() -> None:
    x = random((400, 16), 1).float() ** 3
    assert error(x, "mse") <= min(error(x, "minmax"), error(x, "percentile"), error(x, "percentile", percentile=99.0))


def test_what_an_error_counts_moves_the_range() -> None:
    x = random((400, 2), 1).float() * torch.tensor([1.0, 30.0])
    first = least_squares_range(x, float(x.min()), float(x.max()), form=torch.tensor([[[1.0, 0], [0, 0]]]))
    both = least_squares_range(x, float(x.min()), float(x.max()))
    assert first[1] < both[1] / 3


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_sided_range_ends_at_zero(how: Ranges, sign: int) -> None:
    x = sign * (random((200, 8), 2).float().abs() + 1)
    grid = activation_grid(watched(x), QuantSettings(ranges=how))
    assert int(grid.zero_point) == (0 if sign > 0 else 255)
    assert float((grid.fake(x) - x).abs().mean()) <= float(grid.scale)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("value", [0.0, 3.7, -2e-5])
def test_a_constant_is_exact(how: Ranges, value: float) -> None:
    x = torch.full((20, 4), value)
    grid = activation_grid(watched(x), QuantSettings(ranges=how))
    assert torch.allclose(grid.fake(x), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_rows_are_those_of_the_channels(spatial: int, batched: bool) -> None:
    channels = torch.arange(5.0)
    x = channels.reshape(-1, *[1] * spatial).expand(5, *[4] * spatial)
    watch = watched(x.expand(3, *x.shape) if batched else x, spatial=spatial)
    assert bool((watch.rows() == channels).all())


def test_values_that_are_not_finite_are_seen() -> None:
    assert not watched(torch.tensor([[1.0, float("nan")]])).finite
    assert not watched(torch.ones(1, 2), torch.tensor([[1.0, float("inf")]])).finite
    assert watched(torch.ones(1, 2)).finite


def test_a_watch_is_deterministic() -> None:
    x = random((3000, 64), 0).float()
    assert torch.equal(watched(x, x).rows(), watched(x, x).rows())


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_clipped_weights_err_no_more_than_whole_ones(bits: int, axis: int) -> None:
    w = random((8, 8, 3, 3), 0).float() ** 3
    others = [i for i in range(4) if i != axis]

    def errors(how: str) -> Tensor:
        return (weight_grid(w, bits, axis, how).fake(w) - w).square().sum(others)

    assert bool((errors("mse") <= errors("max") * (1 + 1e-6)).all())
    if bits == 4:
        assert float(errors("mse").sum()) < 0.97 * float(errors("max").sum())


@pytest.mark.parametrize("how", ["max", "mse"])
def test_channels_of_weights_that_are_zero_or_constant_stay(how: str) -> None:
    w = torch.stack([torch.zeros(6), torch.full((6,), 0.3), torch.full((6,), -1e-12)])
    grid = weight_grid(w, 4, how=how)
    assert bool((grid.scale > 0).all())
    assert torch.allclose(grid.fake(w), w, rtol=1e-5, atol=0)
