"""Sums of Kronecker products: one truncated SVD for two factors, nested SVDs and alternating least squares for more.

A kernel W (T, S, K1, ..., Kd) whose sizes are products, T = t1·t2·…, S = s1·s2·…, becomes a tensor with one mode per
factor, m_i = (t_i, s_i, k_i): in that arrangement a Kronecker product is an outer product (Van Loan and Pitsianis,
1993). GKPD (Hameed et al., AAAI 2022, arXiv:2109.14710) is then a matrix of rank R. SeKron (Hameed et al.,
arXiv:2210.06299) applies it again to each of the R right-hand factors::

    X[m1, ..., mN] = Σ_{r1} A1[r1; m1] Σ_{r2} A2[r1 r2; m2] … Σ_{rN-1} AN-1[r1 … rN-1; mN-1] AN[r1 … rN-1; mN]

Factor i has all the rank indices r1 … ri (the last one r1 … rN-1): a tree, whose root is A1. With one mode per factor
(t, s and k apart) it holds CP (R2 = … = 1), Tucker (Ai the same for all r1 … ri-1), tensor trains (Ai the same for all
r1 … ri-2) and tensor rings (r1 stands for the closing and the first bond together); `tests/solvers/test_kronecker.py`
writes each of them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autorank.solvers.lowrank import truncated_product

Shape = tuple[int, ...]
"""Shape (t, s, k1, ..., kd) of one factor."""

EXACT = 1e-12
"""Relative error that leaves nothing to refine in float64."""

BOUND = 10.0
"""Largest sum of the squared norms of all terms, relative to the tensor's: alternating fits stop before terms that grow
against each other without end (SeKron holds CP, whose degeneracy this is)."""

RIDGE = 1e-10
"""Share of the mean of a normal matrix's diagonal that is added to it; steps get shorter, the error still falls."""


