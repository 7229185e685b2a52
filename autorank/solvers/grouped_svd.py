"""Truncated singular value decompositions of groups of columns, under a covariance that couples the groups.

ALDS (Liebenwein et al., NeurIPS 2021, arXiv 2107.11442) approximates every group of a weight's input channels by a
matrix of its own of rank j: Ŵ = [M_1 ... M_k]. Without a covariance the groups are independent truncated SVDs. With
one, Σ, the error tr((W − Ŵ) Σ (W − Ŵ)ᵀ) couples them, and whitening each group by its own block of Σ is not the answer.
For one group, however, the others fixed, there is one in closed form: with E what the others leave of W, the best M_p
of any rank is M* = (E Σ)_p Σ_pp⁻¹, and M_p costs ‖(M_p − M*) L‖² more, L Lᵀ = Σ_pp. So M_p L is the truncated SVD of
M* L: the error falls from group to group, from the independent answers on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autorank.solvers.lowrank import truncated_product


def independent(weight: Tensor, blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the truncated SVD of every group of columns.

    Parameters
    ----------
    weight : Tensor, shape (batch, T, n, m)
        The n is cut into `blocks` equal parts.
    blocks, rank : int

    Returns
    -------
    left : Tensor, shape (batch, blocks, T, rank)
    right : Tensor, shape (batch, blocks, rank, n/blocks, m)
    """
    batch, t, n, m = weight.shape
    parts = weight.reshape(batch, t, blocks, n // blocks, m).transpose(1, 2)
    left, right = truncated_product(parts.flatten(3), rank)
    return left, right.reshape(batch, blocks, rank, n // blocks, m)


def coupled(
    weight: Tensor, root: Tensor, blocks: int, rank: int, max_rounds: int = 20, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Minimise ‖(W − Ŵ) L‖ over weights whose groups of columns have a rank each.

    Parameters
    ----------
    weight : Tensor, shape (batch, T, n, m), float64
    root : Tensor, shape (batch, n, n), or (batch, n) for a diagonal one
        L; the m is white.
    blocks, rank : int
    max_rounds : int
        Rounds over the groups.
    tolerance : float
        Stop when a round lowers the squared error by less than this share of it, in every batch member.

    Returns
    -------
    left, right : Tensor
        As for `independent`. Never worse than truncating each group by its own block of the covariance.
    """
    batch, t, n, m = weight.shape
    size = n // blocks
    if root.ndim == 2:  # nothing couples the groups
        left, right = independent(weight * root[:, None, :, None], blocks, rank)
        return left, right / root.reshape(batch, blocks, 1, size, 1)
    scale = root.abs().amax(dim=(1, 2), keepdim=True)
    root = root / torch.where(scale > 0, scale, torch.ones_like(scale))
    cov = root @ root.mT
    grid = cov.reshape(batch, blocks, size, blocks, size)
    roots = [torch.linalg.cholesky(grid[:, p, :, p]) for p in range(blocks)]
    parts = weight.reshape(batch, t, blocks, size, m)
    target = torch.einsum("btnm,bnq->btqm", weight, cov).reshape(parts.shape)
    image = target  # of what is left of W, kept up to date
    left = weight.new_zeros(batch, blocks, t, rank)
    right = weight.new_zeros(batch, blocks, rank, size, m)
    for p, own in enumerate(roots):
        left[:, p], right[:, p] = _truncated(parts[:, :, p], own, rank)
        image = image - _image(left[:, p], right[:, p], grid[:, p])
    error = _error(parts, left, right, image)
    total = (parts * target).flatten(1).sum(1)
    for _ in range(max_rounds):
        if bool((error <= 1e-16 * total).all()):
            break
        for p, own in enumerate(roots):
            image = image + _image(left[:, p], right[:, p], grid[:, p])
            best = torch.cholesky_solve(_rows(image[:, :, p]).mT, own).mT
            best = best.reshape(batch, t, m, size).transpose(2, 3)
            left[:, p], right[:, p] = _truncated(best, own, rank)
            image = image - _image(left[:, p], right[:, p], grid[:, p])
        left, image = _all_left(left, right, grid, target, image)
        last, error = error, _error(parts, left, right, image)
        if bool((last - error <= tolerance * error).all()):
            break
    return left, right


def _all_left(left: Tensor, right: Tensor, grid: Tensor, target: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the left factors of all groups together; return them and what they leave of W, times Σ."""
    batch, blocks, t, rank = left.shape
    spread = torch.einsum("bprsm,bpsqn->bprqnm", right, grid)
    gram = torch.einsum("bprqnm,bqunm->bprqu", spread, right).reshape(batch, blocks * rank, -1)
    rhs = torch.einsum("btpsm,bprsm->bprt", target, right).reshape(batch, blocks * rank, t)
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    root, info = torch.linalg.cholesky_ex(gram * scale[:, :, None] * scale[:, None])
    found = torch.cholesky_solve(rhs * scale[:, :, None], root) * scale[:, :, None]
    found = found.reshape(batch, blocks, rank, t).transpose(2, 3)
    # Where groups say the same the factors stay as they are.
    usable = ((info == 0) & found.flatten(1).isfinite().all(1))[:, None, None, None]
    found = torch.where(usable, found, left)
    return found, torch.where(usable[..., None], target - torch.einsum("bptr,bprqnm->btqnm", found, spread), image)


def _error(parts: Tensor, left: Tensor, right: Tensor, image: Tensor) -> Tensor:
    """Return tr(E Σ Eᵀ), shape (batch,), given E Σ."""
    return ((parts - torch.einsum("bptr,bprsm->btpsm", left, right)) * image).flatten(1).sum(1)


def _rows(tensor: Tensor) -> Tensor:
    """Return (batch, T·m, n) from (batch, T, n, m)."""
    return tensor.transpose(2, 3).flatten(1, 2)


def _truncated(part: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best product of a rank for (batch, T, n, m) under its own root (batch, n, n)."""
    batch, t, n, m = part.shape
    left, right = truncated_product((_rows(part) @ root).reshape(batch, t, m * n), rank)
    rows = torch.linalg.solve_triangular(root, right.reshape(batch, rank * m, n), upper=False, left=False)
    return left, rows.reshape(batch, rank, m, n).transpose(2, 3)


def _image(left: Tensor, right: Tensor, cov: Tensor) -> Tensor:
    """Return M_p Σ_p, (batch, T, blocks, n, m), for M_p = left · right and the rows Σ_p (batch, n, blocks, n) of Σ."""
    return torch.einsum("btr,brsm,bsqn->btqnm", left, right, cov)
