"""Rounding that looks at the outputs: never worse than the nearest levels, and much better with few bits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from autorank.quant.leaf import with_weight
from autorank.quant.ranges import weight_grid
from autorank.quant.rounding import MAX_PATCH, Inputs, best_rounded, error, output_grid, rounded, rows_of, stored_rows
from autorank.testing.cases import random
from tests.quant.test_leaf import MODULES, module_and_input


def correlated(name: str) -> tuple[nn.Module, Tensor]:
    """A module, and inputs with a mean whose neighbours are alike."""
    module, x = module_and_input(name)
    x = x.repeat(8, *[1] * (x.ndim - 1))
    x = x + random(tuple(x.shape), 9).float() * 0.3 + x.roll(1, 1) + 1
    return module, x


def moment(module: nn.Module, *batches: Tensor) -> Tensor:
    inputs = Inputs(module, len(batches))
    for x in batches:
        inputs.add(x)
    found = inputs.moment()
    assert found is not None
    return found


def bare(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.bias = None  # type: ignore[assignment]
    return copied


@pytest.mark.parametrize("name", MODULES)
def test_the_moment_gives_the_size_of_the_outputs(name: str) -> None:
    module, x = correlated(name)
    rows = rows_of(module, module.weight.detach().double())  # type: ignore[operator]
    expected = bare(module)(x).double()
    channels = -1 if x.ndim == 2 else 1
    whole = expected.movedim(channels, 0).flatten(1)
    found = ((rows @ moment(module, x)) * rows).sum(-1).flatten()
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):  # whose patches reach beyond the cropped outputs
        assert torch.allclose(found, whole.square().mean(1), rtol=1e-4)
    assert torch.equal(stored_rows(module, rows_of(module, module.weight), module.weight), module.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", MODULES)
def test_never_worse_than_nearest(name: str, bits: int) -> None:
    module, x = correlated(name)
    axis = int("transposed" in name)
    grid = weight_grid(module.weight, bits, axis, "max")  # type: ignore[arg-type]
    form = moment(module, x)
    found = rounded(module, grid, form)
    assert torch.equal(grid.fake(found), found)
    wanted = rows_of(module, module.weight.detach().double())  # type: ignore[operator]
    errors = [error(rows_of(module, w.detach().double()), wanted, form) for w in (found, grid.fake(module.weight))]  # type: ignore[arg-type]
    assert bool((errors[0] <= errors[1] * (1 + 1e-9)).all())
    chosen, both = best_rounded(module, [grid, output_grid(module, bits, axis, form)], form)
    assert torch.allclose(chosen.fake(both), both, rtol=1e-6)
    best = error(rows_of(module, both.detach().double()), wanted, form)
    total = (best.sum(0), errors[0].sum(0)) if axis else (best, errors[0])
    assert bool((total[0] <= total[1] * (1 + 1e-6)).all())


def test_few_bits_gain_much_on_the_outputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    x = random((8, 16, 9, 9), 0).float().relu() + 0.5
    grid = weight_grid(module.weight, 4, how="max")
    found = rounded(module, grid, moment(module, x))
    wrong = [float((with_weight(module, x, w) - module(x)).norm()) for w in (found, grid.fake(module.weight))]
    assert wrong[0] < 0.6 * wrong[1]


def test_it_is_close_to_the_best_there_is() -> None:
    """All roundings up or down of four entries, one by one."""
    module = nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        module.weight.copy_(random((6, 4), 3))
    x = random((50, 4), 1).float() @ random((4, 4), 2).float()
    form = moment(module, x)
    grid = weight_grid(module.weight, 4, how="max")
    wanted = module.weight.detach().double()[None] / grid.scale.double()[:, None]
    every = torch.stack(
        [(wanted.floor() + torch.tensor(up)).clamp(-7, 7) for up in itertools.product((0.0, 1.0), repeat=4)]
    )
    best = torch.stack([error(levels, wanted, form) for levels in every]).amin(0)
    found = error(grid.levels(rounded(module, grid, form)).double()[None], wanted, form)
    nearest = error(grid.levels(module.weight).double()[None], wanted, form)
    assert float(found.sum()) <= float(best.sum()) + 0.5 * float((nearest - best).sum())


def test_inputs_that_are_all_zero_leave_the_nearest_levels() -> None:
    module, x = module_and_input("conv2d")
    grid = weight_grid(module.weight, 4, how="max")  # type: ignore[arg-type]
    assert torch.equal(rounded(module, grid, moment(module, x * 0)), grid.fake(module.weight).detach())  # type: ignore[arg-type]


def test_patches_that_are_too_long_have_no_moment() -> None:
    inputs = Inputs(nn.Linear(MAX_PATCH + 1, 2), 1)
    inputs.add(torch.ones(2, MAX_PATCH + 1))
    assert inputs.moment() is None
