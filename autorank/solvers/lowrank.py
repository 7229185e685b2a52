"""Truncated factorisations of batches of matrices, by the Gram matrix of the shorter side.

The squared condition number costs half of the digits of float64 in the weakest directions, which leaves more than
float32 factors can hold, and the eigenproblem is as small as the shorter side of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fix_signs(basis: Tensor) -> Tensor:
    """Return `basis` (..., m, r) with each column's entry of largest magnitude made positive."""
    index = basis.abs().argmax(dim=-2, keepdim=True)
    sign = torch.sign(torch.gather(basis, -2, index))
    return basis * torch.where(sign == 0, torch.ones_like(sign), sign)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors (..., m, rank), largest first, from the m × m Gram matrix."""
    # A scale of one keeps the squares of tiny and huge entries inside the range of the type.
    scale = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, torch.ones_like(scale))
    _, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return fix_signs(vectors[..., -rank:].flip(-1))


def leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis of the leading left singular subspace.

    Parameters
    ----------
    matrix : Tensor, shape (..., m, n)
    rank : int
        At most m.

    Returns
    -------
    Tensor, shape (..., m, rank)
        Left singular vectors of the largest singular values, largest first, signs fixed.
    """
    m, n = matrix.shape[-2:]
    if n < m and rank <= n:
        right = _leading(matrix.mT, rank)
        basis, _ = torch.linalg.qr(matrix @ right)
        return fix_signs(basis)
    return _leading(matrix, rank)


def truncated_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of given rank as a product of two factors (Eckart and Young).

    Parameters
    ----------
    matrix : Tensor, shape (..., m, n)
    rank : int
        At most min(m, n).

    Returns
    -------
    left : Tensor, shape (..., m, rank)
    right : Tensor, shape (..., rank, n)
        One of them is orthonormal; `left @ right` is the approximation.
    """
    m, n = matrix.shape[-2:]
    if m <= n:
        left = _leading(matrix, rank)
        return left, left.mT @ matrix
    right = _leading(matrix.mT, rank)
    return matrix @ right, right.mT


def orthonormal(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with Q R = basis (..., m, n), m ≥ n, Q orthonormal and no negative entry on the diagonal of R."""
    q, r = torch.linalg.qr(basis)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(basis.dtype)
    return q * sign[..., None, :], r * sign[..., :, None]


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give column r of `left` (..., m, r) and row r of `right` (..., r, n) the same norm; their product stays.

    A component that is zero on one side is left as it is, so that training can still move it.
    """
    a = left.norm(dim=-2, keepdim=True)
    b = right.norm(dim=-1, keepdim=True).mT
    usable = (a > 0) & (b > 0)
    factor = torch.where(usable, (b / torch.where(usable, a, torch.ones_like(a))).sqrt(), torch.ones_like(a))
    return left * factor, right / factor.mT
