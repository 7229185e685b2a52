"""The mode updates of CP against a general optimiser, brute force and autograd."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from autorank.solvers import cp_modes
from autorank.testing.cases import random


def setting(shape, rank, mode, seed=0):
    """Return a tensor, the other factors' Khatri-Rao product (entries, R), the unfolding, M, Γ and w."""
    factors = [random((1, n, rank), seed + i) for i, n in enumerate(shape)]
    tensor = random(shape, seed + 10)
    product = torch.ones(1, rank, dtype=torch.float64)
    for i, factor in enumerate(factors):
        if i != mode:
            product = (product[:, None] * factor[0][None]).reshape(-1, rank)
    unfolding = tensor.movedim(mode, 0).flatten(1)
    squares = [factor.square().sum(1) for factor in factors]
    weight = cp_modes.weights(squares, shape, mode)
    return factors, unfolding, product, (unfolding @ product)[None], (product.T @ product)[None], weight


def error(unfolding, factor, product):
    return float((unfolding - factor @ product.T).square().sum())


def of_error(unfolding, factor, product):
    """Return the gradient of the squared error in a factor."""
    return -2 * (unfolding - factor @ product.T) @ product


def of_sensitivity(factor, weight):
    """Return the gradient of the factor's part of the sensitivity."""
    return 2 * factor * weight[0]


