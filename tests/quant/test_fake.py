"""Fake quantization against whole numbers in NumPy, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autorank.quant.fake import QParams, affine, symmetric, weight_levels
from autorank.testing.cases import random
from autorank.types import ACTIVATION_BITS, WEIGHT_BITS
from tests.quant.samples import reference


def halves(p: QParams) -> torch.Tensor:
    """Values half way between levels, and some beyond the ends."""
    return (torch.arange(-2 * p.high, 2 * p.high) + 0.5) * p.scale.flatten()[0]


@pytest.mark.parametrize(
    "ends", [(-1, 2.984375), (-1.3, 2.9), (0, 5), (-3, 0), (1, 2), (-1e-8, 1e-8), (-1e20, 3e20)], ids=str
)
def test_activations_match_the_reference_bit_by_bit(ends: tuple[float, float]) -> None:
    p = affine(*ends)
    x = random((4000,), 1).float() * (ends[1] - ends[0])
    if ends[0] == -1:  # a step of 2⁻⁶, which divides without a rounding error
        x = torch.cat([x, halves(p)])
    levels, values = reference(x.numpy(), p.scale.numpy(), p.zero_point.numpy(), 0, 255)
    assert np.array_equal(p.fake(x).numpy(), values)
    assert np.array_equal(p.levels(x).numpy(), levels)
    assert p.levels(x).dtype == torch.uint8


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weights_match_the_reference_bit_by_bit(bits: int, axis: int) -> None:
    w = random((6, 6, 3, 3), bits).float() * torch.logspace(-3, 3, 6).reshape(-1, 1, 1, 1)
    p = symmetric(w.abs().amax([i for i in range(4) if i != axis]) * 0.7, bits, axis)
    spread = p.spread(p.scale, w).numpy()
    low, high = weight_levels(bits)
    levels, values = reference(w.numpy(), spread, np.zeros_like(spread, dtype=np.int32), low, high)
    assert np.array_equal(p.fake(w).numpy(), values)
    assert np.array_equal(p.levels(w).numpy(), levels)
    assert np.array_equal(p.values(p.levels(w)).numpy(), values)
    assert -levels.min() == levels.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize(
    "p", [affine(-1.3, 2.9), symmetric(torch.tensor([0.3, 2.0]), 4, 0)], ids=["affine", "symmetric"]
)
def test_what_is_on_the_grid_stays(p: QParams) -> None:
    x = p.fake(random((2, 500), 0).float())
    assert torch.equal(p.fake(x), x)
    assert torch.equal(p.values(p.levels(x)), x)


@pytest.mark.parametrize("ends", [(-1.3, 2.9), (0.2, 5.0), (-5.0, -0.2), (0.0, 0.0), (-1e-3, 1e3)], ids=str)
def test_zero_is_a_level(ends: tuple[float, float]) -> None:
    assert float(affine(*ends).fake(torch.zeros(1))) == 0


def test_a_range_without_extent_is_no_division_by_zero() -> None:
    assert float(affine(0, 0).scale) > 0
    assert torch.equal(symmetric(torch.zeros(3), 8, 0).fake(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_the_error_of_what_is_not_clipped_is_half_a_step_at_most() -> None:
    p = affine(-2, 3)
    x = torch.linspace(-2, 3, 10_001)
    assert float((p.fake(x) - x).abs().max()) <= 0.5001 * float(p.scale) + 0.5 * float(p.scale)
    assert float((p.fake(x[1000:-1000]) - x[1000:-1000]).abs().max()) <= 0.5001 * float(p.scale)


def test_gradients_pass_where_nothing_is_clipped_and_nowhere_else() -> None:
    p = affine(-1, 1)
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 3.0], requires_grad=True)
    p.fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_come_back_as_they_were(dtype: torch.dtype) -> None:
    p = affine(-1, 1)
    x = random((100,), 0).to(dtype)
    assert p.fake(x).dtype == dtype
    assert torch.equal(p.levels(x), p.levels(x.float() if dtype != torch.float64 else x))


def test_the_bits_that_plans_may_have() -> None:
    assert (WEIGHT_BITS, ACTIVATION_BITS) == ((8, 6, 4), (8,))
