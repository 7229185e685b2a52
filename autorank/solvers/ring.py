"""Tensor rings (closed loops of cores) with a stabilised fit; with three modes, the tensor chain of shared cores.

A loop has no best approximation in general: plain alternating least squares lets cores grow and cancel (Phan et al.,
arXiv 2203.02617). Here the sensitivity is held down: a start from singular values, alternating least squares,
a correction that lowers the sensitivity at the error that is reached, and more alternating least squares with a price
on the sensitivity that falls until the error is no longer paid with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autorank.solvers import ring_algebra as algebra
from autorank.solvers.lowrank import leading_basis, truncated_product
from autorank.solvers.ring_algebra import Cores, reconstruct, sensitivity
from autorank.solvers.ring_blocks import Block
from autorank.solvers.train import train

__all__ = ["Problem", "correct", "descend", "fit", "reconstruct", "sensitivity", "start", "sweep"]

_SHARES = (3e-2, 1e-2)
"""What the sensitivity may cost, as a share of the squared error: at the start of a fit and at its end."""
_WANTED = 1e-5
"""The squared relative error below which no sensitivity is spent on getting lower."""
_FLOOR = 1e-13
"""Of the squared relative error: it is a difference of numbers near one."""


@dataclass(frozen=True)
class Problem:
    """A tensor of unit norm per batch member, and the mode sizes that the sensitivity counts.

    Attributes
    ----------
    tensor : Tensor, shape (batch, n_0, ..., n_{N-1})
    energy : Tensor, shape (batch,)
        Its squared norm: 1, or 0 for a tensor that is zero.
    sizes : tuple of int
        Mode sizes; those before compression where the tensor was compressed to orthonormal bases.
    """

    tensor: Tensor
    energy: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> tuple[Problem, Tensor]:
        """Return the problem of a tensor and the norms (batch,) that were taken out of it."""
        view = (-1, *[1] * (tensor.ndim - 1))
        scale = tensor.abs().flatten(1).amax(dim=1)
        unit = tensor / torch.where(scale > 0, scale, 1.0).view(view)
        norm = unit.flatten(1).norm(dim=1)
        unit = unit / torch.where(norm > 0, norm, 1.0).view(view)
        return Problem(unit, (norm > 0).to(tensor.dtype), tuple(tensor.shape[1:])), scale * norm


def start(tensor: Tensor, rank: Sequence[int], major: bool = True, seed: int = 0) -> Cores:
    """Return a loop from truncated singular value decompositions, mode after mode.

    Zhao et al. (arXiv 1606.05535): the singular vectors of the first mode are shared out over two bonds, the closing
    one and the next.

    Parameters
    ----------
    tensor : Tensor, shape (batch, n_0, ..., n_{N-1}), float64
    rank : sequence of int
        (r_0, ..., r_{N-1}); core k has shape (r_k, n_k, r_{k+1}).
    major : bool
        Whether the closing bond is the slow index of the singular vectors of the first mode.
    seed : int
        Draws the columns beyond the rank of an unfolding.
    """
    b, n = tensor.shape[:2]
    closing, bond = rank[0], rank[1]
    left, rest = _split(tensor.reshape(b, n, -1), closing * bond, seed)
    if major:
        first = left.reshape(b, n, closing, bond).permute(0, 2, 1, 3)
        rest = rest.reshape(b, closing, bond, -1)
    else:
        first = left.reshape(b, n, bond, closing).permute(0, 3, 1, 2)
        rest = rest.reshape(b, bond, closing, -1).transpose(1, 2)
    cores = [first.contiguous()]
    rest = rest.permute(0, 2, 3, 1)  # (batch, r_1, other modes, r_0)
    for k in range(1, len(rank) - 1):
        size = tensor.shape[1 + k]
        left, rest = _split(rest.reshape(b, cores[-1].shape[3] * size, -1), rank[k + 1], seed + k)
        cores.append(left.reshape(b, -1, size, rank[k + 1]))
    cores.append(rest.reshape(b, rank[-1], tensor.shape[-1], closing))
    return cores


def _split(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns and what belongs to them, filled up with small random columns and zeros."""
    b, m, n = matrix.shape
    inside = min(rank, m, n)
    left, right = truncated_product(matrix, inside)
    if inside < min(m, n) or m > n:
        left, triangle = torch.linalg.qr(left)
        right = triangle @ right
    if inside < rank:
        generator = torch.Generator().manual_seed(seed)
        more = torch.randn(m, rank - inside, generator=generator, dtype=matrix.dtype) * (0.1 / math.sqrt(m))
        left = torch.cat([left, more.to(matrix.device).expand(b, -1, -1)], dim=2)
        right = torch.cat([right, right.new_zeros(b, rank - inside, n)], dim=1)
    return left, right


