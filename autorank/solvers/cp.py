"""Stable CP: alternating updates with momentum under a price on sensitivity, then error-preserving correction.

An alternating least squares fit lowers the error by rank-one terms that grow and cancel; such factors cannot be trained
or rounded. Here the fit pays for sensitivity from its first sweep (a ridge on each mode with the weights of the
sensitivity), momentum makes up for the slow convergence of alternating updates (restarted when the objective rises),
and at the end error-preserving corrections and sweeps of bounded sensitivity take turns (Phan et al., ECCV 2020,
arXiv 2008.05441) until neither gains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autorank.solvers import cp_modes, cp_start
from autorank.solvers.cp_sweeps import Problem, Update
from autorank.solvers.lowrank import leading_basis

Factors = list[Tensor]

RESTARTS = 2
"""Random starts beside the start by slices, for tensors so small that they cost nothing."""

SMALL = 500_000
"""Entries times rank of a tensor for which they cost nothing."""

LARGE = 200_000_000
"""Entries times rank of a tensor from which a second start costs more than it gains."""

TRIAL_SWEEPS = 10
"""Sweeps by which starts are compared."""

PRICE = 0.05
"""Price of a unit of sensitivity, relative to the squared error."""

WORST = 30.0
"""Sensitivity, in units of orthogonal components of the same rank and energy, from which the price falls no further."""

GROWTH = 1.5
"""Bound of the sweeps between corrections, relative to the corrected sensitivity."""

ROUNDS = 2
"""Corrections at most, each followed by bounded sweeps."""

WORK = 8e10
"""Entries times rank times sweeps that a fit takes, unless that makes too few sweeps."""

ROUGH = 1e-4
"""Squared relative error above which float32 is enough for the products of a large tensor."""

WINDOW = 10
"""Sweeps over which progress is judged."""

START, RISE, MOST = 0.5, 1.1, 5.0
"""Momentum: its first value, its growth from sweep to sweep, and its largest value."""

CORRECTIONS = 3
"""Rotations over the modes in one correction, at most."""

SLACK = 1e-3
"""Share of the error that a correction may add, from which it draws what the other modes cannot give."""

COMPRESS = 0.6
"""A mode is compressed to R when R is a smaller share of it than this."""


@dataclass(frozen=True)
class CPResult:
    """A CP approximation of a batch of tensors.

    Attributes
    ----------
    factors : list of Tensor, shape (groups, n, R)
        One per mode, in the order of the modes; the entries of a component are equally large in every mode.
    error : Tensor, shape (groups,)
        Relative error ‖X − X̂‖ / ‖X‖; 0 for X = 0.
    sensitivity : Tensor, shape (groups,)
        Expected squared error of X̂ under noise of variance one on every entry of the factors.
    sweeps : int
        How many sweeps over the modes it took, corrections included.
    """

    factors: Factors
    error: Tensor
    sensitivity: Tensor
    sweeps: int


def cp(
    tensor: Tensor,
    rank: int,
    seed: int = 0,
    max_sweeps: int | None = None,
    tolerance: float = 2e-4,
    price: float = PRICE,
) -> CPResult:
    """Approximate each tensor of a batch by a sum of rank-one terms of bounded sensitivity.

    Parameters
    ----------
    tensor : Tensor, shape (groups, n1, ..., nd), float64
        Finite; d from 2 to 6.
    rank : int
        R ≥ 1, the number of terms; for d = 2 at most min(n1, n2), where the answer is the singular value decomposition.
    seed : int
        Of the noise on the start and of the random starts; each tensor of the batch has random numbers of its own.
    max_sweeps : int, optional
        Bound of the fit, by default 100, down to 40 for large tensors; corrections and bounded sweeps add up to 50.
    tolerance : float
        The fit ends when a sweep lowers no error by more than this share of it, on the average over ten sweeps. The
        number of sweeps is all that the tensors of a batch share.
    price : float
        Price on sensitivity; 0 is alternating least squares until the correction.

    Returns
    -------
    CPResult
    """
    shape = list(tensor.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    largest = tensor.abs().flatten(1).amax(1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = tensor / unit.reshape(-1, *[1] * len(shape))
    norm = scaled.flatten(1).norm(dim=1)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    scaled = scaled / scale.reshape(-1, *[1] * len(shape))
    order = _order(shape)
    arranged = scaled.permute(0, *(1 + m for m in order))
    if max_sweeps is None:
        max_sweeps = max(40, min(100, int(WORK / (tensor[:1].numel() * rank))))
    fit = _Fit(generator, max_sweeps, tolerance, price)
    factors = fit.run(Problem(arranged), rank)
    problem = Problem(arranged)
    error = torch.where(norm > 0, problem.squared_error(factors).sqrt(), torch.zeros_like(norm))
    back = (unit.log() + scale.log()).div(len(shape)).exp() * (norm > 0)
    found: list[Tensor] = [torch.empty(0)] * len(shape)
    for position, mode in enumerate(order):
        found[mode] = factors[position] * back[:, None, None]
    return CPResult(found, error, cp_modes.sensitivity(found), fit.sweeps)


def _order(shape: list[int]) -> list[int]:
    """Return the modes with the two longest ones first and last."""
    by_size = sorted(range(len(shape)), key=lambda m: -shape[m])
    a, b = sorted(by_size[:2])
    return [a, *(m for m in range(len(shape)) if m not in (a, b)), b]


class _Fit:
    """One call of `cp`: its settings, and the sweeps that it has taken."""

    def __init__(self, generator: torch.Generator, max_sweeps: int, tolerance: float, price: float) -> None:
        self.generator, self.max_sweeps, self.tolerance, self.price = generator, max_sweeps, tolerance, price
        self.sweeps = 0

    def run(self, problem: Problem, rank: int) -> Factors:
        """Fit the long modes' leading subspaces first where the rank is small, then the tensor itself."""
        if len(problem.shape) == 2:
            return cp_modes.balanced(cp_start.slices(problem, rank, self.generator, 0.0))
        core, bases = compressed(problem, rank)
        factors = self._fitted(core, self._start(core, rank), self.max_sweeps)
        if core is not problem:
            factors = [f if u is None else u @ f for f, u in zip(factors, bases, strict=True)]
            factors = self._fitted(problem, factors, max(10, self.max_sweeps // 4))
        return self._stabilised(problem, factors)

    def _start(self, problem: Problem, rank: int) -> Factors:
        """Return the best of the starts for each tensor, after a few sweeps where there are several."""
        starts = [cp_start.slices(problem, rank, self.generator)]
        size = problem.tensor[0].numel() * rank
        exact = cp_start.eigen(problem, rank, self.generator) if size <= LARGE else None
        if exact is not None:
            starts.append(exact)
        if size <= SMALL:
            starts += [cp_start.random(problem, rank, self.generator) for _ in range(RESTARTS)]
        if len(starts) == 1:
            return starts[0]
        groups = len(problem.tensor)
        repeated = Problem(problem.tensor.repeat(len(starts), *[1] * len(problem.shape)), problem.sizes)
        factors = self._fitted(repeated, [torch.cat(parts) for parts in zip(*starts, strict=True)], TRIAL_SWEEPS)
        best = repeated.squared_error(factors).reshape(len(starts), groups).argmin(0)
        rows = best * groups + torch.arange(groups, device=best.device)
        return [factor[rows] for factor in factors]

    def _fitted(self, problem: Problem, factors: Factors, max_sweeps: int) -> Factors:
        """Sweep with momentum, lowering squared error + price · sensitivity, until the error stands still."""
        unit = problem.unit(factors[0].shape[-1])
        kept = cp_modes.balanced(factors, problem.sizes)
        point = kept
        error = torch.minimum(problem.energy, problem.squared_error(kept))
        sensitivity = torch.zeros_like(error)
        price = self.price * error / unit
        momentum = torch.full_like(error, START)
        history = [error]
        for sweep in range(max_sweeps):
            new, new_error = problem.sweep(point, _priced(price), single=bool((error > ROUGH).all()))
            self.sweeps += 1
            new = cp_modes.balanced(new, problem.sizes)
            new_sensitivity = problem.sensitivity(new)
            better = new_error + price * new_sensitivity <= error + price * sensitivity
            if sweep == 0:
                better = torch.ones_like(better)
            mask = better[:, None, None]
            new = [torch.where(mask, n, k) for n, k in zip(new, kept, strict=True)]
            step = momentum * better if sweep else torch.zeros_like(momentum)
            point = [n + step[:, None, None] * (n - k) for n, k in zip(new, kept, strict=True)]
            momentum = torch.where(better, (momentum * RISE).clamp_max(MOST), momentum / 2)
            kept = new
            error = torch.where(better, new_error, error)
            sensitivity = torch.where(better, new_sensitivity, sensitivity)
            falls = sensitivity < WORST * unit
            price = torch.where(falls, torch.minimum(price, self.price * error / unit), price)
            history.append(error)
            if sweep >= WINDOW and self._stands(history[-1 - WINDOW], error, WINDOW):
                break
        return kept

    def _stabilised(self, problem: Problem, factors: Factors) -> Factors:
        """Lower the sensitivity at the same error, then the error at about that sensitivity, in turns."""
        factors = cp_modes.balanced(factors, problem.sizes)
        error = problem.squared_error(factors)
        for _ in range(ROUNDS):
            before = error
            factors = self._corrected(problem, factors, error)
            factors, error = self._bounded(problem, factors, GROWTH * problem.sensitivity(factors))
            if self._stands(before, error, WINDOW):
                break
        return self._corrected(problem, factors, error)

    def _corrected(self, problem: Problem, factors: Factors, error: Tensor) -> Factors:
        """Rotate the modes, each with the factor of least sensitivity at this error, until it stands still."""
        limit = error * (1 + SLACK) ** 2

        def update(right: Tensor, gram: Tensor, weight: Tensor, _: Tensor) -> Tensor:
            return cp_modes.corrected(right, gram, weight, problem.energy, limit)

        sensitivity = problem.sensitivity(factors)
        for _ in range(CORRECTIONS):
            new, _ = problem.sweep(factors, update, single=bool((error > ROUGH).all()))
            self.sweeps += 1
            new = cp_modes.balanced(new, problem.sizes)
            new_sensitivity = problem.sensitivity(new)
            mask = new_sensitivity < sensitivity
            factors = [torch.where(mask[:, None, None], n, f) for n, f in zip(new, factors, strict=True)]
            gained = sensitivity - new_sensitivity > 0.01 * sensitivity
            sensitivity = torch.where(mask, new_sensitivity, sensitivity)
            if not bool(gained.any()):
                break
        return factors

    def _bounded(self, problem: Problem, factors: Factors, bound: Tensor) -> tuple[Factors, Tensor]:
        """Lower the error while the sensitivity stays within its bound, mode by mode."""

        def update(right: Tensor, gram: Tensor, weight: Tensor, fixed: Tensor) -> Tensor:
            plain = cp_modes.solve(right, gram, torch.zeros_like(weight))
            left = bound - fixed
            inside = (weight * plain.square().sum(1)).sum(1) <= left
            if bool(inside.all()):
                return plain
            return torch.where(inside[:, None, None], plain, cp_modes.bounded(right, gram, weight, left))

        error = problem.squared_error(factors)
        for _ in range(WINDOW):
            before = error
            factors, error = problem.sweep(factors, update, single=bool((error > ROUGH).all()))
            self.sweeps += 1
            factors = cp_modes.balanced(factors, problem.sizes)
            if self._stands(before, error, 1):
                break
        return factors, error

    def _stands(self, before: Tensor, after: Tensor, sweeps: int) -> bool:
        """Whether no error fell by more than the tolerance for each of so many sweeps."""
        old, new = before.sqrt(), after.sqrt()
        return bool((old - new <= self.tolerance * sweeps * old).all())


def _priced(price: Tensor) -> Update:
    """Return the update that minimises squared error + price · sensitivity."""

    def update(right: Tensor, gram: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        return cp_modes.solve(right, gram, price[:, None] * weight)

    return update


def compressed(problem: Problem, rank: int) -> tuple[Problem, list[Tensor | None]]:
    """Return the tensor in the leading R-dimensional subspaces of the long modes that are much longer than R."""
    bases: list[Tensor | None] = [None] * len(problem.shape)
    tensor = problem.tensor
    for position in (0, len(bases) - 1):
        n = problem.shape[position]
        if rank < COMPRESS * n:
            u = leading_basis(problem.tensor.movedim(1 + position, 1).flatten(2), rank)
            bases[position] = u
            moved = tensor.movedim(1 + position, -1)
            moved = (moved.flatten(1, -2) @ u).reshape(*moved.shape[:-1], rank)
            tensor = moved.movedim(-1, 1 + position)
    if all(u is None for u in bases):
        return problem, bases
    return Problem(tensor, problem.sizes), bases
