"""Updates of one mode of a CP approximation: least squares with a ridge, error-preserving, and of bounded sensitivity.

Every update of mode n needs the same two things: the tensor multiplied by the other factors (MTTKRP), M (groups, n, R),
and the Hadamard product of the other Gram matrices, Γ (groups, R, R). With the factor F, the squared error is
‖X‖² − 2⟨M, F⟩ + ⟨Γ, FᵀF⟩, and the part of the sensitivity that F decides is Σ_r w_r ‖f_r‖².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

JITTER = 1e-13
"""Ridge of the plain solve, relative to a diagonal of ones: the Gram matrices of redundant components are singular."""

CLIP = 1e-10
"""Smallest eigenvalue in the constrained updates, relative to the largest."""


def weights(squares: Sequence[Tensor], sizes: Sequence[int], mode: int) -> Tensor:
    """Return w (groups, R) with sensitivity = Σ_r w_r ‖f_r‖² + (what does not depend on this mode's factor).

    w_r = Σ over the other modes m of n_m · Π_{j ≠ mode, m} ‖a_{j,r}‖² (Phan et al., ECCV 2020, for three modes).

    Parameters
    ----------
    squares : sequence of Tensor, shape (groups, R)
        Squared norms of the columns, per mode.
    sizes : sequence of int
        Mode sizes.
    mode : int
    """
    total = torch.zeros_like(squares[mode])
    others = [m for m in range(len(sizes)) if m != mode]
    for m in others:
        rest = [squares[j] for j in others if j != m]
        total = total + sizes[m] * (math.prod(rest[1:], start=rest[0]) if rest else torch.ones_like(total))
    return total


def sensitivity(factors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Tensor:
    """Return Σ_n n_n Σ_r Π_{m ≠ n} ‖a_{m,r}‖² per group: the squared error that unit noise on the factors causes.

    Parameters
    ----------
    factors : sequence of Tensor, shape (groups, n, R)
        One per mode.
    sizes : sequence of int, optional
        Mode sizes to use instead of those of the factors (factors in compressed coordinates).

    Returns
    -------
    Tensor, shape (groups,)
    """
    squares = [factor.square().sum(1) for factor in factors]
    sizes = sizes or [factor.shape[1] for factor in factors]
    total = torch.zeros_like(squares[0])
    for m, n in enumerate(sizes):
        rest = [s for j, s in enumerate(squares) if j != m]
        total = total + n * math.prod(rest[1:], start=rest[0])
    return total.sum(-1)


def balanced(factors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> list[Tensor]:
    """Rescale each component so that its entries are equally large in every mode: the scaling of least sensitivity.

    The squared norms of a component's columns become proportional to the mode sizes. A component that is zero in one
    mode becomes zero.

    Parameters
    ----------
    factors : sequence of Tensor, shape (groups, n, R)
        One per mode.
    sizes : sequence of int, optional
        Mode sizes to use instead of those of the factors.
    """
    sizes = sizes or [factor.shape[1] for factor in factors]
    norms = torch.stack([factor.norm(dim=1) for factor in factors])
    alive = (norms > 0).all(0)
    safe = torch.where(alive, norms, torch.ones_like(norms))
    common = safe.log().mean(0).exp() * alive
    middle = math.exp(sum(math.log(n) for n in sizes) / len(sizes))
    return [
        factor * (common / norm * math.sqrt(n / middle))[:, None]
        for factor, norm, n in zip(factors, safe, sizes, strict=True)
    ]


def solve(right: Tensor, gram: Tensor, ridge: Tensor) -> Tensor:
    """Return M (Γ + diag(ridge))⁻¹ by Cholesky, more jitter wherever the matrix is not positive definite.

    Parameters
    ----------
    right : Tensor, shape (groups, n, R)
        M.
    gram : Tensor, shape (groups, R, R)
        Γ.
    ridge : Tensor, shape (groups, R)
        Not negative.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1) + ridge
    alive = diagonal > 0
    scale = torch.where(alive, diagonal, torch.ones_like(diagonal)).rsqrt() * alive
    matrix = gram * scale[:, :, None] * scale[:, None, :]
    jitter = JITTER
    while True:
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1 + jitter)
        triangle, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info.any()) or jitter > diagonal.shape[-1]:  # beyond that it fails for being not finite
            break
        jitter *= 100
    return torch.cholesky_solve((right * scale[:, None]).mT, triangle).mT * scale[:, None]