def assert_stationary(objective, constraint):
    """Hold two gradients to Karush-Kuhn-Tucker: opposite, the multiplier not negative.

    Both functions are convex and the constraint is active, so that this, with feasibility, proves the optimum.
    """
    multiplier = -float((objective * constraint).sum() / constraint.square().sum())
    assert multiplier > 0
    torch.testing.assert_close(objective, -multiplier * constraint, rtol=0, atol=1e-6 * float(objective.norm()))


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (3, 4, 2, 3), (2, 3, 2, 3, 2), (2, 3, 2, 2, 2, 2)], ids=str)
def test_sensitivity_is_the_squared_norm_of_the_jacobian(shape):
    rank = 3
    factors = [random((n, rank), i) for i, n in enumerate(shape)]
    letters = "abcdef"[: len(shape)]
    rule = ",".join(f"{letter}r" for letter in letters) + "->" + letters
    jacobians = torch.autograd.functional.jacobian(lambda *f: torch.einsum(rule, *f), tuple(factors))
    expected = sum(float(j.square().sum()) for j in jacobians)
    assert float(cp_modes.sensitivity([f[None] for f in factors])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_weights_are_the_part_of_the_sensitivity_that_a_mode_decides(mode):
    shape, rank = (3, 4, 2, 5), 3
    factors = [random((1, n, rank), i) for i, n in enumerate(shape)]
    weight = cp_modes.weights([f.square().sum(1) for f in factors], shape, mode)
    changed = list(factors)
    changed[mode] = random((1, shape[mode], rank), 20)
    before, after = cp_modes.sensitivity(factors), cp_modes.sensitivity(changed)
    part = [(weight * f[mode].square().sum(1)).sum() for f in (factors, changed)]
    torch.testing.assert_close(after - before, (part[1] - part[0])[None])


def test_balancing_has_the_least_sensitivity_of_all_scalings():
    factors = [random((1, n, 3), i) * 10.0**i for i, n in enumerate((8, 3, 5))]
    balanced = cp_modes.balanced(factors)
    torch.testing.assert_close(
        torch.einsum("ar,br,cr->abcr", *(f[0] for f in balanced)),
        torch.einsum("ar,br,cr->abcr", *(f[0] for f in factors)),
    )

    def scaled(x):
        scales = np.exp(np.append(x.reshape(2, 3), -x.reshape(2, 3).sum(0, keepdims=True), axis=0))
        return float(cp_modes.sensitivity([f * torch.tensor(s) for f, s in zip(factors, scales, strict=True)]))

    best = minimize(scaled, np.zeros(6), method="BFGS").fun
    assert float(cp_modes.sensitivity(balanced)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("shape", "mode"), [((4, 3, 5), 0), ((4, 3, 5), 2), ((3, 3, 2, 3), 1)], ids=str)
@pytest.mark.parametrize("slack", [1.001, 1.2])
def test_corrected_factor_is_the_constrained_optimum(shape, mode, slack):
    rank = 3
    _, unfolding, product, right, gram, weight = setting(shape, rank, mode)
    least = torch.linalg.lstsq(product, unfolding.T).solution.T
    limit = error(unfolding, least, product) * slack
    energy = unfolding.square().sum()[None]
    found = cp_modes.corrected(right, gram, weight, energy, torch.tensor([limit], dtype=torch.float64))[0]
    spent = error(unfolding, found, product)
    assert spent == pytest.approx(limit, rel=1e-8)
    assert_stationary(of_sensitivity(found, weight), of_error(unfolding, found, product))


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_bounded_factor_is_the_constrained_optimum(share):
    rank, mode, shape = 3, 1, (4, 5, 3)
    _, unfolding, product, right, gram, weight = setting(shape, rank, mode)
    least = torch.linalg.lstsq(product, unfolding.T).solution.T
    limit = share * float((weight[0] * least.square().sum(0)).sum())
    found = cp_modes.bounded(right, gram, weight, torch.tensor([limit], dtype=torch.float64))[0]
    assert float((weight[0] * found.square().sum(0)).sum()) == pytest.approx(limit, rel=1e-8)
    assert_stationary(of_error(unfolding, found, product), of_sensitivity(found, weight))


def test_a_limit_that_no_factor_reaches_gives_least_squares():
    _, unfolding, product, right, gram, weight = setting((4, 3, 5), 3, 0)
    least = torch.linalg.lstsq(product, unfolding.T).solution.T
    limit = torch.tensor([error(unfolding, least, product) * 0.9], dtype=torch.float64)
    found = cp_modes.corrected(right, gram, weight, unfolding.square().sum()[None], limit)[0]
    torch.testing.assert_close(found, least)


def test_a_loose_bound_gives_least_squares():
    _, unfolding, product, right, gram, weight = setting((4, 3, 5), 3, 0)
    least = torch.linalg.lstsq(product, unfolding.T).solution.T
    torch.testing.assert_close(cp_modes.bounded(right, gram, weight, torch.tensor([1e9]))[0], least)


@pytest.mark.parametrize("spread", [1, 1e4, 1e8])
def test_secular_root_against_bisection(spread):
    numerators = random((2, 6), 0).square() * torch.logspace(0, 2, 6, dtype=torch.float64)
    poles = torch.logspace(-math.log10(spread), 0, 6, dtype=torch.float64).expand(2, 6)
    target = torch.tensor([0.5, 1e-3], dtype=torch.float64)
    for h, q, t, x in zip(numerators, poles, target, cp_modes.secular(numerators, poles, target), strict=True):
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((h / (q + middle).square()).sum()) > t else (low, middle)
        assert float(x) == pytest.approx(high, rel=1e-6)


def test_solve_is_the_ridge_solution_and_takes_singular_matrices():
    right, half = random((2, 4, 5), 0), random((2, 3, 5), 1)
    gram, ridge = half.mT @ half, torch.full((2, 5), 0.1, dtype=torch.float64)
    expected = right @ torch.linalg.inv(gram + torch.diag_embed(ridge))
    torch.testing.assert_close(cp_modes.solve(right, gram, ridge), expected)
    inside = right[:, :, :3] @ half  # rows in the range of the singular matrix
    found = cp_modes.solve(inside, gram, torch.zeros_like(ridge))
    torch.testing.assert_close(found @ gram, inside, rtol=1e-4, atol=1e-4)
    assert torch.equal(cp_modes.solve(right, torch.zeros_like(gram), torch.zeros_like(ridge)), torch.zeros_like(right))
