"""Where a CP fit starts: slices cut by singular values, the generalised eigenvalue problem, or random factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autorank.solvers.cp_sweeps import Problem
from autorank.solvers.lowrank import leading_basis

NOISE = 1e-2
"""Noise on the start by slices, relative to its columns: its symmetries would never be left otherwise."""


def slices(problem: Problem, rank: int, generator: torch.Generator, noise: float = NOISE) -> list[Tensor]:
    """Return the leading singular triples of the slices along the principal axes of the middle modes.

    In those axes, slice q of the tensor is an (a, b) matrix; a singular triple of it is a rank-one component whose
    middle factors are the axes. All of them together are the tensor, and the `rank` largest are a CP approximation
    whose components are orthogonal, so that its sensitivity is low.

    Returns
    -------
    list of Tensor, shape (groups, n, R)
    """
    tensor = problem.tensor
    groups, a, b = len(tensor), problem.shape[0], problem.shape[-1]
    middle = problem.shape[1:-1]
    axes = [leading_basis(tensor.movedim(2 + j, 1).flatten(2), n) for j, n in enumerate(middle)]
    for j, basis in enumerate(axes):
        tensor = (tensor.movedim(2 + j, -1) @ basis.reshape(groups, *[1] * len(middle), *basis.shape[1:])).movedim(
            -1, 2 + j
        )
    cut = tensor.reshape(groups, a, -1, b).movedim(2, 1)
    short = cut if a <= b else cut.mT
    values, vectors = torch.linalg.eigh(short @ short.mT)
    each = values.shape[-1]
    chosen = values.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :rank]
    piece, column = chosen // each, chosen % each
    rows = torch.arange(groups, device=tensor.device)[:, None]
    left = vectors.mT[rows, piece, column]  # (groups, R, short side)
    pair = [left, (vectors.mT @ short)[rows, piece, column]]
    factors = [*pair] if a <= b else pair[::-1]
    grid = torch.unravel_index(piece, middle) if middle else ()
    between = [basis.mT[rows, index] for basis, index in zip(axes, grid, strict=True)]
    found = [factor.mT for factor in (factors[0], *between, factors[1])]
    missing = rank - chosen.shape[1]
    return _stirred(problem, found, missing, generator, noise)


def _stirred(
    problem: Problem, factors: Sequence[Tensor], missing: int, generator: torch.Generator, share: float
) -> list[Tensor]:
    """Add noise to every column, and small random columns for missing and for empty components."""
    result = []
    for factor in factors:
        n = factor.shape[1]
        factor = torch.nn.functional.pad(factor, (0, missing))
        noise = _normal(problem, (len(factor), n, factor.shape[2]), generator) / math.sqrt(n)
        norm = factor.norm(dim=1, keepdim=True)
        floor = norm.amax(-1, keepdim=True) * share
        result.append(factor + noise * (share * norm).clamp_min(floor))
    return result


def random(problem: Problem, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Return factors (groups, n, R) with standard normal entries."""
    return [_normal(problem, (len(problem.tensor), n, rank), generator) for n in problem.shape]


def eigen(problem: Problem, rank: int, generator: torch.Generator) -> list[Tensor] | None:
    """Return the exact components of a tensor of this rank, from the eigenvectors of two mixed slices.

    Leurgans, Ross and Abel (SIAM J. Matrix Anal. Appl. 14, 1993), on the tensor in its leading R-dimensional
    subspaces of the modes a and b. None where R is larger than a or b; zero, the worst of starts, for each tensor of
    which a slice is singular or the eigenvectors do not form a basis.
    """
    tensor = problem.tensor
    groups, a, b = len(tensor), problem.shape[0], problem.shape[-1]
    if rank > min(a, b) or math.prod(problem.shape[1:-1]) < 2:
        return None
    u = leading_basis(tensor.reshape(groups, a, -1), rank)
    v = leading_basis(tensor.reshape(groups, -1, b).mT, rank)
    cut = (u.mT @ tensor.reshape(groups, a, -1)).reshape(groups, rank, -1, b) @ v[:, None]  # (groups, R, middle, R)
    weights = _normal(problem, (2, cut.shape[2]), generator)
    one, two = torch.einsum("wm,gimj->wgij", weights, cut)
    quotient = _solved(two.mT, one.mT).mT  # one · two⁻¹
    vectors = torch.linalg.eig(quotient).eigenvectors.real
    rest = _solved(vectors, cut.flatten(2))
    # Row r of `rest` is the r-th component without its first mode, of rank one.
    rest = (rest.reshape(groups, -1, rank) @ v.mT).reshape(groups * rank, *problem.shape[1:])
    others = []
    for mode in range(1, rest.ndim):
        vector = leading_basis(rest.movedim(mode, 1).flatten(2), 1)
        others.append(vector.reshape(groups, rank, -1).mT)
    core = rest
    for other in others:
        core = torch.einsum("ri...,ri->r...", core, other.mT.reshape(groups * rank, -1))
    return [u @ vectors * core.reshape(groups, 1, rank), *others]


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix⁻¹ · right, zero for each batch member in which that is not finite."""
    found, _ = torch.linalg.solve_ex(matrix, right)
    finite = found.isfinite().flatten(1).all(1)
    return torch.where(finite[:, None, None], found, torch.zeros_like(found))


def _normal(problem: Problem, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.tensor.device)
