"""Truncated factorisations against the singular value decomposition."""

import pytest
import torch

from autorank.solvers.lowrank import balance, fix_signs, leading_basis, orthonormal, truncated_product
from autorank.testing.cases import random


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 3, 7), (2, 7, 3), (5, 5), (1, 8), (8, 1)], ids=str)
def test_truncated_product_is_eckart_young(shape):
    matrix = random(shape, 0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, min(shape[-2:]) + 1):
        left, right = truncated_product(matrix, rank)
        best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        torch.testing.assert_close(left @ right, best)
        left, right = balance(left, right)
        torch.testing.assert_close(left @ right, best)
        torch.testing.assert_close(left.norm(dim=-2), s[..., :rank].sqrt())


@pytest.mark.parametrize(("shape", "rank"), [((6, 9), 3), ((9, 4), 3), ((9, 4), 6), ((2, 9, 4), 9)], ids=str)
def test_leading_basis_is_orthonormal_and_spans_the_leading_subspace(shape, rank):
    matrix = random(shape, 0)
    basis = leading_basis(matrix, rank)
    eye = torch.eye(rank, dtype=torch.float64).expand(*shape[:-2], rank, rank)
    torch.testing.assert_close(basis.mT @ basis, eye)
    held = (basis.mT @ matrix).square().sum()
    expected = torch.linalg.svdvals(matrix)[..., :rank].square().sum()
    torch.testing.assert_close(held, expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-100, 1e30, 1e100])
def test_extreme_scales(scale):
    matrix = random((4, 6), 0) * scale
    left, right = balance(*truncated_product(matrix, 4))
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert float((left @ right - matrix).norm()) <= 1e-7 * scale * 10


def test_balance_leaves_half_dead_components_trainable():
    left, right = balance(torch.eye(3, dtype=torch.float64)[:, :2], torch.zeros(2, 4, dtype=torch.float64))
    assert left.any()
    assert not right.any()


def test_signs_do_not_depend_on_the_solver():
    basis = random((2, 5, 3), 0)
    torch.testing.assert_close(fix_signs(basis), fix_signs(-basis))
    assert not fix_signs(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 5, 5), (3, 1)], ids=str)
def test_orthonormal_is_the_qr_of_positive_diagonal(shape):
    basis = random(shape, 0)
    q, r = orthonormal(basis)
    torch.testing.assert_close(q @ r, basis)
    # which is the transposed Cholesky factor of the Gram matrix
    torch.testing.assert_close(r, torch.linalg.cholesky(basis.mT @ basis).mT)