def rearrange(weight: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Return a weight with one mode per factor.

    Parameters
    ----------
    weight : Tensor, shape (batch, T, S, K1, ..., Kd)
    shapes : sequence of tuple of int
        (t_i, s_i, k_i1, ..., k_id) of each factor, multiplying to the weight's; the first one counts slowest.

    Returns
    -------
    Tensor, shape (batch, m_1, ..., m_N)
        m_i = t_i·s_i·k_i1·…·k_id.
    """
    n, modes = len(shapes), len(shapes[0])
    digits = weight.reshape(weight.shape[0], *(shape[mode] for mode in range(modes) for shape in shapes))
    order = [1 + mode * n + factor for factor in range(n) for mode in range(modes)]
    return digits.permute(0, *order).reshape(weight.shape[0], *(math.prod(shape) for shape in shapes))


def assemble(tensor: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Return the weight (batch, T, S, K1, ..., Kd) whose rearrangement is `tensor`: the inverse of `rearrange`."""
    n, modes = len(shapes), len(shapes[0])
    digits = tensor.reshape(tensor.shape[0], *(size for shape in shapes for size in shape))
    order = [1 + factor * modes + mode for mode in range(modes) for factor in range(n)]
    sizes = [math.prod(shape[mode] for shape in shapes) for mode in range(modes)]
    return digits.permute(0, *order).reshape(tensor.shape[0], *sizes)


def rank_limits(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Return the largest useful rank of each level: with them every weight is written exactly."""
    sizes = [math.prod(shape) for shape in shapes]
    return tuple(min(sizes[i], math.prod(sizes[i + 1 :])) for i in range(len(sizes) - 1))


def nested_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the factors that nested truncated SVDs give; for two factors the best approximation there is.

    Parameters
    ----------
    tensor : Tensor, shape (batch, m_1, ..., m_N)
    ranks : sequence of int
        R_1, ..., R_{N-1}; see `rank_limits`.

    Returns
    -------
    list of Tensor, shapes (batch, R_1·…·R_i, m_i)
        The rank indices in one, r1 counting slowest; the last has R_1·…·R_{N-1} as the one before it.
    """
    batch, scale = tensor.shape[0], norm_scale(tensor)
    factors, rest = [], tensor / scale
    for level, rank in enumerate(ranks):
        size = rest.shape[1]
        # At the first level `rest` is the tensor itself, after that one matrix for each value of r1 … r_level.
        left, right = truncated_product(rest.reshape(rest.shape[0], size, -1), rank)
        factors.append(left.mT.reshape(batch, -1, size))
        rest = right.reshape(-1, *tensor.shape[level + 2 :])
    factors.append(rest.reshape(batch, -1, tensor.shape[-1]))
    factors[-1] = factors[-1] * scale.reshape(-1, 1, 1)
    return balance(factors)


def tail(factors: Sequence[Tensor], i: int) -> Tensor:
    """Return the sum over r_{i+1} … of A_i … A_N for each value of r_1 … r_{i-1} (i counts from 0).

    Shape (batch, R_1·…·R_{i-1}, m_i · … · m_N); for the last factor it is the factor itself.
    """
    found = factors[-1]
    for j in range(len(factors) - 2, i - 1, -1):
        batch, ranks, size = factors[j].shape
        above = factors[j - 1].shape[1] if j else 1
        upper, lower = factors[j].reshape(batch, above, -1, size), found.reshape(batch, above, ranks // above, -1)
        found = (upper.mT @ lower).flatten(2)
    return found


def multiply(factors: Sequence[Tensor]) -> Tensor:
    """Return the tensor (batch, m_1, ..., m_N) that the factors of `nested_svd` stand for."""
    return tail(factors, 0).reshape(factors[0].shape[0], *(factor.shape[2] for factor in factors))


def environment(factors: Sequence[Tensor], i: int) -> Tensor:
    """Return what a factor is multiplied with: (batch, its rank indices, m_1 · … · m_N without m_i)."""
    batch, ranks = factors[0].shape[0], factors[i].shape[1]
    head = factors[0].new_ones(batch, 1, 1)
    for factor in factors[:i]:
        head = head.repeat_interleave(factor.shape[1] // head.shape[1], dim=1)
        head = (head[..., :, None] * factor[..., None, :]).flatten(2)
    head = head.repeat_interleave(ranks // head.shape[1], dim=1)
    if i == len(factors) - 1:
        return head
    return (head[..., :, None] * tail(factors, i + 1)[..., None, :]).flatten(2)


def sekron(tensor: Tensor, ranks: Sequence[int], max_sweeps: int = 20, tolerance: float = 1e-3) -> list[Tensor]:
    """Return the factors of a SeKron approximation: nested SVDs, then alternating least squares.

    Each step replaces one factor by the minimiser of the error given all others (a linear problem whose normal matrix
    has the size of the factor's rank indices), so the error never rises. Two factors are done after the SVD.

    Parameters
    ----------
    tensor : Tensor, shape (batch, m_1, ..., m_N), float64
    ranks : sequence of int
        R_1, ..., R_{N-1}.
    max_sweeps : int
        Rounds over all factors; 0 for the nested SVDs alone.
    tolerance : float
        Stop when a sweep lowers the squared error by less than this share in every batch member.

    Returns
    -------
    list of Tensor, shapes (batch, R_1·…·R_i, m_i)
    """
    scale = norm_scale(tensor)
    tensor = tensor / scale
    factors = nested_svd(tensor, ranks)
    error = squared_error(tensor, factors)
    if len(ranks) > 1:
        unfoldings = [tensor.movedim(i + 1, 1).flatten(2) for i in range(tensor.ndim - 1)]
        for _ in range(max_sweeps):
            if bool((error <= EXACT**2).all()):
                break
            new = list(factors)
            for i, unfolding in enumerate(unfoldings):
                new[i] = _best(new, i, unfolding)
            found = squared_error(tensor, new)
            better = (found < error) & (term_energy(new) <= BOUND)
            found = torch.where(better, found, error)
            factors = [torch.where(better[:, None, None], b, a) for a, b in zip(factors, new, strict=True)]
            small = error - found <= tolerance * error
            error = found
            if bool(small.all()):
                break
            factors = balance(factors)
    factors[-1] = factors[-1] * scale.reshape(-1, 1, 1)
    return balance(factors)


def _best(factors: Sequence[Tensor], i: int, unfolding: Tensor) -> Tensor:
    """Return factor i that minimises the error given the others; `unfolding` is (batch, m_i, everything else)."""
    around = environment(factors, i)
    normal = around @ around.mT
    step = around @ unfolding.mT - normal @ factors[i]
    return factors[i] + torch.cholesky_solve(step, torch.linalg.cholesky(ridged(normal)))


def ridged(normal: Tensor) -> Tensor:
    """Return a normal matrix (..., n, n) with a ridge that makes it positive definite; the identity for zero."""
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
    return normal + ridge * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)


def squared_error(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return the squared distance (batch,) between a tensor and what factors stand for."""
    return (tensor.flatten(1) - tail(factors, 0).flatten(1)).square().sum(1)


def term_energy(factors: Sequence[Tensor]) -> Tensor:
    """Return the sum (batch,) of the squared norms of the R_1·…·R_{N-1} Kronecker products."""
    leaves = factors[-1].shape[1]
    squared = [factor.square().sum(2) for factor in factors]
    return torch.stack([s.repeat_interleave(leaves // s.shape[1], dim=1) for s in squared]).prod(0).sum(1)


def norm_scale(tensor: Tensor) -> Tensor:
    """Return the Frobenius norm of each batch member, without overflow, 1 for zero; dimensions of size 1 are kept."""
    flat = tensor.flatten(1)
    peak = flat.abs().amax(1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    norm = peak * (flat / peak[:, None]).norm(dim=1)
    return torch.where(norm > 0, norm, torch.ones_like(norm)).reshape(-1, *[1] * (tensor.ndim - 1))


def balance(factors: Sequence[Tensor], rounds: int = 8) -> list[Tensor]:
    """Give each slice of a factor, A_i[r1 … ri], the norm of all that hangs below it in the next; the product stays.

    Where one of them is zero both are left, so that training can still move them.
    """
    factors = list(factors)
    for _ in range(rounds if len(factors) > 2 else 1):
        for i in range(len(factors) - 1):
            upper, lower = factors[i], factors[i + 1]
            below = lower.reshape(lower.shape[0], upper.shape[1], -1)
            a, b = norm_scale(upper.flatten(0, 1)).squeeze(-1), norm_scale(below.flatten(0, 1)).squeeze(-1)
            usable = (upper.flatten(0, 1).abs().amax(1) > 0) & (below.flatten(0, 1).abs().amax(1) > 0)
            factor = torch.where(usable, (b / a).sqrt(), torch.ones_like(a)).reshape(upper.shape[0], -1, 1)
            factors[i] = upper * factor
            factors[i + 1] = (below / factor).reshape(lower.shape)
    return factors