def sweep(problem: Problem, cores: Cores, price: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
    """Update every core in place, one after the other, and return the squared error (batch,).

    Parameters
    ----------
    problem : Problem
    cores : list of Tensor
        Replaced one by one.
    price : Tensor, shape (batch,), optional
        Every core minimises squared error + price·sensitivity; plain alternating least squares without it.
    bound : Tensor, shape (batch,), optional
        With it every core instead minimises the sensitivity at a squared error up to this bound.
    """
    last = len(cores) - 1
    rights = algebra.right_grams(cores)
    left = projected = inner = None
    error = problem.energy
    for k in range(len(cores)):
        if projected is None:
            side = algebra.side_first(problem.tensor, cores)
        elif k == last:
            side = algebra.side_last(projected, cores)
        else:
            inner = algebra.project_last(projected, cores) if inner is None else inner
            side = algebra.side_middle(inner, cores, k)
        terms = algebra.penalty_terms(cores, k, problem.sizes)
        block = Block(cores, k, left, rights[k] if k < last else None, terms, side, problem.energy)
        if bound is not None:
            cores[k], error = block.corrected(bound)
        else:
            cores[k], error = block.penalised(torch.zeros_like(problem.energy) if price is None else price)
        if left is None:
            projected = algebra.project_first(problem.tensor, cores[0])
            left = algebra.first_gram(cores[0])
        elif k < last:
            left = algebra.extend_left(left, cores[k])
    return error


def squared_error(problem: Problem, cores: Sequence[Tensor]) -> Tensor:
    """Return ‖W − Ŵ‖² per batch member, from the difference itself."""
    return (problem.tensor - reconstruct(cores)).flatten(1).square().sum(dim=1)


def descend(problem: Problem, cores: Cores, sweeps: int, tolerance: float, shares: tuple[float, float]) -> Cores:
    """Alternate with a falling price on the sensitivity, each sweep started beyond the last one's answer.

    Extrapolation (after Mitchell, Ye and De Sterck, Numer. Linear Algebra Appl. 27, 2020) that does not lower the
    priced objective is taken back. It halves the number of sweeps or better.

    Parameters
    ----------
    problem : Problem
    cores : list of Tensor
    sweeps : int
        At most so many.
    tolerance : float
        Stop when three sweeps in a row lower every squared error by less than this share.
    shares : tuple of float
        The price is such that the sensitivity costs this share of the squared error, at first and in the end.
    """
    error = squared_error(problem, cores)
    before: Cores | None = None
    beta = torch.full_like(error, 0.5)
    idle = 0
    for step in range(sweeps):
        share = max(shares[0] * 0.7**step, shares[1])
        total = sensitivity(cores, problem.sizes)
        # A zero tensor has no price: its sensitivity falls towards zero, and a price relative to it would overflow.
        price = share * torch.maximum(error, _WANTED * problem.energy) / torch.where(total > 0, total, 1.0)
        if before is None:
            found, new = _swept(problem, cores, price)
        else:
            ahead = [c + beta[:, None, None, None] * (c - b) for c, b in zip(cores, before, strict=True)]
            found, new = _swept(problem, ahead, price)
            worse = ~(new + price * sensitivity(found, problem.sizes) <= error + price * total)
            if bool(worse.any()):
                plain, value = _swept(problem, cores, price)
                found = _where(worse, plain, found)
                new = torch.where(worse, value, new)
            beta = torch.where(worse, beta * 0.5, (beta * 1.2).clamp(max=2.0))
        before, cores = cores, found
        idle = idle + 1 if bool((error - new <= tolerance * error).all()) else 0
        error = new
        if idle == 3 or bool((error <= _FLOOR).all()):
            break
    return cores


def correct(problem: Problem, cores: Cores, slack: float = 1e-3, rounds: int = 6) -> Cores:
    """Lower the sensitivity at the error that the cores have, core after core, until it stops falling.

    The error-preserving correction of Phan et al. (arXiv 2203.02617): every core in turn becomes the one of least
    sensitivity among those with an error of at most (1 + slack) times the present one.
    """
    bound = squared_error(problem, cores) * (1 + slack) ** 2 + _FLOOR * problem.energy
    total = sensitivity(cores, problem.sizes)
    for _ in range(rounds):
        found = list(cores)
        sweep(problem, found, bound=bound)
        new = sensitivity(found, problem.sizes)
        better = new < total
        cores = _where(better, found, cores)
        done = bool((new >= 0.95 * total).all())
        total = torch.minimum(new, total)
        if done:
            break
    return cores


def fit(tensor: Tensor, rank: Sequence[int], sweeps: int = 40, tolerance: float = 3e-4, seed: int = 0) -> Cores:
    """Approximate a batch of tensors by loops of cores whose sensitivity is held down.

    Parameters
    ----------
    tensor : Tensor, shape (batch, n_0, ..., n_{N-1}), float64
        At least three modes.
    rank : sequence of int
        (r_0, ..., r_{N-1}), r_0 the closing bond.
    sweeps : int
        At most so many from the start; half as many again after each correction.
    tolerance : float
        Stop when a sweep lowers the squared error by less than this share.
    seed : int

    Returns
    -------
    list of Tensor
        Core k has shape (batch, r_k, n_k, r_{k+1}); their factors are those of least sensitivity.
    """
    problem, scale = Problem.of(tensor)
    small, first, last = _compressed(problem, rank)
    cores = descend(small, _best_start(small, rank, seed), sweeps, tolerance, _SHARES)
    opened = train_start(small, rank, seed)
    worse = squared_error(small, cores) > squared_error(small, opened)
    if bool(worse.any()):
        cores = _where(worse, descend(small, opened, sweeps, tolerance, (_SHARES[1], _SHARES[1])), cores)
    cores = descend(small, correct(small, cores, rounds=3), sweeps // 2, tolerance, (_SHARES[1], _SHARES[1]))
    if first is not None:
        cores[0] = torch.einsum("bna,bpai->bpni", first, cores[0])
    if last is not None:
        cores[-1] = torch.einsum("bna,biap->binp", last, cores[-1])
    if first is not None or last is not None:
        cores = descend(problem, cores, _POLISH, tolerance, (_SHARES[1], _SHARES[1]))
    return algebra.balanced(correct(problem, cores, rounds=2), scale)


_POLISH = 4
"""Sweeps over the whole tensor after those over a compressed one."""


def _compressed(problem: Problem, rank: Sequence[int]) -> tuple[Problem, Tensor | None, Tensor | None]:
    """Return the problem in bases of the first and last mode twice as large as their cores can span, where that halves.

    Bases no larger than what the cores span would fix what they span, and cost about one percent of the error.
    """
    tensor = problem.tensor
    first = last = None
    b, n = tensor.shape[:2]
    if 4 * rank[0] * rank[1] <= n:
        first = leading_basis(tensor.reshape(b, n, -1), 2 * rank[0] * rank[1])
        tensor = (first.mT @ tensor.reshape(b, n, -1)).reshape(b, -1, *tensor.shape[2:])
    n = tensor.shape[-1]
    if 4 * rank[-1] * rank[0] <= n:
        last = leading_basis(tensor.reshape(b, -1, n).mT, 2 * rank[-1] * rank[0])
        tensor = (tensor.reshape(b, -1, n) @ last).reshape(*tensor.shape[:-1], -1)
    energy = tensor.flatten(1).square().sum(dim=1)
    return Problem(tensor, energy, problem.sizes), first, last


def train_start(problem: Problem, rank: Sequence[int], seed: int) -> Cores:
    """Return a loop that is the tensor train of the same bonds, with small columns for the rest of the closing bond."""
    cores = train(problem.tensor, rank[1:])
    first, last = cores[0], cores[-1]
    b, _, n, i = first.shape
    more = rank[0] - 1
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randn(more, n, i, generator=generator, dtype=first.dtype).to(first.device).expand(b, -1, -1, -1)
    size = 0.1 * first.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / math.sqrt(max(extra[0].numel(), 1))
    cores[0] = torch.cat([first, extra * size], dim=1)
    cores[-1] = torch.cat([last, last.new_zeros(b, *last.shape[1:3], more)], dim=3)
    return algebra.balanced(cores, torch.ones_like(problem.energy))


def _best_start(problem: Problem, rank: Sequence[int], seed: int) -> Cores:
    """Return, per batch member, the better of the two ways to share out the first singular vectors, a little fitted."""
    best: Cores | None = None
    least = problem.energy
    for major in (True, False) if rank[0] > 1 else (True,):
        cores = descend(problem, start(problem.tensor, rank, major, seed), 4, 0.0, (_SHARES[0], _SHARES[0]))
        error = squared_error(problem, cores)
        best = cores if best is None else _where(error < least, cores, best)
        least = error if major else torch.minimum(error, least)
    assert best is not None
    return best


def _swept(problem: Problem, cores: Cores, price: Tensor) -> tuple[Cores, Tensor]:
    found = list(cores)
    error = sweep(problem, found, price)
    return found, error


def _where(take: Tensor, some: Cores, others: Cores) -> Cores:
    return [torch.where(take[:, None, None, None], a, b) for a, b in zip(some, others, strict=True)]