def secular(numerators: Tensor, poles: Tensor, target: Tensor) -> Tensor:
    """Return the smallest x ≥ 0 with Σ_i h_i² / (q_i + x)² ≤ target, per group; infinity for a target of zero or less.

    The root of the trust-region problem (Moré and Sorensen, SIAM J. Sci. Stat. Comput. 4, 1983): the reciprocal of the
    norm is concave in x, so Newton's method on it climbs to the root from the left, without safeguards.

    Parameters
    ----------
    numerators : Tensor, shape (groups, R)
        h².
    poles : Tensor, shape (groups, R)
        q, positive.
    target : Tensor, shape (groups,)
    """
    x = torch.zeros_like(target)
    aim = target.clamp_min(0).sqrt()
    for _ in range(100):
        shifted = poles + x[:, None]
        terms = numerators / shifted.square()
        norm = terms.sum(1).sqrt()
        over = norm > aim * (1 + 1e-12)
        if not bool(over.any()):
            break
        slope = (terms / shifted).sum(1)
        step = norm.square() * (norm / aim - 1) / slope
        new = torch.where(over, x + step, x)
        if bool((new == x).all()):
            break
        x = new
    return x


def corrected(right: Tensor, gram: Tensor, weight: Tensor, energy: Tensor, limit: Tensor) -> Tensor:
    """Return the factor of least weighted norm Σ_r w_r ‖f_r‖² whose squared error is at most `limit`.

    The mode update of the error-preserving correction (Phan et al., ECCV 2020, arXiv 2008.05441) in the form of a ridge
    solution G(Γ̃ + εI)⁻¹: its squared error is that of least squares plus Σ b_i² (ε/(e_i + ε))².

    Parameters
    ----------
    right, gram : Tensor
        M and Γ.
    weight : Tensor, shape (groups, R)
        w.
    energy, limit : Tensor, shape (groups,)
        ‖X‖² and the largest squared error. Where no factor reaches `limit`, the answer is least squares.
    """
    values, vectors, turned, root = _diagonal(right, gram, weight)
    parts = turned.square().sum(1)
    excess = limit - energy + (parts / values).sum(1)  # above the error of least squares
    # In μ = 1/ε the terms are b² e⁻² / (1/e + μ)².
    mu = secular(parts / values**3, 1 / values, torch.where(excess > 0, excess, torch.ones_like(excess)))
    shrunk = mu[:, None] / (1 + mu[:, None] * values)
    shrunk = torch.where((excess > 0)[:, None], shrunk, 1 / values)
    return (turned * shrunk[:, None]) @ vectors.mT * root[:, None]


def bounded(right: Tensor, gram: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """Return the factor of least error with Σ_r w_r ‖f_r‖² at most `limit`: the ridge problem dual to `corrected`.

    Parameters
    ----------
    right, gram : Tensor
        M and Γ.
    weight : Tensor, shape (groups, R)
        w.
    limit : Tensor, shape (groups,)
        Positive.
    """
    values, vectors, turned, root = _diagonal(right, gram, weight)
    epsilon = secular(turned.square().sum(1), values, limit)
    return (turned / (values + epsilon[:, None])[:, None]) @ vectors.mT * root[:, None]


def _diagonal(right: Tensor, gram: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of Γ̃ = diag(w)^(−½) Γ diag(w)^(−½), M diag(w)^(−½) V, and w^(−½)."""
    top = weight.amax(-1, keepdim=True)
    safe = torch.where(top > 0, weight.clamp_min(top * 1e-14), torch.ones_like(weight))
    root = safe.rsqrt()
    values, vectors = torch.linalg.eigh(gram * root[:, :, None] * root[:, None, :])
    largest = values[:, -1:]
    values = torch.where(largest > 0, values.clamp_min(largest * CLIP), torch.ones_like(values))
    return values, vectors, (right * root[:, None]) @ vectors, root
